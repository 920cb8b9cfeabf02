"""Pure. How many tokens will a request use? Estimated at arrival, corrected at settlement.

The prompt: its tokens if Envoy knows them, else the announced size over the bytes per token seen so
far. The answer: the mean length of answers so far, at most what the client asked for. "So far"
means: of this flow with this model; else of all flows with this model; else a default.

Running means are kept of answers, of prompts and of their sizes. Bytes per token is the ratio of
the means, not the mean of the ratios, so that small requests do not outvote large ones. The means
follow a tenant that changes.

A large body is usually a picture or a recording, of a hundred times as many bytes per token as
text. So bytes per token are learnt apart of bodies above `LARGE_BYTES`, and until some are known,
the bytes beyond that are taken to hold no token.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Final, NamedTuple, final

from flowcontrol.config import TokenPrices
from flowcontrol.events import Settled
from flowcontrol.memory import KEPT_MAX, Estimate
from flowcontrol.request import Request

BYTES_PER_TOKEN: Final = 4.0
LARGE_BYTES: Final = 262_144
"""Size of a body above which it is seldom text: that would be 65,536 tokens."""
OUTPUT_DEFAULT: Final = 128.0
"""Expected answer of a model that has not answered yet, in tokens."""
_MEMORY: Final = 32
"""Requests in a running mean: the first 32 count alike, each later one counts 1/32."""
_LEARNED_MAX = 10_000
"""Flows and models remembered, the latest updated: clients can invent any number of ids."""


class Tokens(NamedTuple):
    """Tokens of one request."""

    input: float
    output: float
    cached: float = 0.0
    """Part of the input that the model server had in its prefix cache."""


def cost(tokens: Tokens, prices: TokenPrices) -> float:
    """Return the cost of these tokens; at least that of one input token."""
    fresh = tokens.input - tokens.cached
    if fresh < 0:
        fresh = 0.0
    total = (
        prices.input * fresh + prices.cached_input * tokens.cached + prices.output * tokens.output
    )
    return total if total > prices.input else prices.input


@final
class _Prompts:
    """Running means of prompts; a count of 0 means that nothing is known."""

    __slots__ = ("bytes", "count", "tokens")

    def __init__(self, count: int = 0, tokens: float = 0.0, byte_size: float = 0.0) -> None:
        self.count = count
        self.tokens = tokens
        """Mean tokens of a prompt."""
        self.bytes = byte_size
        """Mean size of the same requests."""

    def learn(self, tokens: int, byte_size: int) -> None:
        """Add the length and size of one prompt."""
        self.count = min(self.count + 1, _MEMORY)
        self.tokens += (tokens - self.tokens) / self.count
        self.bytes += (byte_size - self.bytes) / self.count


@final
class _Learned:
    """Running means of one kind of request; a count of 0 means that nothing is known."""

    __slots__ = ("answers", "large", "output", "small")

    def __init__(self) -> None:
        self.answers = 0
        self.output = 0.0
        """Mean tokens of an answer."""
        self.small = _Prompts()
        self.large = _Prompts()
        """Of bodies above `LARGE_BYTES`."""

    def learn_output(self, tokens: int) -> None:
        """Add the length of one answer."""
        self.answers = min(self.answers + 1, _MEMORY)
        self.output += (tokens - self.output) / self.answers

    def prompts(self, byte_size: int) -> _Prompts:
        """Return what is known of prompts in bodies like one of this size."""
        return self.large if byte_size > LARGE_BYTES else self.small


@final
class TokenEstimator:
    """Estimates tokens, and learns from actual usage. O(1)."""

    def __init__(self) -> None:
        self._learned: OrderedDict[tuple[str | None, str], _Learned] = OrderedDict()
        """By flow and model, and by model alone."""

    def estimate(self, request: Request) -> Tokens:
        """Return the expected tokens of a request."""
        size, answer = request.byte_size, OUTPUT_DEFAULT
        prompt = min(size, LARGE_BYTES) / BYTES_PER_TOKEN
        if self._learned:
            for key in ((None, request.model), (request.flow_id, request.model)):
                learned = self._learned.get(key)
                if learned is None:
                    continue
                if learned.answers:
                    answer = learned.output
                prompts = learned.prompts(size)
                if prompts.count:
                    prompt = size * (prompts.tokens / prompts.bytes)
        if request.input_tokens is not None:
            prompt = float(request.input_tokens)
        if request.output_tokens_max is not None and request.output_tokens_max < answer:
            answer = float(request.output_tokens_max)
        return Tokens(prompt if prompt > 1 else 1.0, answer)

    def learn(self, request: Request, settled: Settled) -> None:
        """Learn from the actual usage of a request; a failed one is ignored."""
        output, prompt = settled.output_tokens, settled.input_tokens
        is_measured = prompt is not None and request.byte_size > 0
        if not settled.is_success or (output is None and not is_measured):
            return
        for key in ((request.flow_id, request.model), (None, request.model)):
            learned = self._learned.get(key)
            if learned is None:
                learned = self._learned[key] = _Learned()
            self._learned.move_to_end(key)
            if output is not None:
                learned.learn_output(output)
            if prompt is not None and is_measured:
                learned.prompts(request.byte_size).learn(prompt, request.byte_size)
        while len(self._learned) > _LEARNED_MAX:
            self._learned.popitem(last=False)

    def remember(self) -> tuple[Estimate, ...]:
        """Return the latest updated means, the latest last."""
        latest = list(islice(reversed(self._learned.items()), KEPT_MAX))
        return tuple(
            Estimate(
                flow_id,
                model,
                answers=each.answers,
                output=each.output,
                prompts=each.small.count,
                prompt=each.small.tokens,
                bytes=each.small.bytes,
                large_prompts=each.large.count,
                large_prompt=each.large.tokens,
                large_bytes=each.large.bytes,
            )
            for (flow_id, model), each in reversed(latest)
        )

    def restore(self, estimates: Iterable[Estimate]) -> None:
        """Go on with what was known before, where nothing is known yet."""
        for each in estimates:
            key = (each.flow_id, each.model)
            if key not in self._learned:
                learned = self._learned[key] = _Learned()
                learned.answers, learned.output = each.answers, each.output
                learned.small = _Prompts(each.prompts, each.prompt, each.bytes)
                learned.large = _Prompts(each.large_prompts, each.large_prompt, each.large_bytes)
