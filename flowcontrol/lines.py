"""Pure. Sorted items in one line for each subset of endpoints.

A request with a subset may go to some endpoints only. While none of these has room, all requests
with that subset are passed over, at the cost of one check. So a request that cannot go costs the
others nothing, keeps its place, and is found as soon as there is room. Subsets come from the
gateway and are few; requests are many.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from flowcontrol.keyedheap import KeyedHeap

Subset = tuple[str, ...]
"""The endpoints that a request may go to."""
HasRoom = Callable[[Subset], bool]
"""Whether any of these endpoints has room."""
Item = TypeVar("Item")
Key = TypeVar("Key", int, float, tuple[int, int])


class Lines(Generic[Item, Key]):
    """Items by key: a line for those that may go anywhere, and one for each subset.

    `put` and `discard` are O(log items) amortised, `first` is O(subsets).
    """

    def __init__(self) -> None:
        self.anywhere: KeyedHeap[Item, Key] = KeyedHeap()
        """Items without a subset; read-only."""
        self.bound: dict[Subset, KeyedHeap[Item, Key]] = {}
        """The other items, by subset; no line is empty. Read-only."""
        self._subsets: dict[Item, Subset] = {}
        """The subset of each of these."""

    def __bool__(self) -> bool:
        return len(self.anywhere) > 0 or len(self.bound) > 0

    def __iter__(self) -> Iterator[Item]:
        yield from self.anywhere
        yield from self._subsets

    def put(self, item: Item, key: Key, subset: Subset | None) -> None:
        """Add an item, or move it to another key, another line, or both."""
        if self._subsets and self.subset_of(item) != subset:
            self._unbind(item)
        if subset is None:
            self.anywhere.put(item, key)
            return
        self.anywhere.discard(item)
        self._subsets[item] = subset
        line = self.bound.get(subset)
        if line is None:
            line = self.bound[subset] = KeyedHeap()
        line.put(item, key)

    def discard(self, item: Item) -> None:
        """Remove an item if it is here."""
        if self._subsets:
            self._unbind(item)
        self.anywhere.discard(item)

    def subset_of(self, item: Item) -> Subset | None:
        """Return the subset of an item; None: it may go anywhere."""
        return self._subsets.get(item)

    def firsts(self) -> Iterator[tuple[Subset, Key, Item]]:
        """Iterate the lines of subsets: subset, smallest key, and its item."""
        for subset, line in self.bound.items():
            first = line.first()
            assert first is not None, "no line is empty"
            yield subset, first[0], first[1]

    def first(self, has_room: HasRoom) -> tuple[Key, Item] | None:
        """Return the smallest key with its item, of those that have room; None: none has.

        An item without a subset is taken to have room. Among equal keys it comes last, because it
        has more choice.
        """
        best: tuple[Key, Item] | None = None
        if self.bound:
            for subset, key, item in self.firsts():
                if (best is None or key < best[0]) and has_room(subset):
                    best = key, item
        free = self.anywhere.first()
        return free if best is None or (free is not None and free[0] < best[0]) else best

    def tied_before(self, item: Item) -> list[Item]:
        """Return the items of its line with the same key that come before it; O(items)."""
        subset = self.subset_of(item)
        line = self.anywhere if subset is None else self.bound[subset]
        return line.tied_before(item)

    def _unbind(self, item: Item) -> None:
        subset = self._subsets.pop(item, None)
        if subset is None:
            return
        line = self.bound[subset]
        line.discard(item)
        if not len(line):
            del self.bound[subset]
