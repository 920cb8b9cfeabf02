"""Settings of what the service tells about itself."""

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from flowcontrol.errors import FlowControlError
from server.sections import Section, switched_off

if TYPE_CHECKING:
    from server.otel import RequestTraces

_TRACE_HEADERS: Final = (
    *("traceparent", "tracestate", "baggage", "b3"),
    *("x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"),
)


class Metrics(Section):
    """What /metrics says."""

    reference_names: bool = Field(default=False, strict=True)
    """Also say what there is under the names of llm-d-router's flow control,
    llm_d_epp_flow_control_*, for dashboards and KEDA triggers that ask for them."""


class Traces(Section):
    """OpenTelemetry's traces; needs the extra otel."""

    exporter: Annotated[Literal["off", "otlp"], BeforeValidator(switched_off)] = "off"
    """otlp: a span flow_control.wait for each request, sent where OTEL_EXPORTER_OTLP_ENDPOINT says.
    The other OTEL_* variables count, too."""

    def headers(self) -> tuple[str, ...]:
        """Return the headers by which requests may tell of their trace: W3C's, and B3's."""
        return () if self.exporter == "off" else _TRACE_HEADERS


def open_traces(settings: Traces, pool: str) -> "RequestTraces | None":
    """Return what keeps traces of requests; None while they are off.

    Raises:
        FlowControlError: the extra is not there, or of no use.
    """
    if settings.exporter == "off":
        return None
    try:
        from server.otel import RequestTraces  # noqa: PLC0415 - an extra, and slow to import

        return RequestTraces(pool)
    except ModuleNotFoundError as error:
        message = f"traces.exporter needs {error.name}: pip install 'flowcontrol[otel]'"
        raise FlowControlError(message) from error
    except ImportError as error:  # xds-protos has files of the same names, of an older OTLP
        message = (
            "traces.exporter cannot use opentelemetry-proto, which xds-protos has overwritten: "
            "pip install --force-reinstall --no-deps opentelemetry-proto"
        )
        raise FlowControlError(message) from error
