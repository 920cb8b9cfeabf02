"""How full the pool is, and where there is room."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.config import Picker
from flowcontrol.saturation import FULL, ConcurrencyDetector

steps = st.lists(
    st.one_of(
        st.just("charge"),
        st.integers(0, 20).map(lambda index: ("release", index)),
        st.sets(st.sampled_from(["a", "b", "c"])).map(lambda names: ("pool", *sorted(names))),
    ),
    max_size=60,
)


class TestPoolAsAWhole:
    """Where Envoy picks the endpoint."""

    @pytest.fixture(name="detector")
    def _detector(self) -> ConcurrencyDetector:
        """Return a detector of two endpoints of three slots."""
        detector = ConcurrencyDetector(3, Picker.OFF)
        detector.set_endpoints(("a", "b"))
        return detector

    def test_saturation_is_in_flight_over_slots(self, detector: ConcurrencyDetector) -> None:
        """From 0 to 1 in sixths; 1.0 is full."""
        saturations = [detector.saturation()]
        for _ in range(6):
            detector.charge()
            saturations.append(detector.saturation())

        assert saturations == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, FULL]

    def test_no_endpoint_is_named(self, detector: ConcurrencyDetector) -> None:
        """Neither to the request nor in the counts."""
        assert detector.charge() is None
        assert detector.in_flight() == {"a": None, "b": None}

    def test_release_gives_the_slot_back(self, detector: ConcurrencyDetector) -> None:
        """One charge and one release are nothing."""
        detector.charge()
        detector.release(None)

        assert detector.saturation() == 0

    def test_shrinking_pool_is_more_than_full(self, detector: ConcurrencyDetector) -> None:
        """What is in flight stays in flight, wherever it is."""
        for _ in range(6):
            detector.charge()
        detector.set_endpoints(("a",))

        assert detector.saturation() == 2.0

    @pytest.mark.parametrize("charges", [0, 1, 6])
    def test_empty_pool_is_full(self, detector: ConcurrencyDetector, charges: int) -> None:
        """No endpoint, no room, whatever is in flight."""
        for _ in range(charges):
            detector.charge()
        detector.set_endpoints(())

        assert detector.is_empty
        assert detector.saturation() == FULL

    def test_pool_that_comes_back_has_room(self, detector: ConcurrencyDetector) -> None:
        """An absence leaves nothing behind."""
        detector.set_endpoints(())
        detector.set_endpoints(("c",))

        assert not detector.is_empty
        assert detector.saturation() == 0

    def test_double_release_is_an_error(self, detector: ConcurrencyDetector) -> None:
        """A slot is given back once."""
        detector.charge()
        detector.release(None)

        with pytest.raises(AssertionError, match="released more than was charged"):
            detector.release(None)


class TestLeastLoaded:
    """Where the engine picks the endpoint."""

    @pytest.fixture(name="detector")
    def _detector(self) -> ConcurrencyDetector:
        """Return a detector of two endpoints of three slots."""
        detector = ConcurrencyDetector(3, Picker.LEAST_LOADED)
        detector.set_endpoints(("a", "b"))
        return detector

    def test_equals_take_turns(self, detector: ConcurrencyDetector) -> None:
        """An even pool is filled evenly."""
        picked = [detector.charge() for _ in range(6)]

        assert picked == ["a", "b", "a", "b", "a", "b"]
        assert detector.saturation() == FULL

    def test_room_is_used_where_it_is(self, detector: ConcurrencyDetector) -> None:
        """Whoever finished more is sent more."""
        for _ in range(6):
            detector.charge()
        detector.release("b")
        detector.release("b")

        assert [detector.charge(), detector.charge()] == ["b", "b"]

    def test_newcomer_is_filled_first(self, detector: ConcurrencyDetector) -> None:
        """An endpoint that joins has the fewest in flight."""
        for _ in range(4):
            detector.charge()
        detector.set_endpoints(("a", "b", "c"))

        assert [detector.charge() for _ in range(3)] == ["c", "c", "a"]

    def test_departed_requests_do_not_count(self, detector: ConcurrencyDetector) -> None:
        """They are at an endpoint whose slots do not count either."""
        for _ in range(6):
            detector.charge()
        detector.set_endpoints(("a",))

        assert detector.saturation() == FULL

        detector.release("b")

        assert detector.saturation() == FULL

        detector.release("a")

        assert detector.saturation() == pytest.approx(2 / 3)

    def test_count_survives_an_absence(self, detector: ConcurrencyDetector) -> None:
        """Two in flight, one ended meanwhile: the endpoint is back with one."""
        for _ in range(4):
            detector.charge()
        detector.set_endpoints(("a",))
        detector.release("b")
        detector.set_endpoints(("a", "b"))

        assert detector.in_flight() == {"a": 2, "b": 1}
        assert detector.saturation() == pytest.approx(3 / 6)

    def test_ended_absence_leaves_nothing(self, detector: ConcurrencyDetector) -> None:
        """When the last request at a departed endpoint ends, it is forgotten."""
        detector.charge()
        detector.charge()
        detector.set_endpoints(())
        detector.release("b")
        detector.set_endpoints(("b", "a"))

        assert detector.in_flight() == {"b": 0, "a": 1}

    def test_endpoint_named_twice_is_one(self, detector: ConcurrencyDetector) -> None:
        """Its slots are counted once."""
        detector.set_endpoints(("a", "a", "b", "a"))

        assert list(detector.in_flight()) == ["a", "b"]

    @pytest.mark.slow
    @given(steps=steps, in_flight_max=st.integers(1, 3))
    @settings(max_examples=150)
    def test_agrees_with_counting(
        self, steps: list[str | tuple[str, ...]], in_flight_max: int
    ) -> None:
        """Whatever pool comes and goes: the counts are true and no endpoint is overfull."""
        detector = ConcurrencyDetector(in_flight_max, Picker.LEAST_LOADED)
        pool: tuple[str, ...] = ()
        running: list[str] = []
        for step in steps:
            if step == "charge":
                if detector.saturation() < FULL:
                    address = detector.charge()
                    assert address in pool
                    running.append(str(address))
            elif step[0] == "pool":
                pool = tuple(map(str, step[1:]))
                detector.set_endpoints(pool)
            elif running:
                detector.release(running.pop(int(step[1]) % len(running)))

            loads = Counter(running)
            assert detector.in_flight() == {address: loads[address] for address in pool}
            assert all(load <= in_flight_max for load in loads.values())
            slots = len(pool) * in_flight_max
            used = sum(loads[address] for address in pool)
            assert detector.saturation() == (used / slots if slots else FULL)
