"""The sections of the configuration file about the sources of objectives, endpoints and load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from flowcontrol.config import Role
from flowcontrol_server.common.addresses import Address, AddressText, HostPort
from flowcontrol_server.common.kubernetes_names import is_label, is_namespace
from flowcontrol_server.common.sections import (
    CountFrom1,
    Duration,
    FileBeside,
    PathBeside,
    Section,
    broken,
    can_be_a_file,
    expect,
    written,
)

_PORTS_MAX = 8
"""The limit of target ports of an InferencePool."""


def _not_null(value: object) -> object:
    if value is None:
        rule = "must not be left empty"
        raise broken(rule)
    return value


Given = BeforeValidator(_not_null)
"""For an optional setting: if its key is present, it must have a value."""


def left_out() -> Any:
    """Return the default of an optional setting."""
    return Field(default=None, validate_default=False)


class KubernetesObjectives(Section):
    """InferenceObjectives of the pool's namespace, watched."""

    write_status: Annotated[bool, Field(strict=True)] = True
    """Whether the condition Accepted is written into each objective's status. If the service
    account may not write it, objectives are still followed."""


class ApiObjectives(Section):
    """Objectives set and deleted by the gRPC API, flowcontrol.v1, with the admin token."""

    file: Annotated[PathBeside | None, Given] = left_out()
    """File in which objectives set by the API are kept, as manifests, reloaded on change. If unset,
    they are kept in memory only. It must hold objectives of this pool only, because each change by
    the API writes the whole file. If this setting changes while the service runs and the new file
    does not exist, it is created with the present objectives."""

    @field_validator("file")
    @classmethod
    def _in_a_folder(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        rule = "must be a file in an existing folder"
        return value and expect(value, rule, can_be_a_file, info)


class Objectives(Section):
    """The source of InferenceObjectives: one of three."""

    directory: Annotated[PathBeside | None, Given] = left_out()
    """Folder of InferenceObjective manifests (*.yaml, *.yml), reloaded on change. A relative path
    starts at the configuration file."""
    kubernetes: Annotated[KubernetesObjectives | None, Given] = left_out()
    api: Annotated[ApiObjectives | None, Given] = left_out()

    @field_validator("directory")
    @classmethod
    def _is_a_folder(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return value and expect(value, "must be a folder", Path.is_dir, info)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = " and ".join(given) or "none of them"
            rule = f"must have one of directory, kubernetes or api, got {names}"
            raise broken(rule)
        return self


class Dns(Section):
    """Endpoints by DNS, queried repeatedly; with the picker on, their addresses are used."""

    names: tuple[HostPort, ...] = ()
    """Host names with a port. Every address of each name (A, AAAA) is an endpoint."""
    srv: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of SRV records, such as _http._tcp.vllm.models.svc.cluster.local. The targets with the
    lowest priority number are endpoints, each with its own port."""
    family: Literal["prefer-ipv4", "ipv4", "ipv6", "all"] = "prefer-ipv4"
    """Which addresses of a name are used. With all, a server that has both kinds is two
    endpoints."""
    interval: Duration = written("5s")
    """Longest time between two queries. The next query comes sooner if the answer's time to live
    ends sooner, but never more than once a second."""
    servers: tuple[HostPort, ...] = ()
    """IP addresses, with a port, of the name servers to query; the system's if empty."""

    @model_validator(mode="after")
    def _something_to_ask(self) -> Self:
        if not self.names and not self.srv:
            rule = "must have names or srv"
            raise broken(rule)
        return self

    @field_validator("names")
    @classmethod
    def _are_names(cls, value: tuple[Address, ...]) -> tuple[Address, ...]:
        addresses = [str(address) for address in value if address.is_ip]
        if addresses:
            rule = f"must be host names, addresses belong in static, got {', '.join(addresses)}"
            raise broken(rule)
        return value

    @field_validator("servers")
    @classmethod
    def _are_addresses(cls, value: tuple[Address, ...]) -> tuple[Address, ...]:
        names = [str(address) for address in value if not address.is_ip]
        if names:
            rule = f"must be IP addresses with a port, got {', '.join(names)}"
            raise broken(rule)
        return value


Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class KubernetesEndpoints(Section):
    """Ready pods of the InferencePool named like the pool, at each of its target ports."""

    selector: Mapping[str, str] = Field(default={})
    """Labels of the pods, instead of an InferencePool's. Needs ports."""
    ports: Annotated[tuple[Port, ...], Field(max_length=_PORTS_MAX)] = ()
    """Ports of each pod, instead of an InferencePool's. Needs selector."""

    @field_validator("selector")
    @classmethod
    def _can_be_labels(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        strangers = {key: each for key, each in value.items() if not is_label(key, each)}
        if strangers:
            rule = f"must have valid labels of a pod, got {strangers!r}"
            raise broken(rule)
        return value

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if bool(self.selector) != bool(self.ports):
            rule = "must have both selector and ports, or neither to follow the InferencePool"
            raise broken(rule)
        return self


class Endpoints(Section):
    """The model servers of the pool: from one source or several, together."""

    static: Annotated[tuple[HostPort, ...] | None, Given] = left_out()
    """Addresses as host:port. With an empty list the pool is empty, and every request waits."""
    roles: Mapping[AddressText, Literal["prefill", "decode"]] = Field(default={})
    """The role of each endpoint where prefill and decode are separate, such as {10.0.0.5:8000:
    prefill}. It overrides a role from `file` or from a pod's label llm-d.ai/role. Endpoints without
    a role do both. The stage with the higher saturation counts."""
    dns: Annotated[Dns | None, Given] = left_out()
    file: Annotated[FileBeside | None, Given] = left_out()
    """File with a YAML list of endpoints, reloaded on change: host:port, or {address, port, role}.
    A relative path starts at the configuration file."""
    kubernetes: Annotated[KubernetesEndpoints | None, Given] = left_out()

    @field_validator("static")
    @classmethod
    def _each_once(cls, value: tuple[Address, ...] | None) -> tuple[Address, ...] | None:
        value = value or ()
        twice = sorted({str(address) for address in value if value.count(address) > 1})
        if twice:
            rule = f"must name each endpoint once, {', '.join(twice)} is repeated"
            raise broken(rule)
        return value

    @model_validator(mode="after")
    def _some_source(self) -> Self:
        sources = ("static", "dns", "file", "kubernetes")
        if not any(name in self.model_fields_set for name in sources):
            rule = "must have static, dns, file or kubernetes"
            raise broken(rule)
        strangers = sorted(set(self.roles) - {str(address) for address in self.static or ()})
        if strangers and self.model_fields_set.isdisjoint(sources[1:]):
            names = ", ".join(strangers)
            rule = f"must have roles only for endpoints in endpoints.static, got {names}"
            raise broken(rule)
        return self

    def role_of(self) -> dict[str, Role]:
        """Return the roles of endpoints that do only prefill or decode."""
        return {address: Role(role) for address, role in self.roles.items()}

    @property
    def written(self) -> tuple[Address, ...]:
        """The endpoints that the file itself names, including host names."""
        return (*(self.static or ()), *(self.dns.names if self.dns else ()))

    @property
    def is_written(self) -> bool:
        """Whether the file itself names all endpoints that there can be."""
        return self.file is None and self.kubernetes is None and not (self.dns and self.dns.srv)


def _http_path(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
        rule = "must be a path that begins with /"
        raise broken(rule)
    return value


class Load(Section):
    """Scrapes of the endpoints for their load, which also show which endpoints are down."""

    engine: Literal["auto", "vllm", "sglang", "tgi", "triton", "llama.cpp", "ollama"] = "auto"
    """Engine whose metrics page to expect. auto recognises each engine by its metric names. ollama
    has no metrics page, and is only checked for being up."""
    scheme: Literal["http", "https"] = "http"
    """With https, the certificate must be one that the system trusts."""
    port: Annotated[Port | None, Given] = left_out()
    """Port of the metrics page, if it is not the endpoint's own; Triton's is 8002. A refused
    connection to another port does not count against the endpoint."""
    path: Annotated[str | None, BeforeValidator(_http_path)] = left_out()
    """Path of the metrics page; /metrics if unset."""
    token_file: Annotated[FileBeside | None, Given] = left_out()
    """File with the key for metrics pages that require one, sent as `Authorization: Bearer`. It is
    read again for each scrape, so it can be replaced in place. Over `http` anyone on the network
    path can read the key."""
    interval: Duration = written("200ms")
    """Time between two scrapes of an endpoint, plus or minus a tenth."""
    timeout: Duration = written("1s")
    """Longest time for one scrape, in total."""
    scrapes_per_second_max: CountFrom1 = 100
    """Most scrapes per second of all endpoints together; with many endpoints the interval grows.
    Past 180 endpoints it exceeds the 2 s of `saturation.metricsStalenessThreshold`. A scrape takes
    about half a millisecond of CPU: a hundred per second take 5 % of a core."""
    unreachable_after: CountFrom1 = 3
    """Refused or unanswered connections in a row, after which an endpoint leaves the pool until it
    accepts one."""


class Kubernetes(Section):
    """How to reach the Kubernetes API, for objectives and endpoints."""

    namespace: str | None = None
    """Namespace of the pool. If unset, the pod's own, or that of the kubeconfig."""
    kubeconfig: Annotated[PathBeside | None, Given] = left_out()
    """Path of a kubeconfig. If unset, the pod's service account is used; or else the files that the
    environment variable KUBECONFIG names, or ~/.kube/config."""
    context: Annotated[str | None, Field(min_length=1), Given] = left_out()
    """Context of the kubeconfig; its current context if unset."""

    @field_validator("namespace")
    @classmethod
    def _can_be_a_namespace(cls, value: str | None) -> str | None:
        if value is not None and not is_namespace(value):
            rule = "must be a valid namespace: at most 63 of a-z, 0-9 and, except at the ends, -"
            raise broken(rule)
        return value

    @field_validator("kubeconfig")
    @classmethod
    def _is_a_kubeconfig(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return value and expect(value, "must be a kubeconfig file", Path.is_file, info)
