"""An Envoy bootstrap for given settings, built from typed messages and rendered as YAML.

envoy/envoy.yaml is the same configuration made by hand: the reason of every setting stands there,
once. Importing this module takes seconds, because envoy-data-plane does: import it lazily.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import yaml

from flowcontrol.errors import FlowControlError
from server.codec import DESTINATION, SERVICE
from server.settings import ENVOY_MARGIN_NS, ENVOY_PATIENCE_MAX_NS, Address, Settings

try:
    with warnings.catch_warnings():
        # Pydantic has deprecated something that envoy-data-plane does as it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from betterproto2 import Casing, Message
        from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
        from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap_v3
        from envoy_data_plane.envoy.config.cluster import v3 as cluster
        from envoy_data_plane.envoy.config.core import v3 as core
        from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
        from envoy_data_plane.envoy.config.listener import v3 as listener
        from envoy_data_plane.envoy.config.route import v3 as route
        from envoy_data_plane.envoy.extensions.access_loggers.stream import v3 as stream
        from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
        from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router
        from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import (
            v3 as hcm,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request import (
            v3 as least_request,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import (
            v3 as override_host,
        )
        from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
        from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstreams
        from envoy_data_plane.envoy.type import v3 as envoy_type
        from envoy_data_plane.envoy.type.metadata import v3 as metadata
        from envoy_data_plane.google import protobuf
except ModuleNotFoundError as _error:
    _message = f"{_error.name} is missing: pip install 'flowcontrol[envoy]'"
    raise FlowControlError(_message) from _error

__all__ = ["EnvoyOptions", "bootstrap"]

CLIENTS: Final = Address("0.0.0.0", 8080)  # noqa: S104 - read, not bound - a gateway's clients are elsewhere
ADMIN: Final = Address("127.0.0.1", 9901)

_ACCESS_LOG: Final = {
    "start": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(:PATH)%",
    "code": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "duration_ms": "%DURATION%",
    "upstream": "%UPSTREAM_HOST%",
    "request_id": "%REQ(X-REQUEST-ID)%",
}
_NO_LIMITS: Final = cluster.CircuitBreakers(
    thresholds=[
        cluster.CircuitBreakersThresholds(
            max_connections=1_000_000_000,
            max_pending_requests=1_000_000_000,
            max_requests=1_000_000_000,
            max_retries=1_000_000_000,
        )
    ]
)
_BETTER_SICK_THAN_NONE: Final = cluster.ClusterCommonLbConfig(
    healthy_panic_threshold=envoy_type.Percent(value=1.0), update_merge_window=timedelta(0)
)
_TCP_KEEPALIVE: Final = core.TcpKeepalive(
    keepalive_time=10, keepalive_interval=5, keepalive_probes=3
)


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What Envoy has to be told and the service's settings do not say."""

    listen: Address = CLIENTS
    """Where clients send their requests."""
    admin: Address = ADMIN
    """Envoy's admin interface. It can stop Envoy and is not protected: keep it local."""
    ext_proc: Address | None = None
    """Where Envoy finds this service. None: at `listen.extProc`, by loopback if that is every
    interface."""
    buffer_limit_bytes: int = 32 * 2**20
    """What Envoy buffers of one request, at most. It must hold the largest prompt: beyond it, Envoy
    does not notice that the client of a parked request has gone."""


def bootstrap(settings: Settings, options: EnvoyOptions) -> str:
    """Return a bootstrap configuration as YAML.

    Raises:
        FlowControlError: Envoy has no way to learn the endpoints by itself.
    """
    if settings.picker == "off" and not settings.endpoints.is_written:
        reason = (
            "envoy-config: endpoints from a file, SRV records or Kubernetes are known to this "
            "service alone: set picker to least-loaded, or let your gateway route to the pool"
        )
        raise FlowControlError(reason)
    message = bootstrap_v3.Bootstrap(
        admin=bootstrap_v3.Admin(address=_socket(options.admin)),
        static_resources=bootstrap_v3.BootstrapStaticResources(
            listeners=[_listener(settings, options)],
            clusters=[
                _service_cluster(options.ext_proc or _reachable(settings.listen.ext_proc)),
                _model_cluster(settings),
            ],
        ),
    )
    content = _readable(message.to_dict(casing=Casing.SNAKE))
    content = {key: content[key] for key in ("admin", "static_resources")}
    text = yaml.safe_dump(content, sort_keys=False, width=100)
    return f"# Envoy for pool {settings.pool!r}. The reasons stand in envoy/envoy.yaml.\n{text}"


