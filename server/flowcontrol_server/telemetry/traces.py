"""Traces, where the configuration turns them on and the extra is installed."""

from typing import TYPE_CHECKING

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.extras import missing
from flowcontrol_server.config.settings import Traces

if TYPE_CHECKING:
    from flowcontrol_server.telemetry.otel import RequestTraces


def open_traces(settings: Traces, pool: str) -> "RequestTraces | None":
    """Return what keeps traces of requests; None while they are off.

    Raises:
        FlowControlError: the extra is not there, or of no use.
    """
    if settings.exporter == "off":
        return None
    try:
        from flowcontrol_server.telemetry.otel import RequestTraces  # noqa: PLC0415 - an extra, and slow to import

        return RequestTraces(pool)
    except ModuleNotFoundError as error:
        message = f"traces.exporter: {missing(error, 'otel')}"
        raise FlowControlError(message) from error
