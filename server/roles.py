"""Pure. What an endpoint does."""

from enum import Enum


class Role(Enum):
    """What an endpoint does, where prefill and decode run apart."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"
