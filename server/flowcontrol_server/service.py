"""The service: start, drain and crash.

start: signal handlers ─▶ processor ─▶ sources known, or 10 s ─▶ doors open ─▶ Kubernetes API
       listed, or 60 s ─▶ health SERVING;
       SIGTERM cancels it ─▶ everything open is closed ─▶ exit 0
drain: SIGTERM ─▶ health NOT_SERVING, liveness stays ─▶ engine drains: refuses arrivals, decides
       waiting requests within the budget ─▶ streams in flight end gracefully ─▶ doors close
       ─▶ exit 0; a second signal ─▶ exit 1 at once
crash: the processor or one of our callbacks on the loop fails ─▶ every parked request is settled
       ─▶ all health NOT_SERVING ─▶ exit 1
"""

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import final

import structlog

from flowcontrol.errors import FlowControlError, NotRunningError
from flowcontrol.events import Decision, DrainBegan, MemoryRestored, Reconfigured, Settled
from flowcontrol.memory import EngineMemory
from flowcontrol.replay.plain import plainly
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.admin import api as admin
from flowcontrol_server.admin.guard import Guard
from flowcontrol_server.admin.http_port import CONNECTIONS_MAX as HTTP_CONNECTIONS_MAX
from flowcontrol_server.admin.http_port import HttpPort
from flowcontrol_server.admin.live import LiveView
from flowcontrol_server.admin.objectives import ObjectiveAccess
from flowcontrol_server.admin.pages import add_pages
from flowcontrol_server.admin.web import web_application
from flowcontrol_server.common.background import in_background
from flowcontrol_server.common.descriptors import reserve_descriptors
from flowcontrol_server.common.signals import STOP_SIGNALS
from flowcontrol_server.common.status import About, ServiceStatus
from flowcontrol_server.config.admin import NO_TOKEN
from flowcontrol_server.config.advice import advice
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.doors import health
from flowcontrol_server.doors.access_log import AccessLog
from flowcontrol_server.doors.call_context import CallContext
from flowcontrol_server.doors.direct.door import DirectDoor
from flowcontrol_server.doors.envoy_secret import EnvoySecret
from flowcontrol_server.doors.ext_proc import ExtProcDoor
from flowcontrol_server.doors.grpc_ports import CONNECTIONS_MAX as GRPC_CONNECTIONS_MAX
from flowcontrol_server.doors.grpc_ports import GrpcPorts
from flowcontrol_server.doors.http2.limits import Http2Limits
from flowcontrol_server.doors.self_signed import self_signed_context
from flowcontrol_server.ledger.ledger import Ledger
from flowcontrol_server.requests import codec
from flowcontrol_server.requests.classify import BodyReads
from flowcontrol_server.requests.codec import Encoder
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.log_join import LogJoin
from flowcontrol_server.requests.parked import Parked, claim_of, report_of
from flowcontrol_server.sources.feed import Feed
from flowcontrol_server.state.continuity import Continuity
from flowcontrol_server.telemetry import logs
from flowcontrol_server.telemetry.log_sink import STANDARD_ERROR
from flowcontrol_server.telemetry.loop_faults import LoopFaults
from flowcontrol_server.telemetry.loop_lag import LoopLag
from flowcontrol_server.telemetry.scrape import Scrape
from flowcontrol_server.telemetry.traces import open_traces
from flowcontrol_server.telemetry.unknown_objectives import UnknownObjectives

ARRIVALS_MAX = 100_000
"""Most arrivals in the processor's inbox: about a second of its work."""
SWITCH_INTERVAL_S = 0.0005
"""How long a Python thread may run before it must yield to others. With the default of 5 ms, to
wake the processor while the loop is busy took 8 to 15 ms at the 99th percentile; with this 1.2 ms.
"""
GC_THRESHOLDS = (20_000, 2, 700)
"""Thresholds of the garbage collector: new container objects until a collection of the youngest
generation; such collections until one of the middle generation, at 60,000 objects, some 20 ms; and
those until a full one. By default the first is 700 objects, and a full collection follows whenever
the heap has grown by a quarter: with 50,000 parked requests that is 0.3 s in which nothing is
decided, again and again. The objects of a request form no cycles and need no collector. Those that
do, as after a client was cut off, are freed a little later."""
CLOSE_GRACE_S = 1.0
"""Time for answers already written to reach Envoy before the port closes."""
JOIN_TIMEOUT_S = 5.0
LOADS_WITHIN_S = 2.0
"""How long the start waits for the endpoints' first load reports, which show what is in flight."""
ABORT_FLUSH_S = 0.2
"""Time to write the last log lines after a second signal to stop."""

