"""The dashboard on the HTTP port: its files, the view as server-sent events, and explanations.

Everything it needs is in the wheel; nothing is loaded from anywhere else, and the browser is told
to load nothing else.
"""

import json
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from aiohttp import web

from flowcontrol.errors import NotRunningError
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.admin.inquiry import NotKnownError, explain
from flowcontrol_server.admin.live import LiveView
from flowcontrol_server.admin.wording import duration
from flowcontrol_server.common.places import NoPlaceError, Places
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.requests.gate import FlowGate

WATCHERS_MAX = 32
"""Who may look at once; each costs a message a second."""
WATCHERS_PER_PEER_MAX = 8
"""Of them, from one address."""
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = ("index.html", "style.css", "app.js", "chart.js", "icon.svg")
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_STATES = {
    api.Explanation.WAITING: "waiting",
    api.Explanation.IN_FLIGHT: "in flight",
    api.Explanation.ENDED: "ended",
}


def add_pages(
    application: web.Application,
    gate: FlowGate,
    live: LiveView,
    role: Callable[[], str] = lambda: "",
) -> None:
    """Serve the dashboard: / and /dashboard/*, /api/events and /api/explain.

    Args:
        application: of the HTTP port; who may ask is for its middleware to say.
        gate: the way to the processor.
        live: what the dashboard shows.
        role: returns what this process is in the election, in words; empty without one.
    """
    folder = files("flowcontrol_server.admin") / "dashboard"
    for name in _FILES:
        path = "/" if name == "index.html" else f"/dashboard/{name}"
        application.router.add_get(path, _file((folder / name).read_bytes(), name))
    application.router.add_get("/api/events", _events(live))
    application.router.add_get("/api/explain", _explain(gate, role))


def _file(body: bytes, name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    content_type = _TYPES[name.rpartition(".")[2]]

    async def handle(_request: web.Request) -> web.Response:
        """Return the file, read once."""
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return handle


def _events(live: LiveView) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    places = Places(WATCHERS_MAX, WATCHERS_PER_PEER_MAX)

    async def handle(request: web.Request) -> web.StreamResponse:
        """Send the history, then a view a second until either side has had enough."""
        try:
            with places.taken(request.remote or ""):
                return await _send_views(request, live)
        except NoPlaceError as error:
            raise web.HTTPServiceUnavailable(text=f"open dashboards {error}\n") from error

    return handle


async def _send_views(request: web.Request, live: LiveView) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={**_HEADERS, "content-type": "text/event-stream", "x-accel-buffering": "no"}
    )
    first = await _available(live.view())
    try:
        await response.prepare(request)
        await response.write(_event("history", json.dumps(list(live.history))))
        await response.write(_event("view", first))
        while True:
            await response.write(_event("view", await live.next_view()))
    except (ConnectionError, NotRunningError):
        return response  # the browser is gone, or the service is about to be


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


async def _available(answer: Awaitable[str]) -> str:
    try:
        return await answer
    except NotRunningError as error:
        raise web.HTTPServiceUnavailable(text=f"{error}\n") from error


def _explain(
    gate: FlowGate, role: Callable[[], str]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        """Say of one request what it waits for, or what became of it."""
        request_id = request.query.get("request", "")
        try:
            said = _explanation(await explain(gate, request_id, role))
        except NotKnownError as error:
            said = {"sentences": [plain(f"{str(error)[0].upper()}{str(error)[1:]}.")]}
            return web.json_response(said, status=404, headers=_HEADERS)
        except NotRunningError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        return web.json_response(said, headers=_HEADERS)

    return handle


def _explanation(said: api.Explanation) -> dict[str, Any]:
    is_waiting = said.state == api.Explanation.WAITING
    decision = said.decision
    facts = {
        "Client's request id": said.client_request_id,
        "Band": str(said.priority),
        "Tenant": said.flow_id,
        "Objective": decision.objective,
        "Arrived": _ago(said, "age"),
        "Outcome": decision.outcome,
        "Decided": _time_of_day(decision) if said.HasField("decision") else "",
        "Waited": _duration(decision, "waited"),
        "Expected to wait": _duration(decision, "expected_wait"),
        "Endpoint": decision.endpoint,
        "Retry after": _duration(decision, "retry_after"),
        "Ahead of it": str(said.position) if is_waiting else "",
        "Expected remaining wait": _duration(said, "expected_wait"),
        "In nine of ten cases at most": _duration(said, "expected_wait_p90"),
        "Evicted in at most": _duration(said, "deadline_in"),
        "Expected at arrival": _duration(said, "expected_at_arrival"),
    }
    return {
        "request_id": said.request_id,
        "state": _STATES[said.state],
        "sentences": [plain(sentence) for sentence in said.sentences],
        "facts": {name: plain(value) for name, value in facts.items() if value},
        "ahead": _ahead(said) if is_waiting else None,
    }


def _ahead(said: api.Explanation) -> list[dict[str, Any]]:
    """Return who is ahead, who goes first first."""
    ahead = [
        {"who": f"in band {priority}", "count": count}
        for priority, count in sorted(said.ahead_above.items(), reverse=True)
    ]
    others = max(0, said.ahead_in_band - said.ahead_in_flow)
    for who, count in (("of other tenants", others), ("of its own", said.ahead_in_flow)):
        if count:
            ahead.append({"who": who, "count": count})
    return ahead


def _time_of_day(decision: api.DecisionRecord) -> str:
    return f"{decision.time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"


def _ago(said: api.Explanation, field: str) -> str:
    text = _duration(said, field)
    return f"{text} ago" if text else ""


def _duration(message: Any, field: str) -> str:
    if not message.HasField(field):
        return ""
    return duration(getattr(message, field).ToNanoseconds())
