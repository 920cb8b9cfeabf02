"""The election of a leader over a real API server, with the chart's permissions."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowcontrol_server.config.sources import Kubernetes
from flowcontrol_server.state.election import Election
from flowcontrol_server.state.kube_lock import KubeLock, lease_name
from tests.kubernetes.conftest import Place
from tests.support.helm import rendered
from tests.support.told import eventually

DURATION_S = 4
SEEN_S = 60.0
LEASE = {
    "apiVersion": "coordination.k8s.io/v1",
    "kind": "Lease",
    "metadata": {"name": lease_name("llama")},
}
pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]


@asynccontextmanager
async def electing(place: Place, directory: Path) -> AsyncIterator[Callable[[str], Election]]:
    """What makes replicas take part, by their names."""
    values = {"config": {"availability": {"election": "kubernetes"}}}
    for document in rendered(values, place.namespace):
        if document["kind"] in {"ServiceAccount", "Role", "RoleBinding"}:
            await place.cluster.apply(document, place.namespace)
    user = {"token": await place.cluster.token("fc-flowcontrol", place.namespace)}
    settings = Kubernetes(kubeconfig=place.running.kubeconfig(directory, user, place.namespace))
    locks: list[KubeLock] = []
    elections: list[Election] = []

    async def elected(_token: int) -> None:
        """Lead."""

    async def deposed() -> None:
        """Lead no more."""

    def begin(name: str) -> Election:
        """Let one more replica take part."""
        locks.append(KubeLock(settings, "llama", name, DURATION_S))
        elections.append(Election(locks[-1], DURATION_S, elected, deposed))
        elections[-1].begin()
        return elections[-1]

    try:
        yield begin
    finally:
        for election in elections:
            await election.resign()
        for lock in locks:
            await lock.close()


async def test_one_resigns(place: Place, tmp_path: Path) -> None:
    """One of two leads, which the Lease says; when it resigns the other leads at once."""
    async with electing(place, tmp_path) as begin:
        one = begin("one")
        await eventually(one.is_leader, SEEN_S)
        other = begin("other")
        await eventually(lambda: "standby" in other.role(), SEEN_S)
        first = (await place.cluster.get(LEASE, place.namespace))["spec"]
        led = one.is_leader(), other.is_leader()
        await one.resign()
        await eventually(other.is_leader, SEEN_S)
        second = (await place.cluster.get(LEASE, place.namespace))["spec"]

    assert led == (True, False)
    assert (first["holderIdentity"], first["leaseDurationSeconds"]) == ("one", DURATION_S)
    assert (second["holderIdentity"], second["leaseTransitions"]) == ("other", 2)
    assert other.problem is None


async def test_outage(place: Place, tmp_path: Path) -> None:
    """Without the API server no replica leads once the lease has ended; then one does again."""
    async with electing(place, tmp_path) as begin:
        replicas = [begin("one"), begin("other")]
        await eventually(lambda: any(each.is_leader() for each in replicas), SEEN_S)
        place.running.stop_server()
        await eventually(lambda: not any(each.is_leader() for each in replicas), SEEN_S)
        await eventually(lambda: all(each.problem for each in replicas), SEEN_S)
        await asyncio.to_thread(place.running.start_server)
        await eventually(lambda: any(each.is_leader() for each in replicas), SEEN_S)
        leaders = sum(each.is_leader() for each in replicas)
        await eventually(lambda: not any(each.problem for each in replicas), SEEN_S)

    assert leaders == 1
