"""The HTTP port keeps room for those who ask, whoever says nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from flowcontrol_server.admin import http_port as module
from flowcontrol_server.admin.http_port import HttpPort

TIMEOUT_S = 20.0
REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def opened(page: Handler | None = None, connections_max: int = 256) -> AsyncIterator[int]:
    """A port that answers every GET of /."""

    async def plain(_request: web.Request) -> web.Response:
        """Say yes."""
        return web.Response(text="yes")

    application = web.Application()
    application.router.add_get("/", page or plain)
    port = HttpPort(application, connections_max)
    try:
        yield await port.open(("127.0.0.1", 0))
    finally:
        await port.close()


async def connect(port: int, host: str = "127.0.0.1") -> Connection:
    """A connection from one of this machine's addresses, which the server has taken in."""
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))


async def until_closed(connection: Connection) -> bytes:
    """What comes until the server closes the connection."""
    reader, _ = connection
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        await leave(connection)


async def leave(*connections: Connection) -> None:
    """Close connections."""
    for _, writer in connections:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def status(connection: Connection) -> bytes:
    """Ask for the page; return the first line of the answer, nothing if there is none."""
    reader, writer = connection
    writer.write(REQUEST)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await reader.readline()
    except ConnectionResetError:
        return b""


class TestSilence:
    """Connections that say nothing."""

    @pytest.mark.parametrize("begun", [b"", REQUEST[:20]])
    async def test_ends(self, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
        """A connection without a whole request ends after a while."""
        monkeypatch.setattr(module, "REQUEST_WITHIN_S", 0.05)
        async with opened() as port:
            connection = await connect(port)
            connection[1].write(begun)

            assert await until_closed(connection) == b""

    async def test_makes_room(self) -> None:
        """However many are silent, who asks is answered."""
        async with opened(connections_max=3) as port:
            silent = [await connect(port) for _ in range(5)]
            asking = await connect(port)

            assert await status(asking) == b"HTTP/1.1 200 OK\r\n"
            for connection in silent[:3]:
                assert await until_closed(connection) == b""
            await leave(*silent[3:], asking)

    async def test_of_whom(self) -> None:
        """The address with the most silent connections loses one, not another address."""
        async with opened(connections_max=3) as port:
            other = await connect(port, "127.0.0.2")
            silent = [await connect(port) for _ in range(4)]

            assert await until_closed(silent[0]) == b""
            assert await status(other) == b"HTTP/1.1 200 OK\r\n"
            await leave(*silent[1:], other)

    async def test_asking_stay(self) -> None:
        """A connection whose request is not answered yet gives way to nobody."""
        is_over, asked = asyncio.Event(), asyncio.Semaphore(0)

        async def page(_request: web.Request) -> web.Response:
            """Take time."""
            asked.release()
            await is_over.wait()
            return web.Response()

        async with opened(page, connections_max=2) as port:
            asking = [await connect(port) for _ in range(2)]
            answers = [asyncio.create_task(status(each)) for each in asking]
            async with asyncio.timeout(TIMEOUT_S):
                await asked.acquire()
                await asked.acquire()
            third = await connect(port)

            assert await until_closed(third) == b""
            is_over.set()
            assert await asyncio.gather(*answers) == [b"HTTP/1.1 200 OK\r\n"] * 2
            await leave(*asking)

    async def test_answered(self) -> None:
        """One that has its answer and asks no more gives way: a probe gets through."""
        async with opened(connections_max=2) as port:
            idle = [await connect(port) for _ in range(2)]
            assert [await status(each) for each in idle] == [b"HTTP/1.1 200 OK\r\n"] * 2
            probe = await connect(port)

            assert await status(probe) == b"HTTP/1.1 200 OK\r\n"
            assert (await until_closed(idle[0])).endswith(b"yes")
            await leave(idle[1], probe)

    async def test_unread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that does not read its answer is cut off."""
        monkeypatch.setattr(module, "READ_WITHIN_S", 0.05)
        cut_off = asyncio.Event()

        async def page(request: web.Request) -> web.StreamResponse:
            """Write more than the system takes."""
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(2**20))
            finally:
                cut_off.set()

        async with opened(page) as port:
            connection = await connect(port)
            connection[1].write(REQUEST)
            async with asyncio.timeout(TIMEOUT_S):
                await cut_off.wait()
            await leave(connection)


async def test_noise_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP is answered 400; a page that fails is logged."""
    planted = "planted"

    async def failing(_request: web.Request) -> web.Response:
        """Fail."""
        raise RuntimeError(planted)

    async with opened(failing) as port:
        reader, writer = await connect(port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\x00\x01")
        answer = await until_closed((reader, writer))
        noise = [*caplog.records]
        asking = await connect(port)
        failed = await status(asking)
        await leave(asking)

    assert answer.split(b" ")[1] == b"400"
    assert noise == []
    assert b"500" in failed
    assert [record.exc_info is not None for record in caplog.records] == [True]
