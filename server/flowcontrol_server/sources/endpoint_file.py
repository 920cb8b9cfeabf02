"""Endpoints from a file, reread when it changes.

Replace the file by a rename: a half-written list of endpoints looks like a shorter one.

    - 10.0.0.5:8000
    - {address: 10.0.0.6, port: 8000, role: prefill}
    - {name: c, address: 10.0.0.7, port: "8000", labels: {llm-d.ai/role: decode}}

A mapping with the list under `endpoints`, as in llm-d-router's file discovery, is read too.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from pydantic_core import PydanticCustomError

from flowcontrol.config import Role
from flowcontrol.errors import ConfigError
from flowcontrol.events import Endpoint
from flowcontrol_server.common.addresses import parse_address
from flowcontrol_server.common.watched import LOOK_AGAIN_MS, watch_folder
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.sources.endpoints import ROLE_LABEL, role_of_label
from flowcontrol_server.sources.mistakes import FileSource, describe_error

ENDPOINTS_MAX = 10_000
"""A longer list is an error."""
SHOWN_MAX = 10
"""Errors of one file that are shown; of the others, only the number."""
KEYS = ("name", "namespace", "address", "port", "labels", "role")
"""The keys that an entry may have."""


class Listed(NamedTuple):
    """The content of a file."""

    endpoints: tuple[Endpoint, ...]
    oddities: tuple[str, ...] = ()
    """Errors for which the file is not rejected."""


@final
class EndpointFile(FileSource):
    """The endpoints that a file lists. The last content without an error stays in effect.

    Args:
        path: the file. Its folder is watched, because a file that is replaced is another file.
        are_picked: whether this service picks among them. If so, those with host names are left
            out, because Envoy identifies a picked endpoint by its IP address only.
        look_again_ms: how often to check whether the path still leads to the watched folder.
    """

    def __init__(
        self, path: Path, *, are_picked: bool = False, look_again_ms: int = LOOK_AGAIN_MS
    ) -> None:
        super().__init__("endpoints_rejected")
        self._path = path
        self._are_picked = are_picked
        self._look_again_ms = look_again_ms
        self._known: tuple[Endpoint, ...] | None = None

    async def follow(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        """Report the endpoints whenever they change, until cancelled."""
        await watch_folder(self._path.parent, lambda: self._look(changed), self._look_again_ms)

    async def _look(self, changed: Callable[[tuple[Endpoint, ...]], None]) -> None:
        try:
            endpoints, oddities = await asyncio.to_thread(
                read_endpoints, self._path, are_picked=self._are_picked
            )
        except ConfigError as error:
            self._report_problems(error.problems)
            return
        except Exception as error:  # noqa: BLE001 - any error here comes from the file
            self._report_problems([describe_error(error, self._path)])
            return
        self._report_problems(oddities)
        if endpoints != self._known:
            self._known = endpoints
            changed(endpoints)

    def _report_problems(self, problems: Sequence[str]) -> None:
        """Replace the errors of the file; log and count the new ones."""
        more = [f"and {len(problems) - SHOWN_MAX} more"] if len(problems) > SHOWN_MAX else []
        problem = "\n".join([*problems[:SHOWN_MAX], *more])
        self.report({self._path: problem} if problem else {})


def read_endpoints(path: Path, *, are_picked: bool = False) -> Listed:
    """Read a file of endpoints; if endpoints are picked, those with host names are left out.

    Raises:
        ConfigError: with every error for which the file is rejected.
    """
    problems: list[str] = []
    oddities: list[str] = []
    endpoints: dict[str, Endpoint] = {}
    for index, entry in enumerate(_entries(path)):
        try:
            endpoint = _read_entry(entry)
        except ValueError as error:
            problems.append(f"{path}: [{index}] {error}, got {entry!r}")
            continue
        unknown = [str(key) for key in entry if key not in KEYS] if isinstance(entry, dict) else ()
        oddities += (
            f"{path}: [{index}] {key} is not a known key and is ignored" for key in unknown
        )
        if endpoint is not None and endpoint.address in endpoints:
            problems.append(
                f"{path}: [{index}] must not repeat an endpoint, got {endpoint.address}"
            )
        elif endpoint is not None and are_picked and not parse_address(endpoint.address).is_ip:
            oddities.append(
                f"{path}: [{index}] is left out, as it must have an IP address unless picker "
                f"is off, got {endpoint.address}"
            )
        elif endpoint is not None:
            endpoints[endpoint.address] = endpoint
    if problems:
        raise ConfigError(problems)
    return Listed(tuple(endpoints.values()), tuple(oddities))


def _entries(path: Path) -> list[Any]:
    documents = read_documents(path)
    content = documents[0] if len(documents) == 1 else None
    if isinstance(content, dict):
        content = content.get("endpoints")
    if not isinstance(content, list):
        raise ConfigError([f"{path}: must be one list of endpoints"])
    if len(content) > ENDPOINTS_MAX:
        raise ConfigError([f"{path}: must list at most {ENDPOINTS_MAX} endpoints"])
    return content


def _read_entry(entry: Any) -> Endpoint | None:
    role: Role | None = Role.BOTH
    if isinstance(entry, dict):
        labels = entry.get("labels")
        if isinstance(labels, dict):
            role = role_of_label(str(labels.get(ROLE_LABEL, "")))
        if "role" in entry:
            role = Role(entry["role"]) if entry["role"] in _ROLES else None
            if role is None:
                message = f"role must be one of {', '.join(_ROLES)}"
                raise ValueError(message)
        given, port = entry.get("address"), entry.get("port")
        address = given if isinstance(given, str) else ""  # None would be a host called so
        if port is not None:
            bracketed = f"[{address}]" if ":" in address and address[:1] != "[" else address
            address = f"{bracketed}:{port}"
    else:
        address = str(entry)
    try:
        parsed = parse_address(address)
    except PydanticCustomError as error:
        raise ValueError(error.message()) from error
    return None if role is None else Endpoint(str(parsed), role)


_ROLES = tuple(role.value for role in Role)
