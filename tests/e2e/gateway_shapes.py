"""How gateways wire an endpoint picker into Envoy, copied from what each of them generates.

Each function changes the configuration that the product generates: its filters make way for those
of the gateway. Sources: Istio pilot/pkg/xds/filters (InferencePoolExtProc), networking/core/route
(ExtProcPerRoute); kgateway inferenceextension/endpointpicker; Envoy AI Gateway extensionserver;
Envoy Gateway internal/xds/translator/extproc. GKE's source is closed: its shape is what its
documentation says of Service Extensions.
"""

from collections.abc import Callable
from typing import Any

from flowcontrol_server.common.addresses import Address

TYPES = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3"
_HEADER_TO_METADATA = "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3"
DESTINATION = "x-gateway-destination-endpoint"
_ROUTE = "type.googleapis.com/envoy.config.route.v3"
_HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
NAME = "envoy.filters.http.ext_proc"
DUPLEX = {
    "request_header_mode": "SEND",
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
    "response_header_mode": "SEND",
    "response_body_mode": "FULL_DUPLEX_STREAMED",
    "response_trailer_mode": "SEND",
}
_SERVICE = {"envoy_grpc": {"cluster_name": "ext_proc"}}
_LB = {"untyped": ["envoy.lb"]}
Shape = Callable[[dict[str, Any]], None]


def istio(configuration: dict[str, Any]) -> None:
    """The filter asks for nothing; the route overrides all."""
    _istio(configuration)


def istio_with_override(configuration: dict[str, Any]) -> None:
    """The same with one EnvoyFilter, which lets us choose the mode."""
    _istio(configuration, allow_mode_override=True)


def kgateway(configuration: dict[str, Any]) -> None:
    """All in the filter, which fails open."""
    _wire(
        configuration,
        failure_mode_allow=True,
        message_timeout="5s",
        processing_mode=DUPLEX,
        metadata_options={
            "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint"]},
            "receiving_namespaces": _LB,
        },
    )
    unverified_tls(configuration)
    _pool_of_subsets(configuration)


def gke(configuration: dict[str, Any]) -> None:
    """As documented: messages of at most 64 KB, TLS that is not verified."""
    service = {"envoy_grpc": {"cluster_name": "ext_proc", "max_receive_message_length": 64 << 10}}
    _wire(
        configuration,
        grpc_service=service,
        processing_mode=DUPLEX,
        metadata_options={"forwarding_namespaces": _LB, "receiving_namespaces": _LB},
    )
    unverified_tls(configuration)
    _pool_that_says_who_served(configuration)


def envoy_gateway_policy(configuration: dict[str, Any]) -> None:
    """An EnvoyExtensionPolicy with bodies FullDuplexStreamed, and no patch.

    As Envoy Gateway 1.9.0 translates docs/gateways.md's manifests. Its filter is off but on the
    route; it says no message_timeout (200 ms).
    """
    manager = _wire(
        configuration,
        buffer_bytes=32 << 10,
        processing_mode=DUPLEX,
        metadata_options={"receiving_namespaces": _LB},
        grpc_service=_SERVICE | {"timeout": "10s"},
    )
    manager["http_filters"][0]["disabled"] = True
    enabled = {"@type": f"{_ROUTE}.FilterConfig", "config": {}}
    _on_every_route(manager, enabled)
    _pool_by_override(configuration)


def ai_gateway(configuration: dict[str, Any]) -> None:
    """No metadata passes either way."""
    _wire(configuration, message_timeout="300s", processing_mode=DUPLEX)
    unverified_tls(configuration)
    _pool_by_header(configuration)


def ai_gateway_buffered(configuration: dict[str, Any]) -> None:
    """With the annotations processing-body-mode: buffered and allow-mode-override."""
    buffered = DUPLEX | {"request_body_mode": "BUFFERED", "response_body_mode": "BUFFERED"}
    _wire(configuration, message_timeout="300s", processing_mode=buffered, allow_mode_override=True)
    unverified_tls(configuration)


def streaming(configuration: dict[str, Any], request: str, response: str) -> None:
    """A filter of somebody's own, with any mode for each body."""
    modes = DUPLEX | {"request_body_mode": request, "response_body_mode": response}
    _wire(configuration, processing_mode=modes, message_timeout="30s")


