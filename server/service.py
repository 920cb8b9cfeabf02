"""Start, drain and crash, on one page.

start: folder read ─▶ processor ─▶ doors open ─▶ health SERVING
drain: SIGTERM ─▶ health NOT_SERVING, liveness stays ─▶ engine drains: refuses arrivals, decides
       what waits within the budget ─▶ streams in flight end politely ─▶ doors close ─▶ exit 0
crash: the processor fails ─▶ every parked request is settled ─▶ all health NOT_SERVING ─▶ exit 1
"""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, final

import grpc
import structlog
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from flowcontrol.errors import ListenError
from flowcontrol.events import Decision, DrainBegan, EndpointsChanged, ObjectivesChanged
from flowcontrol.request import Outcome
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from server import admin, codec, log_codec, logs
from server.access_log import AccessLogDoor
from server.codec import Encoder
from server.ext_proc import ExtProcDoor
from server.gate import FlowGate, Parked
from server.live import LiveView
from server.metrics import SnapshotCollector
from server.objectives import ObjectiveFolder
from server.pages import add_pages
from server.records import Records
from server.settings import Address, Settings
from server.settlement import Settlement
from server.settlement_metrics import SettlementCollector
from server.web import web_application

ARRIVALS_MAX = 100_000
"""Arrivals the processor may be behind: about a second of its work."""
SWITCH_INTERVAL_S = 0.0005
"""How long a Python thread may keep the others waiting. With the interpreter's 5 ms, waking the
processor while the loop is busy took 8 to 15 ms at the 99th percentile; with this 1.2 ms."""
CLOSE_GRACE_S = 1.0
"""For answers already written to reach Envoy before the port closes."""
JOIN_TIMEOUT_S = 5.0

