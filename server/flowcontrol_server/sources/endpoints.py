"""Pure. The endpoints of all sources together, without those that are down."""

from collections.abc import Callable, Iterable
from typing import final

from flowcontrol.config import Role
from flowcontrol.events import Endpoint

ROLE_LABEL = "llm-d.ai/role"
_ROLES = {
    **{role.value: role for role in Role},
    "": Role.BOTH,
    "encode-prefill": Role.PREFILL,
    "prefill-decode": Role.BOTH,
    "encode-prefill-decode": Role.BOTH,
    "encode": None,
}


def role_of_label(label: str) -> Role | None:
    """Return the role that a label names; None: serves no requests. Unknown labels mean both."""
    return _ROLES.get(label, Role.BOTH)


@final
class Roster:
    """Merges the endpoints of all sources, and reports changes. Owner: the loop.

    Args:
        changed: called whenever the known endpoints, or those that are down, have changed.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._sources: dict[str, tuple[Endpoint, ...]] = {}
        self._known: dict[str, Endpoint] = {}
        self._down: set[str] = set()

    @property
    def addresses(self) -> tuple[str, ...]:
        """All known endpoints, including those that are down."""
        return tuple(self._known)

    @property
    def present(self) -> tuple[Endpoint, ...]:
        """The known endpoints that are not down, sorted by address."""
        return tuple(each for address, each in self._known.items() if address not in self._down)

    @property
    def down(self) -> frozenset[str]:
        """The known endpoints that are down."""
        return frozenset(self._down)

    def know(self, source: str, endpoints: Iterable[Endpoint]) -> None:
        """Replace the endpoints of one source."""
        self._sources[source] = tuple(endpoints)
        self._merge()

    def forget(self, source: str) -> None:
        """Drop the endpoints of a source that is no longer used."""
        if self._sources.pop(source, None) is not None:
            self._merge()

    def mark(self, address: str, *, is_up: bool) -> None:
        """Mark a known endpoint as down or up."""
        if address in self._known and is_up == (address in self._down):
            self._down ^= {address}
            self._changed()

    def _merge(self) -> None:
        known: dict[str, Endpoint] = {}
        for endpoints in self._sources.values():
            for endpoint in endpoints:  # the first source decides the role
                known.setdefault(endpoint.address, endpoint)
        self._known = dict(sorted(known.items()))
        self._down &= known.keys()
        self._changed()
