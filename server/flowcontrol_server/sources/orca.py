"""Pure. ORCA load reports, which model servers put into the headers of their responses.

One header has three formats, told apart by its first word; two further headers name the format:

    endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.4, cpu_utilization=0.3
    endpoint-load-metrics: JSON {"named_metrics": {"kv_cache_usage_perc": 0.4}}
    endpoint-load-metrics: BIN <base64 of xds.data.orca.v3.OrcaLoadReport>
    endpoint-load-metrics-json: {"named_metrics": ...}
    endpoint-load-metrics-bin: <base64>

vLLM sends TEXT or JSON, whichever the request asks for in a header of the same name, with the named
metrics kv_cache_usage_perc and num_requests_waiting. In TEXT, vLLM writes name=value and Envoy
name:value; both are read. A report that is invalid in part is ignored as a whole.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from math import isfinite

from google.protobuf.message import DecodeError

from flowcontrol_server.common.envoy_messages import OrcaLoadReport
from flowcontrol_server.sources.engine_metrics import COUNT_MAX, EngineLoad

HEADERS = ("endpoint-load-metrics", "endpoint-load-metrics-json", "endpoint-load-metrics-bin")
"""Names of the response headers, in lower case; the first that is present is read."""
LENGTH_MAX = 16_384
"""Characters of a report; a longer one is not read."""
_WAITING = ("num_requests_waiting", "vllm:num_requests_waiting")
_RUNNING = ("num_requests_running", "vllm:num_requests_running")
_KV_USAGE = ("kv_cache_usage_perc", "kv_cache_utilization", "vllm:kv_cache_usage_perc")
_PREFIX = "named_metrics."


def read_report(headers: Mapping[str, str]) -> EngineLoad | None:
    """Return the load reported in the headers of a response.

    None: there is no report, it cannot be read, or it lacks the number of waiting requests.

    Args:
        headers: names in lower case.
    """
    name = next((name for name in HEADERS if name in headers), None)
    if name is None or len(headers[name]) > LENGTH_MAX:
        return None
    word, _, rest = headers[name].strip().partition(" ")
    kind, text = (word, rest) if word in _FORMATS else (_KINDS[name], headers[name])
    try:
        numbers = dict(_FORMATS[kind](text.strip()))
    except (ValueError, OverflowError, DecodeError, RecursionError):
        return None
    if not all(isfinite(value) for value in numbers.values()):
        return None
    waiting = _count(numbers, _WAITING)
    if waiting is None:
        return None
    return EngineLoad(waiting, _count(numbers, _RUNNING), _part(numbers, _KV_USAGE))


def _text(text: str) -> Iterable[tuple[str, float]]:
    for entry in text.split(","):
        if entry.strip():
            separator = "=" if "=" in entry else ":"
            name, _, value = entry.rpartition(separator)
            if not name.strip():
                raise ValueError(entry)
            yield name.strip().removeprefix(_PREFIX), float(value)


def _json(text: str) -> Iterable[tuple[str, float]]:
    report = json.loads(text)
    if not isinstance(report, dict):
        raise ValueError(text)  # noqa: TRY004 - a malformed value, as the other two raise
    for name, value in report.items():
        if name in {"named_metrics", "namedMetrics"} and isinstance(value, dict):
            yield from ((key, _number(each)) for key, each in value.items())


def _binary(text: str) -> Iterable[tuple[str, float]]:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(text) from error
    yield from OrcaLoadReport.FromString(data).named_metrics.items()


_FORMATS = {"TEXT": _text, "JSON": _json, "BIN": _binary}
_KINDS = dict(zip(HEADERS, _FORMATS, strict=True))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)  # noqa: TRY004 - a malformed value, as everything here
    return float(value)


def _count(numbers: Mapping[str, float], names: tuple[str, ...]) -> int | None:
    value = next((numbers[name] for name in names if name in numbers), None)
    return int(value) if value is not None and 0 <= value <= COUNT_MAX else None


def _part(numbers: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    value = next((numbers[name] for name in names if name in numbers), None)
    return value if value is not None and 0 <= value <= 1 else None
