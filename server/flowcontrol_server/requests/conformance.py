"""Pure. What the Gateway API Inference Extension's conformance tests need of an endpoint picker.

They choose the endpoint of each request by a header, and want to see in the response which one
served it. No client may do so in service: all of it is behind `requests.conformance`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, final

SELECTION_HEADER: Final = "test-epp-endpoint-selection"
"""Endpoints a request may go to: `ip` or `ip:port`, separated by commas."""
SERVED_HEADER: Final = "x-conformance-test-served-endpoint"
"""Of the response: the endpoint that served it, as the gateway says."""


@final
class Conformance:
    """Reads the header by which a test chooses.

    Args:
        endpoints: returns the addresses of the pool, as they are now.
    """

    def __init__(self, endpoints: Callable[[], Iterable[str]]) -> None:
        self._endpoints = endpoints

    def subset(self, headers: Mapping[str, str]) -> tuple[str, ...] | None:
        """Return the endpoints of the pool that a request names; None if it names none."""
        selection = headers.get(SELECTION_HEADER)
        if selection is None:
            return None
        named = {each.strip() for each in selection.split(",")}
        return tuple(
            sorted(a for a in self._endpoints() if a in named or a.rpartition(":")[0] in named)
        )
