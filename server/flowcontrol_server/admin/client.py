"""A client of the admin API, for other processes."""

from collections.abc import AsyncIterator
from typing import Any, Protocol, final

import grpc

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.common.addresses import is_loopback

_DECISIONS_SHOWN = 100
_FLOWS_SHOWN = 50


class SnapshotSource(Protocol):
    """Source of snapshots, decisions and explanations."""

    def watch(self) -> AsyncIterator[api.Snapshot]:
        """Yield snapshots without end."""

    async def decisions(self) -> api.ListDecisionsResponse:
        """Return the newest decisions."""

    async def explain(self, request_id: str) -> api.Explanation:
        """Return the explanation of a request."""

    async def close(self) -> None:
        """Close the connection to the service."""


@final
class AdminSource:
    """The admin API of a running service.

    Args:
        address: host:port of its gRPC API.
        token: sent as `authorization: Bearer ...`, if there is one.
        credentials: for TLS; None: plain text.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        options = channel_options(address)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def watch(self) -> AsyncIterator[api.Snapshot]:
        """Yield snapshots once a second."""
        call = self._channel.unary_stream(
            "/flowcontrol.v1.FlowControl/WatchSnapshot",
            request_serializer=api.WatchSnapshotRequest.SerializeToString,
            response_deserializer=api.Snapshot.FromString,
        )
        asked = api.WatchSnapshotRequest(flows_max=_FLOWS_SHOWN)
        async for snapshot in call(asked, metadata=self._metadata):
            yield snapshot

    async def decisions(self) -> api.ListDecisionsResponse:
        """Return the newest decisions."""
        asked = api.ListDecisionsRequest(count_max=_DECISIONS_SHOWN)
        answer: api.ListDecisionsResponse = await self._ask(
            "ListDecisions", asked, api.ListDecisionsResponse
        )
        return answer

    async def explain(self, request_id: str) -> api.Explanation:
        """Return the explanation of a request."""
        asked = api.ExplainRequest(request_id=request_id)
        answer: api.Explanation = await self._ask("Explain", asked, api.Explanation)
        return answer

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def _ask(self, method: str, message: Any, kind: Any) -> Any:
        call = self._channel.unary_unary(
            f"/flowcontrol.v1.FlowControl/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=kind.FromString,
        )
        return await call(message, metadata=self._metadata, timeout=5.0)


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """Return the options of a channel to host:port; a channel to this machine uses no proxy.

    gRPC would use the one in `http_proxy`, which would see the token; grpcurl and browsers do not.
    """
    host = address.rpartition(":")[0].strip("[]")
    return (("grpc.enable_http_proxy", 0),) if is_loopback(host) else ()