def _cluster(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    clusters = configuration["static_resources"]["clusters"]
    (cluster,) = [each for each in clusters if each["name"] == name]
    found: dict[str, Any] = cluster
    return found


def _pool_that_says_who_served(configuration: dict[str, Any]) -> None:
    """Istio: override_host by metadata, which notes the host it chose."""
    (policy,) = _cluster(configuration, "model_servers")["load_balancing_policy"]["policies"]
    override = policy["typed_extension_config"]["typed_config"]
    override["selected_host_key"] = {"key": "envoy.lb", "path": [{"key": f"{DESTINATION}-served"}]}


def _pool_by_override(configuration: dict[str, Any]) -> None:
    """Envoy Gateway: override_host by header, which notes no host."""
    (policy,) = _cluster(configuration, "model_servers")["load_balancing_policy"]["policies"]
    override = policy["typed_extension_config"]["typed_config"]
    override["override_host_sources"] = [{"header": DESTINATION}]


def _pool_of_subsets(configuration: dict[str, Any]) -> None:
    """kgateway: the header becomes metadata, which selects a subset of one."""
    cluster = _cluster(configuration, "model_servers")
    del cluster["load_balancing_policy"]
    (locality,) = cluster["load_assignment"]["endpoints"]
    for each in locality["lb_endpoints"]:
        address = each["endpoint"]["address"]["socket_address"]
        name = f"{address['address']}:{address['port_value']}"
        each["metadata"] = {"filter_metadata": {"envoy.lb": {DESTINATION: name}}}
    cluster["lb_policy"] = "ROUND_ROBIN"
    cluster["lb_subset_config"] = {
        "subset_selectors": [{"keys": [DESTINATION]}],
        "fallback_policy": "ANY_ENDPOINT",
    }
    rule = {
        "header": DESTINATION,
        "on_header_present": {"metadata_namespace": "envoy.lb", "key": DESTINATION},
    }
    to_metadata = {
        "name": "envoy.filters.http.header_to_metadata",
        "typed_config": {"@type": f"{_HEADER_TO_METADATA}.Config", "request_rules": [rule]},
    }
    _manager(configuration)["http_filters"].insert(-1, to_metadata)


def _pool_by_header(configuration: dict[str, Any]) -> None:
    """Envoy AI Gateway: wherever the header says."""
    cluster = _cluster(configuration, "model_servers")
    for name in ("load_balancing_policy", "load_assignment"):
        del cluster[name]
    cluster.pop("outlier_detection", None)
    cluster["type"] = "ORIGINAL_DST"
    cluster["lb_policy"] = "CLUSTER_PROVIDED"
    cluster["original_dst_lb_config"] = {"use_http_header": True, "http_header_name": DESTINATION}


def unverified_tls(configuration: dict[str, Any]) -> None:
    """Speak TLS to the endpoint picker and trust whatever it shows."""
    cluster = _cluster(configuration, "ext_proc")
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TLS}.UpstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["h2"]},
        },
    }


def with_other_picker(configuration: dict[str, Any], picker: Address) -> None:
    """Behind this product's own filters another endpoint picker, which says where requests go."""
    filters = _manager(configuration)["http_filters"]
    service = {"envoy_grpc": {"cluster_name": "other_picker"}}
    own = {
        "@type": f"{TYPES}.ExternalProcessor",
        "grpc_service": service,
        "message_timeout": "10s",
        "processing_mode": DUPLEX,
    }
    filters.insert(-1, {"name": "other_picker", "typed_config": own})
    address = {"socket_address": {"address": picker.host, "port_value": picker.port}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    protocol = {
        "@type": f"{_HTTP}.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "other_picker",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": "other_picker", "endpoints": endpoints},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol
        },
    }
    configuration["static_resources"]["clusters"].append(cluster)
    _pool_by_header(configuration)


SHAPES: tuple[Shape, ...] = (
    istio,
    istio_with_override,
    kgateway,
    ai_gateway,
    gke,
    envoy_gateway_policy,
)


def _istio(configuration: dict[str, Any], **more: Any) -> None:
    asks_nothing = {"request_header_mode": "SKIP", "response_header_mode": "SKIP"}
    manager = _wire(
        configuration,
        buffer_bytes=32 << 10,
        failure_mode_allow=True,
        message_timeout="1000s",
        processing_mode=asks_nothing,
        metadata_options={"forwarding_namespaces": _LB, "receiving_namespaces": _LB},
        **more,
    )
    _pool_that_says_who_served(configuration)
    overrides = {
        "failure_mode_allow": False,
        "grpc_service": _SERVICE,
        "processing_mode": DUPLEX,
    }
    _on_every_route(manager, {"@type": f"{TYPES}.ExtProcPerRoute", "overrides": overrides})


def _on_every_route(manager: dict[str, Any], own: dict[str, Any]) -> None:
    (host,) = manager["route_config"]["virtual_hosts"]
    for route in host["routes"]:
        route["typed_per_filter_config"] = {NAME: own}


def _wire(
    configuration: dict[str, Any], buffer_bytes: int = 1 << 20, **more: Any
) -> dict[str, Any]:
    """Put the gateway's filter in the place of all of ours; return the connection manager."""
    manager = _manager(configuration)
    own = {"@type": f"{TYPES}.ExternalProcessor", "grpc_service": _SERVICE, **more}
    router = manager["http_filters"][-1]
    manager["http_filters"] = [{"name": NAME, "typed_config": own}, router]
    manager["access_log"] = manager["access_log"][:1]
    manager.pop("local_reply_config", None)
    (options,) = _cluster(configuration, "model_servers")[
        "typed_extension_protocol_options"
    ].values()
    options.pop("http_filters", None)  # nor any before another attempt
    # Envoy sends parts of bodies as large as this; ours is larger, for bodies that it keeps.
    configuration["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"] = (
        buffer_bytes
    )
    return manager


def _manager(configuration: dict[str, Any]) -> dict[str, Any]:
    listener = configuration["static_resources"]["listeners"][0]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager
