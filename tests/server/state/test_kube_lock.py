"""The lease of the leader in the Kubernetes API."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import final

import pytest

from flowcontrol_server.config.sources import Kubernetes
from flowcontrol_server.state.kube_lock import KubeLock, lease_name
from flowcontrol_server.state.store import StateError
from tests.support.kubernetes_api import FakeApiServer, api_server

PATH = "/apis/coordination.k8s.io/v1/namespaces/models/leases"
NAME = "flowcontrol-llama"
DURATION_S = 1
pytestmark = pytest.mark.slow


@final
class House:
    """An API server and two locks."""

    def __init__(self, api: FakeApiServer, kubeconfig: Path) -> None:
        self.api = api
        settings = Kubernetes(kubeconfig=kubeconfig)
        self.one, self.other = (
            KubeLock(settings, "llama", name, DURATION_S) for name in ("one", "other")
        )


@pytest.fixture(name="house")
async def _house(tmp_path: Path) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        api, kubeconfig = await stack.enter_async_context(api_server(tmp_path))
        api.serve(PATH)
        house = House(api, kubeconfig)
        stack.push_async_callback(house.one.close)
        stack.push_async_callback(house.other.close)
        yield house


async def elected(lock: KubeLock) -> int:
    """Ask until the lock is held."""
    async with asyncio.timeout(10):
        while (token := await lock.acquire()) is None:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    return token


def test_name() -> None:
    """A pool's own where that is a DNS label; else one that no other pool has."""
    odd = [lease_name(pool) for pool in ("Llama 3/8B", "llama-3-8b", "Llama_3_8B", "x" * 100)]

    assert lease_name("llama") == NAME
    assert len(set(odd)) == len(odd)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in odd)


async def test_terms(house: House) -> None:
    """Made, renewed, released and taken by another, with the fields of any other controller."""
    first = await elected(house.one)
    again, meanwhile = await house.one.acquire(), await house.other.acquire()
    is_seen = await house.other.is_held_by_another(), await house.one.is_held_by_another()
    made = house.api.get(PATH, NAME)["spec"]
    await house.other.release()
    await house.one.release()
    released = house.api.get(PATH, NAME)["spec"]
    second = await house.other.acquire()
    taken = house.api.get(PATH, NAME)["spec"]

    assert first == again
    assert meanwhile is None
    assert is_seen == (True, False)
    assert (made["holderIdentity"], made["leaseDurationSeconds"]) == ("one", DURATION_S)
    assert released["holderIdentity"] == ""
    assert (taken["holderIdentity"], taken["leaseTransitions"]) == ("other", 2)
    assert second is not None
    assert second > first


async def test_it_expires(house: House) -> None:
    """After its duration without a renewal, as seen by whoever waits."""
    first = await elected(house.one)
    second = await elected(house.other)

    assert second > first
    assert await house.one.acquire() is None


async def test_two_at_once(house: House) -> None:
    """The version of the object lets one of them succeed."""
    await elected(house.one)
    await house.one.release()
    tokens = await asyncio.gather(house.one.acquire(), house.other.acquire())

    assert sum(token is not None for token in tokens) == 1


async def test_out_of_reach_and_forbidden(house: House) -> None:
    """Either is an error that names the setting."""
    house.api.failing = 503
    with pytest.raises(StateError, match="availability: the Lease flowcontrol-llama cannot be"):
        await house.one.acquire()
    house.api.failing = None
    await elected(house.one)
    house.api.forbidden.add(("update", PATH))
    with pytest.raises(StateError, match="403"):
        await house.one.acquire()
