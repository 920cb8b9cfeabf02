"""State and election in a real Valkey or Redis server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from flowcontrol_server.config.state import Valkey
from flowcontrol_server.state.store import Batch, FencedError, LeaseRecord, StateError
from flowcontrol_server.state.valkey_client import ValkeyClient
from flowcontrol_server.state.valkey_lock import ValkeyLock
from flowcontrol_server.state.valkey_store import CHUNK, ValkeyStore
from tests.support.valkey_server import BINARY, ValkeyServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server"),
]
LEASE_MS = 200
EVICTS = ("--maxmemory", "99mb", "--maxmemory-policy", "volatile-lru")


@pytest.fixture(name="client")
async def _client(server: ValkeyServer) -> AsyncIterator[ValkeyClient]:
    client = client_of(server)
    yield client
    await client.close()


def client_of(server: ValkeyServer, **settings: object) -> ValkeyClient:
    """Return connections to a server."""
    return ValkeyClient(Valkey(url=server.url, timeout="200ms", **settings), "llama")  # type: ignore[arg-type]  # as written


def record(number: int) -> LeaseRecord:
    """Return a lease."""
    return LeaseRecord(f"ab.{number}", "10.0.0.1:80" if number % 2 else None, 0, "t", 1.5, number)


async def test_cancelled(client: ValkeyClient) -> None:
    """A call that is cancelled ends so, in whatever turn of the loop that happens."""
    await client.run("return 1", [])
    went_on = []
    for turns in range(20):
        task = asyncio.ensure_future(client.run("return 1", []))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait((task,))
            went_on += [] if task.cancelled() else [turns]

    assert went_on == []


class TestStore:
    """What is written is read again, and only the last to open it writes."""

    async def test_round_trip(self, client: ValkeyClient) -> None:
        """More than one script takes, some removed, and what the engine has learnt."""
        store = ValkeyStore(client)
        before = await store.open(1)
        many = [record(number) for number in range(CHUNK + 5)]
        await store.write(Batch(many, (), is_whole=False, memory="{}"))
        await store.write(Batch([record(9999)], ["ab.0", "ab.7"], is_whole=False))
        after = await ValkeyStore(client).open(2)

        assert (list(before.leases), before.memory) == ([], None)
        assert list(after.leases) == [
            *(many[n] for n in range(CHUNK + 5) if n not in {0, 7}),
            record(9999),
        ]
        assert after.memory == "{}"

    async def test_a_damaged_record(self, client: ValkeyClient) -> None:
        """It is skipped, whatever it is, and the others are read."""
        store = ValkeyStore(client)
        await store.open(1)
        await store.write(Batch([record(1)], (), is_whole=False))
        script = r"return redis.call('HSET', KEYS[1], 'cd', 'no JSON', 'ef', '[\255]')"
        await client.run(script, ["leases"])
        after = await ValkeyStore(client).open(2)

        assert list(after.leases) == [record(1)]

    @pytest.mark.parametrize(
        ("options", "policies"),
        [
            (EVICTS, ["volatile-lru"]),
            (("--maxmemory", "99mb"), []),
            (("--maxmemory-policy", "volatile-lru"), []),
            ((*EVICTS, "--user", "default", "on", "nopass", "~*", "+@all", "-info"), []),
        ],
        ids=" ".join,
    )
    async def test_a_server_that_evicts(
        self, tmp_path: Path, options: tuple[str, ...], policies: list[str]
    ) -> None:
        """It is said at the start, where the server limits its memory and says how."""
        server = ValkeyServer(tmp_path, *options)
        server.start()
        client = client_of(server)
        with structlog.testing.capture_logs() as lines:
            await ValkeyStore(client).open(1)
        await client.close()
        server.stop()

        warned = [each["policy"] for each in lines if each["event"] == "valkey_evicts_keys"]
        assert warned == policies

    async def test_whole(self, client: ValkeyClient) -> None:
        """A whole batch replaces all there was."""
        store = ValkeyStore(client)
        await store.open(1)
        await store.write(Batch([record(1), record(2)], (), is_whole=False))
        await store.write(Batch([record(3)], (), is_whole=True))

        assert (await store.open(1)).leases == [record(3)]

    async def test_fencing(self, client: ValkeyClient) -> None:
        """Whoever opened with a smaller token can neither write nor open again."""
        former, leader = ValkeyStore(client), ValkeyStore(client)
        await former.open(7)
        await leader.open(8)
        await leader.write(Batch([record(1)], (), is_whole=False))
        with pytest.raises(FencedError, match="a later leader has taken over"):
            await former.write(Batch([record(2)], (), is_whole=True))
        with pytest.raises(FencedError):
            await former.open(7)

        assert (await leader.open(8)).leases == [record(1)]

    async def test_a_server_that_lost_its_data(
        self, server: ValkeyServer, client: ValkeyClient
    ) -> None:
        """A part is refused, so that the next batch is whole; and that one is taken."""
        store = ValkeyStore(client)
        await store.open(1)
        server.stop()
        with pytest.raises(StateError, match=r"state\.valkey"):
            await store.write(Batch([record(1)], (), is_whole=False))
        server.start()
        with pytest.raises(StateError, match="lost its data"):
            await store.write(Batch([record(1)], (), is_whole=False))
        await store.write(Batch([record(2)], (), is_whole=True))

        assert (await store.open(1)).leases == [record(2)]

    async def test_a_server_that_hangs(self, server: ValkeyServer, client: ValkeyClient) -> None:
        """It is given up on in time."""
        store = ValkeyStore(client)
        await store.open(1)
        server.pause()
        try:
            async with asyncio.timeout(5):
                with pytest.raises(StateError):
                    await store.write(Batch([record(1)], (), is_whole=False))
        finally:
            server.resume()


async def test_a_password(tmp_path: Path) -> None:
    """It is read from its file; a wrong one is an error that names the setting."""
    server = ValkeyServer(tmp_path, "--requirepass", "open-sesame")
    server.start()
    password = tmp_path / "password"
    password.write_text("wrong\n")
    client = client_of(server, passwordFile=password)
    try:
        with pytest.raises(StateError, match=r"state\.valkey"):
            await ValkeyStore(client).open(1)
        password.write_text("open-sesame\n")

        assert (await ValkeyStore(client).open(1)).leases == []
    finally:
        await client.close()
        server.stop()


class TestLock:
    """One holds it at a time."""

    async def test_terms(self, client: ValkeyClient) -> None:
        """Kept while renewed, released, taken by another, each time with a greater token."""
        one, other = (ValkeyLock(client, name, LEASE_MS) for name in ("one", "other"))
        first = await elected(one)
        again, meanwhile = await one.acquire(), await other.acquire()
        is_seen = await other.is_held_by_another(), await one.is_held_by_another()
        await other.release()
        kept = await one.acquire()
        await one.release()
        second = await other.acquire()

        assert first == again == kept
        assert meanwhile is None
        assert is_seen == (True, False)
        assert second is not None
        assert second > first

    async def test_it_expires(self, client: ValkeyClient) -> None:
        """Whoever does not renew it loses it; it is another term when it comes back."""
        one, other = (ValkeyLock(client, name, LEASE_MS) for name in ("one", "other"))
        first = await elected(one)
        second = await elected(other)
        await other.release()
        third = await one.acquire()

        assert third is not None
        assert first < second < third

    async def test_a_server_without_data(self, server: ValkeyServer, client: ValkeyClient) -> None:
        """Nobody is elected for one lease: the leader that it does not know of may go on."""
        one, other = (ValkeyLock(client, name, 60_000) for name in ("one", "other"))
        at_first = await one.acquire()
        server.stop()
        server.start()
        with_old_connections = await asyncio.gather(
            one.acquire(), other.acquire(), return_exceptions=True
        )
        after = [await one.acquire(), await other.acquire()]

        assert at_first is None
        assert not [each for each in with_old_connections if isinstance(each, int)]
        assert after == [None, None]


async def elected(lock: ValkeyLock) -> int:
    """Ask until the lock is held."""
    async with asyncio.timeout(5):
        while (token := await lock.acquire()) is None:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
    return token
