"""An Envoy bootstrap for given settings, built from typed messages and rendered as YAML.

envoy/envoy.yaml is the same configuration, written by hand, with the reason for every setting.
Importing this module takes seconds, because of envoy-data-plane: import it lazily.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import yaml

from flowcontrol.errors import ConfigError, FlowControlError
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.extras import missing
from flowcontrol_server.config.settings import Listen, Settings
from flowcontrol_server.requests.codec import DESTINATION, SERVICE

try:
    with warnings.catch_warnings():
        # The import of envoy-data-plane uses something that Pydantic has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        from betterproto2 import Casing, Message
        from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap_v3
        from envoy_data_plane.envoy.config.cluster import v3 as cluster
        from envoy_data_plane.envoy.config.core import v3 as core
        from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
        from envoy_data_plane.envoy.config.listener import v3 as listener
        from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import (
            v3 as hcm,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request import (
            v3 as least_request,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import (
            v3 as override_host,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin import (
            v3 as round_robin,
        )
        from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as transport
        from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstreams
        from envoy_data_plane.envoy.type import v3 as envoy_type
        from envoy_data_plane.envoy.type.metadata import v3 as metadata
        from envoy_data_plane.google import protobuf

        from flowcontrol_server.tools.envoy import limits
        from flowcontrol_server.tools.envoy.admission import SERVICE_CLUSTER
        from flowcontrol_server.tools.envoy.attempts import upstream_filters
        from flowcontrol_server.tools.envoy.filters import LOG_CLUSTER
        from flowcontrol_server.tools.envoy.manager import connection_manager
except ModuleNotFoundError as _error:
    raise FlowControlError(missing(_error, "envoy")) from _error

_LOOPBACKS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound
"""Wildcard addresses, and the loopback addresses that reach them from this machine."""
CLIENTS: Final = Address("0.0.0.0", 8080)  # noqa: S104 - read, not bound - a gateway's clients are elsewhere
ADMIN: Final = Address("127.0.0.1", 9901)

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
_PINGS: Final = core.KeepaliveSettings(
    interval=timedelta(seconds=10), timeout=timedelta(seconds=10)
)
_BETTER_SICK_THAN_NONE: Final = cluster.ClusterCommonLbConfig(
    healthy_panic_threshold=envoy_type.Percent(value=1.0), update_merge_window=timedelta(0)
)
_TCP_KEEPALIVE: Final = core.TcpKeepalive(
    keepalive_time=10, keepalive_interval=5, keepalive_probes=3
)


@dataclass(frozen=True, slots=True)
class EnvoyTls:
    """Paths of PEM files on Envoy's machine."""

    ca: str
    """Certificate authorities; one of them must have signed the service's certificate."""
    certificate: str | None = None
    """Client certificate for the service, with `key`; needed with tls.clientCa."""
    key: str | None = None


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What Envoy needs beyond the service's settings."""

    listen: Address = CLIENTS
    """Where Envoy listens for clients."""
    admin: Address | Path | None = ADMIN
    """Envoy's admin interface. None: off. At an address it is read-only; at a Unix socket it can
    also stop Envoy."""
    ext_proc: Address | None = None
    """Where Envoy connects to this service. None: at `listen.extProc`, or at `listen.grpc` if that
    is off; over loopback if the service listens on every interface."""
    tls: EnvoyTls | None = None
    """TLS towards the service; needed if the service serves TLS, and only then."""
    buffer_limit_bytes: int = 32 * 2**20
    """Bytes of one request that Envoy buffers at most. It must hold the largest prompt: beyond it,
    Envoy does not detect that the client of a parked request has disconnected."""
    connections_max: int | None = None
    """Most connections of clients. None: twice flowControl.maxRequests, and at least 10,000. A
    waiting HTTP/1 request is an open connection."""
    heap_bytes_max: int = 4 * 2**30
    """Memory that Envoy may use. Near this bound, Envoy resets the streams that hold the most."""
    original_dst: bool = False
    """Send each request to the address that the service picks, instead of to one of
    endpoints.static: for endpoints that change while Envoy runs. Needs the picker."""
    http2: bool = False
    """Whether Envoy uses HTTP/2 without TLS to model servers, which gRPC needs, instead of
    HTTP/1.1."""


