"""State and election where Valkey or Redis has TLS, a sentinel, or is a cluster: real servers."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowcontrol_server.config.state import Valkey
from flowcontrol_server.state.store import Batch, LeaseRecord, StateError
from flowcontrol_server.state.valkey_client import ValkeyClient
from flowcontrol_server.state.valkey_lock import ValkeyLock
from flowcontrol_server.state.valkey_store import ValkeyStore
from tests.support.ports import free_port
from tests.support.valkey_groups import CLI, NAME, cluster, running, watched_pair
from tests.support.valkey_server import BINARY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server"),
    pytest.mark.skipif(CLI is None, reason="needs redis-cli or valkey-cli"),
]
LEASE_MS = 500
PATIENCE_S = 20.0
FAIL_OVER_S = 10.0
RECORD = LeaseRecord("ab.1", "10.0.0.1:80", 0, "tenant", 1.5, 7.0)


@asynccontextmanager
async def connected(
    port: int, scheme: str = "valkey", **settings: object
) -> AsyncIterator[ValkeyClient]:
    """Connections, closed at the end."""
    url = f"{scheme}://127.0.0.1:{port}"
    client = ValkeyClient(Valkey(url=url, timeout="2s", **settings), "llama")  # type: ignore[arg-type]  # as written
    try:
        yield client
    finally:
        await client.close()


async def elected(lock: ValkeyLock) -> int:
    """Ask for the lease, whatever fails, until it is had."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            token = await lock.acquire()
        except StateError:
            token = None
        if token is not None:
            return token
        assert time.monotonic() < deadline, "not elected in time"
        await asyncio.sleep(0.05)


async def assert_works(client: ValkeyClient) -> None:
    """Elect, write and read again."""
    token = await elected(ValkeyLock(client, "one", LEASE_MS))
    store = ValkeyStore(client)
    await store.open(token)
    await store.write(Batch([RECORD], (), is_whole=True, memory="learnt"))
    contents = await ValkeyStore(client).open(token)

    assert (contents.leases, contents.memory) == ([RECORD], "learnt")
    assert await ValkeyLock(client, "other", LEASE_MS).is_held_by_another()


async def test_cluster_that_cannot_be_reached() -> None:
    """None of its nodes answers: an error like any other, which is tried again."""
    async with connected(free_port(), cluster=True) as client:
        with pytest.raises(StateError, match=r"state\.valkey: .*cannot be connected"):
            await client.run("return 1", [])


async def test_demoted(tmp_path: Path) -> None:
    """A primary that becomes a replica keeps its connections: what its name leads to is asked."""
    with running(tmp_path) as group:
        names = ("one", "other")
        first, second = (group.start(n, "--unixsocket", str(tmp_path / f"{n}.sock")) for n in names)
        name = tmp_path / "primary.sock"
        name.symlink_to("one.sock")
        client = ValkeyClient(Valkey(url=f"unix://{name}"), "llama")
        lock = ValkeyLock(client, "one", LEASE_MS)
        try:
            await elected(lock)
            group.ask(first, "replicaof", "127.0.0.1", str(second.port))
            name.unlink()
            name.symlink_to("other.sock")

            with pytest.raises(StateError, match="read only replica"):
                await lock.acquire()
            await elected(lock)
        finally:
            await client.close()


class TestTls:
    """valkeys://: the server shows a certificate, and asks for ours."""

    async def test_mutual(self, tmp_path: Path) -> None:
        """With the authority that signed it and our own certificate everything works."""
        with running(tmp_path, has_tls=True) as group:
            server = group.start("one")
            async with connected(server.port, "valkeys", **group.files) as client:
                await assert_works(client)

    @pytest.mark.parametrize(
        ("left_out", "problem"),
        [("ca", "CERTIFICATE_VERIFY_FAILED"), ("certificate", ".")],
    )
    async def test_refused(self, tmp_path: Path, left_out: str, problem: str) -> None:
        """An authority that is not trusted, on either side, is an error that names the setting."""
        with running(tmp_path, has_tls=True) as group:
            server = group.start("one")
            files = {**group.files}
            del files[left_out]
            if left_out == "certificate":
                del files["key"]
            async with connected(server.port, "rediss", **files) as client:
                with pytest.raises(StateError, match=rf"state\.valkey: .*{problem}"):
                    await client.run("return 1", [])

    async def test_of_another_host(self, tmp_path: Path) -> None:
        """An authority that is trusted signs for many: the certificate must be for the host."""
        with running(tmp_path, has_tls=True, names=("other.example",)) as group:
            server = group.start("one")
            async with connected(server.port, "valkeys", **group.files) as client:
                with pytest.raises(StateError, match=r"not valid for '127\.0\.0\.1'"):
                    await client.run("return 1", [])


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
class TestGroups:
    """More than one server."""

    async def test_sentinel(self, tmp_path: Path, *, has_tls: bool) -> None:
        """The URL names a sentinel. The primary dies: all is written again at the next."""
        with running(tmp_path, has_tls=has_tls) as group:
            primary, sentinel = watched_pair(group)
            files = group.files if has_tls else {}
            scheme = "valkeys" if has_tls else "valkey"
            async with connected(sentinel.port, scheme, sentinel=NAME, **files) as client:
                await assert_works(client)
                primary.stop()
                began_s = time.monotonic()
                await elected(ValkeyLock(client, "other", LEASE_MS))
                took_s = time.monotonic() - began_s
                await assert_works(client)

        assert took_s < FAIL_OVER_S

    async def test_cluster(self, tmp_path: Path, *, has_tls: bool) -> None:
        """The URL names any node: the keys of a pool are in one slot, wherever that is."""
        with running(tmp_path, has_tls=has_tls) as group:
            files = group.files if has_tls else {}
            scheme = "valkeys" if has_tls else "valkey"
            for node in cluster(group):
                async with connected(node.port, scheme, cluster=True, **files) as client:
                    await assert_works(client)
                    await client.run("return redis.call('DEL', KEYS[1])", ["leader"])
