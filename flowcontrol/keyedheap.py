"""Pure. Items sorted by a key that may change: deadlines of requests, heads of flows."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", int, float, tuple[int, int], tuple[float, int])

_STALE_MIN: Final = 64
"""Below this many stale entries a rebuild is not worth its while."""


class KeyedHeap(Generic[Item, Key]):
    """A binary heap whose items can be moved and removed. Ties go to the item put there first.

    A moved or removed item leaves its old entry behind, unless that is on top: the top is never
    stale. Such entries are dropped when they surface, and all at once when they outnumber the live
    ones, so the heap never exceeds twice its items (plus a constant). `put` and `discard` are
    O(log items) amortised, `first` is O(1).
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
        heap, puts = self._heap, self._puts
        self._put_count += 1
        is_new = item not in puts
        puts[item] = self._put_count
        if is_new:
            heappush(heap, (key, self._put_count, item))
        elif heap[0][2] == item:
            heapreplace(heap, (key, self._put_count, item))
            self._surface()
        else:
            heappush(heap, (key, self._put_count, item))
            self._compact()

    def discard(self, item: Item) -> None:
        """Remove an item if it is here."""
        if self._puts.pop(item, None) is None:
            return
        if self._heap[0][2] == item:
            self._surface()
        else:
            self._compact()

    def copy(self) -> "KeyedHeap[Item, Key]":
        """Return another with the same content; O(items)."""
        other: KeyedHeap[Item, Key] = KeyedHeap()
        other._heap, other._puts = list(self._heap), dict(self._puts)
        other._put_count = self._put_count
        return other

    def first(self) -> tuple[Key, Item] | None:
        """Return the smallest key and its item, or None when there is none."""
        if not self._heap:
            return None
        key, _, item = self._heap[0]
        return key, item

    def tied_before(self, item: Item) -> list[Item]:
        """Return the items with the same key as this one that come before it; O(items)."""
        put = self._puts[item]
        live = [entry for entry in self._heap if self._puts.get(entry[2]) == entry[1]]
        key = next(entry[0] for entry in live if entry[2] == item)
        return [entry[2] for entry in live if entry[0] == key and entry[1] < put]

    def _surface(self) -> None:
        """Drop stale entries from the top."""
        heap, puts = self._heap, self._puts
        while heap and puts.get(heap[0][2]) != heap[0][1]:
            heappop(heap)

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._puts) + _STALE_MIN:
            self._heap = [entry for entry in self._heap if self._puts.get(entry[2]) == entry[1]]
            heapify(self._heap)
