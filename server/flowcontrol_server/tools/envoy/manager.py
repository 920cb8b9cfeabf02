"""Envoy's HTTP connection manager, which handles each request, as typed messages.

Import it through `config`, which reports missing packages.
"""

from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.common.mutation_rules import v3 as mutation_rules
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation import (
    v3 as early_mutation,
)
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

from flowcontrol_server.config.engine import ENVOY_MARGIN_NS, ENVOY_PATIENCE_MAX_NS
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.codec import ATTRIBUTES, ENGINE_HEADERS
from flowcontrol_server.tools.envoy.admission import (
    EXT_PROC,
    admission,
    exempt_routes,
    grpc_service,
    local_replies,
)
from flowcontrol_server.tools.envoy.filters import (
    access_logs,
    metadata_options,
    previous_hosts_predicate,
    response_headers,
    with_readers,
)
from flowcontrol_server.tools.envoy.limits import CONNECTION_IDLE, client_http1, client_http2

_RETRIES_PICKED: Final = 10
"""A retry waits for its slot on a connection that the model server may close meanwhile, often after
5 s without a request. Then a further retry continues the wait."""
_UPLOAD_NS: Final = 300_000_000_000
"""Time for the upload of a body, added to the wait; enough for 32 MiB at 1 Mbit/s."""


def connection_manager(settings: Settings, buffer_limit_bytes: int) -> hcm.HttpConnectionManager:
    """Return the connection manager, which buffers at most so much of one request."""
    action = _route_action(settings)
    websocket = hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="websocket")
    return hcm.HttpConnectionManager(
        stat_prefix="ingress",
        stream_idle_timeout=_duration(ENVOY_PATIENCE_MAX_NS),
        request_headers_timeout=timedelta(seconds=10),
        request_timeout=_duration(request_timeout_ns(settings)),
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=CONNECTION_IDLE),
        http_protocol_options=client_http1(),
        http2_protocol_options=client_http2(buffer_limit_bytes),
        upgrade_configs=[websocket] if settings.requests.websockets else [],
        always_set_request_id_in_response=True,
        early_header_mutation_extensions=_early_mutations(settings),
        local_reply_config=local_replies(settings),
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action=(
            hcm.HttpConnectionManagerPathWithEscapedSlashesAction.UNESCAPE_AND_FORWARD
        ),
        access_log=access_logs(settings),
        route_config=route.RouteConfiguration(
            name="models",
            virtual_hosts=[
                route.VirtualHost(
                    name="models",
                    domains=["*"],
                    routes=[
                        *exempt_routes(settings, action),
                        route.Route(match=route.RouteMatch(prefix="/"), route=action),
                    ],
                    response_headers_to_add=response_headers(settings),
                    include_request_attempt_count=settings.picker != "off",
                )
            ],
        ),
        http_filters=with_readers(
            settings,
            [
                hcm.HttpFilter(
                    name=EXT_PROC, typed_config=protobuf.Any.pack(_external_processor(settings))
                ),
                *admission(settings),
            ],
            hcm.HttpFilter(
                name="envoy.filters.http.router", typed_config=protobuf.Any.pack(router.Router())
            ),
            settings.requests.body_bytes_max(by_default=True),
            buffer_limit_bytes,
        ),
    )


def message_timeout_ns(settings: Settings) -> int:
    """Return Envoy's timeout for a decision: longer than any request waits."""
    return settings.longest_wait_ns + ENVOY_MARGIN_NS


def request_timeout_ns(settings: Settings) -> int:
    """Return the timeout for the arrival of a request; without a body it includes the wait."""
    return message_timeout_ns(settings) + _UPLOAD_NS


def _route_action(settings: Settings) -> route.RouteAction:
    policy = route.RetryPolicy(retry_on="connect-failure,reset-before-request", num_retries=3)
    if settings.picker != "off":  # a retry: the picked endpoint has just failed
        policy.num_retries = _RETRIES_PICKED
        policy.retry_host_predicate = [previous_hosts_predicate()]
        policy.host_selection_retry_max_attempts = 5
    return route.RouteAction(cluster="model_servers", timeout=timedelta(0), retry_policy=policy)


def _external_processor(settings: Settings) -> ext_proc.ExternalProcessor:
    return ext_proc.ExternalProcessor(
        grpc_service=grpc_service(settings, retries=True),
        failure_mode_allow=True,
        message_timeout=_duration(message_timeout_ns(settings)),
        processing_mode=processing_mode(),
        allow_mode_override=True,
        forward_rules=forward_rules(settings),
        metadata_options=metadata_options(settings),
        request_attributes=[*ATTRIBUTES],
    )


def _early_mutations(settings: Settings) -> list[core.TypedExtensionConfig]:
    """Return mutations that remove headers by which clients could choose a server or priority."""
    if settings.requests.trust_engine_headers:
        return []
    mutations = [mutation_rules.HeaderMutation(remove=name) for name in ENGINE_HEADERS]
    return [
        core.TypedExtensionConfig(
            name="envoy.http.early_header_mutation.header_mutation",
            typed_config=protobuf.Any.pack(early_mutation.HeaderMutation(mutations=mutations)),
        )
    ]


def forward_rules(settings: Settings) -> ext_proc.HeaderForwardingRules:
    """Return the headers that Envoy forwards to this service."""
    names = {*settings.requests.headers(), *settings.traces.headers()}
    patterns = [matcher.StringMatcher(exact=name) for name in sorted(names)]
    return ext_proc.HeaderForwardingRules(
        allowed_headers=matcher.ListStringMatcher(patterns=patterns)
    )


def processing_mode() -> ext_proc.ProcessingMode:
    """Return the processing mode: no bodies, and a stream that ends with the request."""
    header, body = ext_proc.ProcessingModeHeaderSendMode, ext_proc.ProcessingModeBodySendMode
    return ext_proc.ProcessingMode(
        request_header_mode=header.SEND,
        response_header_mode=header.SKIP,
        request_body_mode=body.NONE,
        response_body_mode=body.NONE,
        request_trailer_mode=header.SKIP,
        response_trailer_mode=header.SEND,
    )


def _duration(duration_ns: int) -> timedelta:
    return timedelta(microseconds=-(-duration_ns // 1000))  # Rounded up: never below the setting.
