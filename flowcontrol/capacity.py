"""Pure. How much waits, held against how much may."""

from typing import final

from flowcontrol.config import Limits


@final
class Capacity:
    """The account of one scope: a band, or all of them. An exact fit is accepted."""

    __slots__ = ("bytes", "limits", "requests")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.bytes = 0

    def fits(self, byte_size: int, *, freed_requests: int = 0, freed_bytes: int = 0) -> bool:
        """Whether one more request of this size may wait, were that much freed first."""
        limits = self.limits
        requests = self.requests - freed_requests + 1
        size = self.bytes - freed_bytes + byte_size
        return (limits.requests_max is None or requests <= limits.requests_max) and (
            limits.bytes_max is None or size <= limits.bytes_max
        )

    def take(self, byte_size: int) -> None:
        """Count a request that waits from now on."""
        self.requests += 1
        self.bytes += byte_size

    def give_back(self, byte_size: int) -> None:
        """Count a request that waits no longer."""
        assert self.requests > 0, "nothing to give back"
        self.requests -= 1
        self.bytes -= byte_size
