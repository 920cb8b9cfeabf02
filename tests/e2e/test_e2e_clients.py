"""What Envoy takes from clients of every kind, and what it does not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.e2e.client import call, fetch
from tests.e2e.conftest import Start
from tests.e2e.gateway import Gateway, unique
from tests.e2e.harness import Spec, eventually

pytestmark = pytest.mark.e2e

WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def exchange(gateway: Gateway, request: bytes) -> bytes:
    """Send these bytes; return what comes back until the end of the connection."""
    reader, writer = await asyncio.open_connection(*gateway.stack.gateway)
    writer.write(request)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


class TestOldAndOdd:
    """Clients that say more, or less, than HTTP/1.1 asks for."""

    @pytest.mark.parametrize("protocol", ["TLS/1.2", "tls/1.3", "h2c"])
    async def test_upgrade_that_may_be_ignored(self, gateway: Gateway, protocol: str) -> None:
        """An offer to upgrade is ignored: Apache's HttpClient offers TLS, Java's own h2c."""
        headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": protocol}
        headers |= {"http2-settings": "AAMAAABkAAQAAP__"} if protocol == "h2c" else {}
        caller = await gateway.call(headers=headers)
        await (await gateway.next_call()).respond()

        assert (await caller.reply()).status == 200

    @pytest.mark.parametrize("host", [b"Host: models\r\n", b""])
    async def test_http_10(self, gateway: Gateway, host: bytes) -> None:
        """HTTP/1.0 is served, with a Host or without."""
        (backend,) = gateway.backends
        backend.is_answering = True
        answer = await exchange(gateway, b"GET /health HTTP/1.0\r\n" + host + b"\r\n")

        assert answer.startswith(b"HTTP/1.0 200 ")

    async def test_websocket_is_off(self, gateway: Gateway) -> None:
        """A WebSocket upgrade is refused by Envoy, and never queues."""
        caller = await gateway.call("/v1/realtime", method="GET", headers=WEBSOCKET, body=None)

        assert (await caller.reply()).status == 403
        assert gateway.backends[0].calls == []

    @pytest.mark.parametrize("picker", ["off", "least-loaded"])
    async def test_websocket(self, start: Start, picker: str) -> None:
        """Where it is on, it is gated, and holds its slot until the connection is closed."""
        gateway = await start(Spec(requests={"websockets": True}, picker=picker))
        headers = WEBSOCKET | {"content-type": "application/json"}  # as of a client's every request
        caller = await gateway.call("/v1/realtime", method="GET", headers=headers, body=None)
        serving = await gateway.next_call()
        await serving.upgrade("websocket")
        status = await caller.head()
        behind = await gateway.call(name="behind")
        await gateway.until(in_flight=1, waiting=1)
        await caller.hang_up()
        await (await gateway.next_call()).respond()

        assert status == 101
        assert serving.headers["upgrade"] == "websocket"
        assert (await behind.reply()).status == 200

    async def test_request_id(self, gateway: Gateway) -> None:
        """Every response says which request it answers, Envoy's own as well."""
        (backend,) = gateway.backends
        backend.is_answering = True
        named = await (await gateway.call(name="mine")).reply()
        refused = await gateway.call(headers={"x-llm-d-inference-ttl": "0s", **WEBSOCKET})
        unnamed = await (await call(gateway.stack.gateway)).reply()

        assert named.headers["x-request-id"] == "mine"
        assert (await refused.reply()).headers["x-request-id"].startswith("test-")
        assert len(unnamed.headers["x-request-id"]) == 36

    @pytest.mark.parametrize("picker", ["off", "least-loaded"])
    async def test_headers_up_to_the_limit(self, start: Start, picker: str) -> None:
        """Headers that Envoy accepts but cannot send on get 431: a 500 would be tried again."""
        gateway = await start(Spec(picker=picker))
        name = unique()
        headers = {f"x-{number}": "v" for number in range(95)}
        reply = await (await gateway.call(name=name, headers=headers)).reply()
        settled = await gateway.until_so(lambda snapshot: snapshot.settlements.received == 1)

        assert reply.status == 431
        assert reply.body.startswith(b"too many headers: at most 100, of 60 KiB together")
        assert gateway.backends[0].calls == []
        assert await gateway.outcomes(name) == ["dispatched"]
        assert settled.in_flight == 0

    async def test_key_in_the_query(self, gateway: Gateway) -> None:
        """It reaches the model server, and no log."""
        name = unique()
        path = "/v1beta/models/llama:generateContent"
        caller = await gateway.call(f"{path}?key=hush", name=name)
        call = await gateway.next_call()
        await call.respond()
        await caller.reply()
        await gateway.decided(name)

        def logged() -> list[str]:
            lines = gateway.stack.access_log()
            return [line["path"] for line in lines if line["request_id"] == name]

        assert await eventually(logged, what="Envoy's line") == [path]
        assert call.path == f"{path}?key=hush"
        assert "hush" not in gateway.stack.service.log.read_text()

    async def test_path_in_the_log(self, gateway: Gateway) -> None:
        """It is the path of the request, whatever the client's headers say."""
        name = unique()
        gateway.backends[0].is_answering = True
        headers = {"x-envoy-original-path": "/v1/models"}
        await (await gateway.call(name=name, headers=headers)).reply()

        def logged() -> list[str]:
            lines = gateway.stack.access_log()
            return [line["path"] for line in lines if line["request_id"] == name]

        assert await eventually(logged, what="Envoy's line") == ["/v1/chat/completions"]


