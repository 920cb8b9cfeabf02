"""Every parser of what others wrote, against what nobody would write: no other error, and in time.

An input is something ahead, something that repeats, and something behind. The first ones repeat
each of a parser's own words at each place of its language, the others are random. An input must end
within a time, and four times of it must not take more than eight times as long. As a script it goes
on for as long as it is told to, with other seeds each time, and prints the input that failed:

    make fuzz                                             # every target, a minute each
    make fuzz ARGS="orca yaml --seconds 600 --seed 7"     # these, ten minutes, from that seed on
    pip install atheris                                   # it thinks inputs up by coverage:
    python tests/fuzz/parsers.py --atheris orca -max_total_time=300 [CORPUS] [libFuzzer's options]

The suite does the same shortly (test_parsers_fuzz.py).
"""

import argparse
import asyncio
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, final

import structlog
from pydantic_core import PydanticCustomError

from flowcontrol.errors import ConfigError, LedgerError
from flowcontrol.simulation.traces import AZURE_HEADER, TraceError, read_trace
from flowcontrol_server.admin.guard import Guard
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.common.addresses import parse_address
from flowcontrol_server.common.units import parse_duration, parse_quantity
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.config.admin import Secret
from flowcontrol_server.config.settings import load_policies, load_settings
from flowcontrol_server.config.sources import Dns
from flowcontrol_server.ledger.reader import read_entries
from flowcontrol_server.requests.classify import ExemptPaths, Intake, classify, path_of
from flowcontrol_server.requests.codec import MalformedMessageError, decode
from flowcontrol_server.requests.dialects import dialect_of, error_body
from flowcontrol_server.requests.exchange import Message
from flowcontrol_server.requests.log_codec import REPORT_FORMAT, REPORT_TAG, decode_log
from flowcontrol_server.requests.response_reader import ResponseReader
from flowcontrol_server.requests.rules import Condition, Rule, parse_fact
from flowcontrol_server.sources import dns, orca
from flowcontrol_server.sources.endpoint_file import read_endpoints
from flowcontrol_server.sources.engine_metrics import read_load
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.tools.simulate.scenario import load_scenario
from tests.support.dns_server import SRV, A, name_server
from tests.support.envoy_lua import read_of
from tests.support.told import eventually

SECONDS_MAX = 2.0
"""Of CPU time, for one input."""
_QUICK_S = 0.02
"""What takes less is not looked at further: it is noise."""
_GROWTH_MAX = 8.0
"""What four times the input may take; four would be linear, sixteen is quadratic."""
_ROUNDS = 8
"""How often both are measured before they are compared for good: a busy machine once made linear
growth look like 10.4."""
_REMOVED_AT_EXIT = tempfile.TemporaryDirectory(prefix="fuzz-")
_FOLDER = Path(_REMOVED_AT_EXIT.name)
_USAGE_KEYS = {
    *("input_tokens", "output_tokens", "cached_tokens"),
    *("cache_read_tokens", "cache_creation_tokens"),
    *("total_tokens", "error", "first_token_late_ms"),
}
_MINIMAL = b"apiVersion: flowcontrol/v1alpha1\nkind: FlowControlConfig\npool: llama\n"
_YAML: tuple[bytes, ...] = (
    *(b"[", b"]", b"{", b"}", b"- ", b"? ", b": ", b", ", b"\n", b"  ", b"a", b"a: ", b"'", b'"'),
    *(b"&a ", b"*a", b"<<: *a\n", b"<<: [*a, *a]", b"|\n", b">\n", b"# ", b"---\n", b"...\n"),
    *(b"1", b":1", b"0x", b"f", b".", b"1e9", b"2026-01-01", b"!!int ", b"!!binary ", b"!!omap "),
    *(b"\\", b"\\x41", b"\r", b"\t", b"\xc3\xa9", b"\xff", b"%YAML 1.1\n", b"&b [*a, *a]\n"),
)


