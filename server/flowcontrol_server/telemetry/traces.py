"""Opens traces if the configuration turns them on and the extra is installed."""

import os
from typing import TYPE_CHECKING

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.extras import missing
from flowcontrol_server.config.settings import Traces

if TYPE_CHECKING:
    from flowcontrol_server.telemetry.otel import RequestTraces


def open_traces(settings: Traces, pool: str) -> "RequestTraces | None":
    """Return the traces of requests; None: they are off.

    Raises:
        FlowControlError: the extra is missing, or cannot be used.
    """
    if settings.exporter == "off":
        return None
    try:
        from flowcontrol_server.telemetry.otel import RequestTraces  # noqa: PLC0415 - an extra, and slow to import

        return RequestTraces(pool)
    except ModuleNotFoundError as error:
        message = f"traces.exporter: {missing(error, 'otel')}"
        raise FlowControlError(message) from error
    except Exception as error:  # any error of the SDK in the variables
        given = ", ".join(sorted(name for name in os.environ if name.startswith("OTEL_")))
        message = f"traces.exporter: cannot start with {given or 'no OTEL_* variable'}: {error}"
        raise FlowControlError(message) from error
