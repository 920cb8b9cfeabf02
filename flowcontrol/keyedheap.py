"""Pure. Items sorted by a key that may change: deadlines of requests, heads of flows."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", int, float, tuple[int, int], tuple[float, int])

_STALE_MIN = 64
"""Below this many stale entries a rebuild is not worth its while."""


class KeyedHeap(Generic[Item, Key]):
    """A binary heap whose items can be moved and removed. Ties go to the item put there first.

    A moved or removed item leaves its old entry behind; such entries are dropped when they surface,
    and all at once when they outnumber the live ones, so the heap never exceeds twice its items
    (plus a constant). `put` and `discard` are O(log items) amortised, `first` is amortised O(1).
    """

    __slots__ = ("_heap", "_put_count", "_puts")

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Item]] = []
        self._puts: dict[Item, int] = {}
        """The number of the latest put of each live item: its one valid entry in the heap."""
        self._put_count = 0

    def __len__(self) -> int:
        return len(self._puts)

    def __contains__(self, item: Item) -> bool:
        return item in self._puts

    def __iter__(self) -> Iterator[Item]:
        return iter(self._puts)

    def put(self, item: Item, key: Key) -> None:
        """Add an item, or move it to another key."""
        self._put_count += 1
        self._puts[item] = self._put_count
        heappush(self._heap, (key, self._put_count, item))
        self._compact()

    def discard(self, item: Item) -> None:
        """Remove an item if it is here."""
        if self._puts.pop(item, None) is not None:
            self._compact()

    def first(self) -> tuple[Key, Item] | None:
        """Return the smallest key and its item, or None when there is none."""
        while self._heap:
            key, put, item = self._heap[0]
            if self._puts.get(item) == put:
                return key, item
            heappop(self._heap)
        return None

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._puts) + _STALE_MIN:
            self._heap = [entry for entry in self._heap if self._puts.get(entry[2]) == entry[1]]
            heapify(self._heap)
