"""An Envoy bootstrap for given settings, built from typed messages and rendered as YAML.

envoy/envoy.yaml is the same configuration made by hand: the reason of every setting stands there,
once. Importing this module takes seconds, because envoy-data-plane does: import it lazily.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import yaml

from flowcontrol.errors import ConfigError, FlowControlError
from server.codec import DESTINATION, SERVICE
from server.settings import Address, Listen, Settings

try:
    with warnings.catch_warnings():
        # Pydantic has deprecated something that envoy-data-plane does as it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from betterproto2 import Casing, Message
        from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap_v3
        from envoy_data_plane.envoy.config.cluster import v3 as cluster
        from envoy_data_plane.envoy.config.core import v3 as core
        from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
        from envoy_data_plane.envoy.config.listener import v3 as listener
        from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request import (
            v3 as least_request,
        )
        from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import (
            v3 as override_host,
        )
        from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as transport
        from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstreams
        from envoy_data_plane.envoy.type import v3 as envoy_type
        from envoy_data_plane.envoy.type.metadata import v3 as metadata
        from envoy_data_plane.google import protobuf

        from server.envoy_filters import LOG_CLUSTER
        from server.envoy_manager import connection_manager
except ModuleNotFoundError as _error:
    _message = f"{_error.name} is missing: pip install 'flowcontrol[envoy]'"
    raise FlowControlError(_message) from _error

__all__ = ["EnvoyOptions", "EnvoyTls", "bootstrap"]

_LOOPBACKS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound
"""Every interface, and where that is found from this machine."""
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
    """PEM files on Envoy's machine."""

    ca: str
    """Authorities one of which must have signed the service's certificate."""
    certificate: str | None = None
    """Shown to the service, with `key`: for tls.clientCa."""
    key: str | None = None


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What Envoy has to be told and the service's settings do not say."""

    listen: Address = CLIENTS
    """Where clients send their requests."""
    admin: Address = ADMIN
    """Envoy's admin interface. It can stop Envoy and is not protected: keep it local."""
    ext_proc: Address | None = None
    """Where Envoy finds this service. None: at the direct door, or at `listen.extProc` where that
    is off; by loopback if it listens on every interface."""
    tls: EnvoyTls | None = None
    """How Envoy speaks TLS there; needed, and only then, where the direct door does."""
    buffer_limit_bytes: int = 32 * 2**20
    """What Envoy buffers of one request, at most. It must hold the largest prompt: beyond it, Envoy
    does not notice that the client of a parked request has gone."""
    original_dst: bool = False
    """Send each request to whatever address the service picks, in place of choosing among
    endpoints.static: for endpoints that come and go. Needs the picker."""


def bootstrap(settings: Settings, options: EnvoyOptions) -> str:
    """Return a bootstrap configuration as YAML.

    Raises:
        ConfigError: the options do not fit the settings, or Envoy cannot know the endpoints.
    """
    if options.original_dst and settings.picker == "off":
        rule = "picker must not be off with --original-dst: nobody would choose an address"
        raise ConfigError([rule])
    if options.original_dst and settings.picker_fallbacks:
        rule = f"pickerFallbacks must be 0 with --original-dst, got {settings.picker_fallbacks}"
        raise ConfigError([rule])
    if not (options.original_dst or settings.endpoints.is_written):
        rule = (
            "endpoints from a file, SRV records or Kubernetes are known to this service alone: "
            "they need --original-dst, and with it picker: least-loaded"
        )
        raise ConfigError([rule])
    is_tls = settings.tls.certificate is not None
    if is_tls != (options.tls is not None):
        rule = "needs --tls-ca: whom Envoy trusts there" if is_tls else "is needed for --tls-ca"
        raise ConfigError([f"tls {rule}"])
    if options.listen.port == options.admin.port and _meet(options.listen, options.admin):
        rule = f"--listen and --admin must differ, got {options.listen} and {options.admin}"
        raise ConfigError([rule])
    reports = settings.settlement.access_log
    message = bootstrap_v3.Bootstrap(
        admin=bootstrap_v3.Admin(address=_socket(options.admin)),
        static_resources=bootstrap_v3.BootstrapStaticResources(
            listeners=[_listener(settings, options)],
            clusters=[
                _service_cluster(options.ext_proc or _best_door(settings.listen), options.tls),
                *([_log_cluster(_log_address(settings, options), options.tls)] if reports else []),
                _original_dst_cluster() if options.original_dst else _model_cluster(settings),
            ],
        ),
    )
    content = _readable(message.to_dict(casing=Casing.SNAKE))
    content = {key: content[key] for key in ("admin", "static_resources")}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100)
    return f"# Envoy for pool {settings.pool!r}. The reasons stand in envoy/envoy.yaml.\n{text}"