GRPC_OPTIONS = (
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

READY_NAMES = ("", "readiness", codec.SERVICE, admin.SERVICE)
LIVE_NAME = "liveness"
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse.ServingStatus
_log = structlog.get_logger()


@final
class Service:
    """The whole service around one flow controller.

    Args:
        settings: as read from the configuration file.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = ObjectiveFolder(settings.objectives.directory, settings.pool)
        self._ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._is_serving = False
        self._config = settings.controller_config()
        self._records = Records(settings.ledger, settings.shadow)
        self._gate = FlowGate(
            self._config,
            ARRIVALS_MAX,
            self._request_ended,
            self._processor_ended,
            recorder=self._records.recorder,
            recent_max=settings.recent_decisions,
        )
        self._settlement = Settlement(
            settings.settlement.lost_after,
            self._gate.priority_in_flight,
            self._gate.post,
            answered=self._gate.pool_view.answered,
        )
        self._log_door = AccessLogDoor(self._settlement)
        self._door = ExtProcDoor(
            self._gate,
            settings.requests.intake(),
            Encoder(
                picks=settings.picker != "off",
                anywhere=self._gate.pool_view.anywhere,
                engine_priority=settings.requests.engine(),
            ),
            continue_on_fault=settings.requests.on_internal_fault == "continue",
        )
        self._live = LiveView(self._gate, settings.pool)
        self._health = HealthServicer()
        self._grpc_servers: list[grpc.aio.Server] = []
        self._web: web.AppRunner | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, drain, and return the exit status.

        Raises:
            ListenError: naming the address; nothing is left running.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._records.start(self._config, self._gate.made_ns)
        self._gate.start()
        self._change_objectives(self._folder.read())
        endpoints = self._settings.endpoints
        addresses = tuple(str(address) for address in endpoints.static)
        self._gate.post(EndpointsChanged(addresses, endpoints.role_of()))
        try:
            await self._open_doors()
        except ListenError:
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
        following = asyncio.create_task(self._folder.follow(self._change_objectives))
        following.add_done_callback(self._following_ended)
        looking = asyncio.create_task(self._live.run())
        listen = self._settings.listen.model_dump()
        _log.info("service_started", pool=self._settings.pool, listen=listen)
        fault = await self._ended
        following.cancel()
        looking.cancel()
        self._is_serving = False
        await self._tell_health(is_live=fault is None)
        self._gate.join(JOIN_TIMEOUT_S)
        self._records.close()
        await self._close_doors()
        _log.info("service_stopped", exit_status=int(fault is not None))
        return int(fault is not None)

    def _request_ended(self, parked: Parked, decision: Decision) -> None:
        if decision.outcome is Outcome.DISPATCHED and self._settings.settlement.access_log:
            now_ns = parked.left_ns or parked.decided_ns
            self._settlement.request_ended(parked.request_id, decision.priority, now_ns)
        logs.request_ended(parked, decision)

    def _change_objectives(self, priorities: Mapping[str, int]) -> None:
        self._gate.post(ObjectivesChanged(priorities))
        _log.info("objectives_changed", objectives=dict(priorities))

    def _following_ended(self, following: asyncio.Task[None]) -> None:
        if not following.cancelled():
            _log.error("objectives_not_followed", error=repr(following.exception()))

    def _drain(self, cause: str) -> None:
        if not self._is_serving:
            return
        self._is_serving = False
        budget_ns = self._settings.flow_control.drain_budget
        _log.info("drain_began", cause=cause, budget_ms=budget_ns / 1e6)
        task = asyncio.ensure_future(self._tell_health())
        task.add_done_callback(lambda _task: self._gate.post(DrainBegan(budget_ns)))

    def _drain_by_call(self) -> int:
        self._drain("admin API")
        return self._settings.flow_control.drain_budget

    def _processor_ended(self, fault: BaseException | None) -> None:
        if fault is not None:
            _log.critical("processor_failed", exc_info=fault)
        if not self._ended.done():
            self._ended.set_result(fault)

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the service when a callback of the gate's fails: what it was doing is half done."""
        if "handle" in context and isinstance(context.get("exception"), Exception):
            self._processor_ended(context["exception"])
        else:
            loop.default_exception_handler(context)

    async def _tell_health(self, *, is_live: bool = True) -> None:
        ready = _Status.SERVING if self._is_serving else _Status.NOT_SERVING
        for name in READY_NAMES:
            await self._health.set(name, ready)
        await self._health.set(LIVE_NAME, _Status.SERVING if is_live else _Status.NOT_SERVING)

    async def _open_doors(self) -> None:
        listen = self._settings.listen
        main = grpc.aio.server(options=GRPC_OPTIONS)
        main.add_generic_rpc_handlers((self._door.handler(), self._log_door.handler()))
        api_grpc.add_FlowControlServicer_to_server(
            admin.FlowControlServicer(self._gate, self._settings.pool, self._drain_by_call), main
        )
        probes = grpc.aio.server(options=GRPC_OPTIONS)
        health = (_HEALTH_SERVICE, reflection.SERVICE_NAME)
        for server, names in (
            (main, (codec.SERVICE, log_codec.SERVICE, admin.SERVICE, *health)),
            (probes, health),
        ):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection(names, server)
        for server, address in ((main, listen.ext_proc), (probes, listen.health)):
            _bind(server, address)
            self._grpc_servers.append(server)
            await server.start()
        application = web_application(
            self._metrics,
            is_live=lambda: not self._ended.done() or self._ended.result() is None,
            is_ready=lambda: self._is_serving,
        )
        add_pages(application, self._gate, self._live)
        self._web = web.AppRunner(application, access_log=None)
        await self._web.setup()
        try:
            await web.TCPSite(self._web, *listen.http).start()
        except OSError as error:
            raise ListenError(str(listen.http)) from error

    async def _close_doors(self) -> None:
        self._door.close()
        self._log_door.close()
        await asyncio.gather(*(server.stop(CLOSE_GRACE_S) for server in self._grpc_servers))
        if self._web is not None:
            await self._web.cleanup()

    async def _metrics(self) -> SnapshotCollector:
        snapshot = await self._gate.snapshot()
        settled = SettlementCollector(
            self._settlement, self._gate.pool_view, snapshot, time.monotonic_ns()
        )
        return SnapshotCollector(
            snapshot,
            self._gate.inbox_refusals,
            self._folder.error_count,
            (*settled.collect(), *self._records.families()),
        )


def _bind(server: grpc.aio.Server, address: Address) -> None:
    with contextlib.suppress(RuntimeError):
        if server.add_insecure_port(str(address)):
            return
    raise ListenError(str(address))
