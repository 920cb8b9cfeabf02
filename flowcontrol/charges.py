"""Pure. Requests are charged by estimate, and corrected once their actual usage is known.

The access log reports after the fact, in batches, and reports may be lost. So the charge of an
ended request is kept until its settlement comes. It is kept only after the first settlement ever
(without an access log nothing is kept), and only for a bounded number. Settlements that never come
are counted where the log is read, by time.

Requests that ended before the first settlement are kept, too, a few of them, but only to count
their results. To correct them as well was tried: estimates are at their worst in the first second,
and a flow whose charges are then taken back goes before all that arrived at the level which these
charges had raised (`weighted_tokens`), for as much as was taken back.
"""

from collections import OrderedDict
from typing import Final, final

from flowcontrol.config import TokenPrices
from flowcontrol.estimates import TokenEstimator, Tokens, cost
from flowcontrol.events import Settled
from flowcontrol.flow import Lease
from flowcontrol.request import Request

UNSETTLED_MAX: Final = 65_536
"""Ended requests kept: minutes of traffic, while the access log is seconds behind."""
EARLY_MAX: Final = 1_000
"""Requests kept that ended before the first settlement, which comes a second after the first."""


@final
class Charges:
    """Estimates the usage of arrivals and corrects it later. O(1)."""

    def __init__(self, prices: TokenPrices) -> None:
        self.prices = prices
        self.seen = 0
        """Settlements received."""
        self.estimator = TokenEstimator()
        self._ended: OrderedDict[int, Lease] = OrderedDict()
        """Leases of ended requests that are not settled, by request id, in the order they ended."""
        self._early: OrderedDict[int, Lease] = OrderedDict()
        """The same of requests that ended before the first settlement."""

    @property
    def unsettled(self) -> int:
        """Ended requests kept until their settlement comes."""
        return len(self._ended) + len(self._early)

    def estimate(self, request: Request) -> tuple[Tokens, float]:
        """Return the expected tokens of a request, and their cost."""
        tokens = self.estimator.estimate(request)
        return tokens, cost(tokens, self.prices)

    def ended(self, lease: Lease) -> None:
        """Note that a request in flight has ended."""
        if lease.is_settled:
            return
        kept, most = (self._ended, UNSETTLED_MAX) if self.seen else (self._early, EARLY_MAX)
        kept[lease.request.request_id] = lease
        if len(kept) > most:
            kept.popitem(last=False)

    def lost(self, request_id: int) -> None:
        """Forget an ended request: its settlement will not come."""
        self._ended.pop(request_id, None)
        self._early.pop(request_id, None)

    def early(self, request_id: int) -> Lease | None:
        """Return a request that ended before the first settlement, once: to count its result."""
        return self._early.pop(request_id, None)

    def settle(self, settled: Settled, live: Lease | None) -> tuple[Lease, float] | None:
        """Take in the actual usage of a request.

        Args:
            settled: its settlement.
            live: the request, if it has not ended.

        Returns:
            The request, and its true cost minus the charge. None: there is nothing to correct,
            because it was never dispatched, is settled already, or was forgotten.
        """
        self.seen += 1
        ended = self._ended.pop(settled.request_id, None)
        lease = live or ended
        if lease is None or not lease.is_in_flight or lease.is_settled:
            return None
        lease.is_settled = True
        guess = lease.tokens
        true = Tokens(
            guess.input if settled.input_tokens is None else settled.input_tokens,
            (guess.output if settled.is_success else 0.0)
            if settled.output_tokens is None
            else settled.output_tokens,
            settled.cached_tokens or 0,
        )
        self.estimator.learn(lease.request, settled)
        return lease, cost(true, self.prices) - lease.cost
