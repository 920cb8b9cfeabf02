"""What does it cost to ask an endpoint for its load?

Method: a server in a process of its own serves a page like vLLM's (1,000 lines, of which four
matter); the scraper asks it one time after another. Counted is the CPU time of this process alone,
per attempt, and of that what reading the page takes. Five runs; median and spread.

Caveats: one connection, kept open, no TLS; the machine may be shared, so trust the ratios.
"""

import asyncio
import multiprocessing
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

from flowcontrol_server.config.sources import Load
from flowcontrol_server.sources.engine_metrics import read_load
from flowcontrol_server.sources.health import EndpointHealth
from flowcontrol_server.sources.scraper import Scraper, ScrapeResult

ATTEMPTS = 300
RUNS = 5
PORT = 28_611
LINES = 1000


def page() -> bytes:
    """A page of a busy vLLM."""
    lines = [
        f'vllm:request_latency_seconds_bucket{{engine="0",le="{index / 10}",'
        f'model_name="meta-llama/Llama-3.1-8B-Instruct"}} {index}.0'
        for index in range(LINES)
    ]
    for position, name in ((100, "num_requests_running"), (400, "num_requests_waiting")):
        lines.insert(position, f'vllm:{name}{{engine="0",model_name="m"}} 3.0')
    lines.insert(700, 'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5')
    return "\n".join(lines).encode() + b"\n"


def serve() -> None:
    """Serve the page until killed."""
    body = page()

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=body)

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    web.run_app(application, host="127.0.0.1", port=PORT, print=None)


@contextmanager
def server() -> Iterator[None]:
    """The server, in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=serve, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


async def scrape() -> float:
    """Return the CPU seconds of one attempt."""
    load = Load(interval="1ms", scrapesPerSecondMax=1_000_000)  # type: ignore[arg-type]  # as written
    health = EndpointHealth(3, lambda _address, _is_up: None)
    scraper = Scraper(load, lambda _fact: None, health)
    begun_s = time.process_time()
    scraper.ask([f"127.0.0.1:{PORT}"])
    while scraper.results[ScrapeResult.OK] < ATTEMPTS:  # noqa: ASYNC110 - it rings no bell
        await asyncio.sleep(0.05)
    cost_s = (time.process_time() - begun_s) / scraper.results[ScrapeResult.OK]
    await scraper.close()
    return cost_s


async def until_it_listens() -> None:
    """Wait for the server."""
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{PORT}/metrics"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


def reading() -> float:
    """Return the CPU seconds of reading one page."""
    body = page()
    begun_s = time.process_time()
    for _ in range(ATTEMPTS):
        assert read_load(body) is not None
    return (time.process_time() - begun_s) / ATTEMPTS


def told(name: str, costs_s: list[float]) -> str:
    """Return a line of the result."""
    median, low, high = (f(costs_s) * 1e6 for f in (statistics.median, min, max))
    return f"{name:<24}{median:8.0f} us   ({low:.0f} to {high:.0f})"


def main() -> None:
    """Measure and print."""
    print(
        f"{platform.machine()}, Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
    )
    print(f"page: {len(page()) / 1024:.0f} KiB, {ATTEMPTS} attempts, {RUNS} runs")
    with server():
        asyncio.run(until_it_listens())
        print(told("one attempt, CPU", [asyncio.run(scrape()) for _ in range(RUNS)]))
    print(told("of it reading the page", [reading() for _ in range(RUNS)]))


if __name__ == "__main__":
    main()
