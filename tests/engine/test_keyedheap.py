"""The keyed heap against sorting, and its size."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.keyedheap import KeyedHeap

STALE_MIN = 64
"""Stale entries that a heap of any size may hold."""

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "discard"]),
        st.sampled_from("abcdefgh"),
        st.integers(0, 5),
    ),
    max_size=80,
)


class Item:
    """Something to put into a heap, its references countable."""


class TestKeyedHeap:
    """A heap whose items can be moved and removed."""

    @pytest.mark.slow
    @given(steps=steps)
    @settings(max_examples=150)
    def test_agrees_with_sorting(self, steps: list[tuple[str, str, int]]) -> None:
        """The first is the smallest key; of equal keys, the one put there first."""
        heap: KeyedHeap[str, int] = KeyedHeap()
        oracle: dict[str, int] = {}
        for step, item, key in steps:
            oracle.pop(item, None)
            if step == "put":
                heap.put(item, key)
                oracle[item] = key
            else:
                heap.discard(item)

            in_order = sorted(oracle.items(), key=lambda pair: pair[1])  # stable: by latest put
            expected = (in_order[0][1], in_order[0][0]) if in_order else None
            assert heap.first() == expected
            assert len(heap) == len(oracle)
            assert all((each in heap) == (each in oracle) for each in "abcdefgh")

    def test_empty_heap_has_no_first(self) -> None:
        """Before anything is put, and after all is discarded."""
        heap: KeyedHeap[str, int] = KeyedHeap()

        assert heap.first() is None

        heap.put("a", 1)
        heap.discard("a")

        assert heap.first() is None
        assert len(heap) == 0

    def test_drains_in_order(self) -> None:
        """Taking the first away again and again sorts."""
        heap: KeyedHeap[int, int] = KeyedHeap()
        keys = [(index * 37) % 101 for index in range(101)]
        for key in keys:
            heap.put(key, key)
        drained = []
        while (first := heap.first()) is not None:
            drained.append(first[1])
            heap.discard(first[1])

        assert drained == sorted(keys)

    def test_moved_item_is_where_it_was_put_last(self) -> None:
        """Later and earlier keys alike replace the old one."""
        heap: KeyedHeap[str, int] = KeyedHeap()
        heap.put("a", 5)
        heap.put("b", 6)
        heap.put("a", 7)

        assert heap.first() == (6, "b")

        heap.put("a", 1)

        assert heap.first() == (1, "a")
        assert len(heap) == 2

    def test_discarding_what_is_not_here_is_nothing(self) -> None:
        """A request can be discarded whether or not it had a deadline."""
        heap: KeyedHeap[str, int] = KeyedHeap()
        heap.put("a", 1)
        heap.discard("b")

        assert heap.first() == (1, "a")

    def test_same_item_moved_for_ever_does_not_grow_the_heap(self) -> None:
        """One live item keeps at most twice itself and a constant: what moves leaves no trail."""
        heap: KeyedHeap[Item, int] = KeyedHeap()
        item = Item()
        before = sys.getrefcount(item)
        most = 0
        for key in range(1000):
            heap.put(item, 1000 - key % 7)
            most = max(most, sys.getrefcount(item) - before)

        assert most <= 2 + STALE_MIN + 1  # the heap's entries, and the index of live items

    def test_discarded_items_are_let_go(self) -> None:
        """Of a thousand items that came and went, only a constant number is still referred to."""
        heap: KeyedHeap[Item, int] = KeyedHeap()
        items = [Item() for _ in range(1000)]
        before = sum(map(sys.getrefcount, items))
        for key, item in enumerate(items):
            heap.put(item, key)
        for item in items:
            heap.discard(item)

        assert sum(map(sys.getrefcount, items)) - before <= STALE_MIN
