"""Pure. Who must give way so that a newcomer fits?

A limit may be that of the newcomer's flow, of its band, or of everything together. Nobody gives way
for the first: who fills its own flow waits for itself. Else what waits in lower bands goes first,
the lowest band first; then, in the newcomer's own band, whoever fills it, as long as that flow has
a longer backlog than the newcomer's own will be. So a flow that fills a band pays for the others,
and no two ever displace each other in turns. In either, it is the flow with the longest backlog
that pays, and its newest request that goes. Nobody goes in vain.
"""

from collections.abc import Iterator, Sequence

from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.flow import Flow, Lease
from flowcontrol.request import Scope

DISPLACED_MAX = 16
"""Requests of its own band that one newcomer can displace: bounds what its size can cost."""


def equals_to_displace(
    lease: Lease, band: Band, lower: Sequence[Band], everything: Capacity
) -> list[Lease] | None:
    """Return who must go in a newcomer's own band; None when it has no claim to a place.

    O(bands + log flows) for each who must go, at most `DISPLACED_MAX`.

    Args:
        lease: the newcomer.
        band: its band.
        lower: the bands below, all of which waits would go first.
        everything: the account over all bands.
    """
    if not lease.flow.capacity.fits(lease.request.byte_size):
        return None
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
