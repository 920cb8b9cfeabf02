"""The dashboard on the HTTP port: its files, the view as server-sent events, and explanations.

All its files are in the wheel. It loads nothing from other hosts, and its content security policy
forbids the browser to do so.
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
"""Most open dashboards; each costs a message a second."""
WATCHERS_PER_PEER_MAX = 8
"""Most open dashboards from one address."""
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
        application: of the HTTP port; its middleware authorizes requests.
        gate: the way to the processor.
        live: the data of the dashboard.
        role: returns the role of this process in the election, in words; empty: no election.
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
        """Return the file, which was read once."""
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return handle


def _events(live: LiveView) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    places = Places(WATCHERS_MAX, WATCHERS_PER_PEER_MAX)

    async def handle(request: web.Request) -> web.StreamResponse:
        """Send the history, then a view a second until either side ends."""
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
        return response  # the browser is gone, or the service is shutting down


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
        """Explain what a request waits for, or its outcome."""
        request_id = request.query.get("request", "")
        try:
            answer = _explanation(await explain(gate, request_id, role))
        except NotKnownError as error:
            answer = {"sentences": [plain(f"{str(error)[0].upper()}{str(error)[1:]}.")]}
            return web.json_response(answer, status=404, headers=_HEADERS)
        except NotRunningError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        return web.json_response(answer, headers=_HEADERS)

    return handle


def _explanation(answer: api.Explanation) -> dict[str, Any]:
    is_waiting = answer.state == api.Explanation.WAITING
    decision = answer.decision
    facts = {
        "Client's request id": answer.client_request_id,
        "Band": str(answer.priority),
        "Tenant": answer.flow_id,
        "Objective": decision.objective,
        "Arrived": _ago(answer, "age"),
        "Outcome": decision.outcome,
        "Decided": _time_of_day(decision) if answer.HasField("decision") else "",
        "Waited": _duration(decision, "waited"),
        "Expected to wait": _duration(decision, "expected_wait"),
        "Endpoint": decision.endpoint,
        "Retry after": _duration(decision, "retry_after"),
        "Ahead of it": str(answer.position) if is_waiting else "",
        "Expected remaining wait": _duration(answer, "expected_wait"),
        "In nine of ten cases at most": _duration(answer, "expected_wait_p90"),
        "Evicted in at most": _duration(answer, "deadline_in"),
        "Expected at arrival": _duration(answer, "expected_at_arrival"),
    }
    return {
        "request_id": answer.request_id,
        "state": _STATES[answer.state],
        "sentences": [plain(sentence) for sentence in answer.sentences],
        "facts": {name: plain(value) for name, value in facts.items() if value},
        "ahead": _ahead(answer) if is_waiting else None,
    }


def _ahead(answer: api.Explanation) -> list[dict[str, Any]]:
    """Return the requests ahead of it, in the order of dispatch."""
    ahead = [
        {"who": f"in band {priority}", "count": count}
        for priority, count in sorted(answer.ahead_above.items(), reverse=True)
    ]
    others = max(0, answer.ahead_in_band - answer.ahead_in_flow)
    for whose, count in (("of other tenants", others), ("of its own", answer.ahead_in_flow)):
        if count:
            ahead.append({"who": whose, "count": count})
    return ahead


def _time_of_day(decision: api.DecisionRecord) -> str:
    return f"{decision.time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"


def _ago(answer: api.Explanation, field: str) -> str:
    text = _duration(answer, field)
    return f"{text} ago" if text else ""


def _duration(message: Any, field: str) -> str:
    if not message.HasField(field):
        return ""
    return duration(getattr(message, field).ToNanoseconds())
