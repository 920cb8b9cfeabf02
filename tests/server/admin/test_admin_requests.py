"""Explain, ListDecisions, EvictFlow and Drain through a real gRPC server and channel."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, final

import grpc
import pytest

from flowcontrol.config import BandSettings, Concurrency, ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import NotRunningError
from flowcontrol.events import DrainBegan, EndpointsChanged, ObjectivesChanged
from flowcontrol.request import FlowKey, Outcome, Request
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin.api import FlowControlServicer
from flowcontrol_server.requests.classify import Intake, classify_with_origin
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked
from flowcontrol_server.requests.rules import Rule
from tests.support.silent_log import silent_log

TIMEOUT_S = 10.0
POOL = EndpointsChanged(("10.0.0.5:8000",))
CONFIG = ControllerConfig(
    detectors=(Concurrency(requests_max=1),), default_settings=BandSettings(ttl_ns=60_000_000_000)
)
BUDGET_NS = 3_000_000_000


@final
class House:
    """A gate with one slot behind it, and a channel to its admin API."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.role = ""
        """In the election."""
        self.ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.gate = FlowGate(
            CONFIG, 1000, lambda _parked, _decision: None, self.ended.set_result, recent_max=50
        )
        self.drains = 0
        self._channel = channel

    def drain(self) -> int:
        """Count it."""
        self.drains += 1
        return BUDGET_NS

    def park(self, flow_id: str, objective: str | None = None, client_id: str = "") -> Parked:
        """A request."""
        return self.gate.park(Request(0, flow_id, objective, 10), {"x-request-id": client_id})

    async def call(self, method: str, message: Any, kind: Any) -> Any:
        """Ask the admin API."""
        call = self._channel.unary_unary(
            f"/flowcontrol.v1.FlowControl/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=kind.FromString,
        )
        return await call(message, timeout=TIMEOUT_S)

    async def explain(self, request_id: object) -> api.Explanation:
        """Ask about a request."""
        message = api.ExplainRequest(request_id=str(request_id))
        said: api.Explanation = await self.call("Explain", message, api.Explanation)
        return said

    async def decisions(self, **wanted: Any) -> api.ListDecisionsResponse:
        """Ask for decisions."""
        message = api.ListDecisionsRequest(**wanted)
        said: api.ListDecisionsResponse = await self.call(
            "ListDecisions", message, api.ListDecisionsResponse
        )
        return said

    async def evict(self, priority: int, flow_id: str) -> int:
        """Evict a flow."""
        message = api.EvictFlowRequest(priority=priority, flow_id=flow_id)
        said: api.EvictFlowResponse = await self.call("EvictFlow", message, api.EvictFlowResponse)
        return said.evicted


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    """A running one, with a pool and two objectives."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        each = House(channel)
        api_grpc.add_FlowControlServicer_to_server(  # type: ignore[no-untyped-call]  # generated
            FlowControlServicer(
                each.gate, "llama", silent_log(each.gate), each.drain, role=lambda: each.role
            ),
            server,
        )
        await server.start()
        each.gate.start()
        each.gate.post(ObjectivesChanged({"chat": 10, "batch": -1}))
        each.gate.post(POOL)
        try:
            yield each
        finally:
            each.gate.post(DrainBegan(0))
            await asyncio.wait_for(each.ended, TIMEOUT_S)
            assert each.gate.join(TIMEOUT_S)
            await server.stop(None)


async def outcome(parked: Parked) -> Outcome:
    """What was decided."""
    return (await asyncio.wait_for(asyncio.shield(parked.future()), TIMEOUT_S)).outcome


class TestExplain:
    """One request, live or not."""

    async def test_waiting(self) -> None:
        """By our id and by the client's: the same answer."""
        async with house() as it:
            await outcome(it.park("a", "chat"))
            waiting = it.park("b", "batch", "their-id")
            said, same = await it.explain(waiting.request_id), await it.explain("their-id")

            assert said.request_id == same.request_id == waiting.request_id
            assert said.state == api.Explanation.WAITING
            assert said.gate == api.Explanation.POOL_FULL
            assert (said.priority, said.flow_id) == (-1, "b")
            assert said.client_request_id == "their-id"
            assert [each.address for each in said.endpoints] == ["10.0.0.5:8000"]
            assert said.deadline_in.seconds in range(50, 61)
            assert not said.HasField("decision")
            assert said.flow.fair_share == 1.0
            assert "the pool is full" in said.sentences[1]

    async def test_in_flight_and_ended(self) -> None:
        """Its decision is there from then on."""
        async with house() as it:
            parked = it.park("a", "chat")
            await outcome(parked)
            live = await it.explain(parked.request_id)
            it.gate.leave(parked)
            ended = await it.explain(parked.request_id)

            assert live.state == api.Explanation.IN_FLIGHT
            assert live.gate == api.Explanation.GATE_UNSPECIFIED
            assert live.decision.outcome == "dispatched"
            assert live.decision.HasField("in_flight")
            assert not live.decision.ended
            assert ended.state == api.Explanation.ENDED
            assert ended.decision.ended
            assert "was dispatched: there was room at once" in ended.sentences[0]

    async def test_election(self) -> None:
        """With an election it says who decides here, and whom to ask about what is not known."""
        async with house() as it:
            parked = it.park("a", "chat")
            await outcome(parked)
            alone = await it.explain(parked.request_id)
            it.role = "this replica leads"
            leading = await it.explain(parked.request_id)
            it.role = "this replica is a standby: ask the one that leads"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.explain("elsewhere")

            assert leading.sentences[len(alone.sentences) :] == ["This replica leads."]
            assert refused.value.details() == (
                "request 'elsewhere' is neither live nor among the newest decisions; "
                "this replica is a standby: ask the one that leads"
            )

    async def test_classification(self) -> None:
        """What named objective and flow, as `classify` prints it, live and afterwards."""
        async with house() as it:
            rules = Intake(rules=(Rule(objective="chat"),))
            named = {"x-llm-d-inference-fairness-id": "a"}
            request, origin = classify_with_origin(named, {}, rules)
            parked = it.gate.park(request, named, "", origin)
            await outcome(parked)
            live = await it.explain(parked.request_id)
            it.gate.leave(parked)
            ended = await it.explain(parked.request_id)

            for said in (live, ended):
                assert said.objective == "chat"
                assert said.objective_origin == "requests.rules[0]"
                assert said.flow_id_origin == "header x-llm-d-inference-fairness-id"
                assert said.sentences[-1] == (
                    "Its objective is chat (requests.rules[0]), "
                    "its flow id a (header x-llm-d-inference-fairness-id)."
                )

    async def test_evicted(self) -> None:
        """Why, in a sentence."""
        async with house() as it:
            await outcome(it.park("a", "chat"))
            waiting = it.park("b", client_id="x")
            it.gate.leave(waiting)
            await outcome(waiting)
            said = await it.explain("x")

            assert said.state == api.Explanation.ENDED
            assert said.decision.outcome == "evicted-cancelled"
            assert "was evicted: its client left" in said.sentences[0]

    @pytest.mark.parametrize("request_id", ["", "999", "nobody's", "9" * 40])
    async def test_not_known(self, request_id: str) -> None:
        """NOT_FOUND, and it says what was asked; no id is not that of one without."""
        async with house() as it:
            await outcome(it.park("a", "chat"))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.explain(request_id)

            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            assert repr(request_id) in (refused.value.details() or "")


