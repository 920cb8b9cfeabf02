"""Pure. Hashes of the beginning of a prompt, for the picker that looks for a cached prefix.

In a body, hashing begins at the prompt, so fields before it make no difference. The hashes are
valid in this process only.
"""

import re
from typing import Final

BLOCK_BYTES: Final = 1_024
"""About 256 tokens. Shorter blocks find more of a prompt and take more memory."""
_BLOCKS_MAX: Final = 64
_PROMPT: Final = re.compile(rb'"(?:messages|prompt|input|system|instructions|contents)"\s*:')
_SEARCHED_BYTES: Final = 4_096


def prefix_of_body(model: str, body: bytes) -> tuple[int, ...]:
    """Return the hash of the prompt up to the end of each whole block, for the first 64 blocks.

    Args:
        model: the model requested; a prefix cached by one model is of no use to another.
        body: the part of the body that has come.
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
    """Return a hash of the flow, in place of the prompt of a request whose body is unseen."""
    return (hash(flow_id),)
