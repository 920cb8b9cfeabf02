"""Manifests with which Envoy Gateway configures Envoy as `bootstrap` does.

Its policies contain every setting for which Envoy Gateway has a field. One patch contains the rest,
with the messages of the bootstrap. Needs Envoy Gateway 1.9 with
extensionApis.enableEnvoyPatchPolicy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml
from betterproto2 import Casing, Message
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.kubernetes_names import is_name, is_service
from flowcontrol_server.config.engine import ENVOY_PATIENCE_MAX_NS
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.codec import (
    DESTINATION,
    ENGINE_HEADERS,
    METADATA_NAMESPACE,
    SERVICE,
    SIZE_ATTRIBUTE,
)
from flowcontrol_server.tools.envoy import admission, filters, limits, manager
from flowcontrol_server.tools.envoy.config import (
    Dumper,
    EnvoyOptions,
    connections_max,
    log_cluster,
    readable,
)

POLICY: Final = "flowcontrol"
"""Name of each of our policies."""
_API: Final = "gateway.envoyproxy.io/v1alpha1"
_GATEWAY_API: Final = "gateway.networking.k8s.io"
_ENVOY: Final = "type.googleapis.com/envoy.config"
_NO_LIMIT: Final = 1_000_000_000
_NO_LIMITS: Final = {
    "maxConnections": _NO_LIMIT,
    "maxPendingRequests": _NO_LIMIT,
    "maxParallelRequests": _NO_LIMIT,
    "maxParallelRetries": _NO_LIMIT,
}
_TCP_KEEPALIVE: Final = {"probes": 3, "idleTime": "10s", "interval": "5s"}
_DRAIN: Final = "600s"
_MANAGER: Final = (
    "$..filters[?(@.name == 'envoy.filters.network.http_connection_manager')].typed_config"
)
_ROUTER: Final = "$..http_filters[?(@.name == 'envoy.filters.http.router')]"
_HEADER: Final = """\
# Envoy Gateway 1.9 in front of flowcontrol, for pool {pool!r}.
# Made by: flowcontrol envoy-config --envoy-gateway {names.listener} \\
#   --route {names.route} --ext-proc {address} --config ...
# Regenerate it after every change of flowcontrol's configuration: timeouts and limits follow from
# it. envoy/envoy.yaml explains each setting.
#
# Envoy Gateway must allow patches: extensionApis.enableEnvoyPatchPolicy: true.
# HTTPRoute {names.route} must refer to the model servers' Service, not to an InferencePool.
# Gateway {names.gateway} must name this EnvoyProxy in infrastructure.parametersRef. Whenever one of
# its listeners changes, Envoy ends the requests on the old one after drainTimeout, by default 60 s:
# set it above the longest response.
"""


@dataclass(frozen=True, slots=True)
class GatewayNames:
    """The Gateway and the route that the manifests apply to."""

    namespace: str
    gateway: str
    section: str
    """The Gateway's listener."""
    route: str
    """The HTTPRoute to the model servers."""

    @property
    def listener(self) -> str:
        """Return the name that Envoy Gateway gives the listener, and its routes, in Envoy."""
        return f"{self.namespace}/{self.gateway}/{self.section}"


def manifests(settings: Settings, options: EnvoyOptions, names: GatewayNames) -> str:
    """Return the manifests as YAML.

    Raises:
        ConfigError: the manifests cannot express the settings.
    """
    if settings.tls.certificate is not None:
        rule = "tls must be left out with --envoy-gateway, which needs a BackendTLSPolicy for it"
        raise ConfigError([rule])
    if options.ext_proc is None:
        rule = "--envoy-gateway needs --ext-proc: name and port of flowcontrol's Service"
        raise ConfigError([rule])
    address = options.ext_proc
    if not is_service(address.host):
        rule = (
            f"--ext-proc must name a Service of namespace {names.namespace} with "
            f"--envoy-gateway, such as flowcontrol:9002, got {str(address)!r}"
        )
        raise ConfigError([rule])
    if not is_name(names.route):
        raise ConfigError([f"--route must be the name of an HTTPRoute, got {names.route!r}"])
    documents = (
        _envoy_proxy(names),
        _client_traffic(settings, options, names),
        _backend_traffic(settings, names),
        _extension(settings, address, names),
        _patches(settings, options, names),
    )
    texts = [yaml.dump(each, Dumper=Dumper, sort_keys=False, width=100) for each in documents]
    header = _HEADER.format(pool=settings.pool, names=names, address=address)
    return header + "---\n".join(texts)


