"""Lines: a sorted list, of which those without room are left out."""

from typing import final

from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.lines import Lines, Subset

A, B = "10.0.0.1:80", "10.0.0.2:80"
SUBSETS: tuple[Subset | None, ...] = (None, (A,), (B,), (A, B))
PUT = st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 99), st.sampled_from(SUBSETS))
DISCARD = st.tuples(st.just("discard"), st.integers(0, 5), st.just(0), st.none())


@final
class Item:
    """Something to put in."""


def room_at(*addresses: str) -> "Room":
    """Return who says that there is room at these endpoints only."""
    return Room(addresses)


@final
class Room:
    """Says where there is room, and counts how often it is asked."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.asked = 0

    def __call__(self, subset: Subset) -> bool:
        """Answer, and count."""
        self.asked += 1
        return not set(subset).isdisjoint(self.addresses)


class TestLines:
    """By key, apart by subset."""

    @given(steps=st.lists(st.one_of(PUT, PUT, DISCARD), max_size=40))
    @settings(max_examples=150)
    def test_agrees_with_sorting(self, steps: list[tuple[str, int, int, Subset | None]]) -> None:
        """Wherever there is room, the first is the first of a sorted list of those who have any."""
        items = [Item() for _ in range(6)]
        lines: Lines[Item, int] = Lines()
        naive: dict[Item, tuple[int, Subset | None]] = {}
        for number, (what, index, key, subset) in enumerate(steps):
            item = items[index]
            if what == "put":
                unique = key * 100 + number
                lines.put(item, unique, subset)
                naive[item] = unique, subset
            else:
                lines.discard(item)
                naive.pop(item, None)

            assert set(lines) == set(naive)
            assert bool(lines) == bool(naive)
            assert all(len(line) for line in lines.bound.values()), "no line is empty"
            for room in (room_at(), room_at(A), room_at(B), room_at(A, B)):
                could = [
                    (key, item)
                    for item, (key, of) in naive.items()
                    if of is None or not set(of).isdisjoint(room.addresses)
                ]
                assert lines.first(room) == min(could, key=lambda each: each[0], default=None)

    def test_one_question_for_all_of_a_subset(self) -> None:
        """However many stand in a line, they are passed over at once."""
        lines: Lines[Item, int] = Lines()
        for number in range(1000):
            lines.put(Item(), number, (A,))
        free = Item()
        lines.put(free, 5000, None)
        room = room_at(B)

        assert lines.first(room) == (5000, free)
        assert room.asked == 1

    def test_among_equals_who_has_no_choice_goes_first(self) -> None:
        """Else who may go anywhere would take the only place that the other can have."""
        lines: Lines[Item, int] = Lines()
        free, bound = Item(), Item()
        lines.put(free, 1, None)
        lines.put(bound, 1, (A,))

        assert lines.first(room_at(A)) == (1, bound)
