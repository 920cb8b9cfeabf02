"""Pure. What requests are charged by estimate, and what they really took once that is known.

The access log speaks after the fact, in batches, and may be lost. So what was charged for a request
that has ended is kept until its settlement comes, but only once any settlement has ever come
(without an access log nothing is kept), and only for so many. How many never came is counted where
the log is read, by the time that has passed.
"""

from collections import OrderedDict
from typing import Final, final

from flowcontrol.config import TokenPrices
from flowcontrol.estimates import TokenEstimator, Tokens, cost
from flowcontrol.events import Settled
from flowcontrol.flow import Lease
from flowcontrol.request import Request

UNSETTLED_MAX: Final = 65_536
"""Requests waited for: minutes of traffic, where the access log is seconds behind."""


@final
class Charges:
    """Estimates what arrives and corrects it later. O(1)."""

    def __init__(self, prices: TokenPrices) -> None:
        self.prices = prices
        self.seen = 0
        """Settlements that came."""
        self.estimator = TokenEstimator()
        self._ended: OrderedDict[int, Lease] = OrderedDict()
        """Leases of ended requests that are not settled, by request id, in the order they ended."""

    @property
    def unsettled(self) -> int:
        """Ended requests that are kept until their settlement comes."""
        return len(self._ended)

    def estimate(self, request: Request) -> tuple[Tokens, float]:
        """Return what a request will take, as far as is known now, and what that costs."""
        tokens = self.estimator.estimate(request)
        return tokens, cost(tokens, self.prices)

    def ended(self, lease: Lease) -> None:
        """Notice that a request that was in flight is over."""
        if not self.seen or lease.is_settled:
            return
        self._ended[lease.request.request_id] = lease
        if len(self._ended) > UNSETTLED_MAX:
            self._ended.popitem(last=False)

    def lost(self, request_id: int) -> None:
        """Forget a request that has ended: its settlement will not come."""
        self._ended.pop(request_id, None)

    def settle(self, settled: Settled, live: Lease | None) -> tuple[Lease, float] | None:
        """Take in what a request really took.

        Args:
            settled: the news.
            live: the request, if it has not ended.

        Returns:
            The request and by how much more it cost than it was charged; None when there is nothing
            to correct: it was never dispatched, is settled already, or forgotten.
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
