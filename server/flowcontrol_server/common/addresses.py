"""Addresses as people write them: host:port, an IPv6 host in brackets."""

import re
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from flowcontrol_server.common.sections import broken, can_be_a_path

_SOCKET_PATH_BYTES_MAX = 107
"""Size of Linux's sun_path, without its final NUL."""
_ADDRESS_RULE = "must be host:port with a port from 1 to 65535, such as 10.0.0.5:8000 or [::1]:8000"

_ADDRESS = re.compile(r"(?:\[([^\s\[\]]{1,64})\]|([^\s:\[\]/]{1,253})):([0-9]{1,5})")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
"""A host name; underscores are allowed, as in Compose service names and SRV records."""
_NAME_LENGTH_MAX = 253
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_BYTE}(?:\.{_BYTE}){{3}}")


class Address(NamedTuple):
    """A host and a port; the text form puts an IPv6 host in brackets."""

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
    """Parse host:port, or raise the error that pydantic reports as a broken rule."""
    match = _ADDRESS.fullmatch(str(value))
    if match is None or not 0 < int(match[3]) <= 65535:  # noqa: PLR2004 - the largest port
        raise broken(_ADDRESS_RULE)
    host = match[2]
    if host is not None:
        if not _is_host(host):
            raise broken(_ADDRESS_RULE)
    else:
        address, percent, zone = match[1].partition("%")
        try:  # normalized to the spelling that Envoy uses
            host = inet_ntop(AF_INET6, inet_pton(AF_INET6, address)) + percent + zone
        except OSError as error:
            raise broken(_ADDRESS_RULE) from error
    return Address(host, int(match[3]))


def is_loopback(host: str) -> bool:
    """Whether a host, without brackets, can be reached only from its own machine.

    Names that are loopback are those of RFC 6761, section 6.3; no other name is looked up.
    """
    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        name = host.lower().removesuffix(".")
        return name == "localhost" or name.endswith(".localhost")


def _is_host(text: str) -> bool:
    """Whether it is an IPv4 address or a name; a text whose last label is a number is no name."""
    if text.rstrip(".").rpartition(".")[2].isdigit():
        return _IPV4.fullmatch(text) is not None
    return len(text) <= _NAME_LENGTH_MAX and _NAME.fullmatch(text) is not None


def parse_address_or_socket(value: object) -> Address | Path | None:
    """Parse host:port, unix:/path or off (None), or raise the error of a broken rule."""
    if value is False or value == "off":
        return None
    if not isinstance(value, str) or not value.startswith("unix:"):
        return parse_address(value)
    path = value.removeprefix("unix:")
    is_one = path.startswith("/") and can_be_a_path(path)
    if not is_one or len(path.encode()) > _SOCKET_PATH_BYTES_MAX:
        rule = f"must be unix: and an absolute path of at most {_SOCKET_PATH_BYTES_MAX} bytes"
        raise broken(rule)
    return Path(path)


def _as_written(address: Address | Path | None) -> str:
    return f"unix:{address}" if isinstance(address, Path) else str(address or "off")


HostPort = Annotated[Address, BeforeValidator(parse_address), PlainSerializer(str)]
AddressText = Annotated[str, BeforeValidator(lambda value: str(parse_address(value)))]
"""An address as text, in the normalized spelling that sources use."""
DirectAddress = Annotated[
    Address | Path | None, BeforeValidator(parse_address_or_socket), PlainSerializer(_as_written)
]
"""host:port, unix:/path, or off (None)."""
