"""The live view of the demo: results of clients, bands of the service, queues of the servers."""

import asyncio
import re
from statistics import median
from typing import final, get_args

import aiohttp
import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.v1 import flowcontrol_pb2_grpc as api_grpc
from flowcontrol_server.admin.client import channel_options
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.tools.demo.stack import HOST, Ports
from flowcontrol_server.tools.demo.traffic import DemoSample, Driver, Kind

_KINDS: tuple[Kind, ...] = get_args(Kind)
_INTERVAL_S = 0.5
_PLAIN_EVERY = 10
"""Without a terminal, snapshots per printed line."""
_GAUGE = re.compile(r"^vllm:num_requests_(running|waiting)\{[^}]*\} (\S+)", re.MULTILINE)
_LATELY_S = 5.0


@final
class PhaseView:
    """Draws one phase twice a second; without a terminal, prints a line every 5 s."""

    def __init__(self, console: Console, title: str, driver: Driver, ports: Ports) -> None:
        self._console = console
        self._title = title
        self._driver = driver
        self._ports = ports

    async def run(self) -> None:
        """Draw until cancelled."""
        address = f"{HOST}:{self._ports.grpc}"
        async with (
            grpc.aio.insecure_channel(address, channel_options(address)) as channel,
            aiohttp.ClientSession() as session,
        ):
            stub = api_grpc.FlowControlStub(channel)  # type: ignore[no-untyped-call] # generated
            watch = api.WatchSnapshotRequest(flows_max=5)
            watch.interval.FromMilliseconds(int(_INTERVAL_S * 1000))
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                count = 0
                async for snapshot in stub.WatchSnapshot(watch):
                    queued = await asyncio.gather(
                        *(_engine_queue(session, port) for port in self._ports.servers)
                    )
                    if self._console.is_terminal:
                        live.update(self._draw(snapshot, queued), refresh=True)
                    elif count % _PLAIN_EVERY == 0:
                        self._console.print(self._line(snapshot, queued), highlight=False)
                    count += 1

    def _draw(self, snapshot: api.Snapshot, queued: list[tuple[int, int]]) -> RenderableType:
        clients = Table(title=f"{self._title}, {self._driver.now_s:.0f} s", title_justify="left")
        for column in ("clients", "sent", "waiting for a token", "done", "got 429", "TTFT lately"):
            clients.add_column(column, justify="left" if column == "clients" else "right")
        for kind in _KINDS:
            clients.add_row(kind, *self._client_cells(kind))
        title = f"flowcontrol, saturation {snapshot.saturation:.2f}"
        bands = Table(title=title, title_justify="left")
        for column in ("band", "waiting", "in flight", "oldest wait", "flows"):
            bands.add_column(column, justify="right")
        for band in snapshot.bands:
            oldest = f"{band.oldest_wait.ToTimedelta().total_seconds():.1f} s"
            flows = ", ".join(f"{plain(flow.flow_id)} {flow.waiting}" for flow in band.flows[:3])
            waiting = oldest if band.waiting else "-"
            cells = (
                str(band.priority),
                str(band.waiting),
                str(band.in_flight),
                waiting,
                Text(flows),
            )
            bands.add_row(*cells)
        servers = Table(title="model servers", title_justify="left")
        for column in ("endpoint", "running", "queued in the engine"):
            servers.add_column(column, justify="right")
        for port, (running, waiting_count) in zip(self._ports.servers, queued, strict=True):
            style = "red" if waiting_count else ""
            servers.add_row(f"{HOST}:{port}", str(running), str(waiting_count), style=style)
        return Group(clients, bands, servers)

    def _client_cells(self, kind: Kind) -> tuple[str, ...]:
        now_s = self._driver.now_s
        sent = [s for s in self._driver.samples if s.planned.kind == kind and _is_sent(s, now_s)]
        done = sum(sample.end_s is not None for sample in sent)
        waiting = sum(sample.first_token_s is None and sample.end_s is None for sample in sent)
        lately = [
            sample.ttft_s
            for sample in sent
            if sample.ttft_s is not None and (sample.first_token_s or 0.0) > now_s - _LATELY_S
        ]
        ttft = f"{median(lately):.2f} s" if lately else "-"
        refusals = sum(sample.refusals for sample in sent)
        return str(len(sent)), str(waiting), str(done), str(refusals), ttft

    def _line(self, snapshot: api.Snapshot, queued: list[tuple[int, int]]) -> str:
        parts = [f"{self._title}, {self._driver.now_s:.0f} s:"]
        for kind in _KINDS:
            _sent, waiting, done, _refusals, ttft = self._client_cells(kind)
            parts.append(f"{kind} waiting {waiting}, done {done}, TTFT lately {ttft};")
        bands = ", ".join(f"{band.priority}: {band.waiting}" for band in snapshot.bands)
        engines = ", ".join(str(waiting) for _running, waiting in queued)
        return " ".join([*parts, f"held in bands [{bands}], queued in engines [{engines}]"])


def _is_sent(sample: DemoSample, now_s: float) -> bool:
    return sample.planned.at_s <= now_s


async def _engine_queue(session: aiohttp.ClientSession, port: int) -> tuple[int, int]:
    """Return the number of requests that a model server runs, and that wait inside it."""
    async with session.get(f"http://{HOST}:{port}/metrics") as response:
        gauges = dict(_GAUGE.findall(await response.text()))
    return int(float(gauges["running"])), int(float(gauges["waiting"]))
