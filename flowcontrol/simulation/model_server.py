"""A model of one continuous-batching LLM engine, in vLLM's manner.

Pure: no clock, chance, thread or I/O. Time is the argument `now_ns`, so the same model runs behind
HTTP in real time (`tools.model_server`) and on a virtual clock in a discrete-event simulation.

The engine works in steps. A step gives every running sequence one token of decoding or a chunk of
its prefill; all its tokens appear at its end. The queue in front of it is first come, first served
and has no limit: the engine takes every job it is given, and what waits inside cannot be reordered,
moved or dropped. That is the problem this project exists for, so it is modelled and not repaired.
Jobs of a higher priority go before those that wait, as with vLLM's `--scheduling-policy priority`;
none that runs is put back for them.

Simpler than vLLM: the KV cache is counted in tokens, not blocks; every job generates exactly the
number of tokens it asked for. What another server has prefilled arrives with the job, in no time.
The prefix cache, where there is one, holds blocks of prompts whose prefill is complete, as many as
fit beside the running sequences, and forgets the least lately used; a running sequence counts in
full although it shares them.

A simulation asks for milestones only, the first and the last token of each job, and gets them at
the same times for less: while all that run decode and no job can join them, each step is longer
than the one before by the same amount, so that a whole stretch of steps is one sum. It ends with
the first job that ends, where the KV cache is full, or at the next step once a job may join.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from itertools import takewhile

from flowcontrol.simulation.stretch import Stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServerConfig:
    """Size and speed of one engine.

    A step takes `step_base_ns` + `sequence_ns` x decoding sequences + `prefill_token_ns` x prefill
    tokens + `context_token_ns` x tokens of all running sequences in the KV cache. The defaults are
    arithmetic for an 8 B model in 16 bit on a GPU that reads 600 GB/s: 16 sequences of 300 tokens
    take 40 ms a step, 25 tokens/s each.

    Raises:
        ValueError: A field is out of its range; the message names every such field.
    """

    sequences_max: int = 16
    """Sequences running at once (vLLM `max_num_seqs`), >= 1. 16: small enough to fill in a demo."""

    kv_tokens: int = 32_768
    """Capacity of the KV cache in tokens, >= 2. 32,768: 2,048 for each of 16 sequences."""

    batched_tokens_max: int = 512
    """Tokens in one step (vLLM `max_num_batched_tokens`), >= `sequences_max`.

    A longer prompt is prefilled in chunks over several steps. 512: a full chunk takes 128 ms, so
    a long prompt slows its neighbours visibly and does not stop them.
    """

    step_base_ns: int = 27_000_000
    """Time of any step, ns, >= 1. 27 ms: reading 16 GB of weights at 600 GB/s."""

    sequence_ns: int = 750_000
    """Added per decoding sequence, ns, >= 0. 0.75 ms: sampling; brings 16 sequences to 40 ms."""

    prefill_token_ns: int = 250_000
    """Added per prefill token, ns, >= 0. 0.25 ms: 16 GFLOP at 64 TFLOP/s."""

    context_token_ns: int = 218
    """Added per token in the KV cache, ns, >= 0. 218 ns: reading 128 KiB at 600 GB/s."""

    prefix_block_tokens: int = 0
    """Tokens of a block of the prefix cache; 0: there is none. Mooncake's traces name blocks of
    512."""

    def __post_init__(self) -> None:
        """Check every field; report all problems at once."""
        least = dict.fromkeys((field.name for field in fields(self)), 0)
        least |= {"sequences_max": 1, "kv_tokens": 2, "step_base_ns": 1}
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} must be an integer >= {least[name]}, got {value!r}"
            for name, value in values.items()
            if type(value) is not int or value < least[name]
        ]
        if not problems and self.batched_tokens_max < self.sequences_max:
            # One token per running sequence must fit, or a decoding sequence would starve.
            problems.append(
                f"batched_tokens_max must be >= sequences_max ({self.sequences_max}), "
                f"got {self.batched_tokens_max!r}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token."""

    job_id: int
    """The job it belongs to."""

    token_index: int
    """Its place in the job's output, from 0."""

    at_ns: int
    """End of the step that produced it."""

    is_last: bool
    """The job ends with it and has already left the engine."""


