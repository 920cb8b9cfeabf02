"""The ports of grpcio, each with health and reflection."""

import asyncio
import contextlib
import socket
from collections.abc import Mapping
from typing import Any, Final, final

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flowcontrol.errors import ListenError
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.listening import naming
from flowcontrol_server.doors import health

MESSAGE_BYTES_MAX: Final = 4 << 20
"""gRPC's own default. Envoy sends headers of 60 KiB at most unless told otherwise, batches of log
entries of 16 KiB, and parts of bodies of 1 MiB; what is larger is not read."""
METADATA_BYTES_MAX: Final = 16 << 10
"""Of one gRPC call, as grpc counts."""

CONNECTIONS_MAX: Final = 512
"""Of a port. Each costs a descriptor, of which every port must find some left."""

GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    # grpc-core refuses streams it has not yet accepted: at random above 1000, all above 3000. A
    # burst of parked requests looks just like that.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    # Two processes on one port would each gate half of the requests, unnoticed.
    ("grpc.so_reuseport", 0),
    # Envoy's keepalive pings are welcome, also while every stream is silently parked.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A connection that says nothing is closed: before its first request, between two of them, and
    # when its host has vanished. Envoy's keep a stream or a health check open.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@final
class GrpcPorts:
    """Opens ports, and closes them all.

    Args:
        health: what they say of themselves.
    """

    def __init__(self, health: health.Health) -> None:
        self._health = health
        self._servers: list[grpc.aio.Server] = []

    async def open(
        self,
        address: Address,
        credentials: grpc.ServerCredentials | None,
        services: Mapping[str, "grpc.GenericRpcHandler[Any, Any]"],
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """Open one more port.

        Args:
            address: where.
            credentials: for TLS; None for plain text.
            services: by full name; health and reflection are served in any case.
            connections_max: at once; more are closed as they come.

        Raises:
            ListenError: naming the address.
        """
        server = grpc.aio.server(
            options=(*GRPC_OPTIONS, ("grpc.max_allowed_incoming_connections", connections_max))
        )
        server.add_generic_rpc_handlers(tuple(services.values()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        names = (*services, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        _bind(server, address, credentials)
        self._servers.append(server)
        await server.start()

    async def close(self, grace_s: float) -> None:
        """Take no more calls; those under way have so long."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))


def _bind(
    server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None
) -> None:
    with contextlib.suppress(RuntimeError):
        if credentials is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), credentials)
        if port:
            return
    # grpc does not say why; opened without grpc, it raises the reason.
    with naming(str(address)):
        socket.getaddrinfo(address.host, address.port)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        socket.create_server((address.host, address.port), family=family).close()
    reason = "grpc could not bind it and gave no reason"
    raise ListenError(str(address), reason)
