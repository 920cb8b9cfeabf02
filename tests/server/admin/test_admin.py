"""flowcontrol.v1 through a real gRPC server and channel."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from itertools import pairwise
from typing import NamedTuple, TypeVarTuple, final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from flowcontrol.config import (
    Adaptive,
    BandSettings,
    BandTemplate,
    Concurrency,
    ControllerConfig,
    Limits,
    Picker,
    Utilization,
)
from flowcontrol.events import (
    DrainBegan,
    EndpointsChanged,
    LoadObserved,
    ObjectivesChanged,
)
from flowcontrol.request import Request
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin.api import SERVICE, WATCHES_PER_PEER_MAX, FlowControlServicer
from flowcontrol_server.requests.gate import NEWS_WITHIN_S, FlowGate
from flowcontrol_server.requests.parked import Parked
from tests.support.silent_log import SILENT, silent_log
from tests.support.standing import ABOUT, standing

PROBLEM = ("source", "chat.yaml", "is not YAML")
TIMEOUT_S = 10.0


def request(flow_id: str = "tenant", objective: str | None = None) -> Request:
    """A request of 100 bytes that nobody has taken in."""
    return Request(0, flow_id, objective, 100)


Arguments = TypeVarTuple("Arguments")


class Admin(NamedTuple):
    """A running service: its gate, what its owner hears, and a channel to it."""

    gate: FlowGate
    ended: asyncio.Future[BaseException | None]
    channel: grpc.aio.Channel

    async def get(self, flows_max: int = 0) -> api.Snapshot:
        """Ask for one snapshot."""
        call = self.channel.unary_unary(
            "/flowcontrol.v1.FlowControl/GetSnapshot",
            request_serializer=api.GetSnapshotRequest.SerializeToString,
            response_deserializer=api.Snapshot.FromString,
        )
        asked = api.GetSnapshotRequest(flows_max=flows_max)
        snapshot: api.Snapshot = await call(asked, timeout=TIMEOUT_S)
        return snapshot

    def watch(self, interval_s: float = 0.0) -> AsyncIterator[api.Snapshot]:
        """Ask for snapshots without end."""
        call = self.channel.unary_stream(
            "/flowcontrol.v1.FlowControl/WatchSnapshot",
            request_serializer=api.WatchSnapshotRequest.SerializeToString,
            response_deserializer=api.Snapshot.FromString,
        )
        return aiter(call(watch_request(interval_s), timeout=TIMEOUT_S))


def watch_request(interval_s: float) -> api.WatchSnapshotRequest:
    """A request for snapshots at that interval; 0 leaves it unset."""
    interval = Duration()
    interval.FromNanoseconds(round(interval_s * 1e9))
    return api.WatchSnapshotRequest(interval=interval if interval_s else None)


@asynccontextmanager
async def running_gate(
    config: ControllerConfig,
) -> AsyncIterator[tuple[FlowGate, "asyncio.Future[BaseException | None]"]]:
    """A gate with its processor, drained and joined at the end."""
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    gate = FlowGate(config, 10_000, lambda _parked, _decision: None, ended.set_result)
    gate.start()
    try:
        yield gate, ended
    finally:
        gate.post(DrainBegan(0))
        await asyncio.wait_for(ended, TIMEOUT_S)
        assert gate.join(TIMEOUT_S)


@asynccontextmanager
async def admin(config: ControllerConfig | None = None) -> AsyncIterator[Admin]:
    """The admin service of a pool called llama."""
    async with running_gate(config or ControllerConfig()) as (gate, ended):
        server = grpc.aio.server()
        api_grpc.add_FlowControlServicer_to_server(  # type: ignore[no-untyped-call]  # generated
            FlowControlServicer(
                gate, "llama", silent_log(gate), lambda: 0, status=standing(PROBLEM)
            ),
            server,
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Admin(gate, ended, channel)
        await server.stop(None)


async def settled(parked: Parked) -> Parked:
    """The request, when it is decided."""
    await asyncio.wait_for(asyncio.shield(parked.future()), TIMEOUT_S)
    return parked


class TestGetSnapshot:
    """The state, once."""

    async def test_idle(self) -> None:
        """An engine that nobody told anything has a pool, a time and nothing else."""
        async with admin() as service:
            snapshot = await service.get()

        assert snapshot.pool == "llama"
        assert snapshot.time.seconds > 1_600_000_000
        assert list(snapshot.bands) == []
        assert list(snapshot.endpoints) == []
        assert snapshot.waiting == 0
        assert not snapshot.draining

    async def test_everything(self) -> None:
        """Bands, flows, endpoints, objectives and outcomes are told as the engine has them."""
        config = ControllerConfig(
            templates=(
                BandTemplate(
                    priority_min=10,
                    settings=BandSettings(limits=Limits(requests_max=2, bytes_max=500)),
                ),
            ),
            detectors=(Concurrency(requests_max=1),),
            picker=Picker.LEAST_LOADED,
        )
        async with admin(config) as service:
            gate = service.gate
            gate.post(ObjectivesChanged({"chat": 10, "batch": -1}))
            gate.post(EndpointsChanged(("10.0.0.5:8000", "10.0.0.6:8000")))
            gate.leave(await settled(gate.park(request(objective="nobody"))))
            for _ in range(2):
                await settled(gate.park(request("tenant", "chat")))
            *_waiting, refused = [gate.park(request(flow, "chat")) for flow in "bab"]
            await settled(refused)
            gate.post(EndpointsChanged(("10.0.0.5:8000",)))

            got = await service.get()

        assert (got.waiting, got.waiting_bytes, got.in_flight) == (2, 200, 2)
        assert got.unknown_objectives == 1
        assert got.saturation >= 1.0
        assert [(each.name, each.priority) for each in got.objectives] == [
            ("batch", -1),
            ("chat", 10),
        ]
        assert [(each.address, each.in_flight, each.saturation) for each in got.endpoints] == [
            ("10.0.0.5:8000", 1, 1.0)
        ]
        assert [band.priority for band in got.bands] == [10, 0, -1]
        assert [band.declared for band in got.bands] == [True, True, True]
        top, middle, bottom = got.bands
        assert (top.waiting, top.waiting_bytes, top.in_flight) == (2, 200, 2)
        assert (dict(top.limits), top.ceiling) == ({"requests": 2, "bytes": 500}, 1.0)
        assert top.flow_count == 3
        assert {flow.flow_id: (flow.waiting, flow.in_flight) for flow in top.flows} == {
            "a": (1, 0),
            "b": (1, 0),
            "tenant": (0, 2),
        }
        assert top.HasField("oldest_wait")
        assert not bottom.HasField("oldest_wait")
        assert not bottom.limits, "unlimited"
        assert [flow.HasField("oldest_wait") for flow in top.flows] == [True, True, False]
        assert [(each.outcome, each.count) for each in top.outcomes] == [
            *(("completed", 0), ("dispatched", 2), ("rejected-capacity", 1)),
        ]
        assert [(each.outcome, each.count) for each in middle.outcomes] == [
            *(("completed", 1), ("dispatched", 1)),
        ]
        assert list(bottom.outcomes) == []

    async def test_picker_off(self) -> None:
        """While Envoy balances, in-flight counts of single endpoints are not known, not zero."""
        async with admin() as service:
            service.gate.post(EndpointsChanged(("10.0.0.5:8000",)))
            (endpoint,) = (await service.get()).endpoints

        assert not endpoint.HasField("in_flight")
        assert endpoint.saturation == 0.0

    async def test_detectors(self) -> None:
        """Each with its limit, and how that was found; what settled requests is told as well."""
        config = ControllerConfig(detectors=(Utilization(), Adaptive(limit_first=2)))
        async with admin(config) as service:
            service.gate.post(EndpointsChanged(("10.0.0.5:8000",)))
            service.gate.post(LoadObserved("10.0.0.5:8000", 1, 1, 0.2))
            await service.get()
            service.gate.post(EndpointsChanged(("10.0.0.5:8000", "10.0.0.6:8000")))
            first, second = service.gate.park(request()), service.gate.park(request())
            await asyncio.gather(settled(first), settled(second))
            service.gate.leave(first)
            service.gate.leave(second)
            got = await service.get()

        scraped, found = got.detectors
        assert [(each.stage, each.kind) for each in (scraped, found)] == [
            ("both", "utilization"),
            ("both", "adaptive"),
        ]
        assert not scraped.HasField("requests_limit")
        assert found.requests_limit == 4
        (move,) = found.moves
        assert (move.before, move.after, move.address) == (2.0, 4.0, "")
        assert move.reason == "1 endpoints became 2"
        assert move.ago.ToNanoseconds() > 0
        (problem,) = got.problems
        assert (problem.kind, problem.about, problem.text) == PROBLEM
        assert problem.since.seconds == 1_700_000_100
        assert got.standby is not ABOUT.is_deciding
        assert got.about.version == ABOUT.version
        assert got.about.configuration_hash == ABOUT.configuration
        assert tuple(got.about.configuration_changes) == ABOUT.changes
        counts = got.settlements
        assert (counts.received, counts.lost, counts.awaited) == SILENT

    async def test_inbox_refusals(self) -> None:
        """Requests that the engine never saw are counted as well."""
        async with admin() as service:
            parked = [service.gate.park(request()) for _ in range(10_001)]
            assert parked[-1].decision is not None

            assert (await service.get()).inbox_refusals == 1

    @pytest.mark.parametrize(
        ("asked", "shown"), [(0, 20), (1, 1), (3, 3), (1000, 1000), (1001, 1000), (2**32 - 1, 1000)]
    )
    async def test_flows_max(self, asked: int, shown: int) -> None:
        """20 flows a band unless asked otherwise, never more than 1000; all are counted."""
        async with admin() as service:
            for number in range(1010):
                service.gate.park(request(flow_id=f"tenant-{number}"))

            (band,) = (await service.get(asked)).bands

        assert len(band.flows) == shown
        assert band.flow_count == 1010

    async def test_longest_backlog_first(self) -> None:
        """The flows shown are those of the longest backlog."""
        async with admin() as service:
            for number in range(5):
                for _ in range(number + 1):
                    service.gate.park(request(flow_id=f"tenant-{number}"))

            (band,) = (await service.get(2)).bands

        assert [(flow.flow_id, flow.waiting) for flow in band.flows] == [
            ("tenant-4", 5),
            ("tenant-3", 4),
        ]

    async def test_draining(self) -> None:
        """While the engine drains it says so; an undeclared band lasts as long as its requests."""
        async with admin() as service:
            service.gate.post(ObjectivesChanged({"chat": 10}))
            service.gate.park(request(objective="chat"))
            service.gate.post(ObjectivesChanged({}))
            service.gate.post(DrainBegan(60 * 10**9))

            snapshot = await service.get()
            service.gate.post(EndpointsChanged(("10.0.0.5:8000",)))

        assert snapshot.draining
        assert [(band.priority, band.declared) for band in snapshot.bands] == [(10, False)]

    async def test_after_the_end(self) -> None:
        """When the processor has ended the service is unavailable, and says why."""
        async with admin() as service:
            service.gate.post(DrainBegan(0))
            await service.ended

            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await service.get()

        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert raised.value.details() == "the processor has stopped"

    def test_service_name(self) -> None:
        """The name that health checks and reflection know."""
        assert SERVICE == "flowcontrol.v1.FlowControl"


@final
class Caller:
    """The context of a call."""

    def peer(self) -> str:
        """Where it comes from."""
        return "ipv4:127.0.0.1:5000"


class HastyLoop(asyncio.SelectorEventLoop):
    """An event loop that notes how long it was to wait, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Note the delay and call at once."""
        self.delays.append(delay)
        return super().call_later(0, callback, *args, context=context)


class TestWatchSnapshot:
    """The state, again and again."""

    async def test_stream(self) -> None:
        """Snapshots come one after the other, each of its own moment, until the caller is gone."""
        parked: list[Parked] = []
        times, counts = [], []
        async with admin() as service:
            async for snapshot in service.watch(interval_s=0.1):
                times.append(snapshot.time.ToNanoseconds())
                counts.append(snapshot.waiting)
                if len(counts) == 3:
                    break
                parked.append(service.gate.park(request()))

        assert counts == [0, 1, 2]
        assert all(later - earlier > 0.09e9 for earlier, later in pairwise(times))

    @pytest.mark.parametrize(
        ("asked_s", "expected_s"),
        [
            *((0.0, 1.0), (1e-9, 0.1), (0.099, 0.1), (0.1, 0.1), (0.5, 0.5), (60.0, 60.0)),
            *((60.001, 60.0), (1e9, 60.0), (-1.0, 0.1)),
        ],
    )
    def test_interval(self, asked_s: float, expected_s: float) -> None:
        """At least 0.1 s, at most 60 s, 1 s when unset."""
        loop = HastyLoop()

        async def scenario() -> None:
            ended: asyncio.Future[BaseException | None] = loop.create_future()
            gate = FlowGate(ControllerConfig(), 1, lambda *_: None, ended.set_result)
            gate.start()
            request = watch_request(asked_s)
            servicer = FlowControlServicer(gate, "llama", silent_log(gate), lambda: 0)
            snapshots = aiter(servicer.WatchSnapshot(request, Caller()))
            for _ in range(3):
                await anext(snapshots)
            gate.post(DrainBegan(0))
            await ended
            gate.join(TIMEOUT_S)

        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(scenario())

        pauses = [each for each in loop.delays if each != pytest.approx(NEWS_WITHIN_S)]
        assert pauses == [pytest.approx(expected_s)] * 2

    async def test_only_so_many(self) -> None:
        """One watch more of an address is refused."""
        async with admin() as service:
            watches = []
            for _ in range(WATCHES_PER_PEER_MAX):
                watches.append(service.watch(interval_s=60.0))
                await anext(watches[-1])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(service.watch(interval_s=60.0))

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "watches must be at most 8 at once from one address"

    async def test_the_end(self) -> None:
        """A watcher is told when the processor has ended."""
        async with admin() as service:
            snapshots = service.watch(interval_s=0.1)
            await anext(snapshots)
            service.gate.post(DrainBegan(0))
            await service.ended

            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in snapshots:  # those on the way before the end
                    pass

        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
