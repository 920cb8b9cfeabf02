"""Pure. Displacement: which queued requests are evicted to admit an arrival?

Limits apply to a flow, to a band, and to all bands together. If the limit of its flow is reached,
the newcomer is refused and displaces nothing. Otherwise it displaces requests of lower bands, the
lowest band first. If that is not enough, it displaces requests of its own band, from flows whose
backlog is longer than its own would be. So a flow that fills a band pays for the others, and two
flows never displace each other in turns. In each band the flow with the longest backlog loses its
newest request. Nothing is displaced unless the newcomer then fits.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import Scope

DISPLACED_MAX: Final = 16
"""Most requests of its own band that one newcomer can displace, however large it is."""


def displaced_for(
    lease: Lease, band: Band, bands: Iterable[Band], everything: Capacity
) -> Iterator[Lease] | None:
    """Return what to displace to admit a newcomer; None: it must be refused.

    O(bands + log flows) for each; at most `DISPLACED_MAX` of its own band.

    Args:
        lease: the newcomer.
        band: its band.
        bands: all bands, highest first.
        everything: the account of all bands together.

    Returns:
        Requests one by one; each must be removed before the next is asked for.
    """
    if not lease.flow.capacity.fits(lease.request.byte_size):
        return None
    lower = [each for each in bands if each.priority < band.priority]
    equals = _equals_to_displace(lease, band, lower, everything)
    return None if equals is None else _displaced(lease, equals, lower, everything)


def _displaced(
    lease: Lease, equals: list[Lease], lower: list[Band], everything: Capacity
) -> Iterator[Lease]:
    yield from equals
    while not everything.fits(lease.request.byte_size):
        while not lower[-1].capacity.requests:
            lower.pop()
        yield lower[-1].newest_of_longest()


def _equals_to_displace(
    lease: Lease, band: Band, lower: list[Band], everything: Capacity
) -> list[Lease] | None:
    """Return what must go in the newcomer's own band, if all lower bands were empty."""
    requests = sum(each.capacity.requests for each in lower)
    size = sum(each.capacity.bytes for each in lower)
    own = lease.flow.capacity.requests + 1
    victims: list[Lease] = []
    rows: dict[Flow, Iterator[Lease]] = {}
    lengths: dict[Flow, int] = {}
    freed = 0
    while not (is_enough := _fits(lease, band, everything, (len(victims), freed, requests, size))):
        longest, length = band.backlogs.longest()
        if longest is None or length <= own or len(victims) == DISPLACED_MAX:
            break
        victim = next(rows.setdefault(longest, longest.newest_first()))
        lengths[longest] = length - 1
        band.backlogs.shift(longest, length, length - 1)
        victims.append(victim)
        freed += victim.request.byte_size
    for victim in victims:  # they are only counted here, not removed
        length = lengths[victim.flow]
        lengths[victim.flow] = length + 1
        band.backlogs.shift(victim.flow, length, length + 1)
    return victims if is_enough else None


def _fits(lease: Lease, band: Band, everything: Capacity, freed: tuple[int, int, int, int]) -> bool:
    """Whether it fits, with so much freed in its own band and in lower bands."""
    own_requests, own_bytes, lower_requests, lower_bytes = freed
    size = lease.request.byte_size
    return band.capacity.fits(
        size, freed_requests=own_requests, freed_bytes=own_bytes
    ) and everything.fits(
        size, freed_requests=own_requests + lower_requests, freed_bytes=own_bytes + lower_bytes
    )


def without_room(lease: Lease, band: Band, everything: Capacity) -> tuple[Scope, ...]:
    """Return the scopes whose limits have no room for a newcomer."""
    accounts = (
        (Scope.FLOW, lease.flow.capacity),
        (Scope.BAND, band.capacity),
        (Scope.ALL, everything),
    )
    size = lease.request.byte_size
    return tuple(scope for scope, account in accounts if not account.fits(size))