@final
class Target(NamedTuple):
    """A parser."""

    read: Callable[[bytes], object]
    """Raises nothing but what is no surprise."""
    words: tuple[bytes, ...]
    """What its language is made of."""
    bytes_max: int = 1 << 16
    """Of an input."""
    places: tuple[tuple[bytes, bytes], ...] = ((b"", b""),)
    """What stands ahead of and behind a place where words may repeat."""


def _file(read: Callable[[Path], object], *expected: type[Exception]) -> Callable[[bytes], None]:
    """Return how to have a reader of files read bytes; each has a file of its own."""
    path = _FOLDER / f"{len(list(_FOLDER.iterdir()))}.yaml"
    path.touch()

    def reading(data: bytes) -> None:
        """Write a file, and have it read."""
        path.write_bytes(data)
        with suppress(*expected):
            read(path)

    return reading


def _objectives(data: bytes) -> None:
    folder = _FOLDER / "objectives"
    folder.mkdir(exist_ok=True)
    (folder / "any.yaml").write_bytes(data)
    source = ObjectiveFolder(folder, "llama")
    source.read()
    for problem in source.problems.values():
        assert "cannot be read: " not in problem or "UTF-8" in problem, problem


def _settings(data: bytes) -> None:
    """Settings that begin as they should: else the rest would never be looked at."""
    _configuration(_MINIMAL + data)


_configuration = _file(load_settings, ConfigError)


def _log(data: bytes) -> None:
    """Bytes, and entries with a report made of them."""
    with suppress(MalformedMessageError):
        list(decode_log(data))
    message = envoy_messages.StreamAccessLogsMessage()
    for line in data.decode("latin-1").split("\n")[:1000]:
        message.http_logs.log_entry.add().common_properties.custom_tags[REPORT_TAG] = line
    entries = list(decode_log(message.SerializeToString()))
    assert len(entries) == len(message.http_logs.log_entry)


def _orca(data: bytes) -> None:
    text = data.decode("latin-1")
    for name in orca.HEADERS:
        load = orca.read_report({name: text})
        assert load is None or load.waiting >= 0


def _rules() -> Intake:
    facts = [parse_fact(text) for text in ("header:x-tenant", "metadata:jwt:sub:a", "body:stream")]
    rules = tuple(
        Rule(match=(Condition(fact, "a*"),), objective=fact, flow_id=fact) for fact in facts if fact
    )
    return Intake(exempt=ExemptPaths(("/a*", "/health")), rules=rules, input_tokens=facts[0])


_INTAKE = _rules()
_NAMES = (":path", "content-length", "content-type", "x-tenant", "x-llm-d-inference-ttl")
_NUMBERS = ("x-slo-ttft-ms", "x-request-id", "x-llm-d-inference-fairness-id")


def _headers(data: bytes) -> None:
    """A value in every header that is read, and in the metadata."""
    message = envoy_messages.ProcessingRequest()
    for name in (*_NAMES, *_NUMBERS):
        message.request_headers.headers.headers.add(key=name, raw_value=data)
    claims = message.metadata_context.filter_metadata["jwt"].fields["sub"].struct_value
    claims.fields["a"].list_value.values.add().string_value = data.decode("latin-1")
    read = decode(message.SerializeToString())
    assert isinstance(read, Message)
    classify(read.headers, read.metadata or {}, _INTAKE)
    path = path_of(read.headers)
    assert not _INTAKE.exempt.passes("POST", path)
    assert error_body(dialect_of(path, read.headers["content-type"]), 429, "full", "wait")


def _messages(data: bytes) -> None:
    with suppress(MalformedMessageError):
        message = decode(data)
        if isinstance(message, Message):
            classify(message.headers, message.metadata or {}, _INTAKE)


def _numbers(data: bytes) -> None:
    """Durations, quantities and addresses, as headers and settings have them."""
    text = data.decode(errors="replace")
    for read in (parse_duration, parse_quantity):
        value = read(text)
        assert value is None or value >= 0
    with suppress(PydanticCustomError):
        assert 0 < parse_address(text).port < 2**16