READY_NAMES = ("", "readiness", codec.SERVICE, admin.SERVICE, "inference-extension")
"""Names in health checks; gateways' charts use the last one for their endpoint picker."""
LIVE_NAME = "liveness"
_log = structlog.get_logger()


@final
class Service:
    """The service around one flow controller.

    Args:
        settings: the settings in the configuration file.
        path: the configuration file; changes are followed while the service runs.
    """

    def __init__(self, settings: Settings, path: Path) -> None:
        self._configuration = Configuration(settings, path, self._reconfigure)
        self._ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._is_open = False
        """Whether the doors are open and no drain has begun."""
        self._is_remembered = False
        self._restored: MemoryRestored | None = None
        """What an earlier process had learnt; None: nothing, or not read yet."""
        self._draining: asyncio.Task[None] | None = None
        self._start: asyncio.Task[None] | None = None
        self._stop_signals = 0
        self._traces = open_traces(settings.traces, settings.pool)
        loop = asyncio.get_running_loop()
        self._request_log = logs.request_log(
            lambda write: loop.call_later(logs.WRITE_WITHIN_S, write)
        )
        self._ledger = None if settings.ledger is None else Ledger(settings.ledger)
        self._gate = FlowGate(
            settings.controller_config(),
            ARRIVALS_MAX,
            self._request_ended,
            self._processor_ended,
            recorder=None if self._ledger is None else self._ledger.feed,
            recent_max=settings.recent_decisions,
            dispatched=self._request_dispatched,
            may_decide=self._may_decide,
            unsent=self._refused,
        )
        self._unknown_objectives = UnknownObjectives(self._gate.post)
        self._feed = Feed(self._unknown_objectives.post)
        self._continuity = self._make_continuity(settings)
        self._log_join = self._make_log_join(settings)
        secret = settings.listen.secret()
        self._access_log = AccessLog(self._log_join)
        self._health = health.Health()
        self._body_reads = BodyReads()
        self._call_context = self._make_call_context(settings, secret)
        self._set_call_context(settings)
        self._direct_door = DirectDoor(self._call_context)
        self._door = ExtProcDoor(self._call_context)
        self._status = self._make_status(path)
        self._live = LiveView(self._gate, settings.pool, self._log_join, self._status)
        self._loop_lag = LoopLag()
        self._loop_faults = LoopFaults(self._callback_failed)
        self._scrape = self._make_scrape()
        self._grpc_ports = GrpcPorts(self._health)
        self._http_port: HttpPort | None = None

    def _make_continuity(self, settings: Settings) -> Continuity:
        return Continuity(
            settings,
            self._gate.post,
            memory=self._memory,
            remembered=self._remember,
            is_live=lambda request_id: self._gate.live(request_id) is not None,
            turned=self._leadership_changed,
            renew_loads=self._feed.renew_loads,
        )

    def _make_log_join(self, settings: Settings) -> LogJoin:
        return LogJoin(
            settings.settlement.lost_after,
            self._gate.claim_in_flight,
            self._gate.post,
            recovered_ended=self._continuity.recovered_ended,
            answered=self._answered,
            refused=self._refused,
            load_reported=self._feed.load_reported,
        )

    def _make_call_context(self, settings: Settings, secret: EnvoySecret | None) -> CallContext:
        return CallContext(
            gate=self._gate,
            trace_fields=() if self._traces is None else self._traces.fields,
            health=self._health,
            access_log=self._access_log,
            secret=secret,
            limits=Http2Limits(connections_max=settings.listen.connections_max),
            may_decide=self._may_decide,
        )

    def _make_status(self, path: Path) -> ServiceStatus:
        return ServiceStatus(
            {
                "configuration": lambda: (
                    (f"{path.name}", text) for text in self._configuration.problems
                ),
                "source": lambda: (
                    (f"{name}: {about}", text) for name, about, text in self._feed.problems()
                ),
                "endpoint-down": self._feed.problems_of_endpoints,
                "load": self._feed.problems_of_scrapes,
                "objective": self._unknown_objectives.problems,
                "ledger": self._ledger_problems,
                "continuity": self._continuity.problems,
            },
            self._about,
        )

    def _make_scrape(self) -> Scrape:
        return Scrape(
            gate=self._gate,
            log_join=self._log_join,
            feed=self._feed,
            configuration=self._configuration,
            status=self._status,
            ledger=self._ledger,
            continuity=self._continuity,
            loop_lag=self._loop_lag,
            loop_faults=self._loop_faults,
            body_reads=self._body_reads,
            calls=self._call_context,
        )

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, drain, and return the exit status.

        Raises:
            ListenError: an address cannot be opened; nothing is left running.
            LedgerError: the ledger cannot be written; nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        loop.set_exception_handler(self._loop_faults.handle)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        tune_garbage_collection()
        settings = self._configuration.settings
        self._gate.start()
        self._start = asyncio.create_task(self._open())
        try:
            await self._start
        except FlowControlError:
            await self._abandon()
            raise
        except asyncio.CancelledError:
            await self._abandon()
            if not self._stop_signals:
                raise
            _log.info("start_cancelled")
            return 0
        await self._set_health()
        _warn(settings)
        if settings.admin.is_read_only():
            _log.info("admin_api_read_only", reason=NO_TOKEN)
        following = in_background(self._configuration.follow(), "configuration_not_followed")
        sampling = in_background(self._live.run(), "dashboard_not_sampled")
        _log.info(
            "service_started",
            pool=settings.pool,
            listen=settings.listen.model_dump(),
            configuration=self._configuration.hash,
        )
        fault = await self._ended
        following.cancel()
        sampling.cancel()
        await self._feed.stop()
        self._is_open = False
        await self._set_health(is_live=fault is None)
        await asyncio.to_thread(self._gate.join, JOIN_TIMEOUT_S)
        if self._ledger is not None:
            self._ledger.close()
        self._continuity.freeze()
        await self._close_doors()
        await self._continuity.end()
        self._request_log.write()
        _log.info("service_stopped", exit_status=int(fault is not None))
        return int(fault is not None)

    async def _open(self) -> None:
        """Start the sources, open the doors and begin to decide."""
        settings = self._configuration.settings
        if settings.availability.election == "off":
            await self._continuity.begin()
        await self._feed.start(settings)
        if self._restored is not None:  # now that bands and endpoints are known
            self._gate.post(self._restored)
        if settings.state.count_running:
            await self._feed.loads_known(LOADS_WITHIN_S)
        await self._open_doors()
        # Only now, or a second process started by mistake would rename the ledger of the first.
        if self._ledger is not None:
            self._ledger.start(settings.controller_config(), self._gate.made_ns)
        await self._set_health()
        await self._feed.until_listed()
        self._is_open = True
        if settings.availability.election != "off":
            await self._continuity.begin()

    async def _abandon(self) -> None:
        """Close everything that a failed or cancelled start has opened."""
        await self._feed.stop()
        self._gate.post(DrainBegan(0))
        await self._ended
        self._gate.join(JOIN_TIMEOUT_S)
        if self._ledger is not None:
            self._ledger.close()
        await self._close_doors()
        await self._continuity.end()

    def _stop(self, number: signal.Signals) -> None:
        """Cancel the start, or drain; at a second signal, exit at once."""
        self._stop_signals += 1
        if self._stop_signals > 1:
            _log.warning("drain_aborted", cause=number.name, exit_status=1)
            STANDARD_ERROR.stop(ABORT_FLUSH_S)
            os._exit(1)
        assert self._start is not None, "it is set before the loop runs again"
        if self._start.done():
            self._drain(number.name)
        else:
            self._start.cancel()

    async def _reconfigure(self, settings: Settings) -> None:
        """Apply new settings; if one cannot be applied, raise and change nothing."""
        config = settings.controller_config()
        await self._feed.apply(settings)
        self._gate.post(Reconfigured(config))
        _warn(settings, self._configuration.settings)
        self._log_join.lost_after_ns = settings.settlement.lost_after
        self._set_call_context(settings)

    def _set_call_context(self, settings: Settings) -> None:
        """Apply settings to streams that open or are answered from now on."""
        self._access_log.serve(is_served=settings.settlement.access_log)
        requests = settings.requests
        self._call_context.intake = requests.intake(
            self._body_reads,
            reads_prefixes=settings.picker == "prefix-affinity",
            endpoints=lambda: self._gate.pool_view.addresses,
        )
        self._call_context.encoder = Encoder(
            picks=settings.picker != "off",
            trusts_engine_headers=requests.trust_engine_headers,
            anywhere=self._gate.pool_view.anywhere,
            engine_priority=requests.engine(),
            reads_responses=settings.settlement.token_usage,
        )
        self._gate.arrivals.longest_ns = settings.longest_wait_ns
        self._call_context.continue_on_fault = requests.on_fault == "continue"
        self._call_context.unseen_ns = requests.unseen_hold

    async def _memory(self) -> str | None:
        """Return what the engine has learnt, as JSON; None: the engine does not run."""
        try:
            memory, held = await self._gate.ask(
                lambda engine, now_ns: (engine.learned.memory(now_ns), engine.recovery.tickets)
            )
        except NotRunningError:
            return None
        self._continuity.hold_only(held)
        return json.dumps(plainly(EngineMemory).write(memory))

    def _remember(self, text: str) -> None:
        """Restore what another process had learnt; only the first time, and if it is readable."""
        if self._is_remembered:
            return
        self._is_remembered = True
        try:
            memory: EngineMemory = plainly(EngineMemory).read(json.loads(text))
            memory.check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("learnt_state_unreadable", problem=repr(error))
            return
        self._restored = MemoryRestored(memory)
        if self._is_open:
            self._gate.post(self._restored)

    def _objective_access(self) -> ObjectiveAccess:
        return ObjectiveAccess(lambda: self._feed.store, self._feed.problems)

    def _about(self) -> About:
        configuration = self._configuration
        return About(
            version("flowcontrol"),
            configuration.hash,
            configuration.changed_s,
            configuration.changes,
            is_deciding=self._may_decide(),
        )

    def _ledger_problems(self) -> Iterator[tuple[str, str]]:
        problem = None if self._ledger is None else self._ledger.problem
        if problem is not None:
            yield "ledger", problem

    def _answered(self, endpoint: str, is_failure: bool) -> None:  # noqa: FBT001 - its callers pass it by position
        self._gate.pool_view.answered(endpoint, is_failure)
        self._feed.outcome(endpoint, time.monotonic(), is_failure=is_failure)

    def _refused(self, endpoint: str) -> None:
        self._gate.pool_view.answered(endpoint, True)  # noqa: FBT003 - as above
        self._feed.refused(endpoint, time.monotonic())

    def _request_dispatched(self, parked: Parked, decision: Decision) -> None:
        self._continuity.dispatched(parked, decision)

    def _request_ended(self, parked: Parked, decision: Decision) -> None:
        if decision.outcome.was_dispatched:
            self._continuity.ended(parked.request_id)
            is_reported = self._configuration.settings.is_reported
            if parked.is_unsent and is_reported:  # the log reports only the last attempt
                self._gate.post(
                    Settled(parked.request_id, 0, 0, 0, is_success=False, was_sent=False)
                )
                is_reported = False
            self._log_join.request_ended(
                parked.request_id,
                claim_of(parked, decision),
                parked.left_ns or parked.decided_ns,
                is_reported=is_reported,
                report=report_of(parked),
            )
        self._unknown_objectives.request_ended(parked.request.objective, decision.priority)
        continues = self._call_context.continue_on_fault
        self._request_log.request_ended(parked, decision, continue_on_fault=continues)
        if self._traces is not None:
            self._traces.request_ended(parked, decision, continue_on_fault=continues)

    def _drain(self, cause: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._draining = in_background(self._hand_over_or_drain(cause), "drain_failed")

    async def _hand_over_or_drain(self, cause: str) -> None:
        """Hand over to another replica; if there is none, drain within the budget."""
        budget_ns = self._configuration.settings.flow_control.drain_budget
        _log.info("drain_began", cause=cause, budget_ms=budget_ns / 1e6)
        if await self._continuity.hand_over():
            _log.info("handed_over")
            budget_ns = 0
            self._move_streams()
        await self._set_health()
        self._direct_door.begin_drain()
        self._gate.post(DrainBegan(budget_ns))

    async def _leadership_changed(self) -> None:
        """Begin to decide requests, or move them to the next leader."""
        if self._may_decide():
            self._gate.resume()
        else:
            self._move_streams()
        await self._set_health()

    def _move_streams(self) -> None:
        """End all streams: waiting requests move to another replica, responses continue."""
        self._continuity.freeze()
        self._direct_door.move_calls()
        self._door.move_calls()
        self._gate.resume()

    def _may_decide(self) -> bool:
        return self._continuity.may_decide()

    def _is_serving(self) -> bool:
        return self._is_open and self._may_decide()

    def _drain_by_call(self) -> int:
        self._drain("admin API")
        return self._configuration.settings.flow_control.drain_budget

    def _processor_ended(self, fault: BaseException | None) -> None:
        if fault is not None:
            _log.critical("processor_failed", exc_info=fault)
        if not self._ended.done():
            self._ended.set_result(fault)

    def _callback_failed(self, exception: Exception) -> None:
        """End the service, because the work of the callback is incomplete."""
        if self._ended.done():
            _log.error("callback_failed", exc_info=exception)
        else:
            self._gate.fail(exception)

    async def _set_health(self, *, is_live: bool = True) -> None:
        for name in READY_NAMES:
            await self._health.set(name, is_serving=self._is_serving())
        await self._health.set(LIVE_NAME, is_serving=is_live)

    async def _open_doors(self) -> None:
        settings = self._configuration.settings
        listen = settings.listen
        admission = settings.admin
        guard = Guard(
            admission.secret(), admission.clients, trusts_loopback=admission.trust_loopback
        )
        service = api.DESCRIPTOR.services_by_name["FlowControl"]
        servicer = admin.FlowControlServicer(
            self._gate,
            settings.pool,
            self._log_join,
            self._drain_by_call,
            self._objective_access(),
            status=self._status,
            role=self._continuity.role,
        )
        others = GRPC_CONNECTIONS_MAX + HTTP_CONNECTIONS_MAX
        part = reserve_descriptors(listen.connections_max + others)
        grpc_max, http_max = int(part * GRPC_CONNECTIONS_MAX), int(part * HTTP_CONNECTIONS_MAX)
        certificates = settings.tls.certificates()
        await self._grpc_ports.open(
            listen.grpc,
            certificates and certificates.server_credentials(),
            {
                codec.SERVICE: self._door.handler(),
                admin.SERVICE: guard.handler(service, servicer),
            },
            connections_max=grpc_max,
        )
        if listen.ext_proc is not None:
            is_own = settings.tls.self_signed
            context = certificates and certificates.ssl_context()
            if is_own:
                context = self_signed_context()
            await self._direct_door.listen(listen.ext_proc, context, takes_both=is_own)
        application = web_application(
            self._scrape.collect,
            is_live=lambda: not self._ended.done() or self._ended.result() is None,
            is_ready=self._is_serving,
            middlewares=(guard.middleware,),
        )
        add_pages(application, self._gate, self._live, self._continuity.role)
        self._http_port = HttpPort(application, http_max)
        await self._http_port.open(listen.http)

    async def _close_doors(self) -> None:
        self._loop_lag.stop()
        self._door.close()
        await asyncio.gather(
            self._direct_door.close(
                CLOSE_GRACE_S, self._configuration.settings.flow_control.drain_budget / 1e9
            ),
            self._grpc_ports.close(CLOSE_GRACE_S),
        )
        if self._http_port is not None:
            await self._http_port.close()
        if self._traces is not None:
            await self._traces.close()


def _warn(settings: Settings, before: Settings | None = None) -> None:
    """Log the warnings about settings that did not apply to the settings before."""
    known = () if before is None else advice(before)
    for line in advice(settings):
        if line not in known:
            _log.warning("configuration_warning", warning=line)


def tune_garbage_collection() -> None:
    """Make collections rare, and exempt the objects that exist now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
