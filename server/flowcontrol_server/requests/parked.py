"""A request at the gate, and what is known of it until its stream has ended. Owner: the loop."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from flowcontrol.events import Decision
from flowcontrol.request import Request
from flowcontrol_server.requests.classify import Origin
from flowcontrol_server.requests.dialects import Dialect
from flowcontrol_server.requests.log_codec import LogEntry
from flowcontrol_server.requests.log_join import Claim, claim
from flowcontrol_server.requests.response_reader import ResponseReader


@final
@dataclass(slots=True, eq=False, init=False)
class Parked:
    """A request at the gate, from its arrival to the end of its stream."""

    request: Request
    """The request as the engine gets it."""
    decision: Decision | None = None
    """The decision about it; set once."""
    decided: Callable[[Decision], None] | None = None
    """Called once with the decision, after all other fields are set."""
    client_request_id: str = ""
    path: str = ""
    """Path without the query."""
    dialect: Dialect = Dialect.OPENAI
    """Error format of its client."""
    arrived_ns: int = 0
    decided_ns: int = 0
    left_ns: int | None = None
    recall: asyncio.Future[Decision] | None = None
    """Resolves with a second decision, if one comes, which ends the request in flight. None: no
    second one can come."""
    origin: Origin | None = None
    """Origin of its objective and its flow; None: unknown."""
    response: ResponseReader | None = None
    """Reads the response; None: it does not pass through here."""
    trace: Mapping[str, str] | None = None
    """Headers of the trace that it belongs to; None: traces are off."""
    former: "Parked | None" = None
    """The attempt before, which Envoy could not send; it leaves when this one is dispatched."""
    is_followed: bool = False
    """Whether it was dispatched and not sent, and another attempt has come."""
    is_unsent: bool = False
    """Whether it was dispatched and not sent, and another attempt has been dispatched since."""

    def __init__(  # noqa: PLR0913 - its fields; a dataclass's own is interpreted
        self,
        request: Request,
        client_request_id: str = "",
        path: str = "",
        dialect: Dialect = Dialect.OPENAI,
        arrived_ns: int = 0,
        *,
        decided_ns: int = 0,
        left_ns: int | None = None,
        origin: Origin | None = None,
        response: ResponseReader | None = None,
        trace: Mapping[str, str] | None = None,
        former: "Parked | None" = None,
    ) -> None:
        self.request = request
        self.decision = None
        self.decided = None
        self.client_request_id = client_request_id
        self.path = path
        self.dialect = dialect
        self.arrived_ns = arrived_ns
        self.decided_ns = decided_ns
        self.left_ns = left_ns
        self.recall = None
        self.origin = origin
        self.response = response
        self.trace = trace
        self.former = former
        self.is_followed = self.is_unsent = False

    @property
    def request_id(self) -> int:
        """The id that this process gave the request."""
        return self.request.request_id

    def future(self) -> asyncio.Future[Decision]:
        """Return a future of the decision, in place of `decided`; once, and not to be cancelled."""
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        if self.decision is None:
            assert self.decided is None, "there is one decision"
            self.decided = future.set_result
        else:
            future.set_result(self.decision)
        return future


def claim_of(parked: Parked, decision: Decision) -> Claim:
    """Return the bounds of the settlement of a dispatched request."""
    request = parked.request
    endpoints = () if decision.endpoint is None else (decision.endpoint, *decision.fallbacks)
    return claim(
        decision.priority,
        parked.decided_ns,
        request.byte_size,
        request.output_tokens_max,
        endpoints,
    )


def report_of(parked: Parked) -> LogEntry | None:
    """Return the report of the response of a dispatched request that has left; None: unknown."""
    if parked.response is None:
        return None
    return parked.response.report(parked.decided_ns, parked.left_ns or parked.decided_ns)


def trace_of(
    fields: tuple[str, ...], metadata: Mapping[str, str | bytes], headers: Mapping[str, str]
) -> dict[str, str]:
    """Return the headers of a request's trace.

    Args:
        fields: names of the headers that carry a trace.
        metadata: of the stream: has Envoy's own span, if Envoy traces.
        headers: of the request: have the client's span, used if Envoy does not trace.
    """
    own = {name: text for name in fields if isinstance(text := metadata.get(name), str)}
    return own or {name: headers[name] for name in fields if name in headers}
