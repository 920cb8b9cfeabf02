"""What does it cost to read a request and to write its answer?

Method: the bytes Envoy sends for a chat request with fifteen headers, decoded, classified and
answered in a loop; best of seven rounds, one thread, no transport. With and without what Envoy read
of the body, with a set of rules, with a picked endpoint; and one entry of the access log.

Caveats: best of, not typical: the ratio between rows is what to look at. A parked request pays this
once on the event loop's thread, beside the transport.

    python tests/benchmarks/codec.py
"""

import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

sys.path.insert(0, str(Path(__file__).parents[2]))


from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol_server.common import envoy_messages
from flowcontrol_server.requests.classify import Intake, classify
from flowcontrol_server.requests.codec import Encoder, decode
from flowcontrol_server.requests.log_codec import REPORT_TAG, decode_log
from flowcontrol_server.requests.rules import Condition, Rule, parse_fact
from flowcontrol_server.requests.tickets import TICKETS

ROUNDS = 7
LOOPS = 20_000
HEADERS = {
    ":authority": "gateway.example.com",
    ":path": "/v1/chat/completions",
    ":method": "POST",
    ":scheme": "https",
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": "OpenAI/Python 1.99.0",
    "authorization": "Bearer " + "x" * 48,
    "content-length": "2311",
    "x-forwarded-for": "10.1.2.3",
    "x-forwarded-proto": "https",
    "x-request-id": "5d133ae3-0a33-4bd5-87d7-c799f94b2516",
    "x-llm-d-inference-objective": "chat",
    "x-llm-d-inference-fairness-id": "tenant-17",
    "accept-encoding": "gzip, deflate",
}
BODY = {"model": "llama-70b", "stream": "1", "max_tokens": 512.0, "user": "bob"}


def request(*, with_body: bool) -> bytes:
    """Return the request headers as Envoy sends them."""
    message = envoy_messages.ProcessingRequest()
    for name, value in HEADERS.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    if with_body:
        message.metadata_context.filter_metadata["flowcontrol.request"].update(BODY)
    data: bytes = message.SerializeToString()
    return data


def log_entry() -> bytes:
    """Return a message of the access log that holds one entry."""
    message = envoy_messages.StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add()
    entry.common_properties.custom_tags[REPORT_TAG] = (
        f"{TICKETS.issue(17).decode()} via_upstream - 200 151764 82958 2600 500 - 120 2311 456 "
        "10.0.0.5:8000"
    )
    entry.response.response_code.value = 200
    data: bytes = message.SerializeToString()
    return data


def rule(fact: str, pattern: str, objective: str) -> Rule:
    """Return a rule of one condition."""
    found = parse_fact(fact)
    assert found is not None
    return Rule(match=(Condition(found, pattern),), objective=objective)


def best_us(work: Callable[[], object]) -> float:
    """Return the least time a call took on average in any round."""
    rounds = []
    for _ in range(ROUNDS):
        begin_ns = perf_counter_ns()
        for _ in range(LOOPS):
            work()
        rounds.append((perf_counter_ns() - begin_ns) / LOOPS / 1000)
    return min(rounds)


def main() -> None:
    """Print the table."""
    plain, full = request(with_body=False), request(with_body=True)
    bare, read = decode(plain), decode(full)
    rules = Intake(
        rules=(
            rule("body:service_tier", "flex", "batch"),
            rule("metadata:envoy.filters.http.jwt_authn:claims:plan", "gold", "chat"),
            rule("body:model", "llama-*", "chat"),
        )
    )
    default = Intake()
    encoder, picking = Encoder(), Encoder(picks=True)
    proceed = Decision(17, Outcome.DISPATCHED, 10, "tenant", 1_234_000_000)
    picked = replace(proceed, endpoint="10.0.0.5:8000")
    entry = log_entry()
    print(f"Python {platform.python_version()}, {platform.machine()}; us, best of {ROUNDS} rounds")
    read_args = (read.headers, read.metadata)
    for name, work in (
        ("decode, headers alone", lambda: decode(plain)),
        ("decode, and what Envoy read of the body", lambda: decode(full)),
        ("classify, headers alone", lambda: classify(bare.headers, bare.metadata, default)),
        ("classify, and the body", lambda: classify(read.headers, read.metadata, default)),
        ("classify, the body, and three rules", lambda: classify(*read_args, rules)),
        ("encode, gate only", lambda: encoder.encode(proceed)),
        ("encode, endpoint picked", lambda: picking.encode(picked)),
        ("access log, one entry", lambda: list(decode_log(entry))),
    ):
        print(f"{name:42} {best_us(work):6.2f}")


if __name__ == "__main__":
    main()
