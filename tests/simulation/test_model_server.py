"""The engine's model: step times, order, limits, preemption, aborts and conservation."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.simulation.model_server import ModelServer, ModelServerConfig, TokenEvent

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


def token_times(events: list[TokenEvent], job_id: int) -> list[int]:
    """The times of one job's tokens."""
    return [event.at_ns for event in events if event.job_id == job_id]


def places(events: list[TokenEvent]) -> list[tuple[int, int]]:
    """Job and token index of each event."""
    return [(event.job_id, event.token_index) for event in events]


class TestStepTime:
    """A step costs its base, its decoding sequences, its prefill and its context."""

    def test_prefill_then_decode(self) -> None:
        """The first token ends the prefill step, each later one costs a decode step."""
        server = ModelServer(CONFIG)
        server.submit(7, prompt_tokens=5, output_tokens=3, now_ns=50)
        first = 50 + 1000 + 5 * 10 + 5
        second = first + 1000 + 100 + 6
        third = second + 1000 + 100 + 7
        expected = [
            TokenEvent(7, 0, first, is_last=False),
            TokenEvent(7, 1, second, is_last=False),
            TokenEvent(7, 2, third, is_last=True),
        ]
        assert expected == server.advance(FAR_NS)

    def test_long_prompt_is_prefilled_in_chunks(self) -> None:
        """20 prompt tokens need three steps of at most 8 tokens before the first token."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=20, output_tokens=1, now_ns=0)
        chunks = [1000 + 80 + 8, 1000 + 80 + 16, 1000 + 40 + 20]
        assert [TokenEvent(0, 0, sum(chunks), is_last=True)] == server.advance(FAR_NS)

    def test_decoding_takes_its_token_from_the_budget_of_prefills(self) -> None:
        """A sequence that decodes leaves 7 of 8 tokens to its neighbour's prefill."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=1, output_tokens=3, now_ns=0)
        server.submit(1, prompt_tokens=8, output_tokens=1, now_ns=0)
        first = 1000 + 10 + 1
        second = first + 1000 + 100 + 7 * 10 + (2 + 7)
        third = second + 1000 + 100 + 10 + (3 + 8)
        events = server.advance(FAR_NS)
        assert [first, second, third] == token_times(events, 0)
        assert [third] == token_times(events, 1)

    def test_defaults_give_the_documented_rate(self) -> None:
        """16 sequences of about 300 tokens take 40 ms a step."""
        server = ModelServer()
        for job_id in range(16):
            server.submit(job_id, prompt_tokens=290, output_tokens=20, now_ns=0)
        last_steps = token_times(server.advance(FAR_NS), 0)[-2:]
        assert round((last_steps[1] - last_steps[0]) / 1e6) == 40

    def test_wakeup_is_the_end_of_the_step_under_way(self) -> None:
        """Nothing happens one nanosecond before it; submissions do not move it; idle is None."""
        server = ModelServer(CONFIG)
        assert server.next_wakeup_ns() is None
        server.submit(0, prompt_tokens=5, output_tokens=1, now_ns=0)
        assert server.next_wakeup_ns() == 1055
        server.submit(1, prompt_tokens=1, output_tokens=1, now_ns=3)
        assert server.next_wakeup_ns() == 1055
        assert server.advance(1054) == []
        assert [TokenEvent(0, 0, 1055, is_last=True)] == server.advance(1055)
        assert server.next_wakeup_ns() == 1055 + 1011
        assert [TokenEvent(1, 0, 2066, is_last=True)] == server.advance(2066)
        assert server.next_wakeup_ns() is None

    def test_a_late_caller_changes_nothing(self) -> None:
        """A job submitted after the end of an unobserved step does not run before it arrived."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=9000)
        expected = [
            TokenEvent(0, 0, 1055, is_last=True),
            TokenEvent(1, 0, 9000 + 1055, is_last=True),
        ]
        assert expected == server.advance(FAR_NS)

    def test_time_never_goes_back(self) -> None:
        """The caller's clock is held to its word."""
        server = ModelServer(CONFIG)
        server.advance(5)
        with pytest.raises(AssertionError, match="now_ns must not go back"):
            server.advance(4)