def _policy(kind: str, names: GatewayNames, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": POLICY, "namespace": names.namespace}
    return {"apiVersion": _API, "kind": kind, "metadata": metadata, "spec": spec}


def _target(kind: str, name: str) -> dict[str, str]:
    return {"group": _GATEWAY_API, "kind": kind, "name": name}


def _envoy_proxy(names: GatewayNames) -> dict[str, Any]:
    """Return the time to end requests on a listener that has changed: 60 s by default."""
    return _policy("EnvoyProxy", names, {"shutdown": {"drainTimeout": _DRAIN}})


def _client_traffic(
    settings: Settings, options: EnvoyOptions, names: GatewayNames
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "targetRefs": [_target("Gateway", names.gateway)],
        "connection": {
            "bufferLimit": options.buffer_limit_bytes,
            "connectionLimit": {"value": connections_max(settings, options)},
        },
        "tcpKeepalive": _TCP_KEEPALIVE,
        "http1": {
            "http10": {},
            "ignoredUpgradeTypes": [{"type": "Prefix", "value": "TLS/"}],
        },
        "http2": {
            "maxConcurrentStreams": limits.STREAMS_MAX,
            "initialStreamWindowSize": options.buffer_limit_bytes,
            "initialConnectionWindowSize": options.buffer_limit_bytes,
        },
        "path": {"escapedSlashesAction": "UnescapeAndForward", "disableMergeSlashes": False},
        "timeout": {
            "http": {
                "requestReceivedTimeout": _seconds(manager.request_timeout_ns(settings)),
                "requestHeadersReceivedTimeout": "10s",
                "idleTimeout": f"{limits.CONNECTION_IDLE.total_seconds():.0f}s",
                "streamIdleTimeout": _seconds(ENVOY_PATIENCE_MAX_NS),
            }
        },
    }
    if not settings.requests.trust_engine_headers:
        spec["headers"] = {"earlyRequestHeaders": {"remove": list(ENGINE_HEADERS)}}
    return _policy("ClientTrafficPolicy", names, spec)


def _backend_traffic(settings: Settings, names: GatewayNames) -> dict[str, Any]:
    balancer: dict[str, Any] = {"type": "LeastRequest"}
    if settings.picker != "off":
        balancer["endpointOverride"] = {"extractFrom": [{"header": DESTINATION}]}
    spec = {
        "targetRefs": [_target("HTTPRoute", names.route)],
        "loadBalancer": balancer,
        "timeout": {
            "tcp": {"connectTimeout": "2s"},
            "http": {"requestTimeout": "0s", "connectionIdleTimeout": "4s"},
        },
        "retry": {
            "numRetries": 3,
            "retryOn": {"triggers": ["connect-failure", "reset-before-request"]},
        },
        "circuitBreaker": _NO_LIMITS,
        "tcpKeepalive": _TCP_KEEPALIVE,
        "healthCheck": {
            "panicThreshold": 1,
            "passive": {
                "splitExternalLocalOriginErrors": True,
                "consecutiveLocalOriginFailures": 3,
                "interval": "1s",
                "baseEjectionTime": "5s",
                "maxEjectionPercent": 100,
            },
        },
    }
    return _policy("BackendTrafficPolicy", names, spec)


def _extension(settings: Settings, address: Address, names: GatewayNames) -> dict[str, Any]:
    options = filters.metadata_options(settings)
    forwarded = options.forwarding_namespaces
    backend = {
        "circuitBreaker": _NO_LIMITS,
        "http2": {"maxConcurrentStreams": 100_000},
        "healthCheck": {
            "panicThreshold": 1,
            "active": {
                "type": "GRPC",
                "grpc": {"service": SERVICE},
                "interval": "2s",
                "timeout": "5s",
                "unhealthyThreshold": 2,
                "healthyThreshold": 1,
            },
        },
        "retry": {
            "numRetries": 8,
            "retryOn": {"triggers": ["unavailable", "connect-failure", "refused-stream", "reset"]},
            "perRetry": {"backOff": {"baseInterval": "500ms", "maxInterval": "5s"}},
        },
    }
    ext_proc = {
        "backendRefs": [{"name": address.host, "port": address.port}],
        "backendSettings": backend,
        "processingMode": {
            "request": {"attributes": [SIZE_ATTRIBUTE]},
            "allowModeOverride": True,
        },
        "messageTimeout": _seconds(manager.message_timeout_ns(settings)),
        "failOpen": True,
        "metadata": {
            "accessibleNamespaces": list(forwarded.untyped) if forwarded is not None else [],
            "writableNamespaces": ["envoy.lb", METADATA_NAMESPACE],
        },
    }
    spec = {"targetRefs": [_target("HTTPRoute", names.route)], "extProc": [ext_proc]}
    return _policy("EnvoyExtensionPolicy", names, spec)


def _patches(settings: Settings, options: EnvoyOptions, names: GatewayNames) -> dict[str, Any]:
    patches = [
        *_listener_patches(settings, names),
        *_route_patches(settings, names),
    ]
    if settings.is_reported and options.ext_proc is not None:
        host = f"{options.ext_proc.host}.{names.namespace}.svc.cluster.local"
        cluster = log_cluster(settings, Address(host, options.ext_proc.port), None)
        patch = {"type": f"{_ENVOY}.cluster.v3.Cluster", "name": cluster.name}
        operation = {"op": "add", "path": "", "value": _plain(cluster)}
        patches.append({**patch, "operation": operation})
    spec = {
        "targetRef": _target("Gateway", names.gateway),
        "type": "JSONPatch",
        "jsonPatches": patches,
    }
    return _policy("EnvoyPatchPolicy", names, spec)


def _listener_patches(settings: Settings, names: GatewayNames) -> list[dict[str, Any]]:
    own = (
        "$..http_filters[?(@.name == 'envoy.filters.http.ext_proc/envoyextensionpolicy/"
        f"{names.namespace}/{POLICY}/extproc/0')].typed_config"
    )
    before, after = _filters(settings)
    found = [
        (own, "processing_mode/response_trailer_mode", "SEND"),
        (own, "forward_rules", _plain(manager.forward_rules(settings))),
        *((_MANAGER, f"http_filters/{index}", each) for index, each in enumerate(before)),
        *((_ROUTER, "", each) for each in after),
        (_MANAGER, "always_set_request_id_in_response", True),
        (_MANAGER, "local_reply_config", _plain(admission.local_replies(settings))),
    ]
    if settings.is_reported:
        found.append((_MANAGER, "access_log/-", _plain(filters.access_logs(settings)[-1])))
    return [_patch("listener.v3.Listener", names, *each) for each in found]


def _filters(settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the filters before ext_proc and those behind it; enabled only on our route."""
    processor = hcm.HttpFilter(name=admission.EXT_PROC)
    gate = [processor, *admission.admission(settings)]
    chain = filters.with_readers(
        settings,
        gate,
        hcm.HttpFilter(name="last"),
        settings.requests.body_bytes_max(by_default=False),
    )
    at = chain.index(processor)
    plain = [
        {**_plain(each), "name": _own_name(each.name, index), "disabled": True}
        for index, each in enumerate(chain)
    ]
    return plain[:at], plain[at + 1 : -1]


def _own_name(name: str, index: int) -> str:
    """Return a name that no filter of Envoy Gateway has."""
    return f"{POLICY}.{index}.{name.rpartition('.')[2]}"


def _route_patches(settings: Settings, names: GatewayNames) -> list[dict[str, Any]]:
    ours = (
        "$..routes[?(@.metadata.filter_metadata['envoy-gateway'].resources[0].name == "
        f"'{names.route}')]"
    )
    before, after = _filters(settings)
    config = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}
    found: list[tuple[str, str, Any]] = [
        (ours, f"typed_per_filter_config/{each['name']}", config) for each in (*before, *after)
    ]
    headers = [_plain(each) for each in filters.response_headers(settings)]
    if headers:
        found.append((ours, "response_headers_to_add", headers))
    return [_patch("route.v3.RouteConfiguration", names, *each) for each in found]


def _patch(kind: str, names: GatewayNames, where: str, path: str, value: Any) -> dict[str, Any]:
    operation = {"op": "add", "jsonPath": where, "path": path, "value": value}
    if not path:
        del operation["path"]
    return {"type": f"{_ENVOY}.{kind}", "name": names.listener, "operation": operation}


def _plain(message: Message) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = readable(message.to_dict(casing=Casing.SNAKE))
    return plain


def _seconds(duration_ns: int) -> str:
    return f"{-(-duration_ns // 1_000_000_000)}s"  # Rounded up: never below the setting.
