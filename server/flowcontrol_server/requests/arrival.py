"""Pure. How long ago did a request come, by the clock of the Envoy that sent it?

A request that is parked again, because the replica that held it died, keeps its place and its
deadline: Envoy says with `request.time` when it first saw it. The clocks of two machines differ, so
that difference is estimated: what comes straight from Envoy comes within milliseconds, and the
youngest request of some seconds shows how far the clocks are apart.

Nothing comes from the future, nor is older than the longest wait; and no age is believed while the
clocks are too far apart, nor one beyond the longest wait before they have been compared. A clock
that is set makes all requests look old at once, and none of them may expire for that: after ours
was set, which the monotonic clock shows, no age is believed for a window, nor a later one beyond
its end, so that no request overtakes one that came in it; where Envoy's was, none that is far
beyond the longest wait.
"""

from datetime import UTC, datetime
from typing import Final, final

SKEW_NS_MAX: Final = 1_000_000_000
"""Clocks further apart than this are not used; hosts that run NTP differ by milliseconds."""
FRESH_NS: Final = 100_000_000
"""A younger request came straight from Envoy: its order is that in which it reached us. That is
taken off every age: of two requests the one that came first, to Envoy and to us, stays first."""
_WINDOW_NS: Final = 10_000_000_000
"""For how long the youngest request counts, at least."""
_IMPOSSIBLE_NS: Final = 600_000_000_000
"""Beyond the longest wait: Envoy waits no longer for a decision, but for one that was suspended."""
_FAR_NS: Final = 1 << 62
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@final
class ArrivalClock:
    """Ages of requests by Envoy's clock. O(1).

    Args:
        longest_ns: the longest age that is believed.
    """

    def __init__(self, longest_ns: int = 3_600_000_000_000) -> None:
        self.longest_ns = longest_ns
        self._youngest_ns = _FAR_NS
        """Of the requests of this window."""
        self._before_ns: int | None = None
        """Of the window before, however long ago; None: there was none."""
        self._until_ns: int | None = None
        self._offset_ns: int | None = None
        """Of our clock to the monotonic one."""
        self._believed_from_ns = -_FAR_NS
        """No request is older: the end of the window in which our clock was last set."""

    @property
    def skew_ns(self) -> int:
        """How far our clock is ahead of Envoy's, as far as is known.

        While there is only one window, requests may all be old: only what would lie in the future
        says something.
        """
        if self._before_ns is None:
            return min(0, self._youngest_ns)
        return min(self._before_ns, self._youngest_ns)

    def age_ns(self, began: str, wall_ns: int, now_ns: int) -> int:
        """Return how long ago a request came, beyond `FRESH_NS`; 0 where that is unknown.

        Args:
            began: Envoy's `request.time`, RFC 3339; what is none says nothing.
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
        self._heed_setting(wall_ns - now_ns, now_ns)
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

    def _heed_setting(self, offset_ns: int, now_ns: int) -> None:
        """Forget what was compared with a clock that has been set since."""
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