class TestQueue:
    """First come, first served, without a limit in front of `sequences_max`."""

    def test_only_sequences_max_run(self) -> None:
        """The rest waits, and takes a place in the step after it is free."""
        server = ModelServer(CONFIG)
        for job_id in range(5):
            server.submit(job_id, prompt_tokens=1, output_tokens=2, now_ns=0)
        counts = []
        while (wakeup_ns := server.next_wakeup_ns()) is not None:
            counts.append((server.running_count, server.waiting_count))
            server.advance(wakeup_ns)
        assert counts == [(1, 4), (2, 3), (2, 2), (2, 1), (2, 0), (1, 0)]
        assert (server.running_count, server.waiting_count) == (0, 0)

    def test_first_come_first_served(self) -> None:
        """A short job behind long ones waits for its turn: nothing is reordered."""
        server = ModelServer(CONFIG)
        for job_id, prompt_tokens in enumerate((30, 20, 40, 1)):
            server.submit(job_id, prompt_tokens, output_tokens=2, now_ns=0)
        firsts = [e.job_id for e in server.advance(FAR_NS) if e.token_index == 0]
        assert firsts == [0, 1, 2, 3]

    def test_higher_priorities_first(self) -> None:
        """Of what waits, the highest priority goes first, and none that runs goes back for it."""
        server = ModelServer(ModelServerConfig(sequences_max=1))
        for job_id, priority in enumerate((0, -1, 5, 5, 0)):
            server.submit(job_id, 10, 1, 0, priority=priority)

        events = server.advance(1_000_000_000)

        assert [event.job_id for event in events] == [0, 2, 3, 4, 1]

    def test_takes_every_job(self) -> None:
        """Nothing bounds the queue."""
        server = ModelServer(CONFIG)
        for job_id in range(10_000):
            server.submit(job_id, prompt_tokens=1, output_tokens=1, now_ns=0)
        assert server.waiting_count == 9_999


