"""Health as `grpc.health.v1` says it: the same words at every gRPC door."""

from typing import Final, final

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from server.codec import parsed

SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse.ServingStatus


@final
class Health:
    """Which services are served now, for the doors of grpcio and for the direct door."""

    def __init__(self) -> None:
        self.servicer = HealthServicer()
        self._answers: dict[str, bytes] = {}

    async def set(self, service: str, *, is_serving: bool) -> None:
        """Say from now on whether a service is served."""
        status = _Status.SERVING if is_serving else _Status.NOT_SERVING
        self._answers[service] = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        await self.servicer.set(service, status)

    def check(self, request: bytes) -> bytes | None:
        """Answer a HealthCheckRequest with a HealthCheckResponse; None for an unknown service.

        Raises:
            MalformedMessageError: it cannot be read.
        """
        return self._answers.get(parsed(health_pb2.HealthCheckRequest, request).service)
