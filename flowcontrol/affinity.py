"""Pure. Which endpoint last served the beginning of a prompt, so that its cache is used again.

A prompt is identified by the hashes of its blocks. Each hash covers the prompt up to the end of its
block: two prompts share it if, and only if, they are the same up to there. The memory is a hint:
whether the endpoint still has the cache is unknown, and `EndpointPicker` bounds what affinity may
add to the load of one endpoint.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final, final

WORTH: Final = 0.5
"""Part of a prompt that must have been served. A shorter beginning, which all prompts of an
application may share, saves less work than an uneven load costs."""
BLOCKS_MAX: Final = 131_072
"""Blocks remembered, the most recently used: about 20 MB, 2,000 prompts of 64 blocks."""


@final
class PrefixAffinity:
    """Remembers, for each block of a prompt, the endpoint that it was last sent to.

    Args:
        blocks_max: blocks remembered; the least recently used is forgotten first.
    """

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._served: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._served)

    def endpoints(self, prefix: Sequence[int]) -> Iterator[str]:
        """Yield endpoints that served much of the prompt, the one with the longest part first.

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
