"""Pure. Requests that are over, but of which nobody has said yet what they took.

The access log speaks after the fact, in batches, and may be lost. So what was charged for a request
is kept until its settlement comes, but only once any settlement has ever come (without an access
log nothing is kept), and only for so many.
"""

from collections import OrderedDict
from typing import final

from flowcontrol.flow import Lease

UNSETTLED_MAX = 65_536
"""Requests waited for: minutes of traffic, where the access log is seconds behind."""


@final
class Unsettled:
    """Leases of ended requests by request id, in the order they ended. O(1)."""

    def __init__(self) -> None:
        self.lost = 0
        """Ended requests whose settlement never came, since the first that did."""
        self.seen = 0
        """Settlements that came."""
        self._leases: OrderedDict[int, Lease] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def keep(self, lease: Lease) -> None:
        """Remember a request that has ended."""
        if not self.seen:
            return
        self._leases[lease.request.request_id] = lease
        if len(self._leases) > UNSETTLED_MAX:
            self._leases.popitem(last=False)
            self.lost += 1

    def take(self, request_id: int) -> Lease | None:
        """Return what was remembered of a request that is now settled, None if nothing was."""
        self.seen += 1
        return self._leases.pop(request_id, None)