class TestListDecisions:
    """The newest, the latest first."""

    async def test_all_and_some(self) -> None:
        """With filters, and bounded."""
        async with house() as it:
            first = it.park("a", "chat", "c1")
            await outcome(first)
            for flow_id in ("b", "b", "c"):
                waiting = it.park(flow_id)
                it.gate.leave(waiting)
                await outcome(waiting)
            newest = await it.decisions()

            assert [each.request_id for each in newest.decisions] == [4, 3, 2, 1]
            assert newest.kept == 4
            assert newest.decisions[3].client_request_id == "c1"
            assert newest.decisions[3].objective == "chat"
            assert newest.decisions[3].time.seconds > 1_600_000_000
            assert len((await it.decisions(flow_id="b")).decisions) == 2
            assert len((await it.decisions(priority=10)).decisions) == 1
            assert len((await it.decisions(outcome="evicted-cancelled")).decisions) == 3
            assert len((await it.decisions(count_max=1)).decisions) == 1

    async def test_no_such_outcome(self) -> None:
        """INVALID_ARGUMENT and what there is: a word misspelt does not look as if nothing came."""
        async with house() as it:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.decisions(outcome="evicted_ttl")

            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            said = refused.value.details() or ""
            assert said.startswith("outcome must be one of dispatched, rejected-capacity, ")
            assert said.endswith(", got 'evicted_ttl'")


