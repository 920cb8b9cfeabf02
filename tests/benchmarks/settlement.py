"""What do reading bodies and settling requests cost, through a real Envoy?

Method: wrk, 32 connections, a chat request of 1 KB and an answer with token usage, both JSON, all
dispatched at once; Envoy with one worker and the service on its direct door. Three configurations
take turns: the gate alone; with the access log; with bodies and usage read, too. Requests a second,
and CPU per request of each process, as the kernel counts it.

Caveats: clients, Envoy, service and model server share the machine; the service is the bottleneck,
so what Envoy spends shows in its CPU, not in the rate. Rates vary by a quarter from run to run:
compare the rows of one run.

    python tests/benchmarks/settlement.py [--seconds 5] [--rounds 3]
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.e2e.client import fetch
from tests.e2e.harness import Process, Spec, Stack

USAGE = {"prompt_tokens": 250, "completion_tokens": 40}
REPLY = json.dumps({"choices": [{"message": {"content": "x" * 160}}], "usage": USAGE}).encode()
PROMPT = {"model": "llama", "max_tokens": 64, "messages": [{"content": "y" * 900}]}
LUA = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["content-type"] = "application/json"
wrk.body = [[%s]]
"""
VARIANTS: dict[str, dict[str, Any]] = {
    "gate alone": {
        "requests": {"readBodies": False},
        "settlement": {"accessLog": False},
    },
    "and access log": {
        "requests": {"readBodies": False},
        "settlement": {"tokenUsage": False},
    },
    "and bodies, usage": {},
}
_TICKS = os.sysconf("SC_CLK_TCK")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer every request on a connection with the same."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(REPLY)}"
    whole = f"{head}\r\n\r\n".encode() + REPLY
    try:
        while True:
            text = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, after = text.partition(b"content-length: ")
            await reader.readexactly(int(after.split(b"\r\n", 1)[0]) if after else 0)
            writer.write(whole)
    except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
        writer.close()


def cpu_s(process: Process) -> float:
    """Return the CPU seconds a process has taken."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def round_of(stack: Stack, script: Path, seconds: int) -> tuple[float, float, float]:
    """Return requests a second, and the microseconds of CPU of service and Envoy for each."""
    before = [cpu_s(stack.service), cpu_s(stack.envoy)]
    wrk = await asyncio.create_subprocess_exec(
        *(shutil.which("wrk") or "wrk", "-t1", "-c32", f"-d{seconds}s", "-s", str(script)),
        f"http://{stack.gateway}",
        stdout=subprocess.PIPE,
    )
    output = (await wrk.communicate())[0].decode()
    after = [cpu_s(stack.service), cpu_s(stack.envoy)]
    assert "Non-2xx" not in output, output
    count = int(output.split(" requests in ")[0].split()[-1])
    each = [(b - a) / count * 1e6 for a, b in zip(before, after, strict=True)]
    return count / seconds, each[0], each[1]


async def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measured = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(LUA % json.dumps(PROMPT))
        for number in range(options.rounds * len(VARIANTS)):
            name = list(VARIANTS)[number % len(VARIANTS)]
            directory = Path(folder) / str(number)
            directory.mkdir()
            stack = Stack(Spec(max_concurrency=1000, **VARIANTS[name]), directory)
            server = await asyncio.start_server(serve, *stack.endpoints[0])
            try:
                await stack.start()
                measured[name].append(await round_of(stack, script, options.seconds))
                metrics = (await fetch(stack.http, "/metrics")).body.decode().splitlines()
                print(name, *(m for m in metrics if m.startswith("flowcontrol_access_log_entries")))
            finally:
                stack.stop()
                server.close()
    print(f"{'':20} {'requests/s':>10} {'service us':>10} {'Envoy us':>10}   (medians)")
    for name, rounds in measured.items():
        values = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"{name:20} {values[0]:10.0f} {values[1]:10.0f} {values[2]:10.0f}")


if __name__ == "__main__":
    asyncio.run(main())
