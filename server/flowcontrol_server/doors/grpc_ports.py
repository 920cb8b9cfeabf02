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
"""gRPC's own default. By default Envoy sends headers of 60 KiB at most, batches of log entries of
16 KiB, and parts of bodies of 1 MiB; larger messages are rejected."""
METADATA_BYTES_MAX: Final = 16 << 10
"""Metadata of one gRPC call, as grpc counts it."""

CONNECTIONS_MAX: Final = 512
"""Connections of a port. Each takes a descriptor, and every port needs some."""

GRPC_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    # By default grpc-core refuses streams that it has not accepted yet: at random above 1000, all
    # above 3000. A burst of requests to park reaches that.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
    # Two processes on one port would silently gate half of the requests each.
    ("grpc.so_reuseport", 0),
    # Allow Envoy's keepalive pings, also while every stream is parked without traffic.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Close a silent connection: before its first request, between two requests, and after its host
    # has vanished. Connections of Envoy keep a stream or a health check open.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@final
class GrpcPorts:
    """Opens ports, and closes them all.

    Args:
        health: answers their health checks.
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
            address: host and port.
            credentials: for TLS; None: plain text.
            services: handlers by full name; health and reflection are always added.
            connections_max: connections at once; further ones are closed when they come.

        Raises:
            ListenError: it cannot be opened; the error names the address.
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
        """Accept no more calls; those under way are ended after the grace time."""
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
    # grpc does not report the reason; opening the address without grpc raises it.
    with naming(str(address)):
        socket.getaddrinfo(address.host, address.port)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        socket.create_server((address.host, address.port), family=family).close()
    reason = "grpc could not bind it and gave no reason"
    raise ListenError(str(address), reason)