def _authorization(data: bytes) -> None:
    """A token that is not ours lets nobody in."""
    guard = Guard(Secret(None))
    for scheme in ("", "Bearer ", "Basic "):
        said = scheme + data.decode("latin-1")
        assert not said or guard.refusal(changes=True, is_local=True, authorization=said)


def _trace(data: bytes) -> None:
    with suppress(TraceError):
        read_trace(data.decode("latin-1").splitlines())


def _usage(data: bytes) -> None:
    """Envoy's script: in one piece, and in small ones."""
    assert read_of(data).keys() <= _USAGE_KEYS
    read_of(*(data[at : at + 3] for at in range(0, len(data), 3)))


def _response(data: bytes) -> None:
    """A response of each kind that passes through here: in one piece, and in small ones."""
    for kind in ("text/event-stream", "application/x-ndjson", "application/json"):
        for size in (len(data) or 1, 3):
            reader = ResponseReader({":status": "200", "content-type": kind})
            for at in range(0, len(data), size):
                reader.take(data[at : at + size], at, is_end=False)
            reader.end(len(data))
            entry = reader.report(0, len(data))
            assert (entry.response_bytes, entry.was_abandoned) == (len(data), False)


def _dns(data: bytes) -> None:
    """The first four bytes are how long each answer lives, the others are its records."""
    asyncio.run(_resolve(int.from_bytes(data[:4], "big"), data[4:] or b"\0"))


async def _resolve(ttl_s: int, record: bytes) -> None:
    async with name_server() as (server, address), asyncio.timeout(10):
        server.ttl_s = ttl_s
        server.records["any.test", A] = [record[:4]]
        server.records["_any._tcp.test", SRV] = [record[:400]]
        source = dns.DnsEndpoints(
            Dns(names=["any.test:1"], srv=["_any._tcp.test"], servers=[str(address)])  # type: ignore[arg-type]  # as written
        )
        task = asyncio.create_task(source.follow(lambda _endpoints: None))
        try:
            await eventually(lambda: len(server.asked) >= 2)
            assert not task.done(), "no answer ends it"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


