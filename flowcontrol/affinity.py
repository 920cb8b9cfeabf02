"""Pure. Which endpoint served the beginning of a prompt last, so that its cache is used again.

A prompt is known by the hashes of its blocks, each of which stands for the prompt up to its end:
two prompts share a hash if, and only if, they begin alike up to there. What is remembered is a
hint. Whether the endpoint still has the cache is not known, and it does not decide whether a
request may go there: `EndpointPicker` bounds what it may add to the load of one endpoint.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final, final

WORTH: Final = 0.5
"""Part of a prompt that must have been served: a shorter beginning, which all prompts of an
application may have, saves less work than an uneven load costs."""
BLOCKS_MAX: Final = 131_072
"""Blocks remembered, the last to be used: about 20 MB, 2,000 prompts of 64 blocks."""


@final
class PrefixAffinity:
    """Remembers, for each block of a prompt, the endpoint that was sent it last.

    Args:
        blocks_max: blocks remembered; the one that was used least lately is forgotten first.
    """

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._served: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._served)

    def endpoints(self, prefix: Sequence[int]) -> Iterator[str]:
        """Yield endpoints that served much of the prompt, the one of the longest part first.

        Args:
            prefix: hashes of the prompt's blocks, in order. O(blocks).
        """
        last = ""
        least = ceil(len(prefix) * WORTH)
        for block in reversed(prefix[least - 1 :]):
            address = self._served.get(block, "")
            if address and address != last:
                last = address
                yield address

    def served(self, prefix: Sequence[int], address: str) -> None:
        """Note where a prompt was sent. O(blocks)."""
        served = self._served
        for block in prefix:
            served[block] = address
            served.move_to_end(block)
        while len(served) > self._blocks_max:
            served.popitem(last=False)