def bootstrap(settings: Settings, options: EnvoyOptions) -> str:
    """Return a bootstrap configuration as YAML.

    Raises:
        ConfigError: the options contradict the settings, or Envoy has no way to find the endpoints.
    """
    if options.original_dst and settings.picker == "off":
        rule = "picker must not be off with --original-dst: no address would be chosen"
        raise ConfigError([rule])
    if options.original_dst and settings.picker_fallbacks:
        rule = f"pickerFallbacks must be 0 with --original-dst, got {settings.picker_fallbacks}"
        raise ConfigError([rule])
    if not (options.original_dst or settings.endpoints.is_written):
        rule = (
            "endpoints from a file, SRV records or Kubernetes need --original-dst, and with it "
            "picker: least-loaded, because only this service has their addresses"
        )
        raise ConfigError([rule])
    is_tls = settings.tls.certificate is not None
    if is_tls != (options.tls is not None):
        rule = (
            "needs --tls-ca: the CA that signs the service's certificate"
            if is_tls
            else "is needed for --tls-ca"
        )
        raise ConfigError([f"tls {rule}"])
    if isinstance(options.admin, Address) and _meet(options.listen, options.admin):
        rule = f"--listen and --admin must differ, got {options.listen} and {options.admin}"
        raise ConfigError([rule])
    door = options.ext_proc or _door(settings.listen)
    message = bootstrap_v3.Bootstrap(
        admin=_admin(options.admin),
        layered_runtime=limits.runtime(),
        overload_manager=limits.overload_manager(
            connections_max(settings, options), options.heap_bytes_max
        ),
        static_resources=bootstrap_v3.BootstrapStaticResources(
            listeners=[_listener(settings, options)],
            clusters=[
                _service_cluster(settings, door, options.tls),
                *([log_cluster(settings, door, options.tls)] if settings.is_reported else []),
                _original_dst_cluster(options)
                if options.original_dst
                else _model_cluster(settings, options),
            ],
        ),
    )
    content = readable(message.to_dict(casing=Casing.SNAKE))
    order = ("admin", "overload_manager", "layered_runtime", "static_resources")
    content = {key: content[key] for key in order if key in content}
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, width=100)
    return f"# Envoy for pool {settings.pool!r}. envoy/envoy.yaml explains each setting.\n{text}"


def _meet(one: Address, other: Address) -> bool:
    """Whether two addresses conflict."""
    is_one_host = one.host == other.host
    return one.port == other.port and (
        is_one_host or not _LOOPBACKS.keys().isdisjoint((one.host, other.host))
    )


def _admin(address: Address | Path | None) -> bootstrap_v3.Admin | None:
    if address is None:
        return None
    return limits.admin(_socket(address), is_path=isinstance(address, Path))


def connections_max(settings: Settings, options: EnvoyOptions) -> int:
    """Return the most connections of clients."""
    waiting_max = settings.flow_control.max_requests or 0
    return options.connections_max or max(2 * waiting_max, limits.CONNECTIONS_MIN)


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
                        typed_config=protobuf.Any.pack(
                            connection_manager(settings, options.buffer_limit_bytes)
                        ),
                    )
                ]
            )
        ],
    )


def _health_check(settings: Settings) -> core.HealthCheck:
    """Return the health check of replicas; faster with an election, where the leader may change."""
    interval_s, timeout_s, failures = 2.0, 5.0, 2
    if settings.availability.election != "off":
        interval_s, timeout_s, failures = 0.5, 0.5, 1
    return core.HealthCheck(
        grpc_health_check=core.HealthCheckGrpcHealthCheck(service_name=SERVICE),
        interval=timedelta(seconds=interval_s),
        no_traffic_interval=timedelta(seconds=interval_s),
        timeout=timedelta(seconds=timeout_s),
        unhealthy_threshold=failures,
        healthy_threshold=1,
    )


