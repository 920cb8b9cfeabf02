"""The demo from start to end."""

import asyncio
import contextlib
import signal
from pathlib import Path

from rich.console import Console

from server.demo.report import WITH, WITHOUT, Results, picture, save_samples, table
from server.demo.stack import HOST, Ports, running_stack
from server.demo.traffic import Driver, Load, plan
from server.demo.view import LiveView

CHAT_PATH = "/v1/chat/completions"
_INTERRUPTED = 130
_PLAIN_WIDTH = 120
"""Where there is no terminal to fit into."""

_NEXT = """\
Try next{hint}:
  curl -iN http://{host}:{gated}{path} \\
    -H 'content-type: application/json' -H 'x-llm-d-inference-objective: chat' \\
    -H 'x-llm-d-inference-fairness-id: me' \\
    -d '{{"model":"llama","stream":true,"messages":[{{"role":"user","content":"hello"}}]}}'
  {grpcurl} -plaintext {host}:{ext_proc} flowcontrol.v1.FlowControl/GetSnapshot
  dashboard: http://{host}:{http}/    metrics: http://{host}:{http}/metrics    Envoy: http://{host}:{admin}"""


async def run_demo(
    directory: Path, port_offset: int, seed: int, seconds: float, *, keep: bool
) -> int:
    """Run both phases, show them, save what was seen; return the exit status.

    Args:
        directory: gets pictures, samples, configurations and logs.
        port_offset: added to every port.
        seed: of the traffic; the same seed sends the same requests at the same times.
        seconds: how long people keep coming in each of the two phases.
        keep: leave everything running afterwards until ctrl-C.

    Raises:
        DemoError: something needed is missing; nothing is left running.
    """
    ports = Ports().shifted(port_offset)
    load = Load(seconds=seconds)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
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
            console.print(_next_steps(ports, hint), highlight=False, markup=False)
            if keep:
                console.print("Running until ctrl-C.", style="bold")
                await asyncio.Event().wait()
    except asyncio.CancelledError:
        console.print("stopped; nothing is left running", style="dim")
        return 0 if keep else _INTERRUPTED
    return 0


async def _phase(console: Console, name: str, driver: Driver, ports: Ports) -> None:
    view = asyncio.create_task(LiveView(console, name, driver, ports).run())
    try:
        await driver.run()
    finally:
        view.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await view
    console.print(f"{name}: all answered after {driver.now_s:.0f} s", style="dim")


def _show(console: Console, results: Results, directory: Path) -> None:
    console.print(table(results))
    save_samples(results, directory / "requests.csv")
    for suffix in ("png", "svg"):
        picture(results, directory / f"ttft.{suffix}")
    console.print(f"picture: {directory / 'ttft.png'}   every request: {directory}/requests.csv")


def _next_steps(ports: Ports, hint: str) -> str:
    return _NEXT.format(
        hint=hint,
        host=HOST,
        path=CHAT_PATH,
        gated=ports.gated,
        ext_proc=ports.ext_proc,
        http=ports.http,
        admin=ports.admin,
        grpcurl=".venv/bin/grpcurl",
    )
