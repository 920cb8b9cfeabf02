"""Who may ask and who may change, on real gRPC and HTTP connections."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.empty_pb2 import Empty

from flowcontrol_server.admin.guard import Guard
from flowcontrol_server.config.admin import TOKEN_VARIABLE, Admin, Secret
from flowcontrol_server.doors.tls import Tls
from tests.support.certificates import Authority, write_all_at_once, write_pair

TOKEN = "a-token-of-some-length"
TIMEOUT_S = 20.0


def service() -> ServiceDescriptor:
    """A service with a call that asks, one that asks again and again, and one that changes."""
    empty = Empty.DESCRIPTOR.full_name
    file = descriptor_pb2.FileDescriptorProto(name="test/guard.proto", package="test.guard")
    file.dependency.append("google/protobuf/empty.proto")
    added = file.service.add(name="Api")
    for name, streams in (("GetIt", False), ("WatchIt", True), ("Drain", False)):
        added.method.add(name=name, input_type=empty, output_type=empty, server_streaming=streams)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(Empty.DESCRIPTOR.file.serialized_pb)
    pool.Add(file)
    found: ServiceDescriptor = pool.FindServiceByName("test.guard.Api")
    return found


class Api:
    """Answers everything; counts what it was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def GetIt(self, request: Any, _context: Any) -> Any:  # noqa: N802 - a call's name
        """Answer."""
        self.calls.append("GetIt")
        return request

    async def WatchIt(self, request: Any, _context: Any) -> AsyncIterator[Any]:  # noqa: N802 - a call's name
        """Answer twice."""
        self.calls.append("WatchIt")
        yield request
        yield request

    async def Drain(self, request: Any, _context: Any) -> Any:  # noqa: N802 - a call's name
        """Answer."""
        self.calls.append("Drain")
        return request


