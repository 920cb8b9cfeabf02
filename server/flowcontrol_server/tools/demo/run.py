"""Runs the demo."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import final

from rich.console import Console

from flowcontrol_server.config.admin import TOKEN_VARIABLE
from flowcontrol_server.tools.demo.report import (
    BATCH_WAITS,
    WITH,
    WITHOUT,
    Results,
    caveat,
    picture,
    save_samples,
    table,
)
from flowcontrol_server.tools.demo.stack import HOST, TOKEN_FILE, Ports, running_stack
from flowcontrol_server.tools.demo.traffic import DemoLoad, Driver, plan
from flowcontrol_server.tools.demo.view import PhaseView

CHAT_PATH = "/v1/chat/completions"
_INTERRUPTED = 130
_PLAIN_WIDTH = 120
"""If the output is not a terminal."""

_NEXT = """\
Try next{hint}:
  curl -iN http://{host}:{gated}{path} \\
    -H 'content-type: application/json' -H 'x-llm-d-inference-objective: chat' \\
    -H 'x-llm-d-inference-fairness-id: me' \\
    -d '{{"model":"llama","stream":true,"messages":[{{"role":"user","content":"hello"}}]}}'
  export {variable}={token}    # for calls that change something
  {grpcurl} -plaintext {host}:{grpc} flowcontrol.v1.FlowControl/GetSnapshot
  dashboard: http://{host}:{http}/    metrics: http://{host}:{http}/metrics    Envoy: http://{host}:{admin}"""


@final
class _Output(Console):
    """Standard output. Stops the demo once its reader has closed it, as `| head` does.

    Args:
        stop: called once the output is closed.
        width: columns; None: those of the terminal.
    """

    def __init__(self, stop: Callable[[], object], width: int | None = None) -> None:
        super().__init__(width=width)
        self._stop = stop

    def on_broken_pipe(self) -> None:
        """Write nothing more; by default rich raises SystemExit, in the task that writes."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._stop()


async def run_demo(
    directory: Path, port_offset: int, seed: int, seconds: float, *, keep: bool
) -> int:
    """Run both phases, show and save the results; return the exit status.

    Args:
        directory: for pictures, samples, configurations and logs.
        port_offset: added to every port.
        seed: of the traffic; the same seed sends the same requests at the same times.
        seconds: how long people send requests in each of the two phases.
        keep: keep everything running afterwards until ctrl-C.

    Raises:
        DemoError: the demo cannot run; nothing is left running.
    """
    ports = Ports().shifted(port_offset)
    load = DemoLoad(seconds=seconds)
    task = asyncio.current_task()
    assert task is not None
    console = _Output(task.cancel)
    if not console.is_terminal:
        console = _Output(task.cancel, _PLAIN_WIDTH)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    console.print(f"seed {seed}; starting Envoy, three model servers and flowcontrol", style="dim")
    try:
        async with running_stack(ports, directory):
            results: Results = {}
            for name, port in ((WITHOUT, ports.bare), (WITH, ports.gated)):
                driver = Driver(f"http://{HOST}:{port}{CHAT_PATH}", load, plan(load, seed))
                await _phase(console, name, driver, ports)
                results[name] = driver.samples
            _show(console, results, directory)
            hint = "" if keep else " (after `make demo ARGS=--keep`)"
            console.print(_next_steps(ports, hint, directory), highlight=False, markup=False)
            if keep:
                console.print("Running until ctrl-C.", style="bold")
                await asyncio.Event().wait()
    except asyncio.CancelledError:
        console.print("stopped; nothing is left running", style="dim")
        return 0 if keep else _INTERRUPTED
    return 0


async def _phase(console: Console, name: str, driver: Driver, ports: Ports) -> None:
    view = asyncio.create_task(PhaseView(console, name, driver, ports).run())
    try:
        await driver.run()
    finally:
        view.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await view
    console.print(f"{name}: all answered after {driver.now_s:.0f} s", style="dim")


def _show(console: Console, results: Results, directory: Path) -> None:
    console.print(table(results))
    console.print(BATCH_WAITS, style="dim")
    if (text := caveat(results)) is not None:
        console.print(text, style="yellow")
    save_samples(results, directory / "requests.csv")
    for suffix in ("png", "svg"):
        picture(results, directory / f"ttft.{suffix}")
    console.print(f"picture: {directory / 'ttft.png'}   all requests: {directory}/requests.csv")


def _next_steps(ports: Ports, hint: str, directory: Path) -> str:
    return _NEXT.format(
        hint=hint,
        host=HOST,
        path=CHAT_PATH,
        gated=ports.gated,
        grpc=ports.grpc,
        http=ports.http,
        admin=ports.admin,
        variable=TOKEN_VARIABLE,
        token=(directory / TOKEN_FILE).read_text(),
        grpcurl=".venv/bin/grpcurl",
    )