def _meet(one: Address, other: Address) -> bool:
    """Whether two addresses of one port would be in each other's way."""
    return one.host == other.host or not _LOOPBACKS.keys().isdisjoint((one.host, other.host))


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
                        typed_config=protobuf.Any.pack(connection_manager(settings)),
                    )
                ]
            )
        ],
    )


def _service_cluster(address: Address | Path, tls: EnvoyTls | None) -> cluster.Cluster:
    discovery, family = _discovery([address])
    http2 = core.Http2ProtocolOptions(
        max_concurrent_streams=100_000,
        max_outbound_frames=10_000_000,
        max_outbound_control_frames=1_000_000,
        connection_keepalive=_PINGS,
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
        transport_socket=_transport_socket(tls) if tls is not None else None,
        load_assignment=_assignment("ext_proc", [address]),
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


def _log_address(settings: Settings, options: EnvoyOptions) -> Address:
    """Return where the access log goes: to the grpcio door, beside wherever ext_proc is served."""
    if options.ext_proc is None:
        return _reachable(settings.listen.ext_proc)
    return Address(options.ext_proc.host, settings.listen.ext_proc.port)


def _log_cluster(address: Address, tls: EnvoyTls | None) -> cluster.Cluster:
    discovery, family = _discovery([address])
    return cluster.Cluster(
        name=LOG_CLUSTER,
        type=discovery,
        dns_lookup_family=family,
        connect_timeout=timedelta(seconds=2),
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


def _original_dst_cluster() -> cluster.Cluster:
    return cluster.Cluster(
        name="model_servers",
        type=cluster.ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=cluster.ClusterLbPolicy.CLUSTER_PROVIDED,
        original_dst_lb_config=cluster.ClusterOriginalDstLbConfig(metadata_key=_picked()),
        connect_timeout=timedelta(seconds=2),
        circuit_breakers=_NO_LIMITS,
        upstream_connection_options=cluster.UpstreamConnectionOptions(tcp_keepalive=_TCP_KEEPALIVE),
        typed_extension_protocol_options=_model_protocol(),
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
        typed_extension_protocol_options=_model_protocol(),
        load_assignment=_assignment("model_servers", settings.endpoints.written),
    )


def _model_protocol() -> dict[str, protobuf.Any]:
    return _protocol(
        upstreams.HttpProtocolOptions(
            common_http_protocol_options=core.HttpProtocolOptions(
                idle_timeout=timedelta(seconds=4)
            ),
            explicit_http_config=upstreams.HttpProtocolOptionsExplicitHttpConfig(
                http_protocol_options=core.Http1ProtocolOptions()
            ),
        )
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
    source = override_host.OverrideHostOverrideHostSource(metadata=_picked())
    return _policy(
        "envoy.load_balancing_policies.override_host",
        override_host.OverrideHost(
            override_host_sources=[source],
            fallback_policy=full_scan,
        ),
    )


def _picked() -> metadata.MetadataKey:
    """Return where the picked endpoint stands: in metadata, which no client can write."""
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


def _best_door(listen: Listen) -> Address | Path:
    if isinstance(listen.direct, Path):
        return listen.direct
    return _reachable(listen.direct or listen.ext_proc)


def _reachable(address: Address) -> Address:
    """Return where a listener is found from this machine."""
    return Address(_LOOPBACKS.get(address.host, address.host), address.port)


def _socket(address: Address | Path) -> core.Address:
    if isinstance(address, Path):
        return core.Address(pipe=core.Pipe(path=str(address)))
    return core.Address(
        socket_address=core.SocketAddress(address=address.host, port_value=address.port)
    )


class _Dumper(yaml.SafeDumper):
    """Writes a script as its lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


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
