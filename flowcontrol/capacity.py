"""Pure. What waits, against the limits on it."""

from typing import final

from flowcontrol.config import Limits


@final
class Capacity:
    """The account of one scope: a flow, a band, or all bands. An exact fit is accepted.

    A waiting request is counted in its flow, in its band, and among all.

    Args:
        limits: of this scope.
        around: the scope that contains it; None: the outermost.
    """

    __slots__ = ("around", "bytes", "limits", "requests")

    def __init__(self, limits: Limits, around: "Capacity | None" = None) -> None:
        self.limits = limits
        self.around = around
        self.requests = 0
        self.bytes = 0

    def fits(self, byte_size: int, *, freed_requests: int = 0, freed_bytes: int = 0) -> bool:
        """Whether one more request of this size fits here, if that much were freed first."""
        limits = self.limits
        requests = self.requests - freed_requests + 1
        size = self.bytes - freed_bytes + byte_size
        return (limits.requests_max is None or requests <= limits.requests_max) and (
            limits.bytes_max is None or size <= limits.bytes_max
        )

    def has_room(self, byte_size: int) -> bool:
        """Whether it fits here and in every scope around."""
        scope: Capacity | None = self
        while scope is not None:
            limits = scope.limits
            if limits.requests_max is not None and scope.requests >= limits.requests_max:
                return False
            if limits.bytes_max is not None and scope.bytes + byte_size > limits.bytes_max:
                return False
            scope = scope.around
        return True

    def take(self, byte_size: int) -> None:
        """Count a request that waits from now on, here and around."""
        scope: Capacity | None = self
        while scope is not None:
            scope.requests += 1
            scope.bytes += byte_size
            scope = scope.around

    def give_back(self, byte_size: int) -> None:
        """Count a request that waits no longer, here and around."""
        assert self.requests > 0, "nothing to give back"
        scope: Capacity | None = self
        while scope is not None:
            scope.requests -= 1
            scope.bytes -= byte_size
            scope = scope.around
