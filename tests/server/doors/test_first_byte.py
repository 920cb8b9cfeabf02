"""One port for TLS with a certificate of its own, and for plain text."""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from flowcontrol.errors import ListenError
from flowcontrol_server.doors.first_byte import EitherPort
from flowcontrol_server.doors.self_signed import self_signed_context
from tests.support.direct import PROCESS, Stream, grpcio, headers_message, house
from tests.support.gates import TIMEOUT_S


class Echo(asyncio.Protocol):
    """Sends back what comes, behind what it knows of TLS."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # always that one
        """Say whether this is TLS."""
        self._transport = transport
        is_tls = transport.get_extra_info("ssl_object") is not None
        transport.write(b"tls:" if is_tls else b"plain:")

    def data_received(self, data: bytes) -> None:
        """Send it back."""
        self._transport.write(data)


def trusting_anyone() -> ssl.SSLContext:
    """What a client connects with that verifies nothing."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@contextlib.asynccontextmanager
async def either(wait_s: float = TIMEOUT_S, undecided_max: int = 10) -> AsyncIterator[int]:
    """An open port; yields its number."""
    opened = EitherPort(Echo, self_signed_context(), wait_s, undecided_max)
    try:
        yield await opened.open("127.0.0.1", 0)
    finally:
        opened.close()


async def echoed(port: int, text: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Say something, then no more; return what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(text)
        answer = b""
        while not answer.endswith(text):
            answer += await asyncio.wait_for(reader.read(100), TIMEOUT_S)
        return answer
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Wait for the end of a connection, which says nothing before."""
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
    return True


class TestEitherPort:
    """Told apart by the first byte."""

    async def test_both(self) -> None:
        """A TLS client and one of plain text each get what they speak, byte for byte."""
        async with either() as port:
            assert await echoed(port, b"PRI * HTTP/2.0") == b"plain:PRI * HTTP/2.0"
            assert await echoed(port, b"hello", trusting_anyone()) == b"tls:hello"

    async def test_silent(self) -> None:
        """A connection that says nothing is ended when its time is over."""
        async with either(wait_s=0.05) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await ended(reader)
            writer.transport.abort()

    async def test_unfinished_handshake(self) -> None:
        """One that begins a handshake and goes no further is ended as well."""
        async with either(wait_s=0.05) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16\x03\x01")
            assert await ended(reader)
            writer.transport.abort()

    async def test_garbage_handshake(self) -> None:
        """What only begins like TLS is ended, and the port serves on."""
        async with either() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16" + bytes(1000))
            answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
            assert answer[:1] in {b"", b"\x15"}, "nothing, or an alert"
            writer.transport.abort()
            assert await echoed(port, b"PRI") == b"plain:PRI"

    async def test_too_many_silent(self) -> None:
        """One too many ends the oldest that has said nothing; who speaks is served."""
        async with either(undecided_max=2) as port:
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            assert await echoed(port, b"PRI") == b"plain:PRI"
            assert await ended(silent[0][0])
            silent[1][1].write(b"P")
            assert await asyncio.wait_for(silent[1][0].readexactly(7), TIMEOUT_S) == b"plain:P"
            for _, writer in silent:
                writer.transport.abort()

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM, errno.EPROTO])
    async def test_error(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """What goes wrong with a connection before it is accepted ends nothing else."""
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, fault: faults.append(fault))
        errors = [OSError(number, "planted")]
        accept = socket.socket.accept

        def failing(listening: socket.socket) -> tuple[socket.socket, object]:
            if errors:
                raise errors.pop()
            return accept(listening)

        monkeypatch.setattr(socket.socket, "accept", failing)
        monkeypatch.setattr("flowcontrol_server.doors.first_byte.PAUSE_S", 0.05)
        async with either() as port:
            assert await echoed(port, b"PRI") == b"plain:PRI"

        assert (errors, faults) == ([], [])

    async def test_one_address_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a host's addresses all are opened, or none."""
        with socket.create_server(("127.0.0.2", 0)) as used:
            port = used.getsockname()[1]
            addresses = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
                for host in ("127.0.0.1", "127.0.0.2")
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: addresses)
            opened = EitherPort(Echo, self_signed_context(), TIMEOUT_S)
            with pytest.raises(ListenError, match=rf"a\.host:{port}"):
                await opened.open("a.host", port)
            with socket.create_server(("127.0.0.1", port)):
                pass  # no other error: it is free

    async def test_closed(self) -> None:
        """Closing ends what has not been handed on, and accepts no more."""
        async with either() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await ended(reader)
        writer.transport.abort()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_door() -> None:
    """The direct door answers grpcio's plain text and TLS clients that choose h2, at one port."""
    async with house() as home:
        port = await home.door.listen(("127.0.0.1", 0), self_signed_context(), takes_both=True)
        async with grpcio(port) as channel:
            stream = Stream(channel, PROCESS)
            await stream.say(headers_message("/health"))
            assert (await stream.hear()).HasField("request_headers")
            await stream.end()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting_anyone())
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        settings = await asyncio.wait_for(reader.readexactly(9), TIMEOUT_S)
        assert settings[3] == 4, "a SETTINGS frame"
        writer.transport.abort()


async def test_each_start_has_its_own() -> None:
    """Two contexts show different certificates: no key is shared or kept."""
    shown = []
    for _ in range(2):
        async with either() as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting_anyone())
            shown.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            writer.transport.abort()
    assert shown[0] != shown[1]
