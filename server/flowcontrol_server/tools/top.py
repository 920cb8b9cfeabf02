"""`flowcontrol top`: the dashboard in a terminal, over the admin API."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from heapq import nsmallest
from typing import Any, ClassVar, final

import grpc
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Label, Sparkline, Static

from flowcontrol.request import Group, Outcome, by_group
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.admin.client import AdminSource, SnapshotSource
from flowcontrol_server.admin.wording import duration
from flowcontrol_server.common.plain_text import plain

_MOVES_SHOWN = 20
_PROBLEMS_SHOWN = 6
_HISTORY = 120
_RETRY_S = 1.0
_FULL = 1.0


@final
class Explained(ModalScreen[None]):
    """The explanation of one request."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "Close")]

    def __init__(self, title: str, sentences: Sequence[str]) -> None:
        super().__init__()
        self._title = title
        self._sentences = sentences

    def compose(self) -> ComposeResult:
        """Show a box over the rest."""
        with VerticalScroll(id="explained"):
            yield Label(Text(plain(self._title), style="bold"), id="explained-title")
            for sentence in self._sentences:
                yield Static(Text(plain(sentence)), classes="sentence")
            yield Static(Text("Esc closes", style="dim"))


@final
class Top(App[None]):
    """Bands, tenants, endpoints and decisions, live.

    Args:
        source: source of snapshots, decisions and explanations.
    """

    TITLE = "flowcontrol top"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "top.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "ask", "Explain a request"),
        Binding("u", "undispatched", "All / refused and evicted"),
        Binding("p", "pause", "Pause / go on"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),  # also while the input has the focus
    ]

    def __init__(self, source: SnapshotSource) -> None:
        super().__init__()
        self._source = source
        self._waiting: list[float] = []
        self._in_flight: list[float] = []
        self._is_paused = False
        self._hides_dispatched = False
        self._decisions: Sequence[api.DecisionRecord] = ()

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Static("connecting", id="summary")
        yield Static("", id="problems")
        with Horizontal(id="charts"):
            for name in ("waiting", "in flight"):
                with VerticalScroll(classes="chart", can_focus=False):
                    yield Label(name)
                    yield Sparkline([], id=f"spark-{name.replace(' ', '-')}")
        yield _panel(
            "bands",
            "band",
            "objectives",
            *(
                "waiting",
                "oldest",
                "expected",
                "ceiling",
                "gate",
                "in flight",
                "dispatched",
                "refused",
                "evicted",
            ),
        )
        with Horizontal(id="middle"):
            yield _panel(
                "flows", "band", "tenant", "share", "fair", "waiting", "in flight", "oldest"
            )
            with Vertical(id="pool"):
                yield _panel("endpoints", "endpoint", "load", "", "in flight")
                yield _panel("moves", "ago", "limit", "why")
        yield _panel("decisions", "time", "request", "band", "tenant", "outcome", "waited", "why")
        yield Input(placeholder="request id or x-request-id, Enter explains, Esc closes", id="ask")
        yield Footer()

    def on_mount(self) -> None:
        """Set the titles and begin to watch the service."""
        for name, title in (
            ("bands", "Bands"),
            ("flows", "Tenants"),
            ("endpoints", "Endpoints"),
            ("moves", "How the limit was found"),
            ("decisions", "Recent decisions: Enter explains"),
        ):
            self.query_one(f"#{name}").border_title = title
        self._table("decisions").focus()
        self.run_worker(self._follow(), exclusive=True)

    async def on_unmount(self) -> None:
        """Close the connection to the service."""
        await self._source.close()

    async def _follow(self) -> None:
        while True:
            try:
                async for snapshot in self._source.watch():
                    if not self._is_paused:
                        self._decisions = (await self._source.decisions()).decisions
                        self._show(snapshot)
            except grpc.aio.AioRpcError as error:
                reason = plain(error.details() or "")
                self._summary(Text(f"not connected: {reason}", style="bold red"))
            await asyncio.sleep(_RETRY_S)

    def _show(self, snapshot: api.Snapshot) -> None:
        self._waiting = [*self._waiting, float(snapshot.waiting)][-_HISTORY:]
        self._in_flight = [*self._in_flight, float(snapshot.in_flight)][-_HISTORY:]
        self.query_one("#spark-waiting", Sparkline).data = [0.0, *self._waiting]  # drawn from 0 up
        self.query_one("#spark-in-flight", Sparkline).data = [0.0, *self._in_flight]
        self._show_summary(snapshot)
        self._show_bands(snapshot)
        self._show_flows(snapshot)
        self._show_endpoints(snapshot)
        self._show_moves(snapshot)
        self._show_decisions()

    def _show_summary(self, snapshot: api.Snapshot) -> None:
        load = snapshot.saturation
        text = Text.assemble(
            (plain(snapshot.pool), "bold"),
            "   saturation ",
            (f"{load:.0%}", _load_style(load)),
            f" {_bar(load, 20)}   waiting ",
            (str(snapshot.waiting), "bold"),
            "   in flight ",
            (str(snapshot.in_flight), "bold"),
        )
        limits = [d.requests_limit for d in snapshot.detectors if d.HasField("requests_limit")]
        if limits:
            text.append(f" of {min(limits)}")
        if snapshot.draining:
            text.append("   draining", "bold yellow")
        if snapshot.standby:
            text.append("   standby: another replica decides", "bold yellow")
        if self._is_paused:
            text.append("   paused", "bold yellow")
        if snapshot.HasField("about"):
            about = snapshot.about
            text.append(f"   {about.version}, configuration {about.configuration_hash}", "dim")
        self._summary(text)
        self._show_problems(snapshot)

    def _show_problems(self, snapshot: api.Snapshot) -> None:
        """Show the current problems; hide the strip if there are none."""
        strip = self.query_one("#problems", Static)
        strip.display = bool(snapshot.problems)
        now_ns = snapshot.time.ToNanoseconds()
        lines = [
            f"{plain(each.kind)} {plain(each.about)}: {plain(each.text)} "
            f"(for {duration(max(0, now_ns - each.since.ToNanoseconds()))})"
            for each in snapshot.problems[:_PROBLEMS_SHOWN]
        ]
        more = len(snapshot.problems) - len(lines)
        if more > 0:
            lines.append(f"and {more} more")
        strip.update(Text("\n".join(lines), "bold red"))

    def _show_bands(self, snapshot: api.Snapshot) -> None:
        rows = []
        for band in snapshot.bands:
            counts = _by_group(band)
            is_gated = snapshot.saturation >= band.ceiling
            names = [each.name for each in snapshot.objectives if each.priority == band.priority]
            rows.append(
                (
                    str(band.priority),
                    (
                        str(band.priority),
                        ", ".join(names) if band.declared else "drains",
                        str(band.waiting),
                        _duration(band, "oldest_wait"),
                        _duration(band, "expected_wait"),
                        f"{band.ceiling:.0%}",
                        Text("gated", "red") if is_gated else Text("open", "green"),
                        str(band.in_flight),
                        *(str(counts[group]) for group in Group),
                    ),
                )
            )
        _fill(self._table("bands"), rows)

    def _show_flows(self, snapshot: api.Snapshot) -> None:
        rows = [
            (
                f"{band.priority}/{flow.flow_id}",
                (
                    str(band.priority),
                    flow.flow_id,
                    Text(
                        f"{_bar(flow.share, 10)} {flow.share:4.0%}",
                        "yellow" if flow.waiting and flow.share < flow.fair_share * 0.8 else "cyan",
                    ),
                    f"{flow.fair_share:.0%}",
                    str(flow.waiting),
                    str(flow.in_flight),
                    _duration(flow, "oldest_wait"),
                ),
            )
            for band in snapshot.bands
            for flow in band.flows
        ]
        _fill(self._table("flows"), rows)

    def _show_endpoints(self, snapshot: api.Snapshot) -> None:
        rows = [
            (
                each.address,
                (
                    each.address,
                    Text(_bar(each.saturation, 12), _load_style(each.saturation)),
                    f"{each.saturation:.0%}",
                    str(each.in_flight) if each.HasField("in_flight") else "-",
                ),
            )
            for each in snapshot.endpoints
        ]
        _fill(self._table("endpoints"), rows)

    def _show_moves(self, snapshot: api.Snapshot) -> None:
        finds = [each for each in snapshot.detectors if each.kind in {"adaptive", "auto"}]
        self.query_one("#moves").display = bool(finds)
        moves = [(each.stage, move) for each in finds for move in each.moves]
        rows = [
            (
                f"{stage}/{index}",
                (
                    _duration(move, "ago"),
                    Text(
                        f"{move.before:.1f} > {move.after:.1f}",
                        "green" if move.after > move.before else "yellow",
                    ),
                    f"{move.address}: {move.reason}" if move.address else move.reason,
                ),
            )
            for index, (stage, move) in enumerate(
                nsmallest(_MOVES_SHOWN, moves, key=lambda each: each[1].ago.ToNanoseconds())
            )
        ]
        _fill(self._table("moves"), rows)

    def _show_decisions(self) -> None:
        rows = [
            (
                f"{each.request_id}/{each.outcome}",
                (
                    f"{each.time.ToDatetime():%H:%M:%S}",
                    str(each.request_id),
                    str(each.priority),
                    each.flow_id,
                    Text(plain(each.outcome), _outcome_style(each.outcome)),
                    _duration(each, "waited"),
                    each.reason,
                ),
            )
            for each in self._decisions
            if not (self._hides_dispatched and each.outcome == "dispatched")
        ]
        _fill(self._table("decisions"), rows)

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Explain the selected decision."""
        if event.data_table.id == "decisions-table":
            await self._explain(str(event.row_key.value).partition("/")[0])

    def action_ask(self) -> None:
        """Open the input for a request id."""
        ask = self.query_one("#ask", Input)
        ask.add_class("shown")
        ask.focus()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        """Explain the request with the submitted id."""
        self._close_ask()
        if event.value.strip():
            await self._explain(event.value.strip())

    def key_escape(self) -> None:
        """Close the input."""
        self._close_ask()

    def _close_ask(self) -> None:
        ask = self.query_one("#ask", Input)
        ask.value = ""
        ask.remove_class("shown")
        self._table("decisions").focus()

    async def _explain(self, request_id: str) -> None:
        try:
            explanation = await self._source.explain(request_id)
        except grpc.aio.AioRpcError as error:
            self.push_screen(Explained(f"Request {request_id}", [f"{error.details()}."]))
            return
        state = api.Explanation.State.Name(explanation.state).lower().replace("_", " ")
        title = f"Request {explanation.request_id}: {state}"
        self.push_screen(Explained(title, explanation.sentences))

    def action_undispatched(self) -> None:
        """Show all decisions, or only those with another outcome than dispatched."""
        self._hides_dispatched = not self._hides_dispatched
        self._show_decisions()

    def action_pause(self) -> None:
        """Pause the screen, or resume."""
        self._is_paused = not self._is_paused

    def _summary(self, text: Text) -> None:
        self.query_one("#summary", Static).update(text)

    def _table(self, name: str) -> "DataTable[Any]":
        return self.query_one(f"#{name}-table", DataTable)


def _panel(name: str, *columns: str) -> VerticalScroll:
    table: DataTable[Any] = DataTable(
        id=f"{name}-table", cursor_type="row", zebra_stripes=False, show_cursor=name == "decisions"
    )
    for column in columns:
        table.add_column(column)
    return VerticalScroll(table, id=name, classes="panel", can_focus=False)


def _fill(table: "DataTable[Any]", rows: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Replace the rows; the cursor stays on its row, or moves to the first if that is gone."""
    at = None
    if table.row_count and table.show_cursor and table.cursor_row:
        at = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
    scroll = table.scroll_y
    table.clear()
    place = 0
    for index, (key, cells) in enumerate(rows):
        shown = (Text(plain(cell)) if isinstance(cell, str) else cell for cell in cells)
        table.add_row(*shown, key=key)
        if key == at:
            place = index
    if table.show_cursor:
        table.move_cursor(row=place, scroll=False)
        table.scroll_to(y=scroll, animate=False)


def _bar(part: float, width: int) -> str:
    full = min(width, max(0, round(part * width)))
    return "█" * full + "░" * (width - full)


def _duration(message: Any, field: str) -> str:
    if not message.HasField(field):
        return "-"
    return duration(getattr(message, field).ToNanoseconds())


def _by_group(band: api.Band) -> Counter[Group]:
    known = {outcome.value: outcome for outcome in Outcome}  # others may be of a newer service
    counts = {known[each.outcome]: each.count for each in band.outcomes if each.outcome in known}
    return by_group(counts)


def _load_style(load: float) -> str:
    return "bold red" if load >= _FULL else "bold yellow" if load > 0.8 else "bold green"  # noqa: PLR2004 - a fifth left


def _outcome_style(outcome: str) -> str:
    return {"dispatched": "green", "evicted": "yellow"}.get(outcome.partition("-")[0], "red")


def run(address: str, token: str | None, credentials: grpc.ChannelCredentials | None) -> None:
    """Show a service until q is pressed; its gRPC channel must be made inside the loop."""

    async def show() -> None:
        """Connect and show."""
        await Top(AdminSource(address, token, credentials)).run_async()

    asyncio.run(show())
