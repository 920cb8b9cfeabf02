"""Pure. Displacement: which queued requests are evicted to admit an arrival?

A limit may be that of the newcomer's flow, of its band, or of everything together. A full flow
displaces nothing: its newcomer is refused. Else what waits in lower bands is displaced, the lowest
band first; and where that is not enough, requests of the newcomer's own band, of flows that have a
longer backlog than its own will be. So a flow that fills a band pays for the others, and two flows
never displace each other in turns. In every band the flow with the longest backlog loses its newest
request. Nothing is displaced unless the newcomer then fits.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import Scope

DISPLACED_MAX: Final = 16
"""Requests of its own band that one newcomer can displace: bounds what its size can cost."""


def displaced_for(
    lease: Lease, band: Band, bands: Iterable[Band], everything: Capacity
) -> Iterator[Lease] | None:
    """Return what is displaced to admit a newcomer; None when it has no claim to a place.

    O(bands + log flows) for each; of its own band at most `DISPLACED_MAX`.

    Args:
        lease: the newcomer.
        band: its band.
        bands: all of them, the highest first.
        everything: the account over all bands.

    Returns:
        Requests one by one: each must be out of the queue before the next is asked for.
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
    """Return what must go in the newcomer's own band, were all that waits in lower ones gone."""
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
    for victim in victims:  # none of them has gone yet
        length = lengths[victim.flow]
        lengths[victim.flow] = length + 1
        band.backlogs.shift(victim.flow, length, length + 1)
    return victims if is_enough else None


def _fits(lease: Lease, band: Band, everything: Capacity, freed: tuple[int, int, int, int]) -> bool:
    """Whether it fits, with so many requests and bytes gone from its own band and from lower."""
    own_requests, own_bytes, lower_requests, lower_bytes = freed
    size = lease.request.byte_size
    return band.capacity.fits(
        size, freed_requests=own_requests, freed_bytes=own_bytes
    ) and everything.fits(
        size, freed_requests=own_requests + lower_requests, freed_bytes=own_bytes + lower_bytes
    )


def without_room(lease: Lease, band: Band, everything: Capacity) -> tuple[Scope, ...]:
    """Return whose limits have no room for a newcomer."""
    accounts = (
        (Scope.FLOW, lease.flow.capacity),
        (Scope.BAND, band.capacity),
        (Scope.ALL, everything),
    )
    size = lease.request.byte_size
    return tuple(scope for scope, account in accounts if not account.fits(size))
