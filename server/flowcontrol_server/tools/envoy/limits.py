"""Envoy's limits for clients, as typed messages: no client may deny service to the others.

Import it through `config`, which reports missing packages.
"""

from datetime import timedelta
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.overload import v3 as overload
from envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections import (
    v3 as downstream_connections,
)
from envoy_data_plane.envoy.extensions.resource_monitors.fixed_heap import v3 as fixed_heap
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

CONNECTIONS_MIN: Final = 10_000
"""The least bound, if the queue is short."""
STREAMS_MAX: Final = 1_000
"""Concurrent requests of one HTTP/2 connection."""
CONNECTION_IDLE: Final = timedelta(seconds=620)
"""Longer than the 600 s for which Google's load balancers keep an idle connection."""
_WINDOW_MIN_BYTES: Final = 65_535
_WINDOW_MAX_BYTES: Final = 2**31 - 1
_HEAP: Final = "envoy.resource_monitors.fixed_heap"
_CONNECTIONS: Final = "envoy.resource_monitors.global_downstream_max_connections"
_ADMIN_READS: Final = (
    r"/(ready|server_info|stats|stats/prometheus|clusters|listeners|memory|config_dump|certs)"
    r"(\?.*)?"
)
"""Read-only pages."""
_RUNTIME: Final = {
    "overload.premature_reset_total_stream_count": 200,
    "overload.premature_reset_min_stream_lifetime_seconds": 1,
    "http.max_requests_per_io_cycle": 20,
}


def client_http1() -> core.Http1ProtocolOptions:
    """Return the options for HTTP/1 clients."""
    return core.Http1ProtocolOptions(
        accept_http_10=True,
        default_host_for_http_10="models",
        ignore_http_11_upgrade=[matcher.StringMatcher(prefix="TLS/", ignore_case=True)],
    )


def client_http2(buffer_limit_bytes: int) -> core.Http2ProtocolOptions:
    """Return the options for HTTP/2 clients.

    The window of a stream is also the number of bytes that Envoy buffers of it.
    """
    window_bytes = min(max(buffer_limit_bytes, _WINDOW_MIN_BYTES), _WINDOW_MAX_BYTES)
    return core.Http2ProtocolOptions(
        max_concurrent_streams=STREAMS_MAX,
        initial_stream_window_size=window_bytes,
        initial_connection_window_size=window_bytes,
    )


def overload_manager(connections_max: int, heap_bytes_max: int) -> overload.OverloadManager:
    """Return the bounds of all clients together, and Envoy's actions near them."""
    return overload.OverloadManager(
        refresh_interval=timedelta(seconds=0.25),
        resource_monitors=[
            _monitor(_HEAP, fixed_heap.FixedHeapConfig(max_heap_size_bytes=heap_bytes_max)),
            _monitor(
                _CONNECTIONS,
                downstream_connections.DownstreamConnectionsConfig(
                    max_active_downstream_connections=connections_max
                ),
            ),
        ],
        actions=[
            _action("shrink_heap", overload.Trigger(threshold=overload.ThresholdTrigger(0.85))),
            _action(
                "reset_high_memory_stream",
                overload.Trigger(
                    scaled=overload.ScaledTrigger(scaling_threshold=0.85, saturation_threshold=0.95)
                ),
            ),
            _action(
                "stop_accepting_requests",
                overload.Trigger(threshold=overload.ThresholdTrigger(0.98)),
            ),
        ],
        loadshed_points=[
            overload.LoadShedPoint(
                name="envoy.load_shed_points.http1_server_abort_dispatch",
                triggers=[overload.Trigger(name=_HEAP, threshold=overload.ThresholdTrigger(0.95))],
            )
        ],
        buffer_factory_config=overload.BufferFactoryConfig(
            minimum_account_to_track_power_of_two=20
        ),
    )


def runtime() -> bootstrap.LayeredRuntime:
    """Return the limits that Envoy reads from its runtime."""
    layer = bootstrap.RuntimeLayer(name="limits", static_layer=protobuf.Struct.from_dict(_RUNTIME))
    return bootstrap.LayeredRuntime(layers=[layer])


def admin(address: core.Address, *, is_path: bool) -> bootstrap.Admin:
    """Return Envoy's admin interface: complete at a Unix socket, else read-only.

    Any web site can make a browser on the same machine POST to a TCP port.
    """
    pages = matcher.StringMatcher(safe_regex=matcher.RegexMatcher(regex=_ADMIN_READS))
    return bootstrap.Admin(address=address, allow_paths=[] if is_path else [pages])


def _monitor(name: str, config: Message) -> overload.ResourceMonitor:
    return overload.ResourceMonitor(name=name, typed_config=protobuf.Any.pack(config))


def _action(name: str, trigger: overload.Trigger) -> overload.OverloadAction:
    trigger.name = _HEAP
    return overload.OverloadAction(name=f"envoy.overload_actions.{name}", triggers=[trigger])
