"""Settings of what the service tells about itself."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from server.sections import Section, switched_off


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
