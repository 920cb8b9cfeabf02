"""Filters by which Envoy asks this service again before it retries a request, as typed messages.

Where this service picks, a request that cannot be sent to its endpoint needs a slot at another one.
Envoy's router retries by itself. A filter between router and endpoint, skipped for the first
attempt, asks for the slot. Import it through `config`.
"""

from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec import v3 as upstream_codec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.google import protobuf
from envoy_data_plane.xds.type.matcher import v3 as xds

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.codec import ATTEMPT_ATTRIBUTE, ATTRIBUTES, METADATA_NAMESPACE
from flowcontrol_server.tools.envoy.admission import EXT_PROC, grpc_service
from flowcontrol_server.tools.envoy.filters import has_header, skipped
from flowcontrol_server.tools.envoy.manager import (
    forward_rules,
    message_timeout_ns,
    processing_mode,
)

_ATTEMPT_HEADER: Final = "x-envoy-attempt-count"
"""Set by Envoy, which overwrites a client's value."""


def upstream_filters(settings: Settings) -> list[hcm.HttpFilter]:
    """Return the filters between router and endpoint; empty where Envoy chooses the endpoint."""
    if settings.picker == "off":
        return []
    namespaces = ext_proc.MetadataOptionsMetadataNamespaces
    asking = ext_proc.ExternalProcessor(
        grpc_service=grpc_service(settings, retries=True),
        failure_mode_allow=True,
        message_timeout=timedelta(microseconds=message_timeout_ns(settings) // 1000),
        processing_mode=processing_mode(),
        allow_mode_override=True,
        forward_rules=forward_rules(settings),
        metadata_options=ext_proc.MetadataOptions(
            forwarding_namespaces=namespaces(untyped=[METADATA_NAMESPACE]),
            receiving_namespaces=namespaces(untyped=[METADATA_NAMESPACE]),
        ),
        request_attributes=[*ATTRIBUTES, ATTEMPT_ATTRIBUTE],
    )
    return [
        skipped(
            has_header(_ATTEMPT_HEADER, xds.StringMatcher(exact="1")),
            hcm.HttpFilter(name=EXT_PROC, typed_config=protobuf.Any.pack(asking)),
        ),
        hcm.HttpFilter(
            name="envoy.filters.http.upstream_codec",
            typed_config=protobuf.Any.pack(upstream_codec.UpstreamCodec()),
        ),
    ]