async def outcome(
    channel: Any, name: str, authorization: str | None = None
) -> str | grpc.StatusCode:
    """How a call ends: its number of answers, or its status. The channel is one of grpc.aio."""
    metadata = (("authorization", authorization),) if authorization is not None else ()
    path = f"/test.guard.Api/{name}"
    try:
        if name == "WatchIt":
            call = channel.unary_stream(path)(b"", metadata=metadata, timeout=TIMEOUT_S)
            return str(len([answer async for answer in call]))
        await channel.unary_unary(path)(b"", metadata=metadata, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return "1"


@asynccontextmanager
async def serving(
    secret: Secret,
    credentials: grpc.ServerCredentials | None = None,
    clients: tuple[str, ...] = (),
    *,
    trusts_loopback: bool = True,
) -> AsyncIterator[tuple[Api, int]]:
    """The service, guarded, on a port of the loopback."""
    api = Api()
    server = grpc.aio.server()
    guard = Guard(secret, clients, trusts_loopback=trusts_loopback)
    server.add_generic_rpc_handlers((guard.handler(service(), api),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield api, port
    finally:
        await server.stop(None)


@pytest.fixture(name="secret")
def _secret(tmp_path: Path) -> Secret:
    """A token in a file."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return Secret(tmp_path / "token")


class TestRule:
    """The table at the top of the module."""

    @pytest.mark.parametrize(
        ("is_local", "proof", "may_ask", "may_change"),
        [
            (True, "", True, False),
            (True, "token", True, True),
            (True, "certificate", True, True),
            (True, "other certificate", True, False),
            (True, "wrong", False, False),
            (False, "", False, False),
            (False, "token", True, True),
            (False, "certificate", True, True),
            (False, "other certificate", False, False),
            (False, "wrong", False, False),
        ],
    )
    def test_table(
        self,
        secret: Secret,
        is_local: bool,  # noqa: FBT001 - a table
        proof: str,
        may_ask: bool,  # noqa: FBT001 - a table
        may_change: bool,  # noqa: FBT001 - a table
    ) -> None:
        """Every caller, asking and changing."""
        shown = {"token": f"Bearer {TOKEN}", "wrong": "Bearer another-token-of-some-length"}
        names = {"certificate": ("ops.example",), "other certificate": ("envoy.example",)}
        refusals = [
            Guard(secret, ["ops.example"]).refusal(
                changes=changes,
                is_local=is_local,
                names=names.get(proof, ()),
                authorization=shown.get(proof, ""),
            )
            for changes in (False, True)
        ]

        assert [refusal is None for refusal in refusals] == [may_ask, may_change]

    def test_without_a_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No token anywhere: none that is shown is right, not even an empty one."""
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        for shown in ("Bearer ", "Bearer", "Bearer None", f"Bearer {TOKEN}", "Basic Og=="):
            assert not Secret(None).matches(shown)
            refusal = Guard(Secret(None)).refusal(changes=True, is_local=True, authorization=shown)
            assert refusal is not None
            assert "none is set here by FLOWCONTROL_ADMIN_TOKEN or admin.tokenFile" in refusal


class TestSecret:
    """Where the token is."""

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a file it is the variable."""
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)

        assert Admin().secret().matches(f"Bearer {TOKEN}")
        assert Admin().problem() is None

    @pytest.mark.parametrize("text", ["", "  "])
    def test_empty_variable(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        """An empty variable is none: so Compose writes one that is not set."""
        monkeypatch.setenv(TOKEN_VARIABLE, text)

        assert Admin().secret().token() is None
        assert Admin().problem() is None

    @pytest.mark.parametrize("text", ["short", "x" * 1025, "two words of some length"])
    def test_bad_variable(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        """A token that is no good is a mistake at the start, which does not show it."""
        monkeypatch.setenv(TOKEN_VARIABLE, text)

        problem = Admin().problem()

        assert problem is not None
        assert problem.startswith(f"{TOKEN_VARIABLE} must hold 16 to 1024 visible ASCII")
        assert text not in problem

    def test_rotation(self, secret: Secret, tmp_path: Path) -> None:
        """A new token counts at once, the old one no more; a file that is gone lets nobody in."""
        write_all_at_once(tmp_path / "token", b"another-token-of-some-length")

        assert secret.matches("Bearer another-token-of-some-length")
        assert not secret.matches(f"Bearer {TOKEN}")
        (tmp_path / "token").unlink()
        assert not secret.matches("Bearer another-token-of-some-length")

    @pytest.mark.parametrize(
        "shown",
        [
            TOKEN,
            f"Token {TOKEN}",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            "Bearer \u00e4\u00f6\u00fc",
            "Basic not-base64!",
            "Basic not-ASCII-\xe9",
            "Basic " + base64.b64encode(TOKEN.encode()).decode(),
        ],
    )
    def test_wrong(self, secret: Secret, shown: str) -> None:
        """Anything else is refused, without an exception."""
        assert not secret.matches(shown)

    def test_basic(self, secret: Secret) -> None:
        """A browser shows it as the password of any user."""
        shown = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()

        assert secret.matches(f"Basic {shown}")


class TestGrpc:
    """The guard before a gRPC service."""

    async def test_loopback(self, secret: Secret) -> None:
        """This machine may ask; to change anything it shows the token."""
        async with (
            serving(secret) as (api, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            assert await outcome(channel, "GetIt") == "1"
            assert await outcome(channel, "WatchIt") == "2"
            assert await outcome(channel, "Drain") is grpc.StatusCode.UNAUTHENTICATED
            assert api.calls == ["GetIt", "WatchIt"]

            assert await outcome(channel, "Drain", f"Bearer {TOKEN}") == "1"
            assert api.calls == ["GetIt", "WatchIt", "Drain"]

    async def test_wrong_token(self, secret: Secret) -> None:
        """A wrong token is refused also where none would have been needed."""
        async with (
            serving(secret) as (api, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            for name in ("GetIt", "WatchIt", "Drain"):
                ended = await outcome(channel, name, "Bearer another-token-of-some-length")
                assert ended is grpc.StatusCode.UNAUTHENTICATED
            assert api.calls == []

    @pytest.mark.parametrize(
        ("clients", "expected"),
        [
            (("client.example",), "1"),
            (("other.example", "client.example"), "1"),
            ((), grpc.StatusCode.UNAUTHENTICATED),
            (("example", "*.example", "client.example."), grpc.StatusCode.UNAUTHENTICATED),
        ],
    )
    async def test_client_certificate(
        self, tmp_path: Path, clients: tuple[str, ...], expected: str | grpc.StatusCode
    ) -> None:
        """A certificate is proof if it has a name of the settings, not because of its authority."""
        authority = Authority()
        write_pair(tmp_path, authority)
        write_all_at_once(tmp_path / "ca.pem", authority.pem)
        names = {"certificate": "certificate.pem", "key": "key.pem", "clientCa": "ca.pem"}
        shown = Tls.model_validate(names, context={"directory": tmp_path}).certificates()
        assert shown is not None

        async with (
            serving(Secret(None), shown.server_credentials(), clients) as (_, port),
            grpc.aio.secure_channel(
                f"localhost:{port}", authority.channel_credentials(authority)
            ) as channel,
        ):
            assert await outcome(channel, "Drain") == expected

    async def test_loopback_is_not_trusted(self, secret: Secret) -> None:
        """Where a proxy stands in front, asking from this machine takes the token, too."""
        async with (
            serving(secret, trusts_loopback=False) as (_, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            assert await outcome(channel, "GetIt") is grpc.StatusCode.UNAUTHENTICATED
            assert await outcome(channel, "GetIt", f"Bearer {TOKEN}") == "1"

    async def test_passed_on(self, secret: Secret) -> None:
        """Whom a proxy on this machine passes on is somebody else."""
        async with (
            serving(secret) as (_, port),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            untyped: Any = channel
            call = untyped.unary_unary("/test.guard.Api/GetIt")
            passed_on = call(b"", metadata=(("x-forwarded-for", "10.0.0.9"),), timeout=TIMEOUT_S)

            assert await passed_on.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_tls_alone_is_no_proof(self, tmp_path: Path) -> None:
        """Over TLS without client certificates the token is still asked for."""
        authority = Authority()
        write_pair(tmp_path, authority)
        names = {"certificate": "certificate.pem", "key": "key.pem"}
        shown = Tls.model_validate(names, context={"directory": tmp_path}).certificates()
        assert shown is not None

        async with (
            serving(Secret(None), shown.server_credentials()) as (_, port),
            grpc.aio.secure_channel(
                f"localhost:{port}", authority.channel_credentials(authority)
            ) as channel,
        ):
            assert await outcome(channel, "Drain") is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize(
        ("peer", "may_ask"),
        [
            ("ipv4:127.0.0.1:5000", True),
            ("ipv4:127.0.0.6:5000", False),
            ("ipv6:%5B::1%5D:5000", True),
            ("ipv6:[::1]:5000", True),
            ("ipv6:%5B::ffff:127.0.0.1%5D:5000", True),
            ("unix:", True),
            ("unix:/run/flowcontrol.sock", True),
            ("ipv4:10.0.0.5:5000", False),
            ("ipv4:128.0.0.1:5000", False),
            ("ipv6:%5B2001:db8::1%5D:5000", False),
            ("ipv6:%5Bfe80::1%25eth0%5D:5000", False),
            ("ipv6:%5B::ffff:10.0.0.5%5D:5000", False),
            ("vsock:2:5000", False),
            ("", False),
            ("nonsense", False),
        ],
    )
    async def test_peers(self, secret: Secret, peer: str, may_ask: bool) -> None:  # noqa: FBT001 - a table
        """Only addresses of this machine count as such."""

        class Context:
            """A call from that peer."""

            refusal = ""

            def peer(self) -> str:
                """Where it comes from."""
                return peer

            def auth_context(self) -> dict[str, list[bytes]]:
                """Nothing shown."""
                return {}

            def invocation_metadata(self) -> tuple[()]:
                """Nothing said."""
                return ()

            async def abort(self, _code: grpc.StatusCode, details: str) -> None:
                """Take note."""
                self.refusal = details

        context = Context()
        handler = Guard(secret).handler(service(), Api())
        details = type("Details", (), {"method": "/test.guard.Api/GetIt"})()
        method: Any = handler.service(details)
        await method.unary_unary(Empty(), context)

        assert (context.refusal == "") == may_ask


class TestHttp:
    """The guard before pages."""

    @staticmethod
    @asynccontextmanager
    async def client(secret: Secret) -> AsyncIterator[TestClient[web.Request, web.Application]]:
        """A client of a page that may be read and changed, and of metrics."""

        async def page(_request: web.Request) -> web.Response:
            """Say yes."""
            return web.Response(text="yes")

        application = web.Application(middlewares=(Guard(secret).middleware,))
        application.router.add_route("*", "/", page)
        application.router.add_get("/metrics", page)
        async with TestClient(TestServer(application)) as client:
            yield client

    async def test_loopback(self, secret: Secret) -> None:
        """This machine reads; to change anything it shows the token."""
        async with self.client(secret) as client:
            bearer = {"authorization": f"Bearer {TOKEN}"}
            assert (await client.get("/")).status == 200
            assert (await client.post("/")).status == 401
            assert (await client.post("/", headers=bearer)).status == 200
            wrong = {"authorization": "Bearer another-token-of-some-length"}
            assert (await client.get("/", headers=wrong)).status == 401

    async def test_a_name_that_points_here(self, secret: Secret) -> None:
        """A page whose name was made to point here is another machine's; metrics are anybody's."""
        async with self.client(secret) as client:
            host = {"host": f"evil.example:{client.port}"}
            refused = await client.get("/", headers=host)
            assert refused.status == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert (await client.get("/metrics", headers=host)).status == 200
            bearer = {"authorization": f"Bearer {TOKEN}"}
            assert (await client.get("/", headers=host | bearer)).status == 200

    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "a.localhost"]
    )
    async def test_names_of_this_machine(self, secret: Secret, host: str) -> None:
        """Every name this machine calls itself will do, with the port or without."""
        async with self.client(secret) as client:
            for shown in (host, f"{host}:{client.port}"):
                assert (await client.get("/", headers={"host": shown})).status == 200

    @pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via"])
    async def test_passed_on(self, secret: Secret, name: str) -> None:
        """Whom a proxy on this machine passes on is somebody else."""
        async with self.client(secret) as client:
            assert (await client.get("/", headers={name: "10.0.0.9"})).status == 401

    async def test_another_site(self, secret: Secret) -> None:
        """A browser that knows the password lends it to no other site."""
        shown = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        async with self.client(secret) as client:
            basic = {"authorization": f"Basic {shown}"}
            ours = {"origin": f"http://127.0.0.1:{client.port}"}
            for theirs in ("https://evil.example", "null", "http://[bad"):
                assert (await client.post("/", headers=basic | {"origin": theirs})).status == 403
            assert (await client.post("/", headers=basic | ours)).status == 200
