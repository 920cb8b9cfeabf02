"""Pure. The age of a request, by the clock of the Envoy that sent it.

A request that is parked again, because the replica that held it died, keeps its place and its
deadline: Envoy reports in `request.time` when it first saw the request. The clocks of two machines
differ, so the difference is estimated. A request that comes straight from Envoy takes milliseconds,
so the youngest request of some seconds shows how far the clocks are apart.

An age is never below 0 or above the longest wait. It counts as 0 while the clocks are too far
apart, and if it exceeds the longest wait before the clocks have been compared.

A clock that is set makes all requests look old at once, and none of them may expire because of it.
After our clock was set, which the monotonic clock shows, every age is 0 for one window. Later ages
reach back to the end of that window at most, so no request overtakes one that came in the window.
After Envoy's clock was set, an age far beyond the longest wait counts as 0.
"""

from datetime import UTC, datetime
from typing import Final, final

SKEW_NS_MAX: Final = 1_000_000_000
"""Clocks further apart than this are not used; hosts that run NTP differ by milliseconds."""
FRESH_NS: Final = 100_000_000
"""A younger request came straight from Envoy and keeps the order of its arrival here. This much is
subtracted from every age, so a request that came first to Envoy and first here stays first."""
_WINDOW_NS: Final = 10_000_000_000
"""The youngest request counts for at least so long."""
_IMPOSSIBLE_NS: Final = 600_000_000_000
"""An age that exceeds the longest wait by more is ignored: no Envoy waits that long for a decision,
unless it was suspended."""
_FAR_NS: Final = 1 << 62
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@final
class ArrivalClock:
    """Ages of requests by Envoy's clock. O(1).

    Args:
        longest_ns: the greatest age returned.
    """

    def __init__(self, longest_ns: int = 3_600_000_000_000) -> None:
        self.longest_ns = longest_ns
        self._youngest_ns = _FAR_NS
        """Age of the youngest request in this window."""
        self._before_ns: int | None = None
        """The same of the window before, however long ago that was; None: there was none."""
        self._until_ns: int | None = None
        self._offset_ns: int | None = None
        """Our clock minus the monotonic clock."""
        self._believed_from_ns = -_FAR_NS
        """Ages reach back to this at most: the end of the window in which our clock was set."""

    @property
    def skew_ns(self) -> int:
        """Estimate of how far our clock is ahead of Envoy's; below 0: behind it.

        All requests of the first window may be old, so only a negative age counts there: it shows
        that our clock is behind.
        """
        if self._before_ns is None:
            return min(0, self._youngest_ns)
        return min(self._before_ns, self._youngest_ns)

    def age_ns(self, began: str, wall_ns: int, now_ns: int) -> int:
        """Return the age of a request in excess of `FRESH_NS`; 0: none, or unknown.

        Args:
            began: Envoy's `request.time`, RFC 3339; any other text means that it is unknown.
            wall_ns: the time since 1970.
            now_ns: the time, monotonic.
        """
        try:
            since_epoch = datetime.fromisoformat(began) - _EPOCH
        except (ValueError, TypeError):
            return 0
        began_ns = (since_epoch.days * 86_400 + since_epoch.seconds) * 1_000_000_000
        began_ns += since_epoch.microseconds * 1_000
        age_ns = wall_ns - began_ns
        self._forget_if_set(wall_ns - now_ns, now_ns)
        self._observe(age_ns, now_ns)
        skew_ns = self.skew_ns
        if not -SKEW_NS_MAX <= skew_ns <= SKEW_NS_MAX:
            return 0
        age_ns -= skew_ns
        if age_ns > self.longest_ns + _IMPOSSIBLE_NS:
            return 0
        if age_ns > self.longest_ns and self._before_ns is None:
            return 0
        return max(0, min(age_ns - FRESH_NS, self.longest_ns, now_ns - self._believed_from_ns))

    def _forget_if_set(self, offset_ns: int, now_ns: int) -> None:
        """Forget the comparison of the clocks if our clock has been set since."""
        if self._offset_ns is not None and abs(offset_ns - self._offset_ns) > FRESH_NS:
            self._before_ns = self._until_ns = None
            self._youngest_ns = _FAR_NS
            self._believed_from_ns = now_ns + _WINDOW_NS
        self._offset_ns = offset_ns

    def _observe(self, age_ns: int, now_ns: int) -> None:
        if self._until_ns is None:
            self._until_ns = now_ns + _WINDOW_NS
        elif now_ns >= self._until_ns:
            self._before_ns = self._youngest_ns
            self._youngest_ns = _FAR_NS
            self._until_ns = now_ns + _WINDOW_NS
        if age_ns < self._youngest_ns:
            self._youngest_ns = age_ns
