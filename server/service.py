"""Start, drain and crash, on one page.

start: processor ─▶ sources known ─▶ doors open ─▶ health SERVING
drain: SIGTERM ─▶ health NOT_SERVING, liveness stays ─▶ engine drains: refuses arrivals, decides
       what waits within the budget ─▶ streams in flight end politely ─▶ doors close ─▶ exit 0
crash: the processor fails ─▶ every parked request is settled ─▶ all health NOT_SERVING ─▶ exit 1
"""

import asyncio
import contextlib
import gc
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import grpc
import structlog
from aiohttp import web
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from flowcontrol.errors import FlowControlError, ListenError
from flowcontrol.events import Decision, DrainBegan, Reconfigured
from flowcontrol.v1 import flowcontrol_pb2 as api
from server import admin, codec, health, log_codec, logs
from server.access_log import AccessLogDoor
from server.admin_objectives import ObjectiveAccess
from server.codec import Encoder
from server.direct_calls import Terms
from server.direct_door import DirectDoor
from server.ext_proc import ExtProcDoor
from server.gate import FlowGate, Parked
from server.guard import Guard
from server.live import LiveView
from server.loop_lag import LoopLag
from server.metrics import SnapshotCollector, registry_of
from server.pages import add_pages
from server.records import Records
from server.reference_metrics import ReferenceCollector
from server.reload import Configuration
from server.settings import Address, Settings
from server.settlement import Settlement
from server.settlement_metrics import SettlementCollector
from server.sources.feed import Feed
from server.sources.measured import SourceCollector
from server.web import web_application

if TYPE_CHECKING:
    from server.otel import Traces

ARRIVALS_MAX = 100_000
"""Arrivals the processor may be behind: about a second of its work."""
SWITCH_INTERVAL_S = 0.0005
"""How long a Python thread may keep the others waiting. With the interpreter's 5 ms, waking the
processor while the loop is busy took 8 to 15 ms at the 99th percentile; with this 1.2 ms."""
GC_THRESHOLDS = (50_000, 10, 100)
"""Container objects more than before at which garbage is looked for. By default every 700, and all
of them each time they have grown by a quarter: with 50,000 parked that is 0.3 s in which nothing
is decided, again and again. What a request leaves behind holds no cycles and needs no collector;
what does, a client that was cut off for example, waits a while longer."""
CLOSE_GRACE_S = 1.0
"""For answers already written to reach Envoy before the port closes."""
JOIN_TIMEOUT_S = 5.0

MESSAGE_BYTES_MAX = 1 << 20
"""Envoy sends headers of 60 KiB at most unless told otherwise, and batches of access log entries of
16 KiB; what is larger is not read."""
METADATA_BYTES_MAX = 16 << 10
"""Of one gRPC call, as grpc counts."""

GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    # grpc-core refuses streams it has not yet accepted: at random above 1000, all above 3000. A
    # burst of parked requests looks just like that.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    # Two processes on one port would each gate half of the requests, unnoticed.
    ("grpc.so_reuseport", 0),
    # Envoy's keepalive pings are welcome, also while every stream is silently parked.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

_PROCESS = ProcessCollector(registry=None)
"""The process's own CPU time, memory and open files."""
READY_NAMES = ("", "readiness", codec.SERVICE, admin.SERVICE)
LIVE_NAME = "liveness"
_log = structlog.get_logger()