_PLACES = ((b"", b""), (b"a: ", b""), (b"a: &a 'b'\nb: [", b"]"), (b'a: "', b'"'), (b"a: 1", b""))
_OBJECTIVE = b"""apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: chat}
spec: {poolRef: {name: llama}, priority: """
_METRICS = (b"vllm:num_requests_waiting", b"tgi_queue_size", b"nv_trt_llm_request_metrics")
_JSON = (b"{", b"}", b"[", b"]", b'"', b"a", b":", b",", b"1", b"e9", b"\\", b"null", b"NaN", b" ")
TARGETS = {
    "metrics_page": Target(
        read_load,
        (
            *_METRICS,
            *(b"{", b"}", b'="', b'"', b"a", b",", b" ", b"\n", b"\\", b"1", b"# ", b"\t", b"\xff"),
            b'request_type="waiting"',
        ),
        1 << 15,
        (
            (b"", b""),
            *((name + b"{", b"} 1\n") for name in _METRICS),
            *((name + b'{a="', b'"} 1\n') for name in _METRICS),
            *((name + b" ", b"\n") for name in _METRICS),
        ),
    ),
    "orca": Target(
        _orca,
        (
            *_JSON,
            *(b"TEXT ", b"JSON ", b"BIN ", b"=", b"A", b"/", b"named_metrics.", b"inf"),
            *(b'"named_metrics":', b"num_requests_waiting", b"="),
        ),
        1 << 14,
        (
            (b"", b""),
            (b"TEXT num_requests_waiting=", b""),
            (b'JSON {"named_metrics": {"num_requests_waiting": ', b"}}"),
            (b"BIN ", b""),
        ),
    ),
    "yaml": Target(_file(read_documents, ConfigError), _YAML, 1 << 14, _PLACES),
    "configuration": Target(
        _settings,
        (
            *_YAML,
            *(b"\nbands: ", b"\nendpoints: {static: [", b"\nflowControl: {", b"maxRequests: "),
            *(b"\nlisten: {http: ", b"\nrequests: {rules: [", b"\nsaturation: ", b"requestTTL: "),
        ),
        1 << 13,
    ),
    "scenario": Target(
        _file(load_scenario, ConfigError),
        (
            *_YAML,
            b"apiVersion: flowcontrol/v1alpha1\nkind: Scenario\n",
            b"servers: ",
            b"duration: ",
        ),
        1 << 13,
    ),
    "candidate": Target(
        _file(load_policies, ConfigError), (*_YAML, _MINIMAL, b"saturation: "), 1 << 13
    ),
    "objectives": Target(
        _objectives,
        (
            *_YAML,
            *(b"apiVersion: llm-d.ai/v1alpha2\n", b"kind: InferenceObjective\n", b"spec: "),
            *(b"metadata: {name: chat}\n", b"{poolRef: {name: llama}, priority: ", b"}\n"),
        ),
        1 << 13,
        (
            (b"", b""),
            (
                _OBJECTIVE,
                b"}\n",
            ),
        ),
    ),
    "endpoints": Target(
        _file(read_endpoints, ConfigError),
        (*_YAML, b"- 10.0.0.5:8000\n", b"{address: ", b"port: ", b"labels: ", b"[::1%"),
        1 << 13,
        ((b"", b""), (b"- {address: '", b"', port: 1}\n"), (b"- {address: a, port: ", b"}\n")),
    ),
    "access_log": Target(
        _log,
        (
            *filter(None, REPORT_FORMAT.encode().split(b"%")),
            b" ",
            b"-",
            b",",
            b"9",
            b"\n",
            b"\x12\x04\x0a",
        ),
        1 << 16,
        ((b"", b""), (b"a.1 via_upstream - 200 ", b"")),
    ),
    "headers": Target(
        _headers, (b"/", b"..", b"%2e", b"%2F", b"a", b"?", b"9", b"s", b" ", b"\xc3\xa9", b"/v1/")
    ),
    "messages": Target(
        _messages, (b"\x12", b"\x0a", b"\x00", b"\x08", b"\xff", b"\x1a\x02", b"a", b"\x42\x04")
    ),
    "numbers": Target(
        _numbers,
        (
            b"1",
            b"0",
            b".",
            b"s",
            b"ms",
            b"h",
            b"k",
            b"Gi",
            b"-",
            b"e",
            b"[",
            b"]",
            b":",
            b"%",
            b"a",
        ),
    ),
    "authorization": Target(_authorization, (b"A", b"=", b" ", b":", b"Basic ", b"\xe9", b"%3A")),
    "ledger": Target(
        _file(lambda path: list(read_entries(path)), LedgerError),
        (*_JSON, b'{"t":', b'"facts":', b"\n", b'{"header":{"version":1}}\n'),
    ),
    "trace": Target(
        _trace,
        (
            *_JSON,
            *(AZURE_HEADER.encode(), b"\n", b"2023-11-16 18:15:46.1,", b'"timestamp":'),
            *(b'"input_length":1,"output_length":1', b"\x85"),
        ),
    ),
    "usage_stream": Target(
        _usage,
        (*_JSON, b"\n", b'"usage":{', b'"prompt_tokens":', b"data: "),
        1 << 15,
        ((b"", b""), (b'{"usage":{"prompt_tokens":', b"}}\n")),
    ),
    "response": Target(
        _response,
        (*_JSON, b"\n", b"\r", b'"usage":', b'"error":', b'"type":"ping"', b"data: ", b"error: "),
        1 << 15,
        ((b"", b""), (b'{"usage":{"prompt_tokens":', b"}}\n"), (b"data: {", b"}\n\n")),
    ),
    "dns": Target(_dns, (b"\0", b"\xff", b"\1", b"\3www", b"\xc0\x0c", b"\x7f", b"."), 400),
}
"""By name."""


