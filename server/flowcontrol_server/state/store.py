"""The content of a store, and its interface."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import structlog

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.sections import QUANTITY_MAX

_log = structlog.get_logger()


class StateError(FlowControlError):
    """The store cannot be used, for the reason in the message."""


class FencedError(StateError):
    """A later leader has taken over the store: this process must no longer write."""


class LeaseRecord(NamedTuple):
    """One request in flight."""

    ticket: str
    endpoint: str | None
    priority: int
    flow_id: str
    tokens: float
    since_s: float
    """Time of its dispatch, seconds since 1970: a monotonic clock does not survive a reboot."""


class Contents(NamedTuple):
    """The content of a store."""

    leases: Sequence[LeaseRecord] = ()
    memory: str | None = None
    """What the engine had learnt, as JSON."""


class Batch(NamedTuple):
    """Changes that are written together."""

    put: Sequence[LeaseRecord]
    removed: Sequence[str]
    """Tickets."""
    is_whole: bool
    """Whether `put` replaces all leases in the store."""
    memory: str | None = None
    """What the engine has learnt, as JSON; None: unchanged."""

    def __bool__(self) -> bool:
        """Return whether there is anything to write."""
        return bool(self.put or self.removed or self.is_whole or self.memory is not None)


class Store(Protocol):
    """Keeps leases outside the process. Every method may raise StateError, and may be slow."""

    async def open(self, token: int) -> Contents:
        """Take over the store and return its content.

        Args:
            token: grows with every leader; a store opened with a smaller one can no longer write.
        """

    async def write(self, batch: Batch) -> None:
        """Write changes; raises FencedError once a later leader has opened the store."""

    async def close(self) -> None:
        """Close the store."""


def to_plain(record: LeaseRecord) -> list[object]:
    """Return a record as JSON values, without its ticket, which is its key."""
    return list(record[1:])


def from_plain(ticket: str, plain: object) -> LeaseRecord | None:
    """Read a record; None: it is damaged, or of another version."""
    match plain:
        case [None | str() as endpoint, int(priority), str(flow_id), tokens, since_s] if _is_number(
            tokens
        ) and _is_number(since_s):
            return LeaseRecord(ticket, endpoint, priority, flow_id, float(tokens), float(since_s))
    return None


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a number is in range; a NaN would stay in a sum for good."""
    return isinstance(value, int | float) and 0 <= value <= QUANTITY_MAX


def records_of(texts: Mapping[str, str]) -> list[LeaseRecord]:
    """Return the readable records, the oldest first; log the number of the others in one line."""
    read = [(ticket, _read(ticket, text)) for ticket, text in texts.items()]
    skipped = [ticket for ticket, record in read if record is None]
    if skipped:
        _log.warning("state_records_skipped", count=len(skipped), first=skipped[0])
    return sorted((each for _, each in read if each is not None), key=lambda each: each.since_s)


def _read(ticket: str, text: str) -> LeaseRecord | None:
    try:
        return from_plain(ticket, json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
