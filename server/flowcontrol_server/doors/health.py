"""Health by `grpc.health.v1`, the same at every gRPC door."""

from typing import Final, Protocol, final

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from flowcontrol_server.requests.codec import parsed

SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCHERS_MAX: Final = 1_000
"""Watch streams at the direct door; each gets a message when health changes."""
_Status = health_pb2.HealthCheckResponse.ServingStatus


def _answer(status: int) -> bytes:
    answer: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
    return answer


_UNKNOWN: Final = _answer(_Status.SERVICE_UNKNOWN)


class Watcher(Protocol):
    """A stream that gets every change."""

    def tell(self, answer: bytes) -> None:
        """Send a HealthCheckResponse."""


@final
class Health:
    """The health of each service, for the ports of grpcio and the direct door."""

    def __init__(self) -> None:
        self.servicer = HealthServicer()
        self._answers: dict[str, bytes] = {}
        self._watchers: dict[Watcher, str] = {}
        """The service that each watches."""

    async def set(self, service: str, *, is_serving: bool) -> None:
        """Set the health of a service, and send it to all watchers of that service."""
        status = _Status.SERVING if is_serving else _Status.NOT_SERVING
        answer = _answer(status)
        if answer != self._answers.get(service):
            self._answers[service] = answer
            for watcher in [each for each, name in self._watchers.items() if name == service]:
                watcher.tell(answer)
        await self.servicer.set(service, status)

    def check(self, request: bytes) -> bytes | None:
        """Answer a HealthCheckRequest with a HealthCheckResponse; None: the service is unknown.

        Raises:
            MalformedMessageError: it cannot be read.
        """
        return self._answers.get(_service(request))

    def watch(self, request: bytes, watcher: Watcher) -> bytes | None:
        """Answer a HealthCheckRequest now and at every change; None: there are too many watchers.

        For an unknown service, which may become known, the answer is SERVICE_UNKNOWN.

        Raises:
            MalformedMessageError: it cannot be read.
        """
        service = _service(request)
        if len(self._watchers) >= WATCHERS_MAX:
            return None
        self._watchers[watcher] = service
        return self._answers.get(service, _UNKNOWN)

    def unwatch(self, watcher: Watcher) -> None:
        """Remove a watcher."""
        self._watchers.pop(watcher, None)


def _service(request: bytes) -> str:
    service: str = parsed(health_pb2.HealthCheckRequest, request).service
    return service