def _listener(settings: Settings, options: EnvoyOptions) -> listener.Listener:
    return listener.Listener(
        name="ingress",
        address=_socket(options.listen),
        per_connection_buffer_limit_bytes=options.buffer_limit_bytes,
        tcp_keepalive=_TCP_KEEPALIVE,
        filter_chains=[
            listener.FilterChain(
                filters=[
                    listener.Filter(
                        name="envoy.filters.network.http_connection_manager",
                        typed_config=protobuf.Any.pack(_connection_manager(settings)),
                    )
                ]
            )
        ],
    )


def _connection_manager(settings: Settings) -> hcm.HttpConnectionManager:
    return hcm.HttpConnectionManager(
        stat_prefix="ingress",
        stream_idle_timeout=_duration(ENVOY_PATIENCE_MAX_NS),
        request_headers_timeout=timedelta(seconds=10),
        normalize_path=True,
        merge_slashes=True,
        access_log=[
            accesslog.AccessLog(
                name="envoy.access_loggers.stdout",
                typed_config=protobuf.Any.pack(
                    stream.StdoutAccessLog(
                        log_format=core.SubstitutionFormatString(
                            json_format=protobuf.Struct.from_dict(_ACCESS_LOG)
                        )
                    )
                ),
            )
        ],
        route_config=route.RouteConfiguration(
            name="models",
            virtual_hosts=[
                route.VirtualHost(
                    name="models",
                    domains=["*"],
                    routes=[route.Route(match=route.RouteMatch(prefix="/"), route=_route_action())],
                )
            ],
        ),
        http_filters=[
            hcm.HttpFilter(
                name="envoy.filters.http.ext_proc",
                typed_config=protobuf.Any.pack(_external_processor(settings)),
            ),
            hcm.HttpFilter(
                name="envoy.filters.http.router", typed_config=protobuf.Any.pack(router.Router())
            ),
        ],
    )


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
        message_timeout=_duration(settings.longest_wait_ns + ENVOY_MARGIN_NS),
        processing_mode=_processing_mode(),
        metadata_options=ext_proc.MetadataOptions(
            receiving_namespaces=ext_proc.MetadataOptionsMetadataNamespaces(untyped=["envoy.lb"])
        ),
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


def _service_cluster(address: Address) -> cluster.Cluster:
    discovery, family = _discovery([address])
    http2 = core.Http2ProtocolOptions(
        max_concurrent_streams=100_000,
        max_outbound_frames=10_000_000,
        max_outbound_control_frames=1_000_000,
        connection_keepalive=core.KeepaliveSettings(
            interval=timedelta(seconds=10), timeout=timedelta(seconds=10)
        ),
    )
    return cluster.Cluster(
        name="ext_proc",
        type=discovery,
        dns_lookup_family=family,
        connect_timeout=timedelta(seconds=2),
        circuit_breakers=_NO_LIMITS,
        common_lb_config=_BETTER_SICK_THAN_NONE,
        health_checks=[
            core.HealthCheck(
                grpc_health_check=core.HealthCheckGrpcHealthCheck(service_name=SERVICE),
                interval=timedelta(seconds=2),
                no_traffic_interval=timedelta(seconds=2),
                timeout=timedelta(seconds=5),
                unhealthy_threshold=2,
                healthy_threshold=1,
            )
        ],
        typed_extension_protocol_options=_protocol(
            upstreams.HttpProtocolOptions(
                explicit_http_config=upstreams.HttpProtocolOptionsExplicitHttpConfig(
                    http2_protocol_options=http2
                )
            )
        ),
        load_assignment=_assignment("ext_proc", [address]),
    )


