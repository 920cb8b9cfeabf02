"""Traces, where the configuration turns them on and the extra is installed."""

import os
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
    except Exception as error:  # whatever the SDK raises for what it reads there
        given = ", ".join(sorted(name for name in os.environ if name.startswith("OTEL_")))
        message = f"traces.exporter: cannot begin with {given or 'no OTEL_* variable'}: {error}"
        raise FlowControlError(message) from error
