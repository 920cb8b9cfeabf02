"""A control plane for all tests of this folder, and a namespace of its own for each."""

from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import pytest

from tests.support.control_plane import Cluster, ControlPlane, control_plane


class Place(NamedTuple):
    """Where a test works."""

    running: ControlPlane
    cluster: Cluster
    namespace: str


@pytest.fixture(name="running", scope="session")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane: etcd and an API server."""
    with control_plane(tmp_path_factory.mktemp("control-plane")) as running:
        yield running


_numbers = iter(range(1_000_000))


@pytest.fixture(name="place")
async def _place(running: ControlPlane) -> AsyncIterator[Place]:
    """A namespace that nothing is in."""
    namespace = f"models-{next(_numbers)}"
    async with Cluster(running) as cluster:
        for kind, name in (("Namespace", namespace), ("ServiceAccount", "default")):
            document = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
            await cluster.apply(document, namespace)
        yield Place(running, cluster, namespace)
