"""The sections of the configuration file about state outside the process, and the leader."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from flowcontrol_server.common.sections import (
    Duration,
    FileBeside,
    PathBeside,
    Section,
    broken,
    expect,
    switched_off,
    written,
)
from flowcontrol_server.config.sources import Given, left_out

_SCHEMES = ("valkey", "valkeys", "redis", "rediss", "unix")
TLS_SCHEMES = ("valkeys", "rediss")
_DATABASE = re.compile("/?|/[0-9]{1,5}")
LEASE_MIN_NS = 1_000_000_000


class Valkey(Section):
    """A Valkey or Redis server, for several replicas. Needs the extra valkey."""

    url: str = Field(min_length=1)
    """valkey://HOST:PORT/DATABASE, valkeys:// for TLS, or unix:///PATH; redis:// and rediss:// mean
    the same. With Sentinel, the host is any sentinel; with a cluster, any node. With TLS the
    certificate must be for this host; but cluster nodes, and servers that Sentinel names, are not
    checked for their name."""
    user: str | None = Field(default=None, min_length=1)
    """User name, for a server with access control lists."""
    password_file: Annotated[FileBeside | None, Given] = left_out()
    """File with the password, read at every connection. A relative path starts at the configuration
    file."""
    ca: Annotated[FileBeside | None, Given] = left_out()
    """PEM file with the certificate authorities of the server; those of the system if unset."""
    certificate: Annotated[FileBeside | None, Given] = left_out()
    """PEM file with a client certificate. Needs key."""
    key: Annotated[FileBeside | None, Given] = left_out()
    """PEM file with the key of the client certificate."""
    sentinel: str | None = Field(default=None, min_length=1)
    """Name of the primary that Sentinel watches; set it to connect through Sentinel. With TLS the
    sentinels must use TLS, too. They must not require a password."""
    is_cluster: bool = Field(default=False, strict=True, alias="cluster")
    """Whether the server is a cluster."""
    timeout: Duration = written("500ms")
    """Longest time for one answer of the server."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            is_one = parts.scheme == "unix" or bool(parts.scheme in _SCHEMES and parts.hostname)
        except ValueError:
            is_one = False
        if not is_one:
            begins = value.partition("/")[0]  # only this part: the rest may have a password
            rule = (
                f"must be a URL with one of {', '.join(_SCHEMES)} as its scheme, got one that "
                f"begins with {begins!r}"
            )
            raise broken(rule)
        rule = _surplus(parts) or _missing(parts)
        if not value.isprintable():  # urlsplit ignores some of these
            rule = "must have only printable characters, got others"
        if rule:
            raise broken(rule)
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            rule = "must have both certificate and key, or neither"
            raise broken(rule)
        if self.sentinel is not None and self.is_cluster:
            rule = "must have one of sentinel and cluster"
            raise broken(rule)
        parts = urlsplit(self.url)
        if (self.ca or self.certificate) and parts.scheme not in TLS_SCHEMES:
            rule = f"must have a url with {' or '.join(TLS_SCHEMES)} for ca, certificate and key"
            raise broken(rule)
        if parts.scheme == "unix" and (self.sentinel or self.is_cluster):
            rule = "must have a url with a host for sentinel and cluster"
            raise broken(rule)
        if self.is_cluster and self.database:
            rule = f"must have no database in url for cluster, got {self.database}"
            raise broken(rule)
        return self

    @property
    def database(self) -> int:
        """The number of the database."""
        parts = urlsplit(self.url)
        return 0 if parts.scheme == "unix" else int(parts.path.strip("/") or 0)


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is valid, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _missing(parts: SplitResult) -> str:
    """Return the rule that a URL breaks by a missing part; empty: it breaks none."""
    if parts.scheme == "unix":
        is_path = parts.path.startswith("/")
        return "" if is_path else f"must be unix:///PATH, got the path {parts.path!r}"
    return "" if _has_port(parts) else "must have a port from 1 to 65535, or none, got another"


def _surplus(parts: SplitResult) -> str:
    """Return the rule that a URL breaks by a part that is not used; empty: it breaks none."""
    if parts.password is not None:
        return "must not have a password, which belongs in passwordFile, got one"
    if parts.username is not None:
        return f"must not have a user name, which belongs in user, got {parts.username!r}"
    if parts.query or parts.fragment:
        return "must not have options after ? or #, got some"
    if parts.scheme == "unix":
        return f"must be unix:///PATH, got the host {parts.netloc!r}" if parts.netloc else ""
    if not _DATABASE.fullmatch(parts.path):
        return f"must have the number of a database as its path, or none, got {parts.path!r}"
    return ""


class State(Section):
    """Where requests in flight are recorded, so that a restart does not exceed the limit.

    Nothing is recorded by default. Records are written later, in batches: no request waits for its
    record. If the process is killed, requests dispatched since the last batch are not recorded, and
    the limit can be exceeded by their number.
    """

    directory: Annotated[PathBeside | None, Given] = left_out()
    """Folder for the state file of a single replica that may restart. A relative path starts at the
    configuration file."""
    valkey: Annotated[Valkey | None, Given] = left_out()
    write_within: Duration = written("50ms")
    """Longest time from a dispatch to its record, while the store keeps up."""
    lease_age_max: Duration = written("10m")
    """Longest time after its dispatch that a recovered request holds its slot. The slot is freed
    sooner if the access log reports the request's end, or if its endpoint reports fewer requests
    than are held there."""
    count_running: bool = Field(default=True, strict=True)
    """Whether requests that endpoints already run at the start count as in flight, as far as they
    are not recorded. Needs `load`. Set it to false if others also send requests to these
    endpoints."""

    @field_validator("directory")
    @classmethod
    def _is_a_folder(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return value and expect(value, "must be a folder", Path.is_dir, info)

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        if self.directory is not None and self.valkey is not None:
            rule = "must have one of directory and valkey"
            raise broken(rule)
        return self


class Availability(Section):
    """How several replicas of one pool elect the one that decides."""

    election: Annotated[Literal["kubernetes", "valkey", "off"], BeforeValidator(switched_off)] = (
        written("off")
    )
    """How the leader is elected. kubernetes: by a coordination.k8s.io Lease named flowcontrol-POOL
    in the pool's namespace. valkey: by a key in `state.valkey`. off: no election; this process is
    the only one."""
    lease_duration: Duration = written("2s")
    """How long a leader that does not renew its lease remains the leader; whole seconds with
    kubernetes. A leader renews four times in this time, and stops deciding a quarter of it before
    the lease ends."""

    @field_validator("lease_duration")
    @classmethod
    def _is_long_enough(cls, value: int) -> int:
        if value < LEASE_MIN_NS:
            rule = "must be at least 1s"
            raise broken(rule)
        return value
