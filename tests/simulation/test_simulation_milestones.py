"""Milestones: the model server in stretches gives what it gives in steps, to the nanosecond."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.simulation.model_server import ModelServer, ModelServerConfig, TokenEvent
from flowcontrol.simulation.stretch import Stretch

CONFIG = ModelServerConfig(
    sequences_max=2,
    kv_tokens=100,
    batched_tokens_max=8,
    step_base_ns=1000,
    sequence_ns=100,
    prefill_token_ns=10,
    context_token_ns=1,
)
FAR_NS = 10**12


def milestones(events: list[TokenEvent]) -> list[TokenEvent]:
    """The first and the last token of each job."""
    return [event for event in events if event.token_index == 0 or event.is_last]


class TestStretch:
    """Three steps of 10, 12 and 14 ns from 100: they end at 110, 122 and 136."""

    @pytest.mark.parametrize(
        ("now_ns", "expected"), [(100, 0), (109, 0), (110, 1), (121, 1), (122, 2), (136, 2)]
    )
    def test_ended_by(self, now_ns: int, expected: int) -> None:
        """A step has ended at its end; the last one is never counted."""
        assert expected == Stretch(100, 10, 2, 3).ended_by(now_ns)

    @pytest.mark.parametrize(
        ("now_ns", "end_ns"), [(100, 110), (110, 110), (111, 122), (122, 122), (123, 136)]
    )
    def test_cut(self, now_ns: int, end_ns: int) -> None:
        """A job that comes at the end of a step is in time for the next, so the rest is cut."""
        stretch = Stretch(100, 10, 2, 3)
        stretch.cut_from(now_ns)
        assert end_ns == stretch.end_ns

    def test_cut_after_the_end(self) -> None:
        """A stretch that is over stays whole."""
        stretch = Stretch(100, 10, 2, 3)
        stretch.cut_from(500)
        assert stretch == Stretch(100, 10, 2, 3)

    def test_drop(self) -> None:
        """What is left begins where the dropped steps end, and goes on growing."""
        stretch = Stretch(100, 10, 2, 3)
        stretch.drop(2)
        assert stretch == Stretch(122, 14, 2, 1)
        assert stretch.end_ns == 136


class TestMilestones:
    """First and last tokens, at one wake-up per stretch."""

    def test_one_wakeup_for_a_whole_answer(self) -> None:
        """A job alone wakes its driver twice: at its first token and at its last."""
        steps, stretches = ModelServer(CONFIG), ModelServer(CONFIG, milestones_only=True)
        for server in (steps, stretches):
            server.submit(0, prompt_tokens=5, output_tokens=60, now_ns=0)
        wakeups = []
        events = []
        while (wakeup_ns := stretches.next_wakeup_ns()) is not None:
            wakeups.append(wakeup_ns)
            events += stretches.advance(wakeup_ns)

        expected = milestones(steps.advance(FAR_NS))
        assert expected == events
        assert [event.at_ns for event in expected] == wakeups

    def test_a_newcomer_cuts_the_stretch(self) -> None:
        """The wake-up comes forward to the end of the step under way."""
        server = ModelServer(CONFIG, milestones_only=True)
        server.submit(0, prompt_tokens=5, output_tokens=60, now_ns=0)
        server.advance(1055)
        assert (server.next_wakeup_ns() or 0) > 60_000
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=1056)
        assert server.next_wakeup_ns() == 1055 + 1000 + 100 + 6

    def test_nobody_is_woken_for_a_newcomer_who_cannot_join(self) -> None:
        """With every place taken the stretch stays whole."""
        server = ModelServer(replace(CONFIG, sequences_max=1), milestones_only=True)
        server.submit(0, prompt_tokens=5, output_tokens=60, now_ns=0)
        server.advance(1055)
        wakeup_ns = server.next_wakeup_ns()
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=1056)
        assert wakeup_ns == server.next_wakeup_ns()

    def test_abort_in_the_middle(self) -> None:
        """The step under way keeps its length; the steps before it have been done."""
        steps, stretches = ModelServer(CONFIG), ModelServer(CONFIG, milestones_only=True)
        for server in (steps, stretches):
            server.submit(0, prompt_tokens=5, output_tokens=50, now_ns=0)
            server.submit(1, prompt_tokens=1, output_tokens=50, now_ns=0)
            server.advance(20_000)
            server.abort(0)
        assert steps.next_wakeup_ns() == stretches.next_wakeup_ns()
        assert steps.generated_tokens_total == stretches.generated_tokens_total
        assert milestones(steps.advance(FAR_NS)) == stretches.advance(FAR_NS)


@dataclass(frozen=True)
class Step:
    """What happens next, `gap_ns` after what happened before."""

    gap_ns: int
    prompt_tokens: int
    output_tokens: int
    aborts: int | None
    """Which of the living jobs is aborted, counted round; None: none is."""
    advances: bool


CONFIGS = st.builds(
    lambda sequences_max, kv_tokens, budget, context_ns: replace(
        CONFIG,
        sequences_max=sequences_max,
        kv_tokens=kv_tokens,
        batched_tokens_max=sequences_max + budget,
        context_token_ns=context_ns,
    ),
    st.integers(1, 4),
    st.integers(16, 60),
    st.integers(0, 8),
    st.sampled_from([0, 1, 7]),
)
STEPS = st.lists(
    st.builds(
        Step,
        st.integers(0, 9000),
        st.integers(1, 10),
        st.integers(1, 40),
        st.none() | st.integers(0, 9),
        st.booleans(),
    ),
    max_size=14,
)


class Both:
    """The same server twice, in steps and in stretches, under the same script."""

    def __init__(self, config: ModelServerConfig) -> None:
        self.steps = ModelServer(config)
        self.stretches = ModelServer(config, milestones_only=True)
        self.kv_tokens = config.kv_tokens
        self.alive: list[int] = []
        self.now_ns = 0

    def play(self, job_id: int, step: Step) -> None:
        """Do to both what a step says."""
        self.now_ns += step.gap_ns
        if step.advances:
            self.advance()
        if step.prompt_tokens + step.output_tokens <= self.kv_tokens:
            for server in (self.steps, self.stretches):
                server.submit(job_id, step.prompt_tokens, step.output_tokens, self.now_ns)
            self.alive.append(job_id)
        if step.aborts is not None and self.alive:
            victim = self.alive.pop(step.aborts % len(self.alive))
            for server in (self.steps, self.stretches):
                server.abort(victim)

    def advance(self) -> None:
        """Compare all that can be seen of both."""
        expected = milestones(self.steps.advance(self.now_ns))
        assert expected == self.stretches.advance(self.now_ns)
        for event in expected:
            if event.is_last:
                self.alive.remove(event.job_id)
        assert self.seen(self.steps) == self.seen(self.stretches)

    @staticmethod
    def seen(server: ModelServer) -> tuple[float, ...]:
        """Return all that a server says of itself."""
        return (
            *(server.kv_usage, server.running_count, server.waiting_count),
            *(server.prompt_tokens_total, server.generated_tokens_total, server.preemptions_total),
        )


class TestSameAsStepByStep:
    """Whatever is submitted, aborted and asked, and whenever."""

    @settings(max_examples=150)
    @given(config=CONFIGS, script=STEPS)
    def test_equivalence(self, config: ModelServerConfig, script: list[Step]) -> None:
        """Both give the same milestones, counts and cache; only the wake-ups differ."""
        both = Both(config)
        for job_id, step in enumerate(script):
            both.play(job_id, step)
        while (wakeup_ns := both.stretches.next_wakeup_ns()) is not None:
            both.now_ns = max(both.now_ns, wakeup_ns)
            both.advance()
        assert not both.alive
        assert both.steps.next_wakeup_ns() is None
