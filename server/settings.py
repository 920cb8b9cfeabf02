"""The configuration file: its shape, its units, its errors. The only reader of it.

Every model field carries its meaning as a docstring; the README's reference is generated from them.
"""

import re
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    ControllerConfig,
    Fairness,
    Limits,
    Ordering,
    Picker,
)
from flowcontrol.errors import ConfigError
from server.guard import Admin
from server.tls import Tls
from server.units import parse_duration, parse_quantity
from server.yamlfile import read_mapping

ENVOY_PATIENCE_MAX_NS = 3_600_000_000_000
"""The longest message_timeout Envoy accepts: no wait can outlast it."""
ENVOY_MARGIN_NS = 30_000_000_000
"""Envoy waits this much longer than the longest wait we allow: the decision is always ours."""


def _rule(text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{rule}", {"rule": text})


def _duration(value: object) -> object:
    duration_ns = parse_duration(value) if isinstance(value, str) else None
    if duration_ns is None or duration_ns <= 0:
        rule = "must be a duration above zero such as 500ms, 60s or 5m"
        raise _rule(rule)
    return duration_ns


def _limit(value: object) -> object:
    if value == "unlimited":
        return None
    if isinstance(value, str):
        value = parse_quantity(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        rule = "must be a whole number from 0 such as 500, 20k or 4Gi, or the word unlimited"
        raise _rule(rule)
    return value


_ADDRESS_RULE = "must be host:port with a port from 1 to 65535, such as 10.0.0.5:8000 or [::1]:8000"


class Address(NamedTuple):
    """A host and a port; an IPv6 host stands in brackets when written."""

    host: str
    port: int

    @property
    def is_ip(self) -> bool:
        """Whether the host is an IP address, not a name."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(value: object) -> Address:
    """Read host:port, or raise what pydantic reports as a rule."""
    match = re.fullmatch(r"(?:\[([^\s\[\]]+)\]|([^\s:\[\]/]+)):(\d{1,5})", str(value))
    if match is None or not 0 < int(match[3]) <= 65535:  # noqa: PLR2004 - the largest port
        raise _rule(_ADDRESS_RULE)
    host = match[2]
    if host is None:
        address, percent, zone = match[1].partition("%")
        try:  # in one spelling only: Envoy's
            host = inet_ntop(AF_INET6, inet_pton(AF_INET6, address)) + percent + zone
        except OSError as error:
            raise _rule(_ADDRESS_RULE) from error
    return Address(host, int(match[3]))


def _switched_off(value: object) -> object:
    return "off" if value is False else value  # YAML reads a bare off as false


Duration = Annotated[int, BeforeValidator(_duration)]
Limit = Annotated[int | None, BeforeValidator(_limit)]
HostPort = Annotated[Address, BeforeValidator(parse_address), PlainSerializer(str)]


def _written(default: str, alias: str | None = None) -> Any:
    """Return a field whose default is given as one would write it in the file."""
    return Field(default=default, alias=alias)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class Listen(_Section):
    """Where the service listens, each as host:port."""

    ext_proc: HostPort = _written("0.0.0.0:9002")
    """gRPC: Envoy's ext_proc streams, our own API, health and reflection."""
    health: HostPort = _written("0.0.0.0:9003")
    """gRPC health alone, for probes."""
    http: HostPort = _written("0.0.0.0:9090")
    """HTTP: /metrics, /healthz, /readyz."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [self.ext_proc.port, self.health.port, self.http.port]
        if len(set(ports)) != len(ports):
            rule = "must name three different ports"
            raise _rule(rule)
        return self


class Objectives(_Section):
    """Where InferenceObjectives come from."""

    directory: Path
    """Folder of InferenceObjective manifests (*.yaml, *.yml), followed live.
    A relative path starts at the configuration file."""

    @field_validator("directory")
    @classmethod
    def _is_a_folder(cls, value: Path, info: ValidationInfo) -> Path:
        directory = (info.context or {}).get("directory", Path()) / value
        if not directory.is_dir():
            rule = f"must be a folder, got {str(directory)!r}"
            raise _rule(rule)
        return Path(directory)


class Endpoints(_Section):
    """The model servers of the pool."""

    static: tuple[HostPort, ...]
    """Addresses as host:port. An empty list is an empty pool: everything waits."""

    @field_validator("static")
    @classmethod
    def _each_once(cls, value: tuple[Address, ...]) -> tuple[Address, ...]:
        twice = sorted({str(address) for address in value if value.count(address) > 1})
        if twice:
            rule = f"must name each endpoint once, {', '.join(twice)} comes again"
            raise _rule(rule)
        return value


class Saturation(_Section):
    """When the pool is full."""

    detector: Literal["concurrency"] = "concurrency"
    """concurrency: requests in flight, counted exactly from the streams Envoy holds open."""
    max_concurrency: int = Field(default=64, ge=1, strict=True)
    """Requests in flight at one endpoint at which it is full. About what the engine batches."""


class BandMatch(_Section):
    """Which bands a template is for."""

    min_priority: int | None = Field(default=None, strict=True)
    """Lowest priority, included."""
    max_priority: int | None = Field(default=None, strict=True)
    """Highest priority, included."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_priority is None or self.max_priority is None:
            return self
        if self.min_priority > self.max_priority:
            rule = "must have minPriority <= maxPriority"
            raise _rule(rule)
        return self


class Band(_Section):
    """A template: settings for the bands it matches. It creates no band; objectives do."""

    match: BandMatch = BandMatch()
    """Which bands; all when left out."""
    max_requests: Limit = _written("unlimited")
    """Requests that may wait in such a band. 0: none may wait."""
    max_bytes: Limit = _written("unlimited")
    """Announced bytes that may wait in such a band."""
    request_ttl: Duration | None = Field(default=None, alias="requestTTL")
    """Longest wait in such a band while the pool has endpoints; flowControl.requestTTL if unset."""
    fairness: Literal["round-robin", "global-strict"] = "round-robin"
    """Between flows. round-robin: equal turns; global-strict: first come, first served."""
    ordering: Literal["fcfs"] = "fcfs"
    """Within a flow. fcfs: first come, first served."""


class FlowControl(_Section):
    """The queue."""

    max_requests: Limit = Field(default=20_000)
    """Requests that may wait in all bands together. 0: none may wait."""
    max_bytes: Limit = _written("4Gi")
    """Announced bytes (content-length) that may wait in all. Envoy holds them, not this service."""
    request_ttl: Duration = _written("60s", alias="requestTTL")
    """Longest wait while the pool has endpoints. Evicted exactly then, with 429."""
    no_endpoint_ttl: Duration = _written("300s", alias="noEndpointTTL")
    """Longest wait while the pool is empty. Evicted exactly then, with 503."""
    drain_budget: Duration = _written("30s")
    """After SIGTERM, how long waiting requests may still be dispatched before they get 503."""
    bands: tuple[Band, ...] = ()
    """Templates; the first that matches a band's priority counts."""

    @model_validator(mode="after")
    def _within_envoys_patience(self) -> Self:
        if self.longest_wait_ns + ENVOY_MARGIN_NS > ENVOY_PATIENCE_MAX_NS:
            seconds = (ENVOY_PATIENCE_MAX_NS - ENVOY_MARGIN_NS) // 1_000_000_000
            rule = (
                f"must keep the longest requestTTL + noEndpointTTL within {seconds}s: "
                "Envoy gives up on a parked request after at most an hour"
            )
            raise _rule(rule)
        return self

    @property
    def longest_wait_ns(self) -> int:
        """How long a request can possibly be parked: both budgets, one after the other."""
        ttls = [self.request_ttl]
        ttls += [band.request_ttl for band in self.bands if band.request_ttl]
        return max(ttls) + self.no_endpoint_ttl


class Requests(_Section):
    """How requests are read."""

    exempt_paths: tuple[str, ...] = (
        *("/health", "/healthz", "/ping", "/ready", "/version", "/metrics"),
        *("/v1/models", "/v1/models/*"),
    )
    """Paths that pass without queueing and hold no slot: exact, or a prefix that ends in *."""
    on_internal_fault: Literal["refuse", "continue"] = "refuse"
    """If the processor itself fails: refuse with 500, or let requests continue ungated."""

    @field_validator("exempt_paths")
    @classmethod
    def _are_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [path for path in value if not path.startswith("/") or "*" in path[:-1]]
        if wrong:
            rule = "must be paths that begin with / and have * only at the end"
            raise _rule(rule)
        return value


class Metrics(_Section):
    """What /metrics says."""

    reference_names: bool = Field(default=False, strict=True)
    """Also say what there is under the names of llm-d-router's flow control,
    llm_d_epp_flow_control_*, for dashboards and KEDA triggers that ask for them."""


class Traces(_Section):
    """OpenTelemetry's traces; needs the extra otel."""

    exporter: Annotated[Literal["off", "otlp"], BeforeValidator(_switched_off)] = "off"
    """otlp: a span flow_control.wait for each request, sent where OTEL_EXPORTER_OTLP_ENDPOINT says.
    The other OTEL_* variables count, too."""


class Settings(_Section):
    """The whole file."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's shape."""
    kind: Literal["FlowControlConfig"]
    """Kind of this file."""
    pool: str = Field(min_length=1)
    """The one inference pool this process guards; objectives of other pools are ignored."""
    listen: Listen = Listen()
    tls: Tls = Tls()
    admin: Admin = Admin()
    objectives: Objectives
    endpoints: Endpoints
    picker: Annotated[Literal["off", "least-loaded"], BeforeValidator(_switched_off)] = "off"
    """Who chooses the endpoint. off: Envoy; least-loaded: this service, at dispatch."""
    saturation: Saturation = Saturation()
    flow_control: FlowControl = FlowControl()
    requests: Requests = Requests()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()

    @model_validator(mode="after")
    def _picked_by_address(self) -> Self:
        names = [str(address) for address in self.endpoints.static if not address.is_ip]
        if self.picker != "off" and names:
            rule = (
                "picker must be off while endpoints.static has host names, as Envoy knows a picked "
                f"endpoint by its IP address alone, got {', '.join(names)}"
            )
            raise _rule(rule)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        complaint = self.admin.complaint()
        if complaint is not None:
            raise _rule(complaint)
        return self

    @property
    def longest_wait_ns(self) -> int:
        """How long a request can possibly be parked: both budgets, one after the other."""
        return self.flow_control.longest_wait_ns

    def controller_config(self) -> ControllerConfig:
        """Return what the engine is to be told."""
        queue = self.flow_control
        return ControllerConfig(
            limits=Limits(requests_max=queue.max_requests, bytes_max=queue.max_bytes),
            templates=tuple(
                BandTemplate(
                    priority_min=band.match.min_priority,
                    priority_max=band.match.max_priority,
                    settings=BandSettings(
                        limits=Limits(requests_max=band.max_requests, bytes_max=band.max_bytes),
                        ttl_ns=band.request_ttl or queue.request_ttl,
                        fairness=Fairness(band.fairness),
                        ordering=Ordering(band.ordering),
                    ),
                )
                for band in queue.bands
            ),
            default_settings=BandSettings(ttl_ns=queue.request_ttl),
            no_endpoint_ttl_ns=queue.no_endpoint_ttl,
            in_flight_max=self.saturation.max_concurrency,
            picker=Picker(self.picker),
        )


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


_RULES = {
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be >= {ge}",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a whole number",
    "string_type": "must be text",
    "path_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "rule": "{rule}",
}
"""pydantic's kinds of error in the house's words."""


def _say(error: ErrorDetails) -> str:
    """Put one of pydantic's errors as where, rule, value."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    where = str(error["loc"][-1]) if error["type"] == "invalid_key" else "".join(parts).lstrip(".")
    if error["type"] == "missing":
        return f"{where} is required"
    if error["type"] in {"extra_forbidden", "invalid_key"}:
        return f"{where} is not a known setting"
    rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    value = error["input"]
    shown = "" if isinstance(value, dict | BaseModel) or ", got " in rule else f", got {value!r}"
    return f"{where} {rule}{shown}".strip()