def _service_cluster(
    settings: Settings, address: Address | Path, tls: EnvoyTls | None
) -> cluster.Cluster:
    discovery, family = _discovery([address])
    http2 = core.Http2ProtocolOptions(
        max_concurrent_streams=100_000,
        max_outbound_frames=10_000_000,
        max_outbound_control_frames=1_000_000,
        connection_keepalive=_PINGS,
    )
    return cluster.Cluster(
        name=SERVICE_CLUSTER,
        type=discovery,
        dns_lookup_family=family,
        connect_timeout=timedelta(seconds=2),
        circuit_breakers=_NO_LIMITS,
        common_lb_config=_BETTER_SICK_THAN_NONE,
        health_checks=[_health_check(settings)],
        typed_extension_protocol_options=_protocol(
            upstreams.HttpProtocolOptions(
                explicit_http_config=upstreams.HttpProtocolOptionsExplicitHttpConfig(
                    http2_protocol_options=http2
                )
            )
        ),
        transport_socket=_transport_socket(tls) if tls is not None else None,
        load_assignment=_assignment(SERVICE_CLUSTER, [address]),
    )


def _transport_socket(tls: EnvoyTls) -> core.TransportSocket:
    own = []
    if tls.certificate is not None and tls.key is not None:
        chain, key = core.DataSource(filename=tls.certificate), core.DataSource(filename=tls.key)
        own = [transport.TlsCertificate(certificate_chain=chain, private_key=key)]
    context = transport.UpstreamTlsContext(
        common_tls_context=transport.CommonTlsContext(
            tls_certificates=own,
            alpn_protocols=["h2"],
            validation_context=transport.CertificateValidationContext(
                trusted_ca=core.DataSource(filename=tls.ca)
            ),
        )
    )
    return core.TransportSocket(
        name="envoy.transport_sockets.tls", typed_config=protobuf.Any.pack(context)
    )


def log_cluster(
    settings: Settings, address: Address | Path, tls: EnvoyTls | None
) -> cluster.Cluster:
    """Return the cluster that gets Envoy's access log; with an election, that is the leader."""
    discovery, family = _discovery([address])
    has_standby = settings.availability.election != "off"
    return cluster.Cluster(
        name=LOG_CLUSTER,
        type=discovery,
        dns_lookup_family=family,
        connect_timeout=timedelta(seconds=2),
        health_checks=[_health_check(settings)] if has_standby else [],
        common_lb_config=_BETTER_SICK_THAN_NONE if has_standby else None,
        typed_extension_protocol_options=_protocol(
            upstreams.HttpProtocolOptions(
                explicit_http_config=upstreams.HttpProtocolOptionsExplicitHttpConfig(
                    http2_protocol_options=core.Http2ProtocolOptions(connection_keepalive=_PINGS)
                )
            )
        ),
        transport_socket=_transport_socket(tls) if tls is not None else None,
        load_assignment=_assignment(LOG_CLUSTER, [address]),
    )


def _original_dst_cluster(options: EnvoyOptions) -> cluster.Cluster:
    return cluster.Cluster(
        name="model_servers",
        type=cluster.ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=cluster.ClusterLbPolicy.CLUSTER_PROVIDED,
        original_dst_lb_config=cluster.ClusterOriginalDstLbConfig(metadata_key=_picked()),
        connect_timeout=timedelta(seconds=2),
        circuit_breakers=_NO_LIMITS,
        upstream_connection_options=cluster.UpstreamConnectionOptions(tcp_keepalive=_TCP_KEEPALIVE),
        typed_extension_protocol_options=_model_protocol(options),
    )


def _model_cluster(settings: Settings, options: EnvoyOptions) -> cluster.Cluster:
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
        outlier_detection=_outlier_detection() if settings.picker == "off" else None,
        typed_extension_protocol_options=_model_protocol(options, upstream_filters(settings)),
        load_assignment=_assignment("model_servers", settings.endpoints.written),
    )


def _outlier_detection() -> cluster.OutlierDetection:
    """Return how Envoy ejects dead endpoints; used only where Envoy chooses the endpoint.

    Where this service picks, it avoids them itself: Envoy would send a request picked for an
    ejected endpoint to another one, beyond the limit there.
    """
    return cluster.OutlierDetection(
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=3,
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=5),
        max_ejection_time=timedelta(seconds=30),
        max_ejection_percent=100,
    )


