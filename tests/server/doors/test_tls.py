"""Certificates on real connections: shown, asked for, rotated while streams go on."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import capture_logs

from flowcontrol_server.admin.client import AdminSource
from flowcontrol_server.doors.tls import Certificates, Tls, client_credentials
from tests.fuzz.door import HELLO as GREETING
from tests.support.certificates import Authority, visit, write_all_at_once, write_pair

TIMEOUT_S = 20.0
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
CBC = "ECDHE-ECDSA-AES128-SHA256:ECDHE-RSA-AES128-SHA256:ECDHE-RSA-AES256-SHA:AES128-SHA256"
ECHO = "/test.Echo/Echo"


@pytest.fixture(name="authority")
def _authority() -> Authority:
    """The authority that signs the server's first certificate."""
    return Authority()


@pytest.fixture(name="directory")
def _directory(tmp_path: Path, authority: Authority) -> Path:
    """A folder with the first certificate and its key, and the authority of clients."""
    write_pair(tmp_path, authority)
    write_all_at_once(tmp_path / "ca.pem", authority.pem)
    return tmp_path


def certificates(directory: Path, *, is_mutual: bool = False) -> Certificates:
    """The certificates of a folder, as the configuration names them."""
    names = {"certificate": "certificate.pem", "key": "key.pem"}
    if is_mutual:
        names["clientCa"] = "ca.pem"
    loaded = Tls.model_validate(names, context={"directory": directory}).certificates()
    assert loaded is not None
    return loaded


