"""The configuration file: its format, and how it is read. Only this module reads it.

Every field of a model has its meaning as a docstring; the reference of settings is generated from
them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from flowcontrol.config import ControllerConfig, Utilization
from flowcontrol.errors import ConfigError
from flowcontrol_server.common.addresses import Address, DirectAddress, HostPort
from flowcontrol_server.common.kubernetes_names import is_name
from flowcontrol_server.common.sections import (
    PathBeside,
    Section,
    broken,
    is_read_elsewhere,
    switched_off,
    written,
)
from flowcontrol_server.common.yamlfile import read_mapping
from flowcontrol_server.config.admin import Admin
from flowcontrol_server.config.engine import EngineSection
from flowcontrol_server.config.ledger import LedgerSection
from flowcontrol_server.config.problems import problems_of
from flowcontrol_server.config.requests import Requests, Settlement
from flowcontrol_server.config.sources import (
    Endpoints,
    Given,
    Kubernetes,
    Load,
    Objectives,
    left_out,
)
from flowcontrol_server.config.state import Availability, State
from flowcontrol_server.doors.envoy_secret import EnvoySecret
from flowcontrol_server.doors.tls import Tls

_TRACE_HEADERS: Final = (
    *("traceparent", "tracestate", "baggage", "b3"),
    *("x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"),
)


class Listen(Section):
    """Addresses of the service, each as host:port. By default only this machine can connect."""

    ext_proc: DirectAddress = written("127.0.0.1:9002")
    """The direct door, the port for Envoy: ext_proc, its access log, and gRPC health. host:port,
    unix:/path, or off. If off, Envoy is served at `grpc`, at several times the cost and without the
    access log."""
    grpc: HostPort = written("127.0.0.1:9003")
    """The grpcio door, the port for people and programs: the flowcontrol.v1 API, health,
    reflection, and ext_proc for any gRPC client."""
    http: HostPort = written("127.0.0.1:9090")
    """The HTTP port: the dashboard at /, /metrics, /healthz, /readyz."""
    connections_max: int = Field(
        default=1_000, alias="maxConnections", ge=1, le=100_000, strict=True
    )
    """Most connections to `extProc` at once. Envoy opens one for each of its workers. At the limit,
    an idle connection is closed to make room for a new one. Each connection takes an open file."""
    secret_file: PathBeside | None = None
    """File with secrets, one per line, each of 16 to 1024 letters, digits and -._~+/=. Envoy must
    send one of them on each ext_proc and access-log stream, as `authorization: Bearer`;
    `envoy-config` writes the first. The file is reloaded when it changes. For ports without
    `tls.clientCa`."""

    def secret(self) -> EnvoySecret | None:
        """Return the secret that Envoy must present; None: none is needed.

        Raises:
            OSError: the file cannot be read.
            ValueError: it has no secret, too many, or an invalid one.
        """
        return None if self.secret_file is None else EnvoySecret(self.secret_file)

    @model_validator(mode="after")
    def _secret_can_be_used(self) -> Self:
        try:
            self.secret()
        except OSError as error:
            rule = f"secretFile must be a readable file, got '{self.secret_file}': {error.strerror}"
            raise broken(rule) from error
        except ValueError as error:
            rule = f"secretFile {error}"
            raise broken(rule) from error
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [self.grpc.port, self.http.port]
        if isinstance(self.ext_proc, Address):
            ports.append(self.ext_proc.port)
        if len(set(ports)) != len(ports):
            rule = "must name different ports"
            raise broken(rule)
        return self


class Metrics(Section):
    """Contents of /metrics."""

    reference_names: bool = Field(default=False, strict=True)
    """Also exports metrics under the names of llm-d-router's flow control,
    llm_d_epp_flow_control_*, for dashboards and KEDA triggers that use them."""


class Traces(Section):
    """OpenTelemetry's traces; needs the extra otel."""

    exporter: Annotated[Literal["off", "otlp"], BeforeValidator(switched_off)] = "off"
    """otlp: a span flow_control.wait for each request, sent to OTEL_EXPORTER_OTLP_ENDPOINT. The
    other OTEL_* variables apply, too."""

    def headers(self) -> tuple[str, ...]:
        """Return the headers that carry a request's trace context: W3C's, and B3's."""
        return () if self.exporter == "off" else _TRACE_HEADERS


class _Surroundings(Section):
    """The format of the file, and settings of the service around the engine."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's format."""
    kind: Literal["FlowControlConfig"]
    """Kind of this file."""
    pool: str = Field(min_length=1)
    """The inference pool that this process guards; objectives of other pools are ignored."""
    listen: Listen = Listen()
    tls: Tls = Tls()
    admin: Admin = Admin()
    objectives: Objectives
    endpoints: Endpoints
    load: Annotated[Load | None, Given] = left_out()
    kubernetes: Kubernetes = Kubernetes()


class ServiceEngine(EngineSection):
    """The engine's settings, and those about requests, on which it also depends."""

    requests: Requests = Requests()

    def controller_config(self) -> ControllerConfig:
        """Return the engine's settings; every wait is forecast only if answers report it."""
        forecasts = "position" in self.requests.response_headers
        return replace(super().controller_config(), forecasts=forecasts)


