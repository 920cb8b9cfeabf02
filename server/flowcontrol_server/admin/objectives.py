"""Our own gRPC API, flowcontrol.v1: the objectives, and changes of those kept by the API."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, final

import grpc

from flowcontrol.errors import NotRunningError
from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.admin.messages import objective_messages
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.sources.objective_store import ObjectiveStore

Answer = TypeVar("Answer")


@final
@dataclass(frozen=True, slots=True)
class ObjectiveAccess:
    """Access to the source of objectives; read again at each call."""

    store: Callable[[], ObjectiveStore | None]
    """Returns the store that the API changes; None: objectives come from another source."""
    problems: Callable[[], Iterable[tuple[str, str, str]]]
    """Returns the problems of their sources: source, subject and error."""


FROM_ELSEWHERE = ObjectiveAccess(lambda: None, lambda: ())


async def while_running(answer: Awaitable[Answer], context: Any) -> Answer:
    """Return an answer of the processor; end the call as UNAVAILABLE if that has ended."""
    try:
        return await answer
    except NotRunningError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise  # abort has raised already


class ObjectiveMethods:
    """The methods for objectives. A change is in effect when the response is sent.

    Args:
        gate: the way to the engine, which has the objectives in effect.
        objectives: the access to their source.
    """

    def __init__(self, gate: FlowGate, objectives: ObjectiveAccess) -> None:
        self._gate = gate
        self._objectives = objectives

    async def ListObjectives(  # noqa: N802 - as in the .proto
        self,
        request: api.ListObjectivesRequest,  # noqa: ARG002 - as grpc calls it
        context: Any,
    ) -> api.ListObjectivesResponse:
        """Return the objectives in effect, and the problems of their sources."""
        snapshot = await while_running(self._gate.snapshot(), context)
        return api.ListObjectivesResponse(
            objectives=objective_messages(snapshot),
            writable=self._objectives.store() is not None,
            problems=[
                # file names may not be UTF-8
                api.SourceProblem(source=source, about=plain(about), problem=plain(problem))
                for source, about, problem in self._objectives.problems()
            ],
        )

    async def PutObjective(  # noqa: N802 - as in the .proto
        self, request: api.PutObjectiveRequest, context: Any
    ) -> api.Objective:
        """Add or change an objective."""
        store = await self._writable(context)
        objective = request.objective
        try:
            await store.put(objective.name, objective.priority)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except OSError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"not stored: {error}")
        return objective

    async def DeleteObjective(  # noqa: N802 - as in the .proto
        self, request: api.DeleteObjectiveRequest, context: Any
    ) -> api.DeleteObjectiveResponse:
        """Delete an objective; its band drains."""
        store = await self._writable(context)
        try:
            was_there = await store.delete(request.name)
        except OSError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"not stored: {error}")
            raise  # abort has raised already
        if not was_there:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no objective {request.name!r}")
        return api.DeleteObjectiveResponse()

    async def _writable(self, context: Any) -> ObjectiveStore:
        """Return the store; end the call if there is none."""
        store = self._objectives.store()
        if store is None:
            message = (
                "objectives do not come from the API: change them at their source, "
                "or set objectives.api"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
            raise AssertionError  # abort has raised already
        return store
