"""`flowcontrol serve` in a separate process, for tests that need one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest


@contextmanager
def serving(
    config: Path, stderr: int | IO[bytes] = subprocess.PIPE, prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run `flowcontrol serve` in a separate process, ended at the end.

    Args:
        config: path of its configuration.
        stderr: destination of its log.
        prefix: a command that executes the command line after it.
    """
    command = [
        *prefix,
        sys.executable,
        "-m",
        "flowcontrol_server",
        "serve",
        "--config",
        str(config),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    with subprocess.Popen(command, stderr=stderr, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], event: str) -> list[dict[str, Any]]:
    """Return the log of a service up to an event."""
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    for line in process.stderr:
        lines.append(json.loads(line))
        if lines[-1]["event"] == event:
            return lines
    pytest.fail(f"no {event} in {lines}")


def configuration(directory: Path, ports: Sequence[int], more: str = "") -> Path:
    """Return a configuration with these ports: ext_proc, gRPC and HTTP."""
    (directory / "objectives").mkdir()
    path = directory / "flowcontrol.yaml"
    path.write_text(
        "apiVersion: flowcontrol/v1alpha1\nkind: FlowControlConfig\npool: llama\n"
        "objectives: {directory: objectives}\nendpoints: {static: []}\n"
        f"listen:\n  extProc: 127.0.0.1:{ports[0]}\n  grpc: 127.0.0.1:{ports[1]}\n"
        f"  http: 127.0.0.1:{ports[2]}\n{more}"
    )
    return path