def _model_protocol(
    options: EnvoyOptions, filters: Sequence[hcm.HttpFilter] = ()
) -> dict[str, protobuf.Any]:
    explicit = upstreams.HttpProtocolOptionsExplicitHttpConfig(
        http_protocol_options=core.Http1ProtocolOptions()
    )
    if options.http2:
        explicit = upstreams.HttpProtocolOptionsExplicitHttpConfig(
            http2_protocol_options=core.Http2ProtocolOptions()
        )
    return _protocol(
        upstreams.HttpProtocolOptions(
            common_http_protocol_options=core.HttpProtocolOptions(
                idle_timeout=timedelta(seconds=4)
            ),
            explicit_http_config=explicit,
            http_filters=[*filters],
        )
    )


def _load_balancing(settings: Settings) -> cluster.LoadBalancingPolicy:
    if settings.picker == "off":
        return _policy(
            "envoy.load_balancing_policies.least_request",
            least_request.LeastRequest(
                selection_method=least_request.LeastRequestSelectionMethod.FULL_SCAN
            ),
        )
    source = override_host.OverrideHostOverrideHostSource(metadata=_picked())
    # For retries: the least loaded endpoint would be the dead one again.
    next_one = _policy("envoy.load_balancing_policies.round_robin", round_robin.RoundRobin())
    return _policy(
        "envoy.load_balancing_policies.override_host",
        override_host.OverrideHost(override_host_sources=[source], fallback_policy=next_one),
    )


def _picked() -> metadata.MetadataKey:
    """Return the key of the picked endpoint: in metadata, which no client can write."""
    return metadata.MetadataKey(
        key="envoy.lb", path=[metadata.MetadataKeyPathSegment(key=DESTINATION)]
    )


def _policy(name: str, message: Message) -> cluster.LoadBalancingPolicy:
    extension = core.TypedExtensionConfig(name=name, typed_config=protobuf.Any.pack(message))
    return cluster.LoadBalancingPolicy(
        policies=[cluster.LoadBalancingPolicyPolicy(typed_extension_config=extension)]
    )


def _protocol(options: upstreams.HttpProtocolOptions) -> dict[str, protobuf.Any]:
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protobuf.Any.pack(options)}


def _assignment(name: str, addresses: Iterable[Address | Path]) -> endpoint.ClusterLoadAssignment:
    endpoints = [endpoint.Endpoint(address=_socket(address)) for address in addresses]
    hosts = [endpoint.LbEndpoint(endpoint=each) for each in endpoints]
    localities = [endpoint.LocalityLbEndpoints(lb_endpoints=hosts)] if hosts else []
    return endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=localities)


def _discovery(
    addresses: Iterable[Address | Path],
) -> tuple[cluster.ClusterDiscoveryType, cluster.ClusterDnsLookupFamily]:
    discovery, family = cluster.ClusterDiscoveryType, cluster.ClusterDnsLookupFamily
    if not all(isinstance(address, Path) or address.is_ip for address in addresses):
        return discovery.STRICT_DNS, family.V4_PREFERRED
    return discovery.STATIC, family.AUTO


def _door(listen: Listen) -> Address | Path:
    if isinstance(listen.ext_proc, Path):
        return listen.ext_proc
    return _reachable(listen.ext_proc or listen.grpc)


def _reachable(address: Address) -> Address:
    """Return the address at which a listener is reached from this machine."""
    return Address(_LOOPBACKS.get(address.host, address.host), address.port)


def _socket(address: Address | Path) -> core.Address:
    if isinstance(address, Path):
        return core.Address(pipe=core.Pipe(path=str(address)))
    return core.Address(
        socket_address=core.SocketAddress(address=address.host, port_value=address.port)
    )


class Dumper(yaml.SafeDumper):
    """Writes texts of several lines as literal blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _text)


def readable(node: Any) -> Any:
    """Write out defaults that protobuf omits but that are decisions; put scalar values first."""
    if isinstance(node, list):
        return [readable(each) for each in node]
    if not isinstance(node, dict):
        return node
    written = {key: readable(value) for key, value in node.items()}
    if "request_header_mode" in written:
        written = {"request_body_mode": "NONE", "response_body_mode": "NONE"} | written
    return dict(sorted(written.items(), key=lambda item: isinstance(item[1], dict | list)))
