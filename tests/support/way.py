"""Counts the cost of one request: our objects, turns of the loop, hand-overs between threads."""

import asyncio
import selectors
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

OURS = ("flowcontrol.", "flowcontrol_server.")
_NAMED_TUPLE = "namedtuple_"


@final
class Made:
    """Created objects of our classes, and futures that we create, by name, in every thread."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        if event == "c_call":
            if getattr(argument, "__name__", "") == "create_future" and module.startswith(OURS):
                self.counts["Future"] += 1
        elif event == "call":
            code = frame.f_code
            if code.co_name == "create_future":
                caller = frame.f_back
                is_ours = caller is not None and caller.f_globals["__name__"].startswith(OURS)
                self.counts["Future"] += is_ours
            elif code.co_name == "__init__" and isinstance(frame.f_back, FrameType):
                self._made(frame)
            elif module.startswith(_NAMED_TUPLE):
                self.counts[module.removeprefix(_NAMED_TUPLE)] += 1

    def _made(self, frame: FrameType) -> None:
        made = type(frame.f_locals.get("self"))
        caller = frame.f_back
        is_base_call = (
            caller is not None
            and caller.f_code.co_name == "__init__"
            and caller.f_locals.get("self") is frame.f_locals.get("self")
        )
        if made.__module__.startswith(OURS) and not is_base_call:
            self.counts[made.__name__] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count in this thread, and in threads that start meanwhile."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


@final
class CountingSelector(selectors.DefaultSelector):
    """Counts the polls of the loop, one a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Count, and poll."""
        self.turns += 1
        found: list[Any] = super().select(timeout)
        return found


@final
class Pipe(asyncio.Transport):
    """A transport that keeps its output, and calls back at each write."""

    def __init__(self, written: Callable[[bytes], None]) -> None:
        super().__init__()
        self._written = written

    def write(self, data: Any) -> None:
        """Keep output."""
        self._written(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: there is no buffer."""

    def get_write_buffer_size(self) -> int:
        """Return 0: there is no buffer."""
        return 0

    def is_closing(self) -> bool:
        """Return False: it never closes."""
        return False

    def pause_reading(self) -> None:
        """Do nothing: data that still arrives is read later."""

    def resume_reading(self) -> None:
        """Do nothing: no data was held back."""

    def abort(self) -> None:
        """Do nothing."""
