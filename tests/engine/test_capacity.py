"""How much waits, held against how much may."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.capacity import Capacity
from flowcontrol.config import Limits


class TestCapacity:
    """The account of one scope."""

    @pytest.mark.parametrize(
        ("requests_max", "bytes_max", "size", "expected"),
        [
            (3, None, 1, True),
            (2, None, 1, False),
            (None, 100, 40, True),
            (None, 100, 41, False),
            (3, 100, 40, True),
            (3, 100, 41, False),
            (2, 100, 40, False),
            (None, None, 10**12, True),
        ],
    )
    def test_exact_fit_is_accepted(
        self, requests_max: int | None, bytes_max: int | None, size: int, expected: object
    ) -> None:
        """Beside two requests of 60 bytes together: up to each limit, and not one beyond."""
        capacity = Capacity(Limits(requests_max=requests_max, bytes_max=bytes_max))
        capacity.take(20)
        capacity.take(40)

        assert capacity.fits(size) is expected

    def test_zero_means_none_may_wait(self) -> None:
        """No request, however small."""
        assert not Capacity(Limits(requests_max=0)).fits(0)

    def test_zero_bytes_lets_empty_requests_wait(self) -> None:
        """A limit of bytes says nothing about requests without any."""
        capacity = Capacity(Limits(bytes_max=0))

        assert capacity.fits(0)
        assert not capacity.fits(1)

    def test_unlimited_takes_everything(self) -> None:
        """None is no limit, whatever waits already."""
        capacity = Capacity(Limits())
        for _ in range(1000):
            capacity.take(10**9)

        assert capacity.fits(10**9)
        assert (capacity.requests, capacity.bytes) == (1000, 10**12)

    def test_question_of_what_would_be_freed(self) -> None:
        """Both accounts are asked as if that much had gone, and neither is changed."""
        capacity = Capacity(Limits(requests_max=2, bytes_max=100))
        capacity.take(50)
        capacity.take(50)

        assert not capacity.fits(10)
        assert not capacity.fits(10, freed_requests=1)
        assert not capacity.fits(10, freed_bytes=50)
        assert capacity.fits(10, freed_requests=1, freed_bytes=50)
        assert capacity.fits(50, freed_requests=1, freed_bytes=50)
        assert not capacity.fits(51, freed_requests=1, freed_bytes=50)
        assert (capacity.requests, capacity.bytes) == (2, 100)

    def test_flow_is_counted_in_what_lies_around_it(self) -> None:
        """What waits in one flow leaves the other less room in their band, and all bands less."""
        everything = Capacity(Limits(bytes_max=100))
        band = Capacity(Limits(requests_max=2), everything)
        one, other = (Capacity(Limits(requests_max=3), band) for _ in range(2))
        one.take(60)

        assert [(each.requests, each.bytes) for each in (one, other, band, everything)] == [
            *((1, 60), (0, 0), (1, 60), (1, 60))
        ]
        assert other.fits(50)
        assert (other.has_room(50), other.has_room(40)) == (False, True)

        one.take(10)

        assert (other.fits(0), other.has_room(0)) == (True, False)

        one.give_back(60)

        assert (band.requests, everything.bytes) == (1, 10)
        assert other.has_room(90)

    @pytest.mark.slow
    @given(sizes=st.lists(st.integers(0, 30), max_size=30))
    @settings(max_examples=100)
    def test_whoever_asks_first_never_exceeds_a_limit(self, sizes: list[int]) -> None:
        """Taking only what fits fills up to the limits; giving it back empties the account."""
        capacity = Capacity(Limits(requests_max=7, bytes_max=60))
        taken = []
        for size in sizes:
            if capacity.fits(size):
                capacity.take(size)
                taken.append(size)

        assert capacity.requests == len(taken) <= 7
        assert capacity.bytes == sum(taken) <= 60

        for size in taken:
            capacity.give_back(size)

        assert (capacity.requests, capacity.bytes) == (0, 0)

    def test_nothing_is_given_back_that_was_not_taken(self) -> None:
        """A double release is a bug, not a negative count."""
        with pytest.raises(AssertionError, match="nothing to give back"):
            Capacity(Limits()).give_back(1)
