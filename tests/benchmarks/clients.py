"""How long do the official clients try, by themselves, where the queue is full or the wait is over?

Method: a real Envoy and the service, one slot, held by a request that is not answered. Each client
asks once, with its own defaults, and its own retries; measured is the time until it raises, and how
many requests the service saw. "Full": one request may wait, and does, so each attempt is refused at
once. "Spent": the request waits for its TTL of 5 s and is evicted. "Without" is the same through a
proxy that takes `retry-after` and `x-should-retry` out of the responses.

Caveats: one run each, as backoff without headers is random within a quarter; nothing drains, so
Retry-After is what is said where nothing has moved: a second at first, the time so far later.

    python -m tests.benchmarks.clients [PYTHON]

PYTHON is an interpreter that has the clients (`pip install openai anthropic litellm`); those that
are not there are left out.
"""

import asyncio
import contextlib
import json
import platform
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from flowcontrol_server.common.addresses import Address
from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, Stack
from tests.support.ports import HOST

TTL_S = 5
_ASKED = {
    "messages": [{"role": "user", "content": "Hi"}],
    "extra_headers": {"x-llm-d-inference-ttl": f"{TTL_S}s"},
}
_TIMED = """
import json, sys, time
url, asked = sys.argv[1], json.loads(sys.argv[2])
{setup}
began = time.monotonic()
try:
    {ask}
except Exception as error:
    print(json.dumps([time.monotonic() - began, type(error).__name__]))
"""
CLIENTS = {
    "openai": (
        "import openai; client = openai.OpenAI(base_url=url + '/v1', api_key='none')",
        "client.chat.completions.create(model='llama', **asked)",
    ),
    "anthropic": (
        "import anthropic; client = anthropic.Anthropic(base_url=url, api_key='none')",
        "client.messages.create(model='llama', max_tokens=9, **asked)",
    ),
    "litellm": (
        "import litellm; litellm.suppress_debug_info = True",
        "litellm.completion('openai/llama', api_base=url + '/v1', api_key='none', **asked)",
    ),
}
_HIDDEN = {
    b"\r\nretry-after:": b"\r\nx-hidden-a-b:",
    b"\r\nx-should-retry:": b"\r\nx-hidden-abcde:",
}


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            for name, other in _HIDDEN.items():
                data = data.replace(name, other)
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def hiding(gateway: Address) -> AsyncIterator[str]:
    """Listen for clients; the headers of what the gateway answers are hidden from them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(*gateway)
        await asyncio.gather(_pipe(reader, ours), _pipe(theirs, writer))

    async with await asyncio.start_server(serve, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://{HOST}:{port}"
        server.close()


async def run(python: str, source: str, *arguments: str) -> str:
    """Return what an interpreter prints; nothing where it fails."""
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", source, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return output.decode().strip()


async def version_of(python: str, client: str) -> str:
    """Return the version of a client; nothing where it is absent."""
    source = f"import importlib.metadata as m; print(m.version({client!r}))"
    return await run(python, source)


async def measure(python: str, gateway: Gateway, client: str, url: str) -> tuple[float, int, str]:
    """Return seconds, requests seen and the exception of one call."""
    setup, ask = CLIENTS[client]
    source = _TIMED.format(setup=setup, ask=ask)
    before = len(gateway.stack.events("request_decided"))
    total_s, error = json.loads(await run(python, source, url, json.dumps(_ASKED)))
    seen = len(gateway.stack.events("request_decided")) - before
    return total_s, seen, error


async def case(python: str, waiting_max: int, clients: list[str]) -> AsyncIterator[str]:
    """Yield a line for each client, with and without the headers."""
    spec = Spec(max_concurrency=1, flow_control={"maxRequests": waiting_max, "requestTTL": "10m"})
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(spec, Path(directory))
        try:
            await stack.start()
            async with Gateway(stack) as gateway:
                caller, serving = await gateway.occupy()
                waiting = await gateway.call() if waiting_max == 1 else None
                await gateway.until(in_flight=1, waiting=int(waiting is not None))
                for client in clients:
                    told = await measure(python, gateway, client, f"http://{stack.gateway}")
                    async with hiding(stack.gateway) as url:
                        hidden = await measure(python, gateway, client, url)
                    yield f"{client:<10}" + "".join(
                        f"{total_s:>8.1f} s {seen:>2} x {error:<20}"
                        for total_s, seen, error in (told, hidden)
                    )
                await serving.respond()
                await caller.reply()
                if waiting is not None:
                    await (await gateway.next_call()).respond()
                    await waiting.reply()
        finally:
            stack.stop()


async def main(python: str) -> None:
    """Print the table."""
    versions = {client: await version_of(python, client) for client in CLIENTS}
    there = [client for client, version in versions.items() if version]
    named = ", ".join(f"{client} {version or 'absent'}" for client, version in versions.items())
    print(f"{platform.machine()}, Python {platform.python_version()}; {named}")
    for title, waiting_max in (("full queue", 1), (f"TTL of {TTL_S} s spent", 10)):
        print(f"\n{title:<10}\n{'':<10}{'with our headers':<36}without")
        async for line in case(python, waiting_max, there):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else sys.executable))
