"""Pure. Support for the conformance tests of the Gateway API Inference Extension.

The tests choose the endpoint of each request with a header, and expect the response to name the
endpoint that served it. In production no client may do so: all of it needs `requests.conformance`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, final

SELECTION_HEADER: Final = "test-epp-endpoint-selection"
"""Endpoints a request may go to: `ip` or `ip:port`, separated by commas."""
SERVED_HEADER: Final = "x-conformance-test-served-endpoint"
"""Header of the response: the endpoint that served it, as the gateway reports it."""


@final
class Conformance:
    """Reads the header with which a test chooses endpoints.

    Args:
        endpoints: returns the current addresses of the pool.
    """

    def __init__(self, endpoints: Callable[[], Iterable[str]]) -> None:
        self._endpoints = endpoints

    def subset(self, headers: Mapping[str, str]) -> tuple[str, ...] | None:
        """Return the endpoints of the pool that a request names; None: it has no such header."""
        selection = headers.get(SELECTION_HEADER)
        if selection is None:
            return None
        named = {each.strip() for each in selection.split(",")}
        return tuple(
            sorted(a for a in self._endpoints() if a in named or a.rpartition(":")[0] in named)
        )
