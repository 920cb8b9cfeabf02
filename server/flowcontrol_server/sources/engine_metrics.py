"""Pure. The load that model servers report, read from the metrics page of each engine.

vllm       waiting vllm:num_requests_waiting, running vllm:num_requests_running,
           KV cache vllm:kv_cache_usage_perc (before V1 vllm:gpu_cache_usage_perc), which holds the
           blocks of vllm:cache_config_info, num_gpu_blocks of block_size tokens
sglang     sglang:num_queue_reqs, sglang:num_running_reqs, sglang:token_usage; the cache holds
           sglang:max_total_num_tokens
tgi        tgi_queue_size, tgi_batch_current_size; no metric of its KV cache
triton     nv_trt_llm_request_metrics by request_type: waiting, or active less scheduled;
           scheduled; nv_trt_llm_kv_cache_block_metrics by kv_cache_block_type: fraction, or used
           over max. Without TensorRT-LLM only nv_inference_pending_request_count
llama.cpp  llamacpp:requests_deferred, llamacpp:requests_processing; until mid 2025 also
           llamacpp:kv_cache_usage_ratio
ollama     has no metrics page: count requests in flight, or let the limit adapt

From their documentation: vLLM "Production Metrics"; SGLang "Production Metrics" (started with
--enable-metrics); TGI "Metrics"; Triton "Metrics" (on port 8002) and the TensorRT-LLM backend's
README; llama.cpp tools/server README (started with --metrics); ollama/ollama#3144.

Absence is never taken for zero. A page without the number of waiting requests yields no load; any
other missing value is None.
"""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from math import isfinite
from typing import NamedTuple, final

COUNT_MAX = 10**9
"""A larger count is invalid."""


class Engine(Enum):
    """The engine that wrote a metrics page."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TGI = "tgi"
    TRITON = "triton"
    LLAMACPP = "llama.cpp"


@final
class EngineLoad(NamedTuple):
    """The load that one model server reports."""

    waiting: int
    """Requests queued inside the engine."""
    running: int | None
    kv_usage: float | None
    """Part of the KV cache in use, from 0 to 1."""
    kv_tokens: int | None = None
    """Tokens that its KV cache holds."""


class _Sample(NamedTuple):
    labels: Mapping[str, str]
    value: float


Samples = Mapping[str, list[_Sample]]
"""By metric name."""
LINE_BYTES_MAX = 8192
"""A longer line is not read; vLLM's longest has 300 bytes."""
LABELS_MAX = 64
"""A line with more labels is not read."""
_LINES_MAX = 1000
"""Of one metric; further lines are not read."""
# Possessive quantifiers and atomic groups do not backtrack, so a line takes time in proportion to
# its length. With plain ones, 40 KB of a label without a value took 4.5 s. Groups are atomic,
# because a possessive repetition of a group matches half a repetition in Python 3.11.2.
_LABEL = (
    rb'[ \t]*+([A-Za-z_][A-Za-z0-9_]*+)[ \t]*+=[ \t]*+"([^"\\]*+(?>(?:\\.[^"\\]*+)*))"[ \t]*+,?+'
)
_NEXT_LABEL = re.compile(_LABEL)
_REST = re.compile(rb"(?>(?:\{((?>(?:%b)*))[ \t]*+\})?)[ \t]++(?P<value>\S{1,64}+)(?!\S)" % _LABEL)
"""The rest of a line after the name: labels, if any, and the value."""
_COUNT = re.compile("[0-9]{1,10}")
"""A count in a label; a number with hundreds of digits does not fit a float."""


def read_load(page: bytes, engine: Engine | None = None) -> EngineLoad | None:
    """Return the load in a metrics page; None: it lacks the number of waiting requests.

    Args:
        page: in Prometheus's text format; any other content yields None.
        engine: the engine that wrote it; None: detected by the names of its metrics.
    """
    for each in Engine if engine is None else (engine,):
        names, read = _ENGINES[each]
        if any(name.encode() in page for name in names[:2]):
            load = read({name: _series(page, name.encode()) for name in names})
            if load is not None:
                return load
    return None


def before_first_request(page: bytes) -> EngineLoad | None:
    """Return a load of zero for a metrics page without a load metric of any engine; else None.

    Several engines add a metric to their page only once it has a value, at their first request.
    So this holds only for endpoints that have not served one; later, absence is not zero.
    """
    is_page = not page.strip() or b"# TYPE " in page or b"# HELP " in page
    return EngineLoad(0, None, None) if is_page and read_load(page) is None else None


def _series(page: bytes, name: bytes) -> list[_Sample]:
    """Return the series of one metric.

    They are found by name rather than line by line: a page of vLLM has a thousand lines, of which
    four matter, and matching each line took five times as long.
    """
    found: list[_Sample] = []
    at = page.find(name)
    for _ in range(_LINES_MAX):
        if at < 0:
            break
        end = page.find(b"\n", at)
        end = len(page) if end < 0 else end
        is_line = (at == 0 or page[at - 1 : at] == b"\n") and end - at <= LINE_BYTES_MAX
        match = _REST.match(page, at + len(name), end) if is_line else None
        value = _number(match["value"]) if match else None
        if match is not None and value is not None:
            labels = _NEXT_LABEL.findall(match[1] or b"")
            if len(labels) <= LABELS_MAX:
                found.append(_Sample({_text(key): _text(text) for key, text in labels}, value))
        at = page.find(name, end)
    return found


