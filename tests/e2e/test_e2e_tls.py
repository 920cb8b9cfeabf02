"""Mutual TLS between a real Envoy and the service, certificates rotated under way; grpcurl in hand.

The gateway of the other tests asks the service in plain text, so here a stack is driven by hand.
"""

import asyncio
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flowcontrol_server.admin import api as admin
from flowcontrol_server.common.addresses import Address
from tests.e2e.backend import Backend, Call
from tests.e2e.client import CHAT, call
from tests.e2e.harness import Spec, Stack
from tests.support.certificates import Authority, write_all_at_once, write_pair

pytestmark = pytest.mark.e2e

GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
ANSWER_S = 20.0


class Guarded(NamedTuple):
    """A stack that speaks mutual TLS inside, its one backend, and who signs."""

    stack: Stack
    arrived: "asyncio.Queue[Call]"
    authority: Authority
    files: Path
    """certificate.pem and key.pem of the service, client.pem and client.key of Envoy, ca.pem."""

    @property
    def ports(self) -> tuple[Address, Address]:
        """The two ports that speak TLS."""
        assert isinstance(self.stack.ext_proc, Address)
        return self.stack.ext_proc, self.stack.grpc

    async def shown(self) -> list[bytes]:
        """Return the certificate that each port shows at a new handshake."""
        return [await self._shown(port) for port in self.ports]

    async def _shown(self, port: Address) -> bytes:
        reader, writer = await asyncio.open_connection(
            *port,
            ssl=self.authority.client_context(self.authority),
            server_hostname="localhost",
        )
        del reader
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        assert isinstance(shown, bytes)
        return shown

    async def grpcurl(self, *options: str) -> tuple[int, str]:
        """Ask for a snapshot; return grpcurl's exit status and what it prints."""
        address = f"localhost:{self.stack.grpc.port}"
        process = await asyncio.create_subprocess_exec(
            *(GRPCURL, "-cacert", str(self.files / "ca.pem"), *options),
            *(address, f"{admin.SERVICE}/GetSnapshot"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), ANSWER_S)
        assert process.returncode is not None
        return process.returncode, output.decode()


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    """A stack of one slot, its certificates in files."""
    authority, files = Authority(), tmp_path / "tls"
    files.mkdir()
    write_pair(files, authority)
    write_all_at_once(files / "ca.pem", authority.pem)
    certificate, key = authority.issue("envoy.example")
    write_all_at_once(files / "client.pem", certificate)
    write_all_at_once(files / "client.key", key)
    spec = Spec(pems=files)
    (tmp_path / "stack").mkdir()
    stack = Stack(spec, tmp_path / "stack")
    arrived: asyncio.Queue[Call] = asyncio.Queue()
    try:
        async with Backend(stack.endpoints[0], arrived):
            await stack.start()
            yield Guarded(stack, arrived, authority, files)
    finally:
        stack.stop()


class TestMutualTls:
    """Nobody gets in without a certificate."""

    async def test_rotation_under_way(self, guarded: Guarded) -> None:
        """A request in flight ends well while the certificate is replaced; the next shows it."""
        sent = {"x-request-id": "under-way"}
        caller = await call(guarded.stack.gateway, CHAT, headers=sent, body=b"{}")
        under_way = await asyncio.wait_for(guarded.arrived.get(), ANSWER_S)
        await under_way.stream(b'data: {"n": 1}\n\n')
        before = await guarded.shown()

        write_pair(guarded.files, guarded.authority)

        after = await guarded.shown()
        await under_way.send(b'data: {"n": 2}\n\n')
        await under_way.end()
        reply = await caller.reply()
        assert len({*before}) == len({*after}) == 1
        assert after != before
        assert reply.status == 200
        assert reply.body.count(b"data:") == 2
        events = [line["event"] for line in guarded.stack.events("certificate_reloaded")]
        assert events == ["certificate_reloaded"]
        assert guarded.stack.complaints() == []

    async def test_strangers(self, guarded: Guarded) -> None:
        """A client without a certificate gets nothing; with Envoy's authority, the snapshot."""
        shown = ("-cert", str(guarded.files / "client.pem"))
        status, text = await guarded.grpcurl(*shown, "-key", str(guarded.files / "client.key"))
        assert status == 0, text
        assert json.loads(text)["pool"] == "llama"

        status, text = await guarded.grpcurl()
        assert status != 0
        assert "pool" not in text
        for port in guarded.ports:
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                await stranger(guarded, port)


async def stranger(guarded: Guarded, port: Address) -> None:
    """Shake hands without a certificate; TLS 1.3 refuses it with the first byte that is read."""
    reader, writer = await asyncio.open_connection(
        *port,
        ssl=guarded.authority.client_context(),
        server_hostname="localhost",
    )
    try:
        said = await asyncio.wait_for(reader.read(), ANSWER_S)
        assert said, "the service hung up"
    finally:
        writer.transport.abort()