@dataclass(slots=True)
class _Job:
    """A job's progress; it lives in exactly one of the two queues of its engine."""

    job_id: int
    prompt_tokens: int
    output_tokens: int
    submitted_ns: int
    prefill_tokens: int
    """Tokens to compute before the next one is generated: the prompt, after a preemption also the
    tokens already generated."""
    kv_tokens: int = 0
    """Tokens in the KV cache, those of the step under way included; of one that waits, those that
    it brings along."""
    generated_count: int = 0
    prefix: tuple[int, ...] = ()
    """Names of the blocks that its prompt begins with."""
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache when it was last admitted."""
    priority: int = 0

    def step_tokens(self, tokens_max: int, kv_tokens: int | None = None) -> int:
        """Tokens this job computes in its next step: a chunk of its prefill, or one.

        Args:
            tokens_max: The most there is room for.
            kv_tokens: Tokens that it has in the KV cache then; None: those it has.
        """
        held = self.kv_tokens if kv_tokens is None else kv_tokens
        return min(max(self.prefill_tokens - held, 1), tokens_max)


class ModelServer:
    """One engine: an unbounded first-come-first-served queue before a batch of running sequences.

    Answers do not depend on how often `advance` is called: a step that begins at t runs exactly the
    jobs submitted up to t. Time never goes back. Pure; owner: the holder of the clock.

    Args:
        config: Size and speed.
        milestones_only: Return only the first and the last token of each job; nothing else differs
            but the cost, and that a submission or an abort may bring the next wake-up forward.
    """

    def __init__(
        self, config: ModelServerConfig | None = None, *, milestones_only: bool = False
    ) -> None:
        self._config = config or ModelServerConfig()
        self._milestones_only = milestones_only
        self._waiting: OrderedDict[int, _Job] = OrderedDict()
        self._lowest_priority = 0
        """Of all jobs so far, and 0: one of it goes before none."""
        self._running: dict[int, _Job] = {}  # oldest admission first
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks of the prefix cache, the least lately used first."""
        self._step_end_ns: int | None = None
        """End of the stretch of steps under way, which is one step but for milestones."""
        self._stretch = Stretch(0, 1, 0, 1)
        self._now_ns: int | None = None
        self._prompt_tokens_total = 0
        self._cached_tokens_total = 0
        self._generated_tokens_total = 0
        self._preemptions_total = 0

    def submit(  # noqa: PLR0913 - what a job consists of
        self,
        job_id: int,
        prompt_tokens: int,
        output_tokens: int,
        now_ns: int,
        *,
        prefix: tuple[int, ...] = (),
        is_prefilled: bool = False,
        priority: int = 0,
    ) -> None:
        """Append a job to the waiting queue; an idle engine begins a step with it at `now_ns`.

        Args:
            job_id: Names the job in events and in `abort`; free again when the job has left.
            prompt_tokens: Length of the prompt, >= 1.
            output_tokens: Tokens it generates, >= 1.
            now_ns: The present, ns; never before that of an earlier call.
            prefix: Names of the blocks that its prompt begins with.
            is_prefilled: It brings the KV cache of its prompt along, but for the last token, which
                generates the first of the answer.
            priority: It goes before all that wait with a lower one.

        Raises:
            ValueError: The id is in use, a count is below 1, or the job exceeds the KV cache, so
                it could never finish. The engine is unchanged.
        """
        if job_id in self._waiting or job_id in self._running:
            message = f"job_id must be unused, got {job_id!r}"
            raise ValueError(message)
        if min(prompt_tokens, output_tokens) < 1:
            message = (
                "prompt_tokens and output_tokens must be >= 1, "
                f"got {prompt_tokens!r} and {output_tokens!r}"
            )
            raise ValueError(message)
        if prompt_tokens + output_tokens > self._config.kv_tokens:
            message = (
                f"prompt_tokens + output_tokens must be <= kv_tokens ({self._config.kv_tokens}), "
                f"got {prompt_tokens + output_tokens!r}"
            )
            raise ValueError(message)
        self._observe(now_ns)
        kv_tokens = prompt_tokens - 1 if is_prefilled else 0
        self._waiting[job_id] = _Job(
            *(job_id, prompt_tokens, output_tokens, now_ns, prompt_tokens, kv_tokens),
            prefix=prefix,
            priority=priority,
        )
        self._lowest_priority = min(self._lowest_priority, priority)
        if priority > self._lowest_priority:
            for behind in [each for each in self._waiting.values() if each.priority < priority]:
                self._waiting.move_to_end(behind.job_id)
        is_next = next(iter(self._waiting)) == job_id
        if self._step_end_ns is None:
            self._begin_step(now_ns)
        elif is_next and len(self._running) < self._config.sequences_max:
            self._stretch.cut_from(now_ns)
            self._step_end_ns = self._stretch.end_ns

    def abort(self, job_id: int) -> None:
        """Remove a job, waiting or running; its place and its KV cache are free at once.

        The step under way keeps its length, as a GPU does not stop in the middle. Steps that are
        due and not yet advanced over end without the job.

        Raises:
            ValueError: No such job is waiting or running.
        """
        queue = self._running if job_id in self._running else self._waiting
        if queue.pop(job_id, None) is None:
            message = f"job_id must be waiting or running, got {job_id!r}"
            raise ValueError(message)
        if self._step_end_ns is not None:
            self._stretch.cut_from(self._stretch.start_ns)
            self._step_end_ns = self._stretch.end_ns

    def advance(self, now_ns: int) -> list[TokenEvent]:
        """Finish every step that ends at or before `now_ns`, and begin the next one.

        Costs O(running sequences) per step; for milestones, per stretch of steps.

        Args:
            now_ns: The present, ns; never before that of an earlier call.

        Returns:
            The generated tokens, or those of them that are milestones, by time, those of one step
            by admission.
        """
        self._observe(now_ns)
        events: list[TokenEvent] = []
        while (end_ns := self._step_end_ns) is not None and end_ns <= now_ns:
            self._end_step(end_ns, events)
            if self._running:
                self._begin_step(end_ns)
            elif self._waiting:
                first_ns = min([job.submitted_ns for job in self._waiting.values()])
                self._begin_step(max(end_ns, first_ns))
            else:
                self._step_end_ns = None
        if self._step_end_ns is not None and self._stretch.steps > 1:
            self._run_steps(self._stretch.ended_by(now_ns))
        return events

    def next_wakeup_ns(self) -> int | None:
        """End of the step or stretch under way, when `advance` has work; None when idle.

        Submissions and aborts never move the end of a step that has begun.
        """
        return self._step_end_ns

    @property
    def running_count(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Jobs in the queue in front of it, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._config.kv_tokens

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1. Costs O(running sequences)."""
        return self._kv_used() / self._config.kv_tokens

    @property
    def prompt_tokens_total(self) -> int:
        """Prompt tokens of all jobs that generated their first token; recomputing adds nothing."""
        return self._prompt_tokens_total

    @property
    def cached_tokens_total(self) -> int:
        """Of the prompt tokens, those that the prefix cache had."""
        return self._cached_tokens_total

    @property
    def generated_tokens_total(self) -> int:
        """Tokens generated: the number of events ever returned, were all returned."""
        return self._generated_tokens_total

    @property
    def preemptions_total(self) -> int:
        """Times a running sequence was sent back to the waiting queue."""
        return self._preemptions_total

    def _observe(self, now_ns: int) -> None:
        """Hold the caller to a clock that never goes back."""
        assert self._now_ns is None or now_ns >= self._now_ns, "now_ns must not go back"
        self._now_ns = now_ns

    def _kv_used(self) -> int:
        """Tokens in the KV cache."""
        return sum([job.kv_tokens for job in self._running.values()])

    def _begin_step(self, start_ns: int) -> None:
        """Fill a step as vLLM's scheduler does: running sequences, oldest first, then waiting ones.

        Every running sequence gets its share: decoding ones need one token each, and only the
        newest can be in the middle of its prefill, because no job is admitted behind it.
        """
        config = self._config
        budget = config.batched_tokens_max
        kv_free = config.kv_tokens - self._kv_used()
        decode_count = prefill_tokens = 0
        preempted_before = self._preemptions_total

        job: _Job | None
        for job in list(self._running.values()):
            is_decoding = job.kv_tokens >= job.prefill_tokens
            tokens = 1 if is_decoding else job.step_tokens(budget)
            if tokens > kv_free:
                while tokens > kv_free and job.job_id in self._running:
                    kv_free += self._preempt_newest()
            if preempted_before != self._preemptions_total and job.job_id not in self._running:
                break  # it was preempted, and before it all that are newer
            if is_decoding:
                decode_count += 1
            else:
                prefill_tokens += tokens
            job.kv_tokens += tokens
            budget -= tokens
            kv_free -= tokens

        # vLLM admits no job in a step that had to preempt.
        while budget > 0 and preempted_before == self._preemptions_total:
            job = self._head(start_ns)
            if job is None:
                break
            held = job.kv_tokens or self._cached_tokens(job, kv_free)
            tokens = job.step_tokens(budget, held)
            kv_needed = held + tokens
            if len(self._running) == config.sequences_max or kv_needed > kv_free:
                break
            self._running[job.job_id] = self._waiting.pop(job.job_id)
            job.cached_tokens = 0 if job.kv_tokens else held
            prefill_tokens += tokens
            job.kv_tokens = kv_needed
            budget -= tokens
            kv_free -= kv_needed

        assert self._running, "a step must run a job"
        step_ns = (
            config.step_base_ns
            + config.sequence_ns * decode_count
            + config.prefill_token_ns * prefill_tokens
            + config.context_token_ns * (config.kv_tokens - kv_free)
        )
        steps = 1
        if self._milestones_only and not prefill_tokens:
            steps = self._steps_alike(start_ns, kv_free, preempted_before)
        growth_ns = config.context_token_ns * decode_count
        self._stretch = Stretch(start_ns, step_ns, growth_ns, steps)
        self._step_end_ns = self._stretch.end_ns

    def _head(self, start_ns: int) -> _Job | None:
        """Return which job that was there at the start of a step is to be admitted next."""
        here = (job for job in self._waiting.values() if job.submitted_ns <= start_ns)
        return next(here, None)

    def _cached_tokens(self, job: _Job, kv_free: int) -> int:
        """Tokens of a job's prompt in the prefix cache, the last of the prompt never among them."""
        block = self._config.prefix_block_tokens
        if not block or not job.prefix:
            return 0
        while len(self._cached) * block > kv_free:
            self._cached.popitem(last=False)
        known = list(takewhile(self._cached.__contains__, job.prefix))
        for name in reversed(known):  # the end of a prompt is forgotten before its beginning
            self._cached.move_to_end(name)
        return min(len(known) * block, job.prompt_tokens - 1)

    def _cache(self, job: _Job) -> None:
        """Keep the blocks of a prompt whose prefill is complete."""
        if self._config.prefix_block_tokens:
            for name in reversed(job.prefix):
                self._cached[name] = None
                self._cached.move_to_end(name)

    def _steps_alike(self, start_ns: int, kv_free: int, preempted_before: int) -> int:
        """Count the steps, this one included, that will run exactly the sequences of this one."""
        if preempted_before != self._preemptions_total:
            return 1  # The next step may admit.
        if self._waiting and next(iter(self._waiting.values())).submitted_ns > start_ns:
            return 1  # The job at the head was refused, and the room only shrinks.
        left = [job.output_tokens - job.generated_count for job in self._running.values()]
        return min(*left, 1 + kv_free // len(left))

    def _preempt_newest(self) -> int:
        """Send the newest running sequence to the front of the queue; return the KV tokens it had.

        Its cache is lost: the prompt and what it generated are prefilled again.
        """
        job_id, job = self._running.popitem()
        kv_tokens, job.kv_tokens = job.kv_tokens, 0
        job.prefill_tokens = job.prompt_tokens + job.generated_count
        self._waiting[job_id] = job
        self._waiting.move_to_end(job_id, last=False)
        self._preemptions_total += 1
        return kv_tokens

    def _run_steps(self, steps: int) -> None:
        """Put the first steps of a stretch behind it, and begin the one after them."""
        if steps == 0:
            return
        for job in self._running.values():
            job.generated_count += steps
            job.kv_tokens += steps
        self._generated_tokens_total += steps * len(self._running)
        self._stretch.drop(steps)

    def _end_step(self, end_ns: int, events: list[TokenEvent]) -> None:
        """Give every sequence whose prefill is complete its next token."""
        self._run_steps(self._stretch.steps - 1)
        tells_all = not self._milestones_only
        for job in list(self._running.values()):
            if job.kv_tokens < job.prefill_tokens:
                continue
            index = job.generated_count
            job.generated_count = index + 1
            self._generated_tokens_total += 1
            is_last = index + 1 == job.output_tokens
            if index == 0:
                self._prompt_tokens_total += job.prompt_tokens
                self._cached_tokens_total += job.cached_tokens
                self._cache(job)
            if is_last or index == 0 or tells_all:
                events.append(TokenEvent(job.job_id, index, end_ns, is_last))
            if is_last:
                del self._running[job.job_id]
