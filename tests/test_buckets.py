"""Buckets against a plain dict, and the order of ties."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.buckets import Buckets

steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "increment", "decrement"]),
        st.sampled_from("abcdef"),
        st.integers(0, 4),
    ),
    max_size=60,
)


@pytest.fixture(name="buckets")
def _buckets() -> Buckets[str]:
    """Return a at 2, b at 1 and c at 2."""
    buckets: Buckets[str] = Buckets()
    for key, count in (("a", 2), ("b", 1), ("c", 2)):
        buckets.add(key, count)
    return buckets


class TestBuckets:
    """Counts by key, the most at hand."""

    @pytest.mark.slow
    @given(steps=steps)
    @settings(max_examples=150)
    def test_agrees_with_a_dict(self, steps: list[tuple[str, str, int]]) -> None:
        """Whatever is added, moved and removed, counts and the most are those of a dict."""
        buckets: Buckets[str] = Buckets()
        oracle: dict[str, int] = {}
        for step, key, count in steps:
            if step == "add" and key not in oracle:
                buckets.add(key, count)
                oracle[key] = count
            elif step == "remove" and key in oracle:
                assert buckets.remove(key) == oracle.pop(key)
            elif step == "increment" and key in oracle:
                buckets.increment(key)
                oracle[key] += 1
            elif step == "decrement" and oracle.get(key, 0) > 0:
                buckets.decrement(key)
                oracle[key] -= 1

            assert {each: buckets.count(each) for each in buckets} == oracle
            assert len(buckets) == len(oracle)
            if oracle:
                assert oracle[buckets.most()] == max(oracle.values())

    def test_ties_go_to_whoever_was_there_first(self, buckets: Buckets[str]) -> None:
        """Of keys with the same count, the one that reached it first."""
        assert buckets.most() == "a"

        buckets.increment("a")
        buckets.decrement("a")

        assert buckets.most() == "c"

        buckets.increment("b")

        assert buckets.most() == "c"

    def test_emptied_buckets_begin_anew(self, buckets: Buckets[str]) -> None:
        """After the last key has gone, nothing remembers it."""
        for key in list(buckets):
            buckets.remove(key)
        buckets.add("z", 7)

        assert buckets.most() == "z"
        assert buckets.count("z") == 7

    def test_removing_the_most_finds_the_next(self) -> None:
        """The top moves over gaps of any width."""
        buckets: Buckets[str] = Buckets()
        for key, count in (("low", 1), ("middle", 50), ("high", 100)):
            buckets.add(key, count)
        buckets.remove("high")

        assert buckets.most() == "middle"

    def test_membership_is_by_key(self, buckets: Buckets[str]) -> None:
        """A key is in from `add` to `remove`."""
        assert "a" in buckets

        buckets.remove("a")

        assert "a" not in buckets
        assert Counter(list(buckets)) == Counter("bc")

    def test_unknown_key_is_an_error(self, buckets: Buckets[str]) -> None:
        """Nothing can be asked or done about a key that is not here."""
        with pytest.raises(KeyError):
            buckets.count("z")
        with pytest.raises(KeyError):
            buckets.remove("z")
        with pytest.raises(KeyError):
            buckets.increment("z")
        with pytest.raises(KeyError):
            buckets.decrement("z")

    def test_misuse_is_an_error(self, buckets: Buckets[str]) -> None:
        """No key twice, no count below zero."""
        with pytest.raises(AssertionError, match="'a' is here already"):
            buckets.add("a")
        with pytest.raises(AssertionError, match="count must be >= 0, got -1"):
            buckets.add("z", -1)
        buckets.add("zero")
        with pytest.raises(AssertionError, match="'zero' is at 0 already"):
            buckets.decrement("zero")
