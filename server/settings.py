"""The configuration file: its shape, its units, its errors. The only reader of it.

Every model field carries its meaning as a docstring; the README's reference is generated from them.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from flowcontrol.config import Role
from flowcontrol.errors import ConfigError
from server.engine_settings import Engine
from server.record_settings import LedgerSection, ShadowSection
from server.request_settings import Requests, Settlement
from server.sections import Section, broken, written
from server.yamlfile import read_mapping

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
        raise broken(_ADDRESS_RULE)
    host = match[2]
    if host is None:
        address, percent, zone = match[1].partition("%")
        try:  # in one spelling only: Envoy's
            host = inet_ntop(AF_INET6, inet_pton(AF_INET6, address)) + percent + zone
        except OSError as error:
            raise broken(_ADDRESS_RULE) from error
    return Address(host, int(match[3]))


HostPort = Annotated[Address, BeforeValidator(parse_address), PlainSerializer(str)]


class Listen(Section):
    """Where the service listens, each as host:port."""

    ext_proc: HostPort = written("0.0.0.0:9002")
    """gRPC: Envoy's ext_proc streams, our own API, health and reflection."""
    health: HostPort = written("0.0.0.0:9003")
    """gRPC health alone, for probes."""
    http: HostPort = written("0.0.0.0:9090")
    """HTTP: the dashboard at /, /metrics, /healthz, /readyz."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [self.ext_proc.port, self.health.port, self.http.port]
        if len(set(ports)) != len(ports):
            rule = "must name three different ports"
            raise broken(rule)
        return self


class Objectives(Section):
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
            raise broken(rule)
        return Path(directory)


class Endpoints(Section):
    """The model servers of the pool."""

    static: tuple[HostPort, ...]
    """Addresses as host:port. An empty list is an empty pool: everything waits."""
    roles: Mapping[str, Literal["prefill", "decode"]] = Field(default={})
    """Where prefill and decode run apart, what an endpoint does, such as {10.0.0.5:8000: prefill}.
    Those not named do both. The fuller kind counts."""

    @field_validator("static")
    @classmethod
    def _each_once(cls, value: tuple[Address, ...]) -> tuple[Address, ...]:
        twice = sorted({str(address) for address in value if value.count(address) > 1})
        if twice:
            rule = f"must name each endpoint once, {', '.join(twice)} comes again"
            raise broken(rule)
        return value

    @model_validator(mode="after")
    def _roles_of_endpoints(self) -> Self:
        addresses = {str(address) for address in self.static}
        strangers = sorted(set(self.roles) - addresses)
        if strangers:
            rule = f"must give roles to endpoints of its own alone, got {', '.join(strangers)}"
            raise broken(rule)
        return self

    def role_of(self) -> dict[str, Role]:
        """Return the roles of those that do not do everything, as the engine is told."""
        return {address: Role(role) for address, role in self.roles.items()}


class _Surroundings(Section):
    """What the file says of itself, and of the service around the engine."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's shape."""
    kind: Literal["FlowControlConfig"]
    """Kind of this file."""
    pool: str = Field(min_length=1)
    """The one inference pool this process guards; objectives of other pools are ignored."""
    listen: Listen = Listen()
    objectives: Objectives
    endpoints: Endpoints


class Settings(Engine, _Surroundings):
    """The whole file."""

    requests: Requests = Requests()
    settlement: Settlement = Settlement()
    ledger: LedgerSection | None = None
    """Where decisions are written down, nowhere if left out."""
    shadow: ShadowSection | None = None
    """What else is tried on the same traffic, nothing if left out."""
    recent_decisions: int = Field(default=10_000, ge=1, strict=True)
    """Decisions kept in memory to be explained, about 1 kB each."""

    @model_validator(mode="after")
    def _picked_by_address(self) -> Self:
        names = [str(address) for address in self.endpoints.static if not address.is_ip]
        if self.picker != "off" and names:
            rule = (
                "picker must be off while endpoints.static has host names, as Envoy knows a picked "
                f"endpoint by its IP address alone, got {', '.join(names)}"
            )
            raise broken(rule)
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


_RULES = {
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be >= {ge}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a whole number",
    "bool_type": "must be true or false",
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
    shown = "" if isinstance(value, dict | BaseModel) or ", got " in rule else f", got {value!r}"
    return f"{where} {rule}{shown}".strip()
