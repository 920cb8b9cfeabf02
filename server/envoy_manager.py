"""Envoy's HTTP connection manager: the way of a request, as typed messages.

For `envoy_config` alone, which imports it late and says what is missing.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
from envoy_data_plane.envoy.type import v3 as envoy_type
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

from server.codec import SIZE_ATTRIBUTE
from server.engine_settings import ENVOY_MARGIN_NS, ENVOY_PATIENCE_MAX_NS
from server.envoy_filters import access_logs, metadata_options, response_headers, with_readers
from server.settings import Settings

_UPLOAD_NS: Final = 300_000_000_000
"""For the body of a request, beside its wait; 32 MiB come in it at 1 Mbit/s."""


def connection_manager(settings: Settings) -> hcm.HttpConnectionManager:
    """Return how Envoy serves clients."""
    return hcm.HttpConnectionManager(
        stat_prefix="ingress",
        stream_idle_timeout=_duration(ENVOY_PATIENCE_MAX_NS),
        request_headers_timeout=timedelta(seconds=10),
        request_timeout=_duration(_message_timeout_ns(settings) + _UPLOAD_NS),
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
                    routes=[route.Route(match=route.RouteMatch(prefix="/"), route=_route_action())],
                    response_headers_to_add=response_headers(settings),
                )
            ],
        ),
        http_filters=with_readers(
            settings,
            hcm.HttpFilter(
                name="envoy.filters.http.ext_proc",
                typed_config=protobuf.Any.pack(_external_processor(settings)),
            ),
            hcm.HttpFilter(
                name="envoy.filters.http.router", typed_config=protobuf.Any.pack(router.Router())
            ),
        ),
    )


def _message_timeout_ns(settings: Settings) -> int:
    return settings.longest_wait_ns + ENVOY_MARGIN_NS


def _route_action() -> route.RouteAction:
    return route.RouteAction(
        cluster="model_servers",
        timeout=timedelta(0),
        retry_policy=route.RetryPolicy(
            retry_on="connect-failure,reset-before-request", num_retries=3
        ),
    )


def _external_processor(settings: Settings) -> ext_proc.ExternalProcessor:
    return ext_proc.ExternalProcessor(
        grpc_service=core.GrpcService(
            envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name="ext_proc"),
            retry_policy=_fail_over(),
        ),
        failure_mode_allow=False,
        status_on_error=envoy_type.HttpStatus(code=envoy_type.StatusCode.ServiceUnavailable),
        message_timeout=_duration(_message_timeout_ns(settings)),
        processing_mode=_processing_mode(),
        allow_mode_override=True,
        forward_rules=_forward_rules({*settings.requests.headers(), *settings.traces.headers()}),
        metadata_options=metadata_options(settings),
        request_attributes=[SIZE_ATTRIBUTE],
    )


def _forward_rules(headers: Iterable[str]) -> ext_proc.HeaderForwardingRules:
    patterns = [matcher.StringMatcher(exact=name) for name in sorted(headers)]
    return ext_proc.HeaderForwardingRules(
        allowed_headers=matcher.ListStringMatcher(patterns=patterns)
    )


def _fail_over() -> core.RetryPolicy:
    return core.RetryPolicy(
        retry_on="unavailable,connect-failure,refused-stream,reset",
        num_retries=8,
        retry_back_off=core.BackoffStrategy(
            base_interval=timedelta(seconds=0.5), max_interval=timedelta(seconds=5)
        ),
        retry_host_predicate=[
            core.RetryPolicyRetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=protobuf.Any.pack(previous_hosts.PreviousHostsPredicate()),
            )
        ],
        host_selection_retry_max_attempts=5,
    )


def _processing_mode() -> ext_proc.ProcessingMode:
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
    return timedelta(microseconds=-(-duration_ns // 1000))  # Rounded up: never less than asked.
