"""What a request is expected to take, and what is learnt from what it took."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol import estimates
from flowcontrol.config import TokenPrices
from flowcontrol.estimates import LARGE_BYTES, OUTPUT_DEFAULT, TokenEstimator, Tokens, cost
from flowcontrol.events import Settled
from flowcontrol.request import Request


def request(
    flow_id: str = "a",
    model: str = "m",
    byte_size: int = 400,
    input_tokens: int | None = None,
    output_tokens_max: int | None = None,
) -> Request:
    """Return a request."""
    return Request(
        1,
        flow_id,
        byte_size=byte_size,
        input_tokens=input_tokens,
        output_tokens_max=output_tokens_max,
        model=model,
    )


def taught(*lessons: tuple[Request, int | None, int | None]) -> TokenEstimator:
    """Return an estimator that has learnt from requests, given tokens of prompts and answers."""
    estimator = TokenEstimator()
    for each, prompt, answer in lessons:
        estimator.learn(each, Settled(1, input_tokens=prompt, output_tokens=answer))
    return estimator


class TestCost:
    """Tokens as one number."""

    PRICES = TokenPrices(input=1.0, cached_input=0.1, output=2.0)

    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [
            (Tokens(100, 50), 200.0),
            (Tokens(100, 0), 100.0),
            (Tokens(100, 50, cached=80), 128.0),
            (Tokens(100, 0, cached=100), 10.0),
            (Tokens(100, 0, cached=200), 20.0),
            (Tokens(0, 0), 1.0),
            (Tokens(0.5, 0), 1.0),
        ],
    )
    def test_is_priced(self, tokens: Tokens, expected: float) -> None:
        """Fresh, cached and answered tokens each have their price; nothing is free."""
        assert cost(tokens, self.PRICES) == pytest.approx(expected)


class TestEstimate:
    """A guess at arrival."""

    def test_knows_nothing_at_first(self) -> None:
        """A token for four bytes, and an answer of middling length."""
        assert TokenEstimator().estimate(request()) == (100.0, OUTPUT_DEFAULT, 0.0)

    def test_believes_what_envoy_says(self) -> None:
        """The tokens of the prompt, where they are known, and the most the client asked for."""
        found = TokenEstimator().estimate(request(input_tokens=7, output_tokens_max=30))

        assert found == (7.0, 30.0, 0.0)

    @pytest.mark.parametrize("byte_size", [0, 1, 3])
    def test_prompt_has_at_least_one_token(self, byte_size: int) -> None:
        """Whatever its size."""
        assert TokenEstimator().estimate(request(byte_size=byte_size)).input == 1.0

    def test_most_asked_for_is_not_expected(self) -> None:
        """Clients ask for thousands and get a hundred."""
        assert TokenEstimator().estimate(request(output_tokens_max=9999)).output == OUTPUT_DEFAULT

    def test_own_answers_count_before_those_of_others(self) -> None:
        """A flow's own from this model, else anybody's from it, else the guess."""
        estimator = taught((request("a"), None, 10), (request("b"), None, 30))

        assert estimator.estimate(request("a")).output == 10.0
        assert estimator.estimate(request("c")).output == 20.0
        assert estimator.estimate(request("a", model="other")).output == OUTPUT_DEFAULT

    def test_bytes_of_a_token_are_learnt(self) -> None:
        """By the ratio of the means: a small request counts for little."""
        estimator = taught(
            (request(byte_size=9000), 1000, None), (request(byte_size=1000), 1000, None)
        )

        assert estimator.estimate(request(byte_size=500)).input == pytest.approx(100.0)
        assert estimator.estimate(request("b", byte_size=500)).input == pytest.approx(100.0)
        assert estimator.estimate(request()).output == OUTPUT_DEFAULT

    def test_large_body_is_seldom_text(self) -> None:
        """A picture of a megabyte counts as 65,536 tokens until the first usage is known."""
        assert TokenEstimator().estimate(request(byte_size=LARGE_BYTES)).input == 65_536.0
        assert TokenEstimator().estimate(request(byte_size=1_300_000)).input == 65_536.0

    def test_pictures_and_text_are_learnt_apart(self) -> None:
        """A tenant's pictures do not make its text cheap, nor its text the pictures dear."""
        estimator = taught(
            (request(byte_size=1_000_000), 2000, None), (request(byte_size=2000), 400, None)
        )

        assert estimator.estimate(request(byte_size=500_000)).input == pytest.approx(1000.0)
        assert estimator.estimate(request(byte_size=500)).input == pytest.approx(100.0)
        assert estimator.estimate(request("b", byte_size=500_000)).input == pytest.approx(1000.0)

    def test_what_is_remembered_is_estimated_alike(self) -> None:
        """By an estimator that goes on with it."""
        first, second = taught((request(byte_size=1_000_000), 2000, 7)), TokenEstimator()
        second.restore(first.remember())

        assert second.remember() == first.remember()
        for size in (500, 500_000):
            assert second.estimate(request(byte_size=size)) == first.estimate(
                request(byte_size=size)
            )

    def test_answers_alone_leave_the_prompt_a_guess(self) -> None:
        """What is not known is not made up."""
        assert taught((request(), None, 10)).estimate(request()).input == 100.0

    def test_request_of_unknown_size_teaches_nothing_of_prompts(self) -> None:
        """There is nothing to divide by."""
        assert taught((request(byte_size=0), 500, None)).estimate(request()).input == 100.0

    def test_failures_teach_nothing(self) -> None:
        """An error page is a short answer."""
        estimator = TokenEstimator()
        estimator.learn(request(), Settled(1, 5, 0, 5, is_success=False))

        assert estimator.estimate(request()) == (100.0, OUTPUT_DEFAULT, 0.0)

    @given(answers=st.lists(st.integers(0, 5000), min_size=1, max_size=32))
    @settings(max_examples=50)
    def test_is_the_mean_at_first(self, answers: list[int]) -> None:
        """The first 32 count alike."""
        estimator = taught(*[(request(), None, answer) for answer in answers])

        assert estimator.estimate(request()).output == pytest.approx(sum(answers) / len(answers))

    def test_follows_a_tenant_that_changes(self) -> None:
        """After a hundred answers of another length, the old ones are all but forgotten."""
        before, after = [(request(), None, 1000)] * 500, [(request(), None, 100)] * 100
        estimator = taught(*before, *after)

        assert estimator.estimate(request()).output == pytest.approx(100, abs=50)

    @given(
        lessons=st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.sampled_from("mn"),
                st.integers(0, 9000),
                st.none() | st.integers(0, 5000),
                st.none() | st.integers(0, 5000),
            ),
            max_size=40,
        )
    )
    @settings(max_examples=50)
    def test_is_never_beyond_what_was_seen(
        self, lessons: list[tuple[str, str, int, int | None, int | None]]
    ) -> None:
        """A guess lies between the shortest and the longest answer of that model."""
        estimator = taught(
            *[
                (request(flow, model, size), prompt, out)
                for flow, model, size, prompt, out in lessons
            ]
        )
        for flow_id in "abcd":
            for model in "mn":
                seen = [each[4] for each in lessons if each[1] == model and each[4] is not None]
                found = estimator.estimate(request(flow_id, model)).output
                low, high = min(seen, default=OUTPUT_DEFAULT), max(seen, default=OUTPUT_DEFAULT)
                assert low - 1e-6 <= found <= high + 1e-6

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Flows are the clients' to invent; the one longest without news is forgotten."""
        monkeypatch.setattr(estimates, "_LEARNED_MAX", 3)
        estimator = taught(*[(request(flow), None, 7) for flow in "abcab"], (request("d"), None, 1))

        assert estimator.estimate(request("b")).output == 7.0
        assert estimator.estimate(request("d")).output == 1.0
        assert estimator.estimate(request("a")).output == pytest.approx(6.0)
