"""Health as `grpc.health.v1` says it: the same words at every gRPC door."""

from typing import Final, final

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from server.codec import MalformedMessageError

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
        try:
            service = health_pb2.HealthCheckRequest.FromString(request).service
        except DecodeError as error:
            message = "not a HealthCheckRequest"
            raise MalformedMessageError(message) from error
        return self._answers.get(service)
