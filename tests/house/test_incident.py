"""One incident, told alike by dashboard, admin API, ledger and log, and decided again alike."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from aiohttp import ClientSession
from click.testing import CliRunner

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.cli import main
from tests.support import incident
from tests.support.streams import Running, Streams, running

pytestmark = pytest.mark.slow
TOKEN = "a-token-long-enough"
PATIENCE_S = 20.0
SETTINGS: dict[str, Any] = {
    "endpoints": {"static": ["10.0.0.5:8000"]},
    "picker": "least-loaded",
    "saturation": {"maxConcurrency": 1},
    "flowControl": {"bands": [{"match": {"maxPriority": -1}, "maxRequests": 2}]},
    "ledger": {"file": "ledger.jsonl"},
}
CANDIDATE = """\
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
objectives: {directory: objectives}
endpoints: {static: []}
picker: least-loaded
saturation: {maxConcurrency: 2}
"""


class Scene(NamedTuple):
    """A burst of a tenant's batch work behind somebody's chat, over by now."""

    service: Running
    session: ClientSession
    channel: grpc.aio.Channel
    statuses: dict[str, int]

    async def ask(self, method: str, message: Any, kind: Any) -> Any:
        """Ask the admin API."""
        call = self.channel.unary_unary(
            f"/flowcontrol.v1.FlowControl/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=kind.FromString,
        )
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        return await call(message, metadata=metadata, timeout=PATIENCE_S)

    async def get(self, path: str, **parameters: str) -> str:
        """Ask over HTTP."""
        async with self.session.get(f"{self.service.http}{path}", params=parameters) as answer:
            return await answer.text()


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    """One chat in flight; of five batch requests two wait, three are refused; one flow evicted."""
    (directory / "candidate.yaml").write_text(CANDIDATE)
    objectives = {"chat": 10, "batch": -1}
    async with (
        running(directory, SETTINGS, objectives, FLOWCONTROL_ADMIN_TOKEN=TOKEN) as service,
        ClientSession() as session,
        grpc.aio.insecure_channel(service.grpc) as channel,
    ):
        streams, release = Streams(service.grpc), asyncio.Event()
        it = Scene(service, session, channel, {})

        async def come(client_id: str, objective: str) -> None:
            it.statuses[client_id] = await streams.ask(
                "nightly", objective=objective, client_id=client_id, until=release
            )

        asking = [asyncio.create_task(come("chat-0", "chat"))]
        await until(partial(_has_in_flight, it, 1))
        for number in range(5):
            asking.append(asyncio.create_task(come(f"batch-{number}", "batch")))
            await until(partial(_knows, it, number + 2))
        evicted = await it.ask(
            "EvictFlow",
            api.EvictFlowRequest(priority=-1, flow_id="nightly"),
            api.EvictFlowResponse,
        )
        assert evicted.evicted == 2
        release.set()
        await asyncio.gather(*asking)
        await streams.close()
        await until(partial(_has_in_flight, it, 0))
        yield it


async def snapshot(it: Scene) -> api.Snapshot:
    """The engine now."""
    message = api.GetSnapshotRequest()
    said: api.Snapshot = await it.ask("GetSnapshot", message, api.Snapshot)
    return said


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for another process."""
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)


async def _has_in_flight(it: Scene, count: int) -> bool:
    return (await snapshot(it)).in_flight == count


async def _knows(it: Scene, count: int) -> bool:
    said = await snapshot(it)
    decided = sum(
        each.count for band in said.bands for each in band.outcomes if each.outcome != "completed"
    )
    return decided + said.waiting >= count


async def _measures(it: Scene, sample: str) -> bool:
    return sample in await it.get("/metrics")


async def test_it_is_explained_alike_everywhere(tmp_path: Path) -> None:
    """Why was batch-4 refused, and what became of batch-0?"""
    async with scene(tmp_path) as it:
        assert it.statuses == {"chat-0": 200} | {f"batch-{number}": 429 for number in range(5)}
        explained = {
            name: await it.ask("Explain", api.ExplainRequest(request_id=name), api.Explanation)
            for name in it.statuses
        }
        listed = await it.ask(
            "ListDecisions", api.ListDecisionsRequest(), api.ListDecisionsResponse
        )
        shown = json.loads(await it.get("/api/explain", request="batch-4"))
        assert await it.service.stopped() == 0
        logged = {each["client_request_id"]: each for each in it.service.lines("request_decided")}
        complaints = it.service.lines("ledger_not_written")
    assert complaints == []

    refused = "the queue of its band had no room for it (100% saturation, 2 left waiting)"
    assert explained["batch-4"].sentences[0].endswith(f"was rejected: {refused}.")
    evicted = "an operator evicted the waiting requests of its flow"
    assert evicted in explained["batch-0"].sentences[0]
    assert shown["sentences"] == list(explained["batch-4"].sentences)
    by_client = {each.client_request_id: each for each in listed.decisions}
    assert by_client["batch-4"].reason == refused

    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    written = {each["request_id"]: each for line in ledger for each in line.get("decisions", ())}
    for name, said in explained.items():
        decision = written[said.request_id]
        assert decision["outcome"] == said.decision.outcome == logged[name]["outcome"]
        assert decision["priority"] == said.priority == logged[name]["priority"]
        assert logged[name]["request_id"] == said.request_id
    assert written[explained["batch-4"].request_id]["without_room"] == ["band"]

    again = CliRunner().invoke(main, ["replay", str(tmp_path / "ledger.jsonl")])
    assert again.exit_code == 0, again.output
    assert "decided again identically: all 6 decisions" in again.output

    other = CliRunner().invoke(
        main,
        ["replay", str(tmp_path / "ledger.jsonl"), "--config", str(tmp_path / "candidate.yaml")],
    )
    assert other.exit_code == 0, other.output
    assert "3  rejected-capacity > evicted-operator" in other.output
    assert "1  evicted-operator > dispatched" in other.output


def test_without_a_folder() -> None:
    """The script that plays it says what it needs."""
    result = CliRunner().invoke(incident.main, [])

    assert result.exit_code == 2
    assert "Missing argument 'FOLDER'" in result.output


async def test_drain_by_call(tmp_path: Path) -> None:
    """As SIGTERM does: what is in flight goes on, then the process ends with 0."""
    async with (
        running(tmp_path, SETTINGS, {}, FLOWCONTROL_ADMIN_TOKEN=TOKEN) as service,
        ClientSession() as session,
        grpc.aio.insecure_channel(service.grpc) as channel,
    ):
        it = Scene(service, session, channel, {})
        said = await it.ask("Drain", api.DrainRequest(), api.DrainResponse)
        assert said.budget.seconds == 30
        assert await service.ended() == 0
        assert [line["cause"] for line in service.lines("drain_began")] == ["admin API"]