def pinned(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """The context, for one version of TLS."""
    context.minimum_version = context.maximum_version = version
    return context


@asynccontextmanager
async def echoing(shown: Certificates) -> AsyncIterator[int]:
    """A grpc server that says everything back; yields its port."""

    async def echo(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        """Say everything back."""
        async for request in requests:
            yield request

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),)
    )
    port = server.add_secure_port("127.0.0.1:0", shown.server_credentials())
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def channel(port: int, credentials: grpc.ChannelCredentials) -> Any:
    """A channel of grpc.aio, whose stubs want codecs, with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, options)


async def say(call: Any, text: bytes) -> bytes:
    """Send a message on a stream and return what comes back."""
    await call.write(text)
    answer: bytes = await call.read()
    return answer


async def hello(port: int, credentials: grpc.ChannelCredentials) -> bytes:
    """Connect anew, say hello, return the answer."""
    async with channel(port, credentials) as new:
        return await say(new.stream_stream(ECHO)(timeout=TIMEOUT_S), b"hello")


class TestGrpc:
    """The grpcio door."""

    async def test_rotation(self, directory: Path, authority: Authority) -> None:
        """A new certificate is shown to who comes next; a stream under way goes on."""
        other = Authority()
        async with (
            echoing(certificates(directory)) as port,
            channel(port, authority.channel_credentials()) as first,
        ):
            call = first.stream_stream(ECHO)(timeout=TIMEOUT_S)
            assert await say(call, b"before") == b"before"

            write_pair(directory, other)

            assert await hello(port, other.channel_credentials()) == b"hello"
            assert await say(call, b"after") == b"after"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await hello(port, authority.channel_credentials())
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    @pytest.mark.parametrize("is_mutual", [False, True])
    async def test_our_own_client(self, directory: Path, *, is_mutual: bool) -> None:
        """`flowcontrol top` comes in with the same files; without them nobody answers."""
        names = ("ca.pem", "certificate.pem", "key.pem")
        ca, certificate, key = (directory / name for name in names)
        shown = client_credentials(ca, *((certificate, key) if is_mutual else (None, None)))
        codes = []
        async with echoing(certificates(directory, is_mutual=is_mutual)) as port:
            for credentials in (shown, None):
                source = AdminSource(f"localhost:{port}", None, credentials)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await source.decisions()
                codes.append(refused.value.code())
                await source.close()

        assert codes == [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE]

    async def test_mutual(self, directory: Path, authority: Authority) -> None:
        """With clientCa a client shows a certificate of that authority, or is turned away."""
        async with echoing(certificates(directory, is_mutual=True)) as port:
            assert await hello(port, authority.channel_credentials(authority)) == b"hello"
            for shows in (None, Authority()):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await hello(port, authority.channel_credentials(shows))
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    async def test_rotation_of_the_clients_authority(
        self, directory: Path, authority: Authority
    ) -> None:
        """A new authority of clients counts at the next handshake, the old one no more."""
        other = Authority()
        async with echoing(certificates(directory, is_mutual=True)) as port:
            write_all_at_once(directory / "ca.pem", other.pem)

            assert await hello(port, authority.channel_credentials(other)) == b"hello"
            with pytest.raises(grpc.aio.AioRpcError):
                await hello(port, authority.channel_credentials(authority))

    @VERSIONS
    async def test_an_old_session(
        self, directory: Path, authority: Authority, version: ssl.TLSVersion
    ) -> None:
        """New files end all sessions: an old client is asked for its certificate again."""
        client = pinned(authority.client_context(authority), version)
        async with echoing(certificates(directory, is_mutual=True)) as port:
            first = await asyncio.to_thread(visit, port, client, GREETING)
            assert first.answer
            write_all_at_once(directory / "ca.pem", Authority().pem)

            again = await asyncio.to_thread(visit, port, client, GREETING, first.session)

        assert (again.answer, again.was_resumed) == (b"", False)

    async def test_suites(self, directory: Path, authority: Authority) -> None:
        """With TLS 1.2 there are suites without CBC alone."""
        async with echoing(certificates(directory)) as port:
            assert await self.answer(port, authority, "ECDHE+AESGCM")
            assert not await self.answer(port, authority, CBC)

    @staticmethod
    async def answer(port: int, authority: Authority, suites: str) -> bytes:
        """What a client with these suites is told."""
        client = pinned(authority.client_context(), ssl.TLSVersion.TLSv1_2)
        client.set_ciphers(suites)
        return (await asyncio.to_thread(visit, port, client, GREETING)).answer

    async def test_half_a_rotation(self, directory: Path, authority: Authority) -> None:
        """Files that do not belong together change nothing, are said once, and may still come."""
        other = Authority()
        certificate, key = other.issue()
        structlog.reset_defaults()
        with capture_logs() as logs:
            async with echoing(certificates(directory)) as port:
                write_all_at_once(directory / "certificate.pem", certificate)
                for _ in range(2):
                    assert await hello(port, authority.channel_credentials()) == b"hello"
                assert [line["event"] for line in logs] == ["certificate_not_reloaded"]
                assert logs[0]["error"] == "the key does not match the certificate"

                write_all_at_once(directory / "key.pem", key)
                assert await hello(port, other.channel_credentials()) == b"hello"
        assert logs[-1]["event"] == "certificate_reloaded"

    async def test_files_gone(self, directory: Path, authority: Authority) -> None:
        """Files that are gone leave what was read in force."""
        async with echoing(certificates(directory)) as port:
            (directory / "key.pem").unlink()

            assert await hello(port, authority.channel_credentials()) == b"hello"


class TestAsyncio:
    """The direct door's way: an asyncio server with an SSL context."""

    @staticmethod
    async def connect(
        port: int, trusted: Authority, shows: Authority | None = None, name: str = "localhost"
    ) -> bytes:
        """Connect, say hello, return the answer: empty when the server hung up."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusted.client_context(shows), server_hostname=name
        )
        try:
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
            writer.write(b"hello\n")
            return await asyncio.wait_for(reader.readline(), TIMEOUT_S)
        except (ssl.SSLError, ConnectionError):
            return b""
        finally:
            writer.close()

    @staticmethod
    @asynccontextmanager
    async def serving(shown: Certificates) -> AsyncIterator[int]:
        """A server that says one line back; yields its port."""

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Say one line back."""
            writer.write(await reader.readline())
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=shown.ssl_context())
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    async def test_rotation(self, directory: Path, authority: Authority) -> None:
        """The next handshake shows the new certificate, asked for by name or not."""
        other = Authority()
        async with self.serving(certificates(directory)) as port:
            assert await self.connect(port, authority) == b"hello\n"

            write_pair(directory, other)

            assert await self.connect(port, other) == b"hello\n"
            assert await self.connect(port, other, name="127.0.0.1") == b"hello\n"
            with pytest.raises(ssl.SSLCertVerificationError):
                await self.connect(port, authority)

    async def test_mutual(self, directory: Path, authority: Authority) -> None:
        """Clients' certificates are asked for, and their authority can be rotated, too."""
        other = Authority()
        async with self.serving(certificates(directory, is_mutual=True)) as port:
            assert await self.connect(port, authority, shows=authority) == b"hello\n"
            assert await self.connect(port, authority) == b""
            assert await self.connect(port, authority, shows=other) == b""

            write_all_at_once(directory / "ca.pem", other.pem)

            assert await self.connect(port, authority, shows=other) == b"hello\n"
            assert await self.connect(port, authority, shows=authority) == b""

    @VERSIONS
    @pytest.mark.parametrize("is_mutual", [True, False])
    async def test_no_session_is_resumed(
        self, directory: Path, authority: Authority, version: ssl.TLSVersion, *, is_mutual: bool
    ) -> None:
        """Neither by a ticket nor by a session id: each connection shows its certificate."""
        client = pinned(authority.client_context(authority), version)
        async with self.serving(certificates(directory, is_mutual=is_mutual)) as port:
            first = await asyncio.to_thread(visit, port, client, b"hello\n")
            again = await asyncio.to_thread(visit, port, client, b"hello\n", first.session)

        assert (first.answer, again.answer) == (b"hello\n", b"hello\n")
        assert first.session is not None
        assert not first.session.has_ticket
        assert not again.was_resumed

    @VERSIONS
    async def test_an_old_session(
        self, directory: Path, authority: Authority, version: ssl.TLSVersion
    ) -> None:
        """A client of the authority before does not come in with the session it had."""
        client = pinned(authority.client_context(authority), version)
        async with self.serving(certificates(directory, is_mutual=True)) as port:
            first = await asyncio.to_thread(visit, port, client, b"hello\n")
            assert first.answer == b"hello\n"
            write_all_at_once(directory / "ca.pem", Authority().pem)

            again = await asyncio.to_thread(visit, port, client, b"hello\n", first.session)

        assert (again.answer, again.was_resumed) == (b"", False)

    async def test_suites(self, directory: Path, authority: Authority) -> None:
        """With TLS 1.2 there are suites without CBC alone."""
        answers = []
        async with self.serving(certificates(directory)) as port:
            for suites in ("ECDHE+AESGCM", "ECDHE+CHACHA20", CBC, "DHE+AESGCM"):
                client = pinned(authority.client_context(), ssl.TLSVersion.TLSv1_2)
                client.set_ciphers(suites)
                answers.append((await asyncio.to_thread(visit, port, client, b"hello\n")).answer)

        assert answers == [b"hello\n", b"hello\n", b"", b""]


class TestSettings:
    """The section `tls`."""

    def test_plain_text(self) -> None:
        """Without a certificate there is no TLS."""
        assert Tls().certificates() is None

    def test_key_with_a_password(self, tmp_path: Path) -> None:
        """A key that asks for a password is refused, not asked about on a terminal."""
        from cryptography.hazmat.primitives import serialization as pem  # noqa: PLC0415 - slow

        certificate, key = Authority().issue()
        secret = pem.BestAvailableEncryption(b"secret")
        locked = pem.load_pem_private_key(key, None).private_bytes(
            pem.Encoding.PEM, pem.PrivateFormat.PKCS8, secret
        )
        (tmp_path / "c").write_bytes(certificate)
        (tmp_path / "k").write_bytes(locked)

        with pytest.raises(ValueError, match="the key must not have a password"):
            Tls.model_validate({"certificate": "c", "key": "k"}, context={"directory": tmp_path})

    def test_other_key(self, directory: Path) -> None:
        """A key of another certificate is found out before anything is opened."""
        (directory / "key.pem").write_bytes(Authority().issue()[1])

        with pytest.raises(ValueError, match="the key does not match the certificate"):
            certificates(directory)
