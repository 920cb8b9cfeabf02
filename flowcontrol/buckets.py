"""Pure. Keys sorted by a small count that moves by one.

Which flow has the longest backlog is asked on the way of a request, and the count moves by exactly
one at a time. So keys are kept in buckets, one per count, and the top follows by one step: when the
top bucket empties because its key went one down, the bucket below now holds that key. Every
operation is O(1) (but for `remove` of a key that was alone at the top). The same idea serves LFU
caches: Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme",
2010. Ordered dictionaries, because the first key of a plain one costs O(keys deleted before it).
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key")


class Buckets(Generic[Key]):
    """Counts by key, the most at hand. Ties go to the key that came there first.

    Owner: whoever owns the engine; not thread-safe.
    """

    __slots__ = ("_buckets", "_counts", "_high")

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}
        self._buckets: dict[int, OrderedDict[Key, None]] = {}
        self._high = 0

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, key: Key) -> bool:
        return key in self._counts

    def __iter__(self) -> Iterator[Key]:
        return iter(self._counts)

    def count(self, key: Key) -> int:
        """Return the key's count; KeyError when it is not here."""
        return self._counts[key]

    def add(self, key: Key, count: int = 0) -> None:
        """Take up a new key."""
        assert key not in self._counts, f"{key!r} is here already"
        assert count >= 0, f"count must be >= 0, got {count}"
        self._put(key, count)
        self._high = max(self._high, count)

    def remove(self, key: Key) -> int:
        """Forget a key and return its count; O(gap) when it was alone at the top."""
        count = self._counts.pop(key)
        self._take(key, count)
        while self._high not in self._buckets and self._high:
            self._high -= 1
        return count

    def increment(self, key: Key) -> None:
        """Move a key one bucket up."""
        count = self._counts[key]
        self._move(key, count, count + 1)
        if count == self._high:
            self._high = count + 1

    def decrement(self, key: Key) -> None:
        """Move a key one bucket down; its count must be at least 1."""
        count = self._counts[key]
        assert count > 0, f"{key!r} is at 0 already"
        self._move(key, count, count - 1)
        if count == self._high and count not in self._buckets:
            self._high = count - 1

    def most(self) -> Key:
        """Return a key of the largest count; there must be one."""
        return next(iter(self._buckets[self._high]))

    def _move(self, key: Key, count: int, to: int) -> None:
        buckets = self._buckets
        if to not in buckets and len(buckets[count]) == 1:
            buckets[to] = buckets.pop(count)  # as it is: it holds nobody else
            self._counts[key] = to
        else:
            self._take(key, count)
            self._put(key, to)

    def _put(self, key: Key, count: int) -> None:
        self._counts[key] = count
        bucket = self._buckets.get(count)
        if bucket is None:
            bucket = self._buckets[count] = OrderedDict()
        bucket[key] = None

    def _take(self, key: Key, count: int) -> None:
        bucket = self._buckets[count]
        del bucket[key]
        if not bucket:
            del self._buckets[count]
