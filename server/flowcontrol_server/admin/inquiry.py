"""Questions about single requests, put to the processor and to the newest decisions."""

from collections.abc import Callable
from functools import partial

from flowcontrol.controller import FlowController
from flowcontrol.errors import FlowControlError
from flowcontrol.request import Outcome
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol.views import explain as engine
from flowcontrol.views.explain import Explanation
from flowcontrol_server.admin.messages import add_origin, decision_message, explanation_message
from flowcontrol_server.admin.wording import reason
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.recent import Decided


class NotKnownError(FlowControlError):
    """Asked about a request that is neither live nor among the newest decisions."""


async def explain(
    gate: FlowGate, request_id: str, role: Callable[[], str] = lambda: ""
) -> api.Explanation:
    """Say of a request what it waits for, or what became of it.

    Args:
        gate: the way to the processor.
        request_id: ours, else the client's.
        role: returns what this process is in the election, in words; empty without one.

    Raises:
        NotKnownError: it is unknown, or no longer known.
        NotRunningError: it is live, and the processor has ended.
    """
    parked = gate.find(request_id)
    explained = None
    if parked is not None:
        explained = await gate.ask(partial(_explain, request_id=parked.request_id))
    decided = gate.recent.find(request_id if parked is None else str(parked.request_id))
    if explained is None or parked is None:
        if decided is None:
            message = f"request {request_id!r} is neither live nor among the newest decisions"
            if said_role := role():
                message = f"{message}; {said_role}"
            raise NotKnownError(message)
        return _ended(decided, gate)
    said = explanation_message(explained, parked)
    add_origin(said, parked.request.objective, parked.origin)
    if said_role := role():
        said.sentences.append(f"{said_role[0].upper()}{said_role[1:]}.")
    if decided is not None:
        said.decision.CopyFrom(decision_message(decided, parked))
    return said


def _explain(controller: FlowController, now_ns: int, request_id: int) -> Explanation | None:
    return engine.explain(controller, request_id, now_ns)


def _ended(decided: Decided, gate: FlowGate) -> api.Explanation:
    decision = decided.decision
    live = gate.live(decision.request_id)
    who = f"Request {decision.request_id} of {decision.flow_id} in band {decision.priority}"
    said = api.Explanation(
        request_id=decision.request_id,
        client_request_id=decided.client_request_id,
        state=api.Explanation.ENDED,
        sentences=[f"{who} was {_said(decision.outcome)}: {reason(decision)}."],
        priority=decision.priority,
        flow_id=decision.flow_id,
        decision=decision_message(decided, live),
    )
    add_origin(said, decided.request.objective, decided.origin)
    return said


def _said(outcome: Outcome) -> str:
    """Return a word for an outcome: evicted-ttl is just evicted, as the reason follows."""
    return outcome.value.partition("-")[0] if outcome is not Outcome.INTERNAL else "not decided"