class TestEvictFlow:
    """What waits of one flow goes."""

    async def test_only_what_waits_of_it(self) -> None:
        """In flight goes on, other flows and bands wait on, who comes later waits."""
        async with house() as it:
            in_flight = it.park("a")
            await outcome(in_flight)
            gone = [it.park("a") for _ in range(3)]
            other, elsewhere = it.park("b"), it.park("a", "batch")

            assert await it.evict(0, "a") == 3
            assert {await outcome(each) for each in gone} == {Outcome.EVICTED_OPERATOR}
            later = it.park("a")
            assert await it.evict(7, "a") == 0
            assert await it.evict(0, "nobody") == 0
            snapshot = await it.gate.snapshot()
            assert (snapshot.waiting, snapshot.in_flight) == (3, 1)
            assert not any(each.decision is not None for each in (other, elsewhere, later))

    async def test_a_flow_must_be_named(self) -> None:
        """Nothing is evicted by mistake."""
        async with house() as it:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.evict(0, "")

            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class TestDrain:
    """As SIGTERM does."""

    async def test_it_is_begun(self) -> None:
        """And its budget told."""
        async with house() as it:
            said = await it.call("Drain", api.DrainRequest(), api.DrainResponse)

            assert it.drains == 1
            assert said.budget.ToNanoseconds() == BUDGET_NS

    async def test_afterwards_nobody_can_be_asked(self) -> None:
        """UNAVAILABLE; what was decided can still be explained."""
        async with house() as it:
            parked = it.park("a")
            await outcome(parked)
            it.gate.post(DrainBegan(0))
            await asyncio.wait_for(asyncio.shield(it.ended), TIMEOUT_S)

            for call in (it.evict(0, "a"), it.explain(parked.request_id)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            it.gate.leave(parked)
            assert (await it.explain(parked.request_id)).decision.outcome == "dispatched"


class TestQuestions:
    """What the admin API rests on."""

    async def test_a_question_that_fails_harms_nobody_else(self) -> None:
        """Whoever asked hears of it; the engine goes on."""

        def wrong(_controller: FlowController, _now_ns: int) -> None:
            message = "no such thing"
            raise LookupError(message)

        async with house() as it:
            with pytest.raises(LookupError, match="no such thing"):
                await it.gate.ask(wrong)
            assert await outcome(it.park("a")) is Outcome.DISPATCHED

    async def test_all_posted_before_is_decided(self) -> None:
        """The answer sees it."""
        async with house() as it:
            for _ in range(5):
                it.park("a")
            assert await it.gate.ask(lambda controller, _now_ns: controller.waiting) == 4

    async def test_whoever_is_gone_is_not_answered(self) -> None:
        """And nothing is left of the question."""
        async with house() as it:
            asking = asyncio.create_task(it.gate.ask(lambda _controller, _now_ns: 1))
            await asyncio.sleep(0)
            asking.cancel()
            assert await it.gate.ask(lambda _controller, _now_ns: 2) == 2

    async def test_nobody_waits_for_an_engine_that_is_gone(self) -> None:
        """Neither before nor after that is known here."""
        async with house() as it:
            it.gate.post(DrainBegan(0))
            late = asyncio.create_task(it.gate.ask(lambda _controller, _now_ns: 1))
            evicting = asyncio.create_task(it.gate.evict_flow(FlowKey(0, "a")))
            await asyncio.wait_for(asyncio.shield(it.ended), TIMEOUT_S)
            results = await asyncio.gather(late, evicting, return_exceptions=True)

            assert all(each in (0, 1) or isinstance(each, NotRunningError) for each in results)
            with pytest.raises(NotRunningError):
                await it.gate.ask(lambda _controller, _now_ns: 1)