class TestCache:
    """The KV cache bounds what runs; the newest sequence makes room for older ones."""

    def test_usage_counts_computed_tokens(self) -> None:
        """Usage grows with each chunk and each token, and falls to 0 at the end."""
        server = ModelServer(CONFIG)
        assert server.kv_usage == 0.0
        server.submit(0, prompt_tokens=10, output_tokens=3, now_ns=0)
        usages = []
        while (wakeup_ns := server.next_wakeup_ns()) is not None:
            usages.append(server.kv_usage)
            server.advance(wakeup_ns)
        assert usages == [0.08, 0.10, 0.11, 0.12]
        assert server.kv_usage == 0.0

    def test_waits_for_room(self) -> None:
        """A free place is no use while the first chunk does not fit the cache."""
        server = ModelServer(replace(CONFIG, kv_tokens=10))
        server.submit(0, prompt_tokens=7, output_tokens=3, now_ns=0)
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=0)
        events = server.advance(FAR_NS)
        assert places(events) == [(0, 0), (0, 1), (0, 2), (1, 0)]
        assert server.preemptions_total == 0

    def test_prefilled_elsewhere(self) -> None:
        """It brings its cache along, and computes one token of its prompt: in one step, not two."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=10, output_tokens=2, now_ns=0, is_prefilled=True)
        assert server.kv_usage == 0.1
        first = 1000 + 10 + 10
        second = first + 1000 + 100 + 11
        assert token_times(server.advance(FAR_NS), 0) == [first, second]

    def test_prefilled_elsewhere_waits_for_room(self) -> None:
        """What it brings along must fit, all of it."""
        server = ModelServer(replace(CONFIG, kv_tokens=10))
        server.submit(0, prompt_tokens=2, output_tokens=2, now_ns=0)
        server.submit(1, prompt_tokens=9, output_tokens=1, now_ns=0, is_prefilled=True)
        assert places(server.advance(FAR_NS)) == [(0, 0), (0, 1), (1, 0)]
        assert server.preemptions_total == 0

    def test_newest_is_preempted_to_the_front_and_recomputed(self) -> None:
        """It loses its cache and its place, but no token, and no job overtakes it."""
        server = ModelServer(replace(CONFIG, kv_tokens=12))
        for job_id in range(3):
            server.submit(job_id, prompt_tokens=4, output_tokens=6, now_ns=0)
        events: list[TokenEvent] = []
        while server.preemptions_total == 0:
            events += server.advance(server.next_wakeup_ns() or 0)
        assert places(events) == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
        assert (server.running_count, server.waiting_count) == (1, 2)
        assert server.kv_usage == 7 / 12
        # Job 0 takes three more steps; then one step recomputes 4 + 2 tokens of job 1 and spends
        # the rest of its budget on job 2, which is still behind it.
        rest = server.advance(FAR_NS)
        assert places(rest[:6]) == [(0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (2, 0)]
        assert rest[3].at_ns - rest[2].at_ns == 1000 + 8 * 10 + 8
        for job_id in range(3):
            indexes = [e.token_index for e in events + rest if e.job_id == job_id]
            assert list(range(6)) == indexes
        assert (server.prompt_tokens_total, server.generated_tokens_total) == (12, 18)
        assert server.preemptions_total == 2

    def test_nobody_is_admitted_in_a_step_that_preempts(self) -> None:
        """The preempted job is not back at once, though a chunk of 3 would fit the room it left."""
        server = ModelServer(replace(CONFIG, kv_tokens=12, batched_tokens_max=4))
        for job_id in range(2):
            server.submit(job_id, prompt_tokens=4, output_tokens=6, now_ns=0)
        while server.preemptions_total == 0:
            server.advance(server.next_wakeup_ns() or 0)
        assert (server.running_count, server.waiting_count) == (1, 1)


CACHING = replace(CONFIG, prefix_block_tokens=4)


class TestPrefixCache:
    """What prompts share is prefilled once."""

    @staticmethod
    def ttft(server: ModelServer, job_id: int, prefix: tuple[int, ...], now_ns: int) -> int:
        """Let a job of 10 tokens run alone; the time to its first token."""
        server.submit(job_id, 10, 1, now_ns, prefix=prefix)
        (event,) = server.advance(now_ns + 10**6)
        return event.at_ns - now_ns

    def test_shared_beginning(self) -> None:
        """Two blocks of a prompt seen before are not computed again; the last token always is."""
        server = ModelServer(CACHING)
        whole = (1000 + 80 + 8) + (1000 + 20 + 10)

        assert self.ttft(server, 0, (1, 2), 0) == whole
        assert self.ttft(server, 1, (1, 2), 10**7) == 1000 + 20 + 10
        assert self.ttft(server, 2, (1, 3), 2 * 10**7) == 1000 + 60 + 10
        assert self.ttft(server, 3, (4, 5), 3 * 10**7) == whole
        assert (server.cached_tokens_total, server.prompt_tokens_total) == (8 + 4, 40)

    def test_whole_prompt(self) -> None:
        """A prompt that is cached whole computes one token."""
        server = ModelServer(replace(CACHING, prefix_block_tokens=5))
        self.ttft(server, 0, (1, 2), 0)

        assert self.ttft(server, 1, (1, 2), 10**7) == 1000 + 10 + 10
        assert server.cached_tokens_total == 9

    def test_room(self) -> None:
        """Blocks are forgotten where running sequences need their room, the end first."""
        server = ModelServer(replace(CACHING, kv_tokens=16))
        self.ttft(server, 0, (1, 2, 3, 4, 5), 0)
        self.ttft(server, 1, (1, 2, 3, 4, 5), 10**7)

        assert server.cached_tokens_total == 9  # four blocks fit, and hold the prompt but one token
        server.submit(2, 8, 3, 2 * 10**7)
        server.submit(3, 4, 1, 2 * 10**7, prefix=(1, 2))
        server.advance(FAR_NS)
        assert server.cached_tokens_total == 9 + 3

    def test_none(self) -> None:
        """Without the cache a prefix makes no difference."""
        server = ModelServer(CONFIG)

        assert self.ttft(server, 0, (1,), 0) == self.ttft(server, 1, (1,), 10**7)


class TestAbort:
    """An abort frees at once, waiting or running."""

    def test_waiting(self) -> None:
        """The job never runs, and the others do not notice."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.submit(2, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.abort(1)
        assert (server.running_count, server.waiting_count) == (1, 1)
        assert places(server.advance(FAR_NS)) == [(0, 0), (2, 0)]
        assert server.prompt_tokens_total == 10

    def test_running(self) -> None:
        """Place and cache are free now; the step keeps its length and gives it no token."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=5, output_tokens=9, now_ns=0)
        server.submit(1, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.abort(0)
        assert (server.running_count, server.waiting_count, server.kv_usage) == (0, 1, 0.0)
        assert server.next_wakeup_ns() == 1055
        assert [TokenEvent(1, 0, 2110, is_last=True)] == server.advance(FAR_NS)
        assert (server.prompt_tokens_total, server.generated_tokens_total) == (5, 1)

    def test_last_job(self) -> None:
        """The step under way ends without a job, then the engine is idle."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=5, output_tokens=9, now_ns=0)
        server.abort(0)
        assert server.advance(1055) == []
        assert server.next_wakeup_ns() is None

    def test_id_is_free_again(self) -> None:
        """A new job of the same name inherits nothing from the step under way."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=5, output_tokens=9, now_ns=0)
        server.abort(0)
        server.submit(0, prompt_tokens=2, output_tokens=1, now_ns=1)
        assert [TokenEvent(0, 0, 1055 + 1022, is_last=True)] == server.advance(FAR_NS)

    def test_unknown(self) -> None:
        """Aborting what has left is the caller's mistake."""
        server = ModelServer(CONFIG)
        server.submit(3, prompt_tokens=5, output_tokens=1, now_ns=0)
        server.advance(FAR_NS)
        with pytest.raises(ValueError, match=r"^job_id must be waiting or running, got 3$"):
            server.abort(3)


