"""Explanations of single requests, from the processor and from the newest decisions."""

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
    """The request is neither live nor among the newest decisions."""


async def explain(
    gate: FlowGate, request_id: str, role: Callable[[], str] = lambda: ""
) -> api.Explanation:
    """Explain what a request waits for, or its outcome.

    Args:
        gate: the way to the processor.
        request_id: flowcontrol's, otherwise the client's.
        role: returns the role of this process in the election, in words; empty: no election.

    Raises:
        NotKnownError: the request is unknown, or no longer known.
        NotRunningError: the request is live, and the processor has ended.
    """
    parked = gate.find(request_id)
    explained = None
    if parked is not None:
        explained = await gate.ask(partial(_explain, request_id=parked.request_id))
    decided = gate.recent.find(request_id if parked is None else str(parked.request_id))
    if explained is None or parked is None:
        if decided is None:
            message = f"request {request_id!r} is neither live nor among the newest decisions"
            if own_role := role():
                message = f"{message}; {own_role}"
            raise NotKnownError(message)
        return _ended(decided, gate)
    answer = explanation_message(explained, parked)
    add_origin(answer, parked.request.objective, parked.origin)
    if own_role := role():
        answer.sentences.append(f"{own_role[0].upper()}{own_role[1:]}.")
    if decided is not None:
        answer.decision.CopyFrom(decision_message(decided, parked))
    return answer


def _explain(controller: FlowController, now_ns: int, request_id: int) -> Explanation | None:
    return engine.explain(controller, request_id, now_ns)


def _ended(decided: Decided, gate: FlowGate) -> api.Explanation:
    decision = decided.decision
    live = gate.live(decision.request_id)
    subject = f"Request {decision.request_id} of {decision.flow_id} in band {decision.priority}"
    answer = api.Explanation(
        request_id=decision.request_id,
        client_request_id=decided.client_request_id,
        state=api.Explanation.ENDED,
        sentences=[f"{subject} was {_verb(decision.outcome)}: {reason(decision)}."],
        priority=decision.priority,
        flow_id=decision.flow_id,
        decision=decision_message(decided, live),
    )
    add_origin(answer, decided.request.objective, decided.origin)
    return answer


def _verb(outcome: Outcome) -> str:
    """Return the verb of an outcome: evicted-ttl is just evicted, as the reason follows."""
    return outcome.value.partition("-")[0] if outcome is not Outcome.INTERNAL else "not decided"
