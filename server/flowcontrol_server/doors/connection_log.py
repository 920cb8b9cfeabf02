"""Warnings about connections, at a bounded rate: clients can cause any number of them."""

from typing import Any, final

import structlog

_log = structlog.get_logger()


@final
class ConnectionLog:
    """Logs the first warning of each kind at once, and counts those that follow.

    The owner calls `flush` at intervals; a kind has at most one line between two calls.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, dict[str, Any]]] = {}
        """By event: number of warnings since its last line, and fields of the latest warning."""

    def report(self, event: str, **fields: Any) -> None:
        """Log a warning, or count it."""
        if event in self._held:
            self._held[event] = (self._held[event][0] + 1, fields)
        else:
            self._held[event] = (0, fields)
            _log.warning(event, **fields)

    def flush(self) -> None:
        """Log the latest counted warning of each kind, with their number."""
        held, self._held = self._held, {}
        for event, (count, fields) in held.items():
            if count:
                _log.warning(event, count=count, **fields)
                self._held[event] = (0, fields)