class TestRefusals:
    """What can never run is refused at the door, with the reason."""

    @pytest.mark.parametrize(
        ("job_id", "prompt_tokens", "output_tokens", "message"),
        [
            (0, 1, 1, "job_id must be unused, got 0"),
            (1, 0, 1, "prompt_tokens and output_tokens must be >= 1, got 0 and 1"),
            (1, 1, 0, "prompt_tokens and output_tokens must be >= 1, got 1 and 0"),
            (1, 99, 2, r"prompt_tokens \+ output_tokens must be <= kv_tokens \(100\), got 101"),
        ],
    )
    def test_submit(
        self, job_id: int, prompt_tokens: int, output_tokens: int, message: str
    ) -> None:
        """The engine is unchanged."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=1, output_tokens=1, now_ns=0)
        with pytest.raises(ValueError, match=f"^{message}$"):
            server.submit(job_id, prompt_tokens, output_tokens, now_ns=0)
        assert (server.running_count, server.waiting_count) == (1, 0)

    def test_job_as_big_as_the_cache_runs(self) -> None:
        """The limit itself is allowed."""
        server = ModelServer(CONFIG)
        server.submit(0, prompt_tokens=98, output_tokens=2, now_ns=0)
        assert places(server.advance(FAR_NS)) == [(0, 0), (0, 1)]

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("sequences_max", 0, "sequences_max must be an integer >= 1, got 0"),
            ("kv_tokens", 1, "kv_tokens must be an integer >= 2, got 1"),
            ("step_base_ns", 0, "step_base_ns must be an integer >= 1, got 0"),
            ("step_base_ns", 1e6, "step_base_ns must be an integer >= 1, got 1000000.0"),
            ("sequence_ns", -1, "sequence_ns must be an integer >= 0, got -1"),
            ("prefill_token_ns", -1, "prefill_token_ns must be an integer >= 0, got -1"),
            ("context_token_ns", True, "context_token_ns must be an integer >= 0, got True"),
            ("batched_tokens_max", 1, r"batched_tokens_max must be >= sequences_max \(2\), got 1"),
        ],
    )
    def test_config(self, field: str, value: object, message: str) -> None:
        """Each field names its rule."""
        changes: dict[str, Any] = {field: value}
        with pytest.raises(ValueError, match=f"^{message}$"):
            replace(CONFIG, **changes)

    def test_config_reports_all_problems(self) -> None:
        """One message for everything wrong."""
        with pytest.raises(ValueError, match=r"sequences_max must .*; kv_tokens must "):
            ModelServerConfig(sequences_max=0, kv_tokens=0)


@dataclass(frozen=True)
class Arrival:
    """A job of the property tests, submitted `gap_ns` after the one before."""

    gap_ns: int
    prompt_tokens: int
    output_tokens: int


CONFIGS = st.builds(
    lambda sequences_max, kv_tokens, budget: replace(
        CONFIG,
        sequences_max=sequences_max,
        kv_tokens=kv_tokens,
        batched_tokens_max=sequences_max + budget,
    ),
    st.integers(1, 4),
    st.integers(16, 40),
    st.integers(0, 8),
)
ARRIVALS = st.lists(
    st.builds(Arrival, st.integers(0, 3000), st.integers(1, 10), st.integers(1, 6)), max_size=12
)


class TestProperties:
    """What holds for every load."""

    @given(config=CONFIGS, arrivals=ARRIVALS, data=st.data())
    def test_conservation(
        self, config: ModelServerConfig, arrivals: list[Arrival], data: st.DataObject
    ) -> None:
        """Every job is waiting, running, finished or aborted; every token is counted once."""
        server = ModelServer(config)
        tokens: dict[int, list[TokenEvent]] = {}
        finished: set[int] = set()
        aborted: set[int] = set()
        now_ns = 0

        def advance(now_ns: int) -> None:
            for event in server.advance(now_ns):
                tokens[event.job_id].append(event)
                if event.is_last:
                    finished.add(event.job_id)
            left = len(tokens) - len(finished) - len(aborted)
            assert left == server.waiting_count + server.running_count
            assert sum(map(len, tokens.values())) == server.generated_tokens_total
            assert server.running_count <= config.sequences_max
            assert 0 <= server.kv_usage <= 1

        for job_id, arrival in enumerate(arrivals):
            now_ns += arrival.gap_ns
            advance(now_ns)
            tokens[job_id] = []
            server.submit(job_id, arrival.prompt_tokens, arrival.output_tokens, now_ns)
            alive = sorted(tokens.keys() - finished - aborted)
            victim = data.draw(st.none() | st.sampled_from(alive))
            if victim is not None:
                server.abort(victim)
                aborted.add(victim)
        while (wakeup_ns := server.next_wakeup_ns()) is not None:
            advance(wakeup_ns)

        assert tokens.keys() == finished | aborted
        assert not finished & aborted
        for job_id, events in tokens.items():
            assert list(range(len(events))) == [event.token_index for event in events]
            times = [event.at_ns for event in events]
            assert sorted(set(times)) == times
            assert (len(events) == arrivals[job_id].output_tokens) == (job_id in finished)
        prompts = sum(arrivals[job_id].prompt_tokens for job_id in tokens if tokens[job_id])
        assert prompts == server.prompt_tokens_total

    @given(config=CONFIGS, arrivals=ARRIVALS)
    def test_deterministic_and_independent_of_the_caller(
        self, config: ModelServerConfig, arrivals: list[Arrival]
    ) -> None:
        """Asking at every step, or once at the end, gives the same tokens at the same times."""
        eager, late = ModelServer(config), ModelServer(config)
        eager_events: list[TokenEvent] = []
        now_ns = 0
        for job_id, arrival in enumerate(arrivals):
            now_ns += arrival.gap_ns
            while (wakeup_ns := eager.next_wakeup_ns()) is not None and wakeup_ns <= now_ns:
                eager_events += eager.advance(wakeup_ns)
            for server in (eager, late):
                server.submit(job_id, arrival.prompt_tokens, arrival.output_tokens, now_ns)
        eager_events += eager.advance(FAR_NS)
        assert eager_events == late.advance(FAR_NS)
        assert eager.preemptions_total == late.preemptions_total

    @given(arrivals=ARRIVALS)
    def test_first_come_first_served(self, arrivals: list[Arrival]) -> None:
        """With room in the cache, first tokens come in the order of submission."""
        server = ModelServer(replace(CONFIG, kv_tokens=1000))
        for job_id, arrival in enumerate(arrivals):
            server.submit(job_id, arrival.prompt_tokens, arrival.output_tokens, now_ns=0)
        firsts = [event.job_id for event in server.advance(FAR_NS) if event.token_index == 0]
        assert list(range(len(arrivals))) == firsts