def attempt(target: Target, seed: int) -> None:
    """Have a parser read an input made from a seed.

    Raises:
        AssertionError: naming the input that took too long; or whatever the parser raises.
    """
    ahead, unit, behind, size = _input(target, seed)
    count = max(1, size // len(unit))

    def made(count: int) -> bytes:
        """Return the input with so many units."""
        return b"".join((ahead, unit * count, behind))

    said = f"seed {seed}: {ahead!r} + {unit!r} * {count} + {behind!r}"
    try:
        whole_s = _seconds(target, made(count), 1)
    except Exception as error:
        error.add_note(said)
        raise
    if whole_s >= SECONDS_MAX:
        whole_s = min(whole_s, _seconds(target, made(count), 3))
    assert whole_s < SECONDS_MAX, f"{said} took {whole_s:.2f} s"
    if whole_s <= _QUICK_S:
        return
    quarter_s = growth = float("inf")
    for _ in range(_ROUNDS):  # in turn: what disturbs the machine then disturbs both
        quarter_s = min(quarter_s, _seconds(target, made(count // 4), 3))
        whole_s = min(whole_s, _seconds(target, made(count), 3))
        growth = whole_s / max(quarter_s, _QUICK_S / 8)
        if growth < _GROWTH_MAX:
            return
    msg = f"{said} took {growth:.1f} times what a quarter of it took"
    raise AssertionError(msg)


def _input(target: Target, seed: int) -> tuple[bytes, bytes, bytes, int]:
    """Return what stands ahead, what repeats, what stands behind, and the size of it all."""
    systematic = [(*place, word) for place in target.places for word in target.words]
    if seed < len(systematic):
        ahead, behind, unit = systematic[seed]
        return ahead, unit, behind, target.bytes_max
    chance = random.Random(seed)

    def some(most: int) -> bytes:
        """Return a few words, now and then any bytes."""
        if chance.random() < 0.1:
            return chance.randbytes(chance.randint(0, most))
        return b"".join(chance.choices(target.words, k=chance.randint(0, most)))

    ahead, behind = chance.choice(target.places)
    size = chance.choice((100, target.bytes_max // 8, target.bytes_max))
    return ahead + some(5), some(4) or b"a", some(5) + behind, size


def _seconds(target: Target, data: bytes, times: int) -> float:
    """Return the least CPU time that reading took."""
    least_s = float("inf")
    for _ in range(times):
        begun_s = time.process_time()
        target.read(data)
        least_s = min(least_s, time.process_time() - begun_s)
    return least_s


def be_quiet() -> None:
    """Have nothing logged, and no name server waited for."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    dns.TIMEOUT_S, dns.TRIES = 0.05, 1


def main(arguments: Iterable[str]) -> None:
    """Go on until the time is over, or something fails."""
    parser = argparse.ArgumentParser(description="Fuzz the parsers of what others wrote.")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of the first input")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time")
    options = parser.parse_args([*arguments])
    names = options.targets or list(TARGETS)
    with ProcessPoolExecutor(options.jobs, initializer=be_quiet) as pool:
        for line in pool.map(_go_on, names, repeat(options.seconds), repeat(options.seed)):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


def _go_on(name: str, seconds: float, first_seed: int) -> str:
    TARGETS[name].read(b"")  # what is made once, in seconds, is no part of an input's time
    over_s, seed = time.monotonic() + seconds, first_seed
    while time.monotonic() < over_s:
        attempt(TARGETS[name], seed)
        seed += 1
    return f"{name}: {seed - first_seed} inputs from seed {first_seed} on"


def guided(name: str, arguments: list[str]) -> None:
    """Let atheris think inputs up for one target."""
    atheris: Any = importlib.import_module("atheris")  # no dependency of the project
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *arguments], lambda data: _within(TARGETS[name], data))
    atheris.Fuzz()


def _within(target: Target, data: bytes) -> None:
    took_s = _seconds(target, data, 1)
    assert took_s < SECONDS_MAX, f"took {took_s:.2f} s"


if __name__ == "__main__":
    be_quiet()
    if sys.argv[1:2] == ["--atheris"]:
        guided(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
