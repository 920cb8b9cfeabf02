"""Pure. From request headers to what the engine needs to know.

Nothing here refuses: a missing or malformed header falls to a documented default.
"""

from collections.abc import Mapping
from typing import NamedTuple, final

from flowcontrol.request import DEFAULT_FLOW_ID
from server.dialects import Dialect, dialect_of
from server.units import parse_duration

FLOW_ID_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
TTL_HEADER = "x-llm-d-inference-ttl"
CONTROL_HEADERS = (*FLOW_ID_HEADERS, *OBJECTIVE_HEADERS, TTL_HEADER)
"""Meant for us: removed before the model server sees the request."""

NAME_LENGTH_MAX = 256
"""Characters of a flow id or an objective name that count; the rest is cut off."""


class RequestFacts(NamedTuple):
    """What the headers say of a request."""

    flow_id: str
    objective: str | None
    byte_size: int
    """From content-length; 0 when the size is not announced."""
    ttl_ns: int | None
    client_request_id: str
    """x-request-id, for people who read logs; never used as an identity."""
    path: str
    dialect: Dialect = Dialect.OPENAI
    """How the client wants to be told of an error."""


@final
class ExemptPaths:
    """Paths that pass ungated: exact ones, and prefixes written with a trailing *."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._exact = frozenset(path for path in paths if not path.endswith("*"))
        self._prefixes = tuple(path[:-1] for path in paths if path.endswith("*"))

    def __contains__(self, path: str) -> bool:
        return path in self._exact or path.startswith(self._prefixes)


def classify(headers: Mapping[str, str]) -> RequestFacts:
    """Read the headers, their names in lower case, of which the first value of each counts."""
    flow_id = _first(headers, FLOW_ID_HEADERS)
    length = headers.get("content-length", "")
    path = headers.get(":path", "").partition("?")[0]
    return RequestFacts(
        flow_id=flow_id or DEFAULT_FLOW_ID,
        objective=_first(headers, OBJECTIVE_HEADERS) or None,
        byte_size=int(length) if length.isascii() and length.isdigit() and len(length) < 16 else 0,  # noqa: PLR2004 - a petabyte
        ttl_ns=parse_duration(headers.get(TTL_HEADER, "")),
        client_request_id=headers.get("x-request-id", "")[:NAME_LENGTH_MAX],
        path=path,
        dialect=dialect_of(path, headers.get("content-type", "")),
    )


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((headers[name] for name in names if headers.get(name)), "")[:NAME_LENGTH_MAX]
