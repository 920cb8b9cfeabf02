"""Callbacks that fail on the event loop."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from flowcontrol_server.common.units import parse_quantity
from flowcontrol_server.telemetry.loop_faults import LoopFaults


def _through_a_library(_pairs: object) -> int | None:
    return parse_quantity(None)  # type: ignore[arg-type]  # the planted fault


@pytest.mark.parametrize(
    ("callback", "is_ours"),
    [
        (lambda: json.loads("no JSON"), False),
        (lambda: parse_quantity(None), True),  # type: ignore[arg-type]  # the planted fault
        (lambda: json.loads("{}", object_hook=_through_a_library), True),
    ],
    ids=["library", "ours", "ours-through-a-library"],
)
async def test_owner(callback: Callable[[], Any], is_ours: bool) -> None:  # noqa: FBT001 - a parameter
    """With our code on the stack the service ends; without, it is logged and counted."""
    ended: asyncio.Queue[Exception] = asyncio.Queue()
    faults = LoopFaults(ended.put_nowait)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(faults.handle)
    with capture_logs() as lines:
        loop.call_soon(callback)
        await asyncio.sleep(0)

    assert ended.qsize() == int(is_ours)
    assert faults.library_faults == int(not is_ours)
    assert [line["event"] for line in lines] == ["library_callback_failed"] * (not is_ours)


async def test_built_in() -> None:
    """A callback without a Python frame is none of ours."""
    ended: asyncio.Queue[Exception] = asyncio.Queue()
    faults = LoopFaults(ended.put_nowait)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(faults.handle)
    future = loop.create_future()
    future.set_result(None)
    with capture_logs():
        loop.call_soon(future.set_result, None)
        await asyncio.sleep(0)

    assert (faults.library_faults, ended.qsize()) == (1, 0)
