"""InferenceObjectives that come, change and go while requests wait."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowcontrol.v1 import flowcontrol_pb2 as api
from tests.e2e.gateway import Gateway
from tests.e2e.harness import OBJECTIVES, Spec, Stack, eventually

pytestmark = pytest.mark.e2e

SEEN_S = 2.0
"""How long a manifest may take from being written to being in force."""


def bands(snapshot: api.Snapshot) -> dict[int, tuple[bool, int, int]]:
    """Return what there is to know of each band: is it declared, who waits, who is in flight."""
    return {b.priority: (b.declared, b.waiting, b.in_flight) for b in snapshot.bands}


def objectives(snapshot: api.Snapshot) -> dict[str, int]:
    """Return the priorities in force."""
    return {objective.name: objective.priority for objective in snapshot.objectives}


@pytest.fixture(autouse=True)
async def folder(gateway: Gateway) -> AsyncIterator[None]:
    """The objectives folder, afterwards as it was before."""
    yield
    for path in gateway.stack.objectives.iterdir():
        if path.stem not in OBJECTIVES:
            path.unlink()
    await gateway.until_so(lambda now: objectives(now) == OBJECTIVES, SEEN_S)


class TestLive:
    """No restart for anything."""

    async def test_new_objective(self, gateway: Gateway) -> None:
        """A new objective makes a band at once; its requests go before those that wait already."""
        _, occupying = await gateway.occupy()
        await gateway.call(name="early")
        await gateway.until(waiting=1)
        gateway.stack.declare("gold", 70)
        added = await gateway.until_so(lambda now: 70 in bands(now), SEEN_S)
        await gateway.call(objective="gold", name="golden")
        await gateway.until(waiting=2)
        names = []
        call = occupying
        for _ in range(2):
            await call.respond()
            call = await gateway.next_call()
            names.append(call.name)
        await call.respond()

        assert bands(added)[70] == (True, 0, 0)
        assert objectives(added)["gold"] == 70
        assert names == ["golden", "early"]

    async def test_changed_priority(self, gateway: Gateway) -> None:
        """Who waits keeps its place in the old band, which drains and disappears with its last.

        A request of the same objective that comes after the change belongs to the new band.
        """
        gateway.stack.declare("silver", 20)
        await gateway.until_so(lambda now: 20 in bands(now), SEEN_S)
        _, occupying = await gateway.occupy()
        await gateway.call(objective="silver", name="before")
        await gateway.until(waiting=1)
        gateway.stack.declare("silver", 30)
        changed = await gateway.until_so(lambda now: 30 in bands(now), SEEN_S)
        await gateway.call(objective="silver", name="after")
        waiting = await gateway.until(waiting=2)
        await occupying.respond()
        first = await gateway.next_call()
        await first.respond()
        second = await gateway.next_call()
        last = await gateway.until(waiting=0, in_flight=1)
        await second.respond()
        gone = await gateway.until_so(lambda now: 20 not in bands(now))

        assert bands(changed)[20] == (False, 1, 0)
        assert (bands(waiting)[30], bands(waiting)[20]) == ((True, 1, 0), (False, 1, 0))
        assert [first.name, second.name] == ["after", "before"]
        assert bands(last)[20] == (False, 0, 1)
        assert 30 in bands(gone)

    async def test_removed_objective(self, gateway: Gateway) -> None:
        """A band whose objective is removed drains; a newcomer that names it counts as unknown."""
        gateway.expected_complaints.add("objective_unknown")
        gateway.stack.declare("bronze", 5)
        await gateway.until_so(lambda now: 5 in bands(now), SEEN_S)
        _, occupying = await gateway.occupy()
        await gateway.call(objective="bronze", name="first-bronze")
        await gateway.until(waiting=1)
        gateway.stack.remove_manifest("bronze.yaml")
        removed = await gateway.until_so(lambda now: "bronze" not in objectives(now), SEEN_S)
        await gateway.call(objective="bronze", name="too-late")
        await gateway.until(waiting=2)
        await occupying.respond()
        first = await gateway.next_call()
        await first.respond()
        second = await gateway.next_call()
        gone = await gateway.snapshot()
        await second.respond()
        line = await gateway.decided("too-late")

        assert bands(removed)[5] == (False, 1, 0)
        assert [first.name, second.name] == ["first-bronze", "too-late"]
        assert 5 not in bands(gone)
        assert (line["priority"], line["objective"]) == (0, "bronze")

    async def test_empty_band_goes_at_once(self, gateway: Gateway) -> None:
        """A band in which nothing waits and nothing is in flight disappears with its objective."""
        gateway.stack.declare("brief", 6)
        await gateway.until_so(lambda now: 6 in bands(now), SEEN_S)
        gateway.stack.remove_manifest("brief.yaml")
        gone = await gateway.until_so(lambda now: "brief" not in objectives(now), SEEN_S)

        assert 6 not in bands(gone)

    async def test_written_while_the_service_starts(self, tmp_path: Path) -> None:
        """A manifest that is written while the service is still opening its ports counts too."""
        stack = Stack(Spec(), tmp_path)

        async def is_open() -> bool:
            _, writer = await asyncio.open_connection(*stack.grpc)
            writer.close()
            return True

        try:
            starting = asyncio.ensure_future(stack.start())
            await eventually(is_open, 20.0, "the first port is open")
            stack.declare("meanwhile", 33)
            await starting
            async with Gateway(stack) as gateway:
                added = await gateway.until_so(lambda now: "meanwhile" in objectives(now), SEEN_S)
        finally:
            stack.stop()

        assert objectives(added) == {"meanwhile": 33, **OBJECTIVES}


class TestMistakes:
    """What a bad manifest does: be complained about, nothing else."""

    async def test_last_good_is_kept(self, gateway: Gateway) -> None:
        """A manifest that breaks keeps what it last said; the mistake is logged and counted."""
        counter = "flowcontrol_objective_errors_total"
        gateway.expected_complaints.add("objective_rejected")
        gateway.stack.declare("iron", 40)
        await gateway.until_so(lambda now: 40 in bands(now), SEEN_S)
        before = await gateway.metric(counter)
        gateway.stack.write_manifest("iron.yaml", "kind: InferenceObjective\nmetadata: {name: [")

        async def is_counted() -> bool:
            return await gateway.metric(counter) > before

        await eventually(is_counted, SEEN_S, "the mistake is counted")
        kept = await gateway.snapshot()
        complaint = gateway.stack.events("objective_rejected")[-1]
        gateway.stack.declare("iron", 41)
        mended = await gateway.until_so(lambda now: 41 in bands(now), SEEN_S)

        assert objectives(kept)["iron"] == 40
        assert bands(kept)[40] == (True, 0, 0)
        assert complaint["file"].endswith("/iron.yaml")
        assert "while parsing" in complaint["problem"]
        assert complaint["level"] == "error"
        assert 40 not in bands(mended)

    async def test_others_are_not_taken_down(self, gateway: Gateway) -> None:
        """A file that never was any good does not keep another from being read."""
        gateway.expected_complaints.add("objective_rejected")
        gateway.stack.write_manifest("bad.yaml", "- not a manifest")
        gateway.stack.declare("good", 45)
        added = await gateway.until_so(lambda now: 45 in bands(now), SEEN_S)

        assert objectives(added) == {"good": 45, **OBJECTIVES}
