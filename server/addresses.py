"""Addresses as people write them: host:port, an IPv6 host in brackets."""

import re
from ipaddress import ip_address
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from server.sections import broken

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
