"""Start, drain and crash, on one page.

start: processor ─▶ sources known ─▶ doors open ─▶ health SERVING
drain: SIGTERM ─▶ health NOT_SERVING, liveness stays ─▶ engine drains: refuses arrivals, decides
       what waits within the budget ─▶ streams in flight end politely ─▶ doors close ─▶ exit 0
crash: the processor or a callback of the loop fails ─▶ every parked request is settled ─▶ all
       health NOT_SERVING ─▶ exit 1
"""

import asyncio
import gc
import signal
import sys
import time
from pathlib import Path
from typing import Any, final

import structlog
from aiohttp import web

from flowcontrol.errors import FlowControlError
from flowcontrol.events import Decision, DrainBegan, Reconfigured
from flowcontrol.v1 import flowcontrol_pb2 as api
from server import admin, codec, health, log_codec, logs
from server.access_log import AccessLogDoor
from server.admin_objectives import ObjectiveAccess
from server.background import in_background
from server.codec import Encoder
from server.direct_door import DirectDoor
from server.ext_proc import ExtProcDoor
from server.gate import FlowGate, Parked
from server.grpc_ports import GrpcPorts
from server.guard import Guard
from server.listening import naming
from server.live import LiveView
from server.loop_lag import LoopLag
from server.pages import add_pages
from server.records import Records
from server.reload import Configuration
from server.scrape import Scrape
from server.settings import Settings
from server.settlement import Settlement
from server.sources.feed import Feed
from server.telemetry import open_traces
from server.terms import Terms
from server.unknown_objectives import UnknownObjectives
from server.web import web_application

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
        self._traces = open_traces(settings.traces, settings.pool)
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
        self._unknown_objectives = UnknownObjectives(self._gate.post)
        self._feed = Feed(self._unknown_objectives.post)
        self._settlement = Settlement(
            settings.settlement.lost_after,
            self._gate.priority_in_flight,
            self._gate.post,
            answered=self._answered,
            load_reported=self._feed.load_reported,
        )
        self._log_door = AccessLogDoor(self._settlement)
        self._health = health.Health()
        self._terms = Terms(
            gate=self._gate,
            trace_fields=() if self._traces is None else self._traces.fields,
            health=self._health.check,
            limits=settings.direct.http2_limits(),
        )
        self._set_terms(settings)
        self._direct_door = DirectDoor(self._terms)
        self._door = ExtProcDoor(self._terms)
        self._live = LiveView(self._gate, settings.pool, self._settlement)
        self._loop_lag = LoopLag()
        self._scrape = Scrape(
            gate=self._gate,
            settlement=self._settlement,
            feed=self._feed,
            configuration=self._configuration,
            records=self._records,
            loop_lag=self._loop_lag,
        )
        self._grpc_ports = GrpcPorts(self._health)
        self._web: web.AppRunner | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, drain, and return the exit status.

        Raises:
            ListenError: naming the address; nothing is left running.
            LedgerError: it cannot be written; nothing is left running.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        tune_garbage_collection()
        settings = self._configuration.settings
        self._gate.start()
        try:
            await self._feed.start(settings)
            await self._open_doors()
            # Last: whoever starts twice by mistake must not rename the ledger of the one that runs.
            self._records.start(settings.controller_config(), self._gate.made_ns)
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
        following = in_background(self._configuration.follow(), "configuration_not_followed")
        looking = in_background(self._live.run(), "dashboard_not_sampled")
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
        await asyncio.to_thread(self._gate.join, JOIN_TIMEOUT_S)
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
        self._set_terms(settings)

    def _set_terms(self, settings: Settings) -> None:
        """Let settings count for streams that open or are answered from now on."""
        requests = settings.requests
        self._terms.intake = requests.intake()
        self._terms.encoder = Encoder(
            picks=settings.picker != "off",
            anywhere=self._gate.pool_view.anywhere,
            engine_priority=requests.engine(),
        )
        self._terms.continue_on_fault = requests.on_internal_fault == "continue"

    def _objective_access(self) -> ObjectiveAccess:
        return ObjectiveAccess(lambda: self._feed.store, self._feed.problems)

    def _answered(self, endpoint: str, is_failure: bool) -> None:  # noqa: FBT001 - as it is told
        self._gate.pool_view.answered(endpoint, is_failure)
        self._feed.outcome(endpoint, time.monotonic(), is_failure=is_failure)

    def _request_ended(self, parked: Parked, decision: Decision) -> None:
        if decision.outcome.was_dispatched:
            self._settlement.request_ended(
                parked.request_id,
                decision.priority,
                parked.left_ns or parked.decided_ns,
                is_reported=self._configuration.settings.settlement.access_log,
            )
        self._unknown_objectives.request_ended(parked.facts.objective, decision.priority)
        continues = self._terms.continue_on_fault
        self._request_log.request_ended(parked, decision, continue_on_fault=continues)
        if self._traces is not None:
            self._traces.request_ended(parked, decision, continue_on_fault=continues)

    def _drain(self, cause: str) -> None:
        if not self._is_serving:
            return
        self._is_serving = False
        budget_ns = self._configuration.settings.flow_control.drain_budget
        _log.info("drain_began", cause=cause, budget_ms=budget_ns / 1e6)
        task = in_background(self._tell_health(), "health_not_told")
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
        exception = context.get("exception")
        if "handle" in context and isinstance(exception, Exception):
            if self._ended.done():
                _log.error("callback_failed", exc_info=exception)
            else:
                self._gate.fail(exception)
        elif "protocol" in context and isinstance(exception, Exception):
            _log.error("connection_failed", exc_info=exception)  # and is closed
        else:
            loop.default_exception_handler(context)

    async def _tell_health(self, *, is_live: bool = True) -> None:
        for name in READY_NAMES:
            await self._health.set(name, is_serving=self._is_serving)
        await self._health.set(LIVE_NAME, is_serving=is_live)

    async def _open_doors(self) -> None:
        settings = self._configuration.settings
        listen = settings.listen
        guard = Guard(settings.admin.secret())
        service = api.DESCRIPTOR.services_by_name["FlowControl"]
        servicer = admin.FlowControlServicer(
            self._gate,
            settings.pool,
            self._settlement,
            self._drain_by_call,
            self._objective_access(),
        )
        certificates = settings.tls.certificates()
        await self._grpc_ports.open(
            listen.ext_proc,
            certificates and certificates.server_credentials(),
            {
                codec.SERVICE: self._door.handler(),
                log_codec.SERVICE: self._log_door.handler(),
                admin.SERVICE: guard.handler(service, servicer),
            },
        )
        await self._grpc_ports.open(listen.health, None, {})
        if listen.direct is not None:
            context = certificates and certificates.ssl_context()
            await self._direct_door.listen(listen.direct, context)
        application = web_application(
            self._scrape.collect,
            is_live=lambda: not self._ended.done() or self._ended.result() is None,
            is_ready=lambda: self._is_serving,
            middlewares=(guard.middleware,),
        )
        add_pages(application, self._gate, self._live)
        self._web = web.AppRunner(application, access_log=None)
        await self._web.setup()
        with naming(str(listen.http)):
            await web.TCPSite(self._web, *listen.http).start()

    async def _close_doors(self) -> None:
        self._loop_lag.stop()
        self._door.close()
        self._log_door.close()
        await asyncio.gather(
            self._direct_door.close(CLOSE_GRACE_S), self._grpc_ports.close(CLOSE_GRACE_S)
        )
        if self._web is not None:
            await self._web.cleanup()
        if self._traces is not None:
            await self._traces.close()


def tune_garbage_collection() -> None:
    """Look for garbage seldom, and never again at what has been loaded until now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
