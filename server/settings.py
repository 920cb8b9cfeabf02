"""The configuration file: its shape, its units, its errors. The only reader of it.

Every model field carries its meaning as a docstring; the README's reference is generated from them.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from flowcontrol.config import Utilization
from flowcontrol.errors import ConfigError
from server.addresses import Address, DirectAddress, HostPort, parse_address
from server.direct_settings import Direct
from server.engine_settings import Engine
from server.guard import Admin
from server.record_settings import LedgerSection, ShadowSection
from server.request_settings import Requests, Settlement
from server.sections import Section, broken, written
from server.settings_sources import Endpoints, Given, Kubernetes, Load, Objectives, left_out
from server.telemetry import Metrics, Traces
from server.tls import Tls
from server.yamlfile import read_mapping

__all__ = [
    "Address",
    "Endpoints",
    "Listen",
    "Objectives",
    "Settings",
    "load_settings",
    "parse_address",
    "problems_of",
]


class Listen(Section):
    """Where the service listens, each as host:port."""

    direct: DirectAddress = written("0.0.0.0:9004")
    """The direct door, for Envoy's ext_proc streams and health checks alone, at a fraction of the
    cost: host:port, unix:/path, or off."""
    ext_proc: HostPort = written("0.0.0.0:9002")
    """The grpcio door: ext_proc for any client, Envoy's access log, our own API, health and
    reflection."""
    health: HostPort = written("0.0.0.0:9003")
    """gRPC health alone, for probes."""
    http: HostPort = written("0.0.0.0:9090")
    """HTTP: the dashboard at /, /metrics, /healthz, /readyz."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [self.ext_proc.port, self.health.port, self.http.port]
        if isinstance(self.direct, Address):
            ports.append(self.direct.port)
        if len(set(ports)) != len(ports):
            rule = "must name different ports"
            raise broken(rule)
        return self


class _Surroundings(Section):
    """What the file says of itself, and of the service around the engine."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's shape."""
    kind: Literal["FlowControlConfig"]
    """Kind of this file."""
    pool: str = Field(min_length=1)
    """The one inference pool this process guards; objectives of other pools are ignored."""
    listen: Listen = Listen()
    tls: Tls = Tls()
    admin: Admin = Admin()
    direct: Direct = Direct()
    objectives: Objectives
    endpoints: Endpoints
    load: Annotated[Load | None, Given] = left_out()
    kubernetes: Kubernetes = Kubernetes()


class Settings(Engine, _Surroundings):
    """The whole file."""

    requests: Requests = Requests()
    settlement: Settlement = Settlement()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    ledger: Annotated[LedgerSection | None, Given] = left_out()
    """Where decisions are written down, nowhere if left out."""
    shadow: Annotated[ShadowSection | None, Given] = left_out()
    """What else is tried on the same traffic, nothing if left out."""
    recent_decisions: int = Field(default=10_000, ge=1, le=10_000_000, strict=True)
    """Decisions kept in memory to be explained, about 1 kB each."""

    @property
    def scraping(self) -> Load | None:
        """How endpoints are asked for their load: `load`, or its defaults for a detector's sake."""
        detectors = self.controller_config().detectors
        is_needed = any(isinstance(each, Utilization) for each in detectors)
        return self.load or (Load() if is_needed else None)

    @model_validator(mode="after")
    def _picked_by_address(self) -> Self:
        static = self.endpoints.static or ()
        names = [str(address) for address in static if not address.is_ip]
        if self.picker != "off" and names:
            rule = (
                "picker must be off while endpoints.static has host names, as Envoy knows a picked "
                f"endpoint by its IP address alone, got {', '.join(names)}"
            )
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        complaint = self.admin.complaint()
        if complaint is not None:
            raise broken(complaint)
        return self

    @property
    def longest_wait_ns(self) -> int:
        """How long a request can possibly be parked: both budgets, one after the other."""
        return self.flow_control.longest_wait_ns


def load_settings(path: Path) -> Settings:
    """Read a configuration file.

    Raises:
        ConfigError: naming every mistake in it, each with its path in the file.
    """
    content = read_mapping(path)
    try:
        return Settings.model_validate(content, context={"directory": path.parent})
    except ValidationError as error:
        raise ConfigError(problems_of(error)) from error


def problems_of(error: ValidationError) -> list[str]:
    """Return pydantic's errors in the house's words, each with its path in the file."""
    return [_say(each) for each in error.errors()]


_SHOWN_MAX = 120
"""Characters of a wrong value that are said."""
_RULES = {
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be >= {ge}",
    "less_than_equal": "must be <= {le}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length}, got {actual_length}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a whole number",
    "string_type": "must be text",
    "path_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "rule": "{rule}",
}
"""pydantic's kinds of error in the house's words."""


def _say(error: ErrorDetails) -> str:
    """Put one of pydantic's errors as where, rule, value."""
    # Whether one or several are given, in parentheses, is not a place in the file.
    loc = error["loc"][:-2] if error["loc"][-1:] == ("[key]",) else error["loc"]
    places = [part for part in loc if not str(part).startswith("(")]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in places)
    where = str(error["loc"][-1]) if error["type"] == "invalid_key" else "".join(parts).lstrip(".")
    if error["type"] == "missing":
        return f"{where} is required"
    if error["type"] in {"extra_forbidden", "invalid_key"}:
        return f"{where} is not a known setting"
    rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    value = error["input"]
    is_said = isinstance(value, dict | BaseModel) or ", got " in rule
    shown = "" if is_said else f", got {_shortened(repr(value))}"
    return f"{where} {rule}{shown}".strip()


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
