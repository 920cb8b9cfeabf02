"""Pure. How many tokens will a request take? Guessed at arrival, corrected at settlement.

The prompt: what Envoy says, else the announced size at 4 bytes a token. The answer: the average of
what this flow got from this model before, else what anybody got from it, never more than the client
asked for.
"""

from collections import OrderedDict
from typing import NamedTuple, final

from flowcontrol.config import TokenPrices
from flowcontrol.request import Request

BYTES_PER_TOKEN = 4
OUTPUT_DEFAULT = 128
"""Expected of a model nobody has been answered by yet."""
_MEMORY = 32
"""Answers an average remembers: the first 32 count alike, later ones 1/32 each."""
_AVERAGES_MAX = 10_000
"""Averages kept; the one longest unused goes first."""


class Tokens(NamedTuple):
    """What a request takes."""

    input: float
    output: float
    cached: float = 0.0
    """Of the input: what the model server had in its prefix cache."""


def cost(tokens: Tokens, prices: TokenPrices) -> float:
    """Return the cost of that many tokens; at least one input token's."""
    fresh = max(0.0, tokens.input - tokens.cached)
    total = (
        prices.input * fresh + prices.cached_input * tokens.cached + prices.output * tokens.output
    )
    return max(prices.input, total)


@final
class TokenEstimator:
    """Guesses tokens and learns from what was used. O(1)."""

    def __init__(self) -> None:
        self._averages: OrderedDict[tuple[str | None, str], tuple[float, int]] = OrderedDict()
        """By flow and model, and by model alone: the average and how much it rests on."""

    def estimate(self, request: Request) -> Tokens:
        """Return what the request will take, as far as can be told now."""
        size = request.byte_size / BYTES_PER_TOKEN
        prompt = size if request.input_tokens is None else float(request.input_tokens)
        answer = self._average(request.flow_id, request.model)
        if request.output_tokens_max is not None:
            answer = min(answer, request.output_tokens_max)
        return Tokens(max(1.0, prompt), answer)

    def learn(self, flow_id: str, model: str, output_tokens: int) -> None:
        """Take in how long one answer was."""
        for key in ((flow_id, model), (None, model)):
            average, count = self._averages.get(key, (0.0, 0))
            count = min(count + 1, _MEMORY)
            self._averages[key] = (average + (output_tokens - average) / count, count)
            self._averages.move_to_end(key)
        while len(self._averages) > _AVERAGES_MAX:
            self._averages.popitem(last=False)

    def _average(self, flow_id: str, model: str) -> float:
        for key in ((flow_id, model), (None, model)):
            known = self._averages.get(key)
            if known is not None:
                return known[0]
        return OUTPUT_DEFAULT