class Settings(ServiceEngine, _Surroundings):
    """The whole file."""

    settlement: Settlement = Settlement()
    state: State = State()
    availability: Availability = Availability()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    ledger: Annotated[LedgerSection | None, Given] = left_out()
    """The decision ledger; if unset, no decisions are recorded."""
    recent_decisions: int = Field(default=10_000, ge=1, le=10_000_000, strict=True)
    """Decisions kept in memory for explanations, about 1 kB each."""

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The folder of the file, at which relative paths start."""
        return self._folder

    @property
    def is_reported(self) -> bool:
        """Whether Envoy's access log reports finished requests."""
        return self.settlement.access_log and self.listen.ext_proc is not None

    @property
    def scraping(self) -> Load | None:
        """How endpoints are scraped: `load`, or its defaults if a detector needs it; None: not."""
        detectors = self.controller_config().detectors
        is_needed = any(isinstance(each, Utilization) for each in detectors)
        return self.load or (Load() if is_needed else None)

    @model_validator(mode="after")
    def _picked_by_address(self) -> Self:
        static = self.endpoints.static or ()
        names = [str(address) for address in static if not address.is_ip]
        if self.picker != "off" and names:
            rule = (
                "picker must be off while endpoints.static has host names, as Envoy identifies a "
                f"picked endpoint only by its IP address, got {', '.join(names)}"
            )
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _has_metrics(self) -> Self:
        detectors = self.controller_config().detectors
        is_asked = any(isinstance(each, Utilization) for each in detectors)
        if is_asked and self.load is not None and self.load.engine == "ollama":
            rule = (
                "saturation.detector must not be utilization where load.engine is ollama, which "
                "has no metrics: use auto or concurrency"
            )
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _can_elect(self) -> Self:
        election = self.availability.election
        if election == "valkey" and self.state.valkey is None:
            rule = "availability.election must not be valkey without state.valkey"
            raise broken(rule)
        if election != "off" and self.state.directory is not None:
            rule = (
                "state.directory must be absent with availability.election, as a replica cannot "
                f"read another's files, got {str(self.state.directory)!r}"
            )
            raise broken(rule)
        if election == "kubernetes" and self.availability.lease_duration % 1_000_000_000:
            rule = "availability.leaseDuration must be whole seconds with kubernetes"
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _pool_can_be_asked_for(self) -> Self:
        pods = self.endpoints.kubernetes
        if pods is not None and not pods.selector and not is_name(self.pool):
            rule = (
                "pool must be a valid name of an InferencePool where endpoints.kubernetes "
                f"has no selector, got {self.pool!r}"
            )
            raise broken(rule)
        if self.availability.election == "kubernetes" and not is_name(f"flowcontrol-{self.pool}"):
            rule = (
                "pool must make flowcontrol-POOL a valid name of a Lease where "
                f"availability.election is kubernetes, got {self.pool!r}"
            )
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _can_be_chosen(self) -> Self:
        if self.requests.conformance and self.picker == "off":
            rule = "picker must not be off where requests.conformance is true"
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        if self.tls.self_signed and not isinstance(self.listen.ext_proc, Address):
            shown = "off" if self.listen.ext_proc is None else f"unix:{self.listen.ext_proc}"
            rule = f"listen.extProc must be host:port where tls.selfSigned is true, got {shown}"
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Self:
        if self.admin.clients and self.tls.client_ca is None:
            rule = (
                "admin.clients must be empty without tls.clientCa, as clients then present no "
                f"certificates, got {', '.join(self.admin.clients)}"
            )
            raise broken(rule)
        return self

    @model_validator(mode="after")
    def _guarded(self, info: ValidationInfo) -> Self:
        problem = None if is_read_elsewhere(info) else self.admin.problem()
        if problem is not None:
            raise broken(problem)
        return self

    @property
    def longest_wait_ns(self) -> int:
        """Longest time that a request can be parked: both limits, one after the other."""
        return self.flow_control.longest_wait_ns


def load_settings(path: Path, *, is_elsewhere: bool = False) -> Settings:
    """Read a configuration file.

    Args:
        path: path of the file.
        is_elsewhere: this is not the service's machine, so files and folders that only the service
            reads need not exist here.

    Raises:
        ConfigError: the file has errors; each is named, with its path in the file.
    """
    content = read_mapping(path)
    try:
        context = {"directory": path.parent, "is_elsewhere": is_elsewhere}
        settings = Settings.model_validate(content, context=context)
    except ValidationError as error:
        raise ConfigError(problems_of(error, Settings)) from error
    settings._folder = path.parent.absolute()  # noqa: SLF001 - its own maker
    return settings


class _Policies(ServiceEngine):
    """Picker, saturation, queue and requests; the rest of the file is ignored."""

    model_config = ConfigDict(extra="ignore")


def load_policies(path: Path) -> ControllerConfig:
    """Read the engine's settings from a configuration file; its folders need not exist.

    Raises:
        ConfigError: the part that is used has errors, or the file has unknown settings; each is
            named.
    """
    content = read_mapping(path)
    known = {str(field.alias or name) for name, field in Settings.model_fields.items()}
    problems = [f"{name} is not a known setting" for name in content if name not in known]
    try:
        policies = _Policies.model_validate(content)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error)]) from error
    if problems:
        raise ConfigError(problems)
    return policies.controller_config()