def _text(label: bytes) -> str:
    return label.decode(errors="replace")


def _vllm(samples: Samples) -> EngineLoad | None:
    # One series per engine core of a data-parallel server: requests add up, caches are averaged.
    return _load(
        _sum(samples.get("vllm:num_requests_waiting")),
        _sum(samples.get("vllm:num_requests_running")),
        _mean(samples.get("vllm:kv_cache_usage_perc") or samples.get("vllm:gpu_cache_usage_perc")),
        _blocks(samples.get("vllm:cache_config_info")),
    )


def _sglang(samples: Samples) -> EngineLoad | None:
    # With metrics for all schedulers, every tensor-parallel rank repeats the values of its group.
    return _load(
        _sum(_once_per_group(samples.get("sglang:num_queue_reqs"))),
        _sum(_once_per_group(samples.get("sglang:num_running_reqs"))),
        _mean(_once_per_group(samples.get("sglang:token_usage"))),
        _sum(_once_per_group(samples.get("sglang:max_total_num_tokens"))),
    )


def _tgi(samples: Samples) -> EngineLoad | None:
    waiting, running = samples.get("tgi_queue_size"), samples.get("tgi_batch_current_size")
    return _load(_sum(waiting), _sum(running), None)


def _triton(samples: Samples) -> EngineLoad | None:
    def of(kind: str) -> float | None:
        requests = samples.get("nv_trt_llm_request_metrics", ())
        return _sum([each for each in requests if each.labels.get("request_type") == kind])

    def blocks(kind: str) -> float | None:
        cache = samples.get("nv_trt_llm_kv_cache_block_metrics", ())
        return _sum([each for each in cache if each.labels.get("kv_cache_block_type") == kind])

    waiting, active, scheduled = of("waiting"), of("active"), of("scheduled")
    if waiting is None and active is not None and scheduled is not None:
        waiting = max(0.0, active - scheduled)  # two gauges, read one after the other
    if waiting is None:
        return _load(_sum(samples.get("nv_inference_pending_request_count")), None, None)
    fraction, used, most = blocks("fraction"), blocks("used"), blocks("max")
    if fraction is None and used is not None and most:
        fraction = used / most
    return _load(waiting, scheduled, fraction)


def _llamacpp(samples: Samples) -> EngineLoad | None:
    return _load(
        _sum(samples.get("llamacpp:requests_deferred")),
        _sum(samples.get("llamacpp:requests_processing")),
        _mean(samples.get("llamacpp:kv_cache_usage_ratio")),
    )


_ENGINES: Mapping[Engine, tuple[tuple[str, ...], Callable[[Samples], EngineLoad | None]]] = {
    Engine.VLLM: (
        (
            *("vllm:num_requests_waiting", "vllm:num_requests_running"),
            *("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "vllm:cache_config_info"),
        ),
        _vllm,
    ),
    Engine.SGLANG: (
        (
            *("sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage"),
            "sglang:max_total_num_tokens",
        ),
        _sglang,
    ),
    Engine.TGI: (("tgi_queue_size", "tgi_batch_current_size"), _tgi),
    Engine.TRITON: (
        (
            *("nv_trt_llm_request_metrics", "nv_inference_pending_request_count"),
            "nv_trt_llm_kv_cache_block_metrics",
        ),
        _triton,
    ),
    Engine.LLAMACPP: (
        (
            *("llamacpp:requests_deferred", "llamacpp:requests_processing"),
            "llamacpp:kv_cache_usage_ratio",
        ),
        _llamacpp,
    ),
}
"""Metric names and reader of each engine; without either of the first two there is no load."""


def _blocks(samples: list[_Sample] | None) -> float | None:
    """Return the tokens of all blocks of all engine cores; None: a core lacks one number."""
    tokens = 0.0
    for sample in samples or ():
        sizes = [sample.labels.get(name, "") for name in ("num_gpu_blocks", "block_size")]
        if not all(map(_COUNT.fullmatch, sizes)):
            return None
        tokens += int(sizes[0]) * int(sizes[1])
    return tokens or None


def _load(
    waiting: float | None,
    running: float | None,
    usage: float | None,
    kv_tokens: float | None = None,
) -> EngineLoad | None:
    if waiting is None:
        return None
    is_usage = usage is not None and 0 <= usage <= 1
    return EngineLoad(
        waiting=int(waiting),
        running=None if running is None else int(running),
        kv_usage=usage if is_usage else None,
        kv_tokens=int(kv_tokens) if kv_tokens and kv_tokens <= COUNT_MAX else None,
    )


def _once_per_group(samples: list[_Sample] | None) -> list[_Sample] | None:
    groups: dict[tuple[str, str], _Sample] = {}
    for sample in samples or ():
        key = (sample.labels.get("model_name", ""), sample.labels.get("dp_rank", ""))
        if key not in groups or groups[key].value < sample.value:
            groups[key] = sample
    return list(groups.values())


def _sum(samples: list[_Sample] | None) -> float | None:
    return sum(sample.value for sample in samples) if samples else None


def _mean(samples: list[_Sample] | None) -> float | None:
    return sum(sample.value for sample in samples) / len(samples) if samples else None


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and 0 <= value <= COUNT_MAX else None