def _model_cluster(settings: Settings) -> cluster.Cluster:
    discovery, family = _discovery(settings.endpoints.written)
    return cluster.Cluster(
        name="model_servers",
        type=discovery,
        dns_lookup_family=family,
        connect_timeout=timedelta(seconds=2),
        circuit_breakers=_NO_LIMITS,
        upstream_connection_options=cluster.UpstreamConnectionOptions(tcp_keepalive=_TCP_KEEPALIVE),
        load_balancing_policy=_load_balancing(settings),
        common_lb_config=_BETTER_SICK_THAN_NONE,
        outlier_detection=cluster.OutlierDetection(
            split_external_local_origin_errors=True,
            consecutive_local_origin_failure=3,
            interval=timedelta(seconds=1),
            base_ejection_time=timedelta(seconds=5),
            max_ejection_time=timedelta(seconds=30),
            max_ejection_percent=100,
        ),
        typed_extension_protocol_options=_protocol(
            upstreams.HttpProtocolOptions(
                common_http_protocol_options=core.HttpProtocolOptions(
                    idle_timeout=timedelta(seconds=4)
                ),
                explicit_http_config=upstreams.HttpProtocolOptionsExplicitHttpConfig(
                    http_protocol_options=core.Http1ProtocolOptions()
                ),
            )
        ),
        load_assignment=_assignment("model_servers", settings.endpoints.written),
    )


def _load_balancing(settings: Settings) -> cluster.LoadBalancingPolicy:
    full_scan = _policy(
        "envoy.load_balancing_policies.least_request",
        least_request.LeastRequest(
            selection_method=least_request.LeastRequestSelectionMethod.FULL_SCAN
        ),
    )
    if settings.picker == "off":
        return full_scan
    picked = metadata.MetadataKey(
        key="envoy.lb", path=[metadata.MetadataKeyPathSegment(key=DESTINATION)]
    )
    return _policy(
        "envoy.load_balancing_policies.override_host",
        override_host.OverrideHost(
            override_host_sources=[override_host.OverrideHostOverrideHostSource(metadata=picked)],
            fallback_policy=full_scan,
        ),
    )


def _policy(name: str, message: Message) -> cluster.LoadBalancingPolicy:
    extension = core.TypedExtensionConfig(name=name, typed_config=protobuf.Any.pack(message))
    return cluster.LoadBalancingPolicy(
        policies=[cluster.LoadBalancingPolicyPolicy(typed_extension_config=extension)]
    )


def _protocol(options: upstreams.HttpProtocolOptions) -> dict[str, protobuf.Any]:
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protobuf.Any.pack(options)}


def _assignment(name: str, addresses: Iterable[Address]) -> endpoint.ClusterLoadAssignment:
    endpoints = [endpoint.Endpoint(address=_socket(address)) for address in addresses]
    hosts = [endpoint.LbEndpoint(endpoint=each) for each in endpoints]
    localities = [endpoint.LocalityLbEndpoints(lb_endpoints=hosts)] if hosts else []
    return endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=localities)


def _discovery(
    addresses: Iterable[Address],
) -> tuple[cluster.ClusterDiscoveryType, cluster.ClusterDnsLookupFamily]:
    discovery, family = cluster.ClusterDiscoveryType, cluster.ClusterDnsLookupFamily
    if not all(address.is_ip for address in addresses):
        return discovery.STRICT_DNS, family.V4_PREFERRED
    return discovery.STATIC, family.AUTO


def _reachable(address: Address) -> Address:
    """Return where a listener is found from this machine."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host)  # noqa: S104 - read, not bound
    return Address(loopback or address.host, address.port)


def _socket(address: Address) -> core.Address:
    return core.Address(
        socket_address=core.SocketAddress(address=address.host, port_value=address.port)
    )


def _duration(duration_ns: int) -> timedelta:
    return timedelta(microseconds=-(-duration_ns // 1000))  # Rounded up: never less than asked.


def _readable(node: Any) -> Any:
    """Say the defaults that are decisions, which protobuf leaves unsaid; put plain values first."""
    if isinstance(node, list):
        return [_readable(each) for each in node]
    if not isinstance(node, dict):
        return node
    said = {key: _readable(value) for key, value in node.items()}
    if "processing_mode" in said:
        said.setdefault("failure_mode_allow", False)
    if "request_header_mode" in said:
        said = {"request_body_mode": "NONE", "response_body_mode": "NONE"} | said
    return dict(sorted(said.items(), key=lambda item: isinstance(item[1], dict | list)))
