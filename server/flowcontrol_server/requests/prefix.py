"""Pure. Hashes of what a prompt begins with, for the picker that looks for its cached beginning.

Of a body they begin where the prompt does, so that fields before it make no difference. The hashes
are those of this process alone.
"""

import re
from typing import Final

BLOCK_BYTES: Final = 1_024
"""Some 256 tokens. Shorter blocks find more of a prompt and take more memory."""
_BLOCKS_MAX: Final = 64
_PROMPT: Final = re.compile(rb'"(?:messages|prompt|input|system|instructions|contents)"\s*:')
_SEARCHED_BYTES: Final = 4_096


def prefix_of_body(model: str, body: bytes) -> tuple[int, ...]:
    """Return the hash of each whole block of a prompt, of 64 blocks at most, with all before it.

    Args:
        model: that was asked for; what one model has cached is of no use to another.
        body: as far as it has come.
    """
    found = _PROMPT.search(body, 0, _SEARCHED_BYTES)
    begin = 0 if found is None else found.start()
    count = min((len(body) - begin) // BLOCK_BYTES, _BLOCKS_MAX)
    hashes: list[int] = []
    before = hash(model)
    for at in range(begin, begin + count * BLOCK_BYTES, BLOCK_BYTES):
        before = hash((before, body[at : at + BLOCK_BYTES]))
        hashes.append(before)
    return tuple(hashes)


def prefix_of_flow(flow_id: str) -> tuple[int, ...]:
    """Return what stands for the prompt of a request whose body is not seen: its flow."""
    return (hash(flow_id),)
