"""A name server for tests, over real UDP, with configured answers or none."""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import final

from flowcontrol_server.common.addresses import Address

A, AAAA, SRV = 1, 28, 33
NXDOMAIN, SERVFAIL = 3, 2
_IN = 1


@final
class FakeDns(asyncio.DatagramProtocol):
    """Answers by name and type; a name without records does not exist."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        """The questions, in order."""
        self.records: dict[tuple[str, int], list[bytes]] = {}
        self.codes: dict[str | tuple[str, int], int | None] = {}
        """Response code by name, or by name and type, instead of an answer; None: no response."""
        self.ttl_s = 300
        self.transport: asyncio.DatagramTransport | None = None
        """The socket on which it answers."""

    def address(self, name: str, addresses: Iterable[str]) -> None:
        """Set the addresses of a name."""
        packed = [ip_address(each).packed for each in addresses]
        self.records[name, A] = [each for each in packed if len(each) == 4]
        self.records[name, AAAA] = [each for each in packed if len(each) == 16]

    def service(self, name: str, targets: Iterable[tuple[int, str, int]]) -> None:
        """Set SRV records: priority number, target and port of each."""
        self.records[name, SRV] = [
            struct.pack("!HHH", priority, 0, port) + _encoded(target)
            for priority, target, port in targets
        ]

    def forget(self, name: str) -> None:
        """Remove a name."""
        self.records = {key: value for key, value in self.records.items() if key[0] != name}

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer a question."""
        name, end = _decoded(data, 12)
        kind = int.from_bytes(data[end : end + 2], "big")
        self.asked.append((name, kind))
        code = self.codes.get((name, kind), self.codes.get(name, 0))
        if code is None:
            return
        exists = any(key[0] == name for key in self.records)
        answers = self.records.get((name, kind), []) if not code else []
        code = code or (0 if exists else NXDOMAIN)
        header = data[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(answers), 0, 0)
        body = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", kind, _IN, self.ttl_s, len(each)) + each
            for each in answers
        )
        assert self.transport is not None
        self.transport.sendto(header + data[12 : end + 4] + body, addr)


@asynccontextmanager
async def name_server() -> AsyncIterator[tuple[FakeDns, Address]]:
    """A name server on a real port."""
    loop = asyncio.get_running_loop()
    transport, fake = await loop.create_datagram_endpoint(FakeDns, local_addr=("127.0.0.1", 0))
    fake.transport = transport
    try:
        yield fake, Address(*transport.get_extra_info("sockname")[:2])
    finally:
        transport.close()


def _encoded(name: str) -> bytes:
    labels = [label.encode() for label in name.split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _decoded(data: bytes, at: int) -> tuple[str, int]:
    labels = []
    while length := data[at]:
        labels.append(data[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels).lower(), at + 1