class TestEngineHeaders:
    """Headers by which a client would choose its model server or its priority there."""

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
    async def test_removed(self, gateway: Gateway, path: str) -> None:
        """They do not reach the model server, gated or exempt."""
        headers = {"x-vllm-priority": "-9", "x-override-priority": "9"}
        headers["x-gateway-destination-endpoint"] = "10.0.0.1:1"
        caller = await gateway.call(path, method="GET", headers=headers, body=None)
        serving = await gateway.next_call()
        await serving.respond()
        await caller.reply()

        assert serving.headers.keys().isdisjoint(headers)

    async def test_trusted(self, start: Start) -> None:
        """Where the operator trusts them, they do."""
        gateway = await start(Spec(requests={"trustEngineHeaders": True}))
        caller = await gateway.call(headers={"x-vllm-priority": "-9"})
        serving = await gateway.next_call()
        await serving.respond()
        await caller.reply()

        assert serving.headers["x-vllm-priority"] == "-9"


def small(configuration: dict[str, Any]) -> None:
    """Little memory, and few connections."""
    heap, connections = configuration["overload_manager"]["resource_monitors"]
    heap["typed_config"]["max_heap_size_bytes"] = 200 * 2**20
    connections["typed_config"]["max_active_downstream_connections"] = 60


class TestLimits:
    """No client costs the others their service."""

    async def test_admin(self, gateway: Gateway) -> None:
        """Envoy's admin port shows, and changes nothing."""
        admin = gateway.stack.admin
        quit_ = await (await call(admin, "/quitquitquit", headers={"origin": "http://x"})).reply()
        level = await (await call(admin, "/logging?level=debug")).reply()

        assert (quit_.status, level.status) == (403, 403)
        assert (await fetch(admin, "/ready")).status == 200

    async def test_unfinished_uploads(self, start: Start) -> None:
        """Uploads cannot take more memory than Envoy may have; what runs goes on meanwhile.

        Ten come a second: Envoy looks at its memory four times a second.
        """
        gateway = await start(Spec(edit_envoy=small))
        caller, serving = await gateway.occupy()
        async with connections(gateway, 40) as uploads:
            ends = [asyncio.ensure_future(reader.read()) for reader, _ in uploads]
            for _, writer in uploads:
                writer.write(UNFINISHED)
                await asyncio.wait(ends, timeout=0.1)  # the pace
            await asyncio.wait(ends, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            refused = sum(end.done() for end in ends)
            memory = gateway.stack.envoy.resident_bytes()
            await serving.respond()
            reply = await caller.reply()
        await asyncio.gather(*ends, return_exceptions=True)
        (backend,) = gateway.backends
        backend.is_answering = True
        await eventually(lambda: _is_served(gateway), 20, "service as before")

        assert refused > 0
        assert reply.status == 200
        assert memory < len(uploads) * SIZE

    async def test_connections(self, start: Start) -> None:
        """Connections beyond the limit are closed; what runs goes on."""
        gateway = await start(Spec(edit_envoy=small))
        caller, serving = await gateway.occupy()
        async with connections(gateway, 80) as more:
            await eventually(lambda: sum(reader.at_eof() for reader, _ in more) >= 20, 10, "closed")
            await serving.respond()
            reply = await caller.reply()

        assert reply.status == 200


SIZE = 12 * 2**20
UNFINISHED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: models\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (SIZE + 1, b" " * SIZE)
)
"""A JSON upload that lacks its last byte."""


@contextlib.asynccontextmanager
async def connections(
    gateway: Gateway, count: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Hold so many connections to Envoy."""
    async with contextlib.AsyncExitStack() as stack:
        held = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection(*gateway.stack.gateway)
            stack.push_async_callback(_abort, writer)
            held.append((reader, writer))
        yield held


async def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _is_served(gateway: Gateway) -> bool:
    return (await (await gateway.call()).reply()).status == 200
