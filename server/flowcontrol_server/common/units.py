"""Pure. Durations as Go writes them, quantities as Kubernetes writes them, and whole numbers."""

import re

_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_SUFFIX = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)},
}
_PART = re.compile(r"([0-9]+(?:[.][0-9]+)?|[.][0-9]+)(ns|us|µs|ms|s|m|h)")
_QUANTITY = re.compile(r"([0-9]+)(|[kMGTPE]|[KMGTPE]i)")
_LENGTH_MAX = 64


def parse_duration(text: str) -> int | None:
    """Return the nanoseconds of a Go duration such as 90s, 1m30s or 1.5h; None: it is not one."""
    if not text or len(text) > _LENGTH_MAX or not re.fullmatch(f"({_PART.pattern})+", text):
        return None
    return round(sum(float(number) * _UNIT_NS[unit] for number, unit in _PART.findall(text)))


def parse_quantity(text: str) -> int | None:
    """Return the value of a whole Kubernetes quantity such as 20k or 4Gi; None: it is not one."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _LENGTH_MAX else None
    return int(match[1]) * _SUFFIX[match[2]] if match else None


def parse_whole(text: str, digits_max: int) -> int | None:
    """Return the number written in at most so many ASCII digits; None: it is not one."""
    is_whole = text.isascii() and text.isdigit() and len(text) <= digits_max
    return int(text) if is_whole else None


def format_duration(duration_ns: int) -> str:
    """Return the duration in the largest unit that keeps it whole, as in 300s or 1500ms."""
    for unit in ("s", "ms", "us", "ns"):
        if duration_ns % _UNIT_NS[unit] == 0:
            return f"{duration_ns // _UNIT_NS[unit]}{unit}"
    return f"{duration_ns}ns"