@final
class Service:
    """The whole service around one flow controller.

    Args:
        settings: as read from the configuration file.
        path: that file, followed while the service runs.
    """

    def __init__(self, settings: Settings, path: Path) -> None:
        self._configuration = Configuration(settings, path, self._reconfigure)
        self._ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._is_serving = False
        self._traces = _traces(settings)
        loop = asyncio.get_running_loop()
        self._request_log = logs.RequestLog(
            lambda write: loop.call_later(logs.WRITE_WITHIN_S, write)
        )
        self._records = Records(settings.ledger, settings.shadow)
        self._gate = FlowGate(
            settings.controller_config(),
            ARRIVALS_MAX,
            self._request_ended,
            self._processor_ended,
            recorder=self._records.recorder,
            recent_max=settings.recent_decisions,
        )
        self._feed = Feed(self._gate.post)
        self._settlement = Settlement(
            settings.settlement.lost_after,
            self._gate.priority_in_flight,
            self._gate.post,
            answered=self._answered,
            load_reported=self._feed.load_reported,
        )
        self._log_door = AccessLogDoor(self._settlement)
        self._health = health.Health()
        terms = Terms(
            gate=self._gate,
            intake=settings.requests.intake(),
            encoder=self._encoder(settings),
            continue_on_fault=settings.requests.on_internal_fault == "continue",
            trace_fields=() if self._traces is None else self._traces.fields,
            health=self._health.check,
            limits=settings.direct.http2_limits(),
        )
        self._direct_door = DirectDoor(terms)
        self._door = ExtProcDoor(
            self._gate,
            terms.intake,
            terms.encoder,
            continue_on_fault=terms.continue_on_fault,
            trace_fields=terms.trace_fields,
        )
        self._live = LiveView(self._gate, settings.pool)
        self._loop_lag = LoopLag()
        self._grpc_servers: list[grpc.aio.Server] = []
        self._web: web.AppRunner | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, drain, and return the exit status.

        Raises:
            ListenError: naming the address; nothing is left running.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        tune_garbage_collection()
        settings = self._configuration.settings
        self._records.start(settings.controller_config(), self._gate.made_ns)
        self._gate.start()
        try:
            await self._feed.start(settings)
            await self._open_doors()
        except FlowControlError:
            await self._feed.stop()
            self._gate.post(DrainBegan(0))
            await self._ended
            self._gate.join(JOIN_TIMEOUT_S)
            self._records.close()
            await self._close_doors()
            raise
        self._is_serving = True
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain, number.name)
        await self._tell_health()
        following = asyncio.create_task(self._configuration.follow())
        following.add_done_callback(self._following_ended)
        looking = asyncio.create_task(self._live.run())
        _log.info(
            "service_started",
            pool=settings.pool,
            listen=settings.listen.model_dump(),
            configuration=self._configuration.hash,
        )
        fault = await self._ended
        following.cancel()
        looking.cancel()
        await self._feed.stop()
        self._is_serving = False
        await self._tell_health(is_live=fault is None)
        self._gate.join(JOIN_TIMEOUT_S)
        self._records.close()
        await self._close_doors()
        self._request_log.write()
        _log.info("service_stopped", exit_status=int(fault is not None))
        return int(fault is not None)

    async def _reconfigure(self, settings: Settings) -> None:
        """Put other settings into force, or raise and change nothing."""
        config = settings.controller_config()
        await self._feed.apply(settings)
        self._gate.post(Reconfigured(config))
        self._settlement.lost_after_ns = settings.settlement.lost_after
        for door in (self._direct_door, self._door):
            door.reconfigure(
                settings.requests.intake(),
                self._encoder(settings),
                continue_on_fault=settings.requests.on_internal_fault == "continue",
            )

    def _encoder(self, settings: Settings) -> Encoder:
        return Encoder(
            picks=settings.picker != "off",
            anywhere=self._gate.pool_view.anywhere,
            engine_priority=settings.requests.engine(),
        )

    def _objective_access(self) -> ObjectiveAccess:
        return ObjectiveAccess(lambda: self._feed.store, self._feed.problems)

    def _answered(self, endpoint: str, is_failure: bool) -> None:  # noqa: FBT001 - as it is told
        self._gate.pool_view.answered(endpoint, is_failure)
        self._feed.outcome(endpoint, time.monotonic(), is_failure=is_failure)

    def _request_ended(self, parked: Parked, decision: Decision) -> None:
        settlement = self._configuration.settings.settlement
        if decision.outcome.was_dispatched and settlement.access_log:
            now_ns = parked.left_ns or parked.decided_ns
            self._settlement.request_ended(parked.request_id, decision.priority, now_ns)
        self._request_log.request_ended(parked, decision)
        if self._traces is not None:
            self._traces.request_ended(parked, decision)

    def _following_ended(self, following: asyncio.Task[None]) -> None:
        if not following.cancelled():
            _log.error("configuration_not_followed", error=repr(following.exception()))

    def _drain(self, cause: str) -> None:
        if not self._is_serving:
            return
        self._is_serving = False
        budget_ns = self._configuration.settings.flow_control.drain_budget
        _log.info("drain_began", cause=cause, budget_ms=budget_ns / 1e6)
        task = asyncio.ensure_future(self._tell_health())
        task.add_done_callback(lambda _task: self._direct_door.begin_drain())
        task.add_done_callback(lambda _task: self._gate.post(DrainBegan(budget_ns)))

    def _drain_by_call(self) -> int:
        self._drain("admin API")
        return self._configuration.settings.flow_control.drain_budget

    def _processor_ended(self, fault: BaseException | None) -> None:
        if fault is not None:
            _log.critical("processor_failed", exc_info=fault)
        if not self._ended.done():
            self._ended.set_result(fault)

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the service when a callback of the gate's fails: what it was doing is half done."""
        if "handle" in context and isinstance(context.get("exception"), Exception):
            self._processor_ended(context["exception"])
        elif "protocol" in context and isinstance(context.get("exception"), Exception):
            _log.error("connection_failed", exc_info=context["exception"])  # and is closed
        else:
            loop.default_exception_handler(context)

    async def _tell_health(self, *, is_live: bool = True) -> None:
        for name in READY_NAMES:
            await self._health.set(name, is_serving=self._is_serving)
        await self._health.set(LIVE_NAME, is_serving=is_live)

    async def _open_doors(self) -> None:
        listen = self._configuration.settings.listen
        main = grpc.aio.server(options=GRPC_OPTIONS)
        main.add_generic_rpc_handlers((self._door.handler(), self._log_door.handler()))
        guard = Guard(self._configuration.settings.admin.secret())
        service = api.DESCRIPTOR.services_by_name["FlowControl"]
        servicer = admin.FlowControlServicer(
            self._gate,
            self._configuration.settings.pool,
            self._drain_by_call,
            self._objective_access(),
        )
        main.add_generic_rpc_handlers((guard.handler(service, servicer),))
        probes = grpc.aio.server(options=GRPC_OPTIONS)
        common = (health.SERVICE, reflection.SERVICE_NAME)
        for server, names in (
            (main, (codec.SERVICE, log_codec.SERVICE, admin.SERVICE, *common)),
            (probes, common),
        ):
            health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
            reflection.enable_server_reflection(names, server)
        certificates = self._configuration.settings.tls.certificates()
        credentials = certificates and certificates.server_credentials()
        for server, address, shown in (
            (main, listen.ext_proc, credentials),
            (probes, listen.health, None),
        ):
            _bind(server, address, shown)
            self._grpc_servers.append(server)
            await server.start()
        if listen.direct is not None:
            context = certificates and certificates.ssl_context()
            await self._direct_door.listen(listen.direct, context)
        application = web_application(
            self._metrics,
            is_live=lambda: not self._ended.done() or self._ended.result() is None,
            is_ready=lambda: self._is_serving,
            middlewares=(guard.middleware,),
        )
        add_pages(application, self._gate, self._live)
        self._web = web.AppRunner(application, access_log=None)
        await self._web.setup()
        try:
            await web.TCPSite(self._web, *listen.http).start()
        except OSError as error:
            raise ListenError(str(listen.http)) from error

    async def _close_doors(self) -> None:
        self._loop_lag.stop()
        self._door.close()
        self._log_door.close()
        stopping = (server.stop(CLOSE_GRACE_S) for server in self._grpc_servers)
        await asyncio.gather(self._direct_door.close(CLOSE_GRACE_S), *stopping)
        if self._web is not None:
            await self._web.cleanup()
        if self._traces is not None:
            await self._traces.close()

    async def _metrics(self) -> CollectorRegistry:
        snapshot = await self._gate.snapshot()
        settings = self._configuration.settings
        feed = self._feed.snapshot()
        collectors: list[Collector] = [
            SnapshotCollector(
                snapshot,
                self._gate.inbox_refusals,
                sum(count for name, count in feed.errors.items() if name.startswith("objectives.")),
                self._loop_lag.snapshot(),
            ),
            SettlementCollector(
                self._settlement, self._gate.pool_view, snapshot, time.monotonic_ns()
            ),
            SourceCollector(feed, self._configuration, time.monotonic()),
            self._records.collector(),
        ]
        if settings.metrics.reference_names:
            limits = settings.controller_config().limits
            collectors.append(ReferenceCollector(snapshot, settings.pool, limits))
        return registry_of([*collectors, _PROCESS])


def tune_garbage_collection() -> None:
    """Look for garbage seldom, and never again at what has been loaded until now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _traces(settings: Settings) -> "Traces | None":
    if settings.traces.exporter == "off":
        return None
    try:
        from server.otel import Traces  # noqa: PLC0415 - an extra, and slow to import

        return Traces(settings.pool)
    except ModuleNotFoundError as error:
        message = f"traces.exporter needs {error.name}: pip install 'flowcontrol[otel]'"
        raise FlowControlError(message) from error
    except ImportError as error:  # xds-protos has files of the same names, of an older OTLP
        message = (
            "traces.exporter cannot use opentelemetry-proto, which xds-protos has overwritten: "
            "pip install --force-reinstall --no-deps opentelemetry-proto"
        )
        raise FlowControlError(message) from error


def _bind(
    server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None
) -> None:
    with contextlib.suppress(RuntimeError):
        if credentials is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), credentials)
        if port:
            return
    raise ListenError(str(address))
