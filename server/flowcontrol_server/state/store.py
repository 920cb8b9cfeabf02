"""What a store holds, and what is asked of one."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import structlog

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.sections import QUANTITY_MAX

_log = structlog.get_logger()


class StateError(FlowControlError):
    """The store cannot be used; the message says why."""


class FencedError(StateError):
    """A later leader has taken the store: this process must not write any more."""


class LeaseRecord(NamedTuple):
    """One request in flight."""

    ticket: str
    endpoint: str | None
    priority: int
    flow_id: str
    tokens: float
    since_s: float
    """When it was dispatched, seconds since 1970: a monotonic clock ends with its machine."""


class Contents(NamedTuple):
    """All that a store holds."""

    leases: Sequence[LeaseRecord] = ()
    memory: str | None = None
    """What the engine had learnt, as JSON."""


class Batch(NamedTuple):
    """Changes written together, all or none."""

    put: Sequence[LeaseRecord]
    removed: Sequence[str]
    """Tickets."""
    is_whole: bool
    """Whether `put` is all there is: whatever else the store holds is removed."""
    memory: str | None = None
    """None: as it was."""

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.put or self.removed or self.is_whole or self.memory is not None)


class Store(Protocol):
    """Keeps leases outside the process. Every method may raise StateError, and may take long."""

    async def open(self, token: int) -> Contents:
        """Take the store and return what it holds.

        Args:
            token: grows with every leader; a store opened with a smaller one can no longer write.
        """

    async def write(self, batch: Batch) -> None:
        """Write changes; raises FencedError once a later leader has opened the store."""

    async def close(self) -> None:
        """Close the store."""


def to_plain(record: LeaseRecord) -> list[object]:
    """Return a record as JSON has it, without its ticket, which is its key."""
    return list(record[1:])


def from_plain(ticket: str, plain: object) -> LeaseRecord | None:
    """Read a record; None where it is none: another version's, or damaged."""
    match plain:
        case [None | str() as endpoint, int(priority), str(flow_id), tokens, since_s] if _is_number(
            tokens
        ) and _is_number(since_s):
            return LeaseRecord(ticket, endpoint, priority, flow_id, float(tokens), float(since_s))
    return None


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is one to count with: a NaN that is added to a sum stays in it for good."""
    return isinstance(value, int | float) and 0 <= value <= QUANTITY_MAX


def records_of(texts: Mapping[str, str]) -> list[LeaseRecord]:
    """Return every record that can be read, the oldest first; what cannot is said in one line."""
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
