"""What does the service take while nobody asks anything of it?

Question: CPU of the whole process, in percent of one core, without a request: with its default
settings and no endpoint to ask for its load; with /metrics scraped once a second beside; and with
one endpoint that is asked for its load, as often as `load` says where nothing else is set.

Method: the service as the product starts it, with a folder of objectives and its configuration file
watched, on uvloop. CPU is what the kernel says of all its threads over some seconds, counted after
it has been ready for a while. A process of its own for each row; medians of the rounds with their
spread.

Caveats: what the kernel does for it in softirq is not in it. The endpoint is a server in this
process that answers 404: a page like vLLM's costs 0.3 ms each time it is read (`scrape_cost.py`).

    PYTHONPATH=. python tests/benchmarks/idle.py [--rounds 3] [--seconds 20] [--interpreted]
"""

import argparse
import statistics
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.benchmarks import stage
from tests.support.ports import HOST

SETTLED_S = 3.0
"""After which what is done once is done."""
ROWS = {
    "default settings": (False, False),
    "and /metrics scraped every second": (True, False),
    "and one endpoint asked for its load": (False, True),
}
"""Whether it is scraped, and whether it asks an endpoint."""


class NotFound(BaseHTTPRequestHandler):
    """An endpoint without a page."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:  # type: ignore[override]  # says nothing
        """Log nothing."""


def idle(port: int, options: argparse.Namespace, *, is_scraped: bool, asks: bool) -> float:
    """Return the percentage of a core."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"endpoints": [port], "load": {}} if asks else {"endpoints": []}
        with stage.service(
            Path(folder), "idle", is_compiled=not options.interpreted, **more
        ) as service:
            url = f"http://{HOST}:{service.http}/metrics"
            time.sleep(SETTLED_S)
            begin_ns, begin_s = service.process.cpu_ns(), time.monotonic()
            for second in range(options.seconds):
                if is_scraped:
                    with urllib.request.urlopen(url) as page:
                        page.read()
                time.sleep(max(0.0, begin_s + second + 1 - time.monotonic()))
            cpu_s = (service.process.cpu_ns() - begin_ns) / 1e9
            return 100 * cpu_s / (time.monotonic() - begin_s)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--interpreted", action="store_true")
    options = parser.parse_args()
    endpoint = ThreadingHTTPServer((HOST, 0), NotFound)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    port = endpoint.server_address[1]
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(options.rounds):
        for name, (is_scraped, asks) in ROWS.items():
            found[name].append(idle(port, options, is_scraped=is_scraped, asks=asks))
    lines = [
        stage.machine(),
        f"{options.rounds} rounds of {options.seconds} s, % of a core; median (least to most)",
        "",
        *(f"{name:36} {stage.told(values, 2)}" for name, values in found.items()),
    ]
    figures = {"cpu_percent": statistics.median(found["default settings"])}
    stage.keep("idle", "\n".join(lines), figures)


if __name__ == "__main__":
    main()
