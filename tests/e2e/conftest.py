"""What the end-to-end tests stand on: a gateway of real processes, shared where it can be.

A module says how its gateway is to be by overriding the fixture `spec`. A test that needs one of
its own, to break it for example, asks `start` for it.
"""

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.e2e.gateway import Gateway
from tests.e2e.harness import Spec, Stack

Start = Callable[[Spec], Awaitable[Gateway]]


@pytest.fixture(scope="session")
def garbage_is_new() -> None:
    """Spare each collection a third of a second: what was there before the tests is no garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leak_found_at_once(garbage_is_new: None) -> Iterator[None]:  # noqa: ARG001 - for its effect
    """What a test left open fails that test; else it would fail another, or the run at its end."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def spec() -> Spec:
    """How the module's gateway is to be: one slot, and the rest as the product writes it."""
    return Spec()


@pytest.fixture(scope="module")
def door() -> str:
    """The port that Envoy's streams use; test_e2e_grpcio.py repeats the essentials on the other."""
    return "direct"


@pytest.fixture(scope="session")
def stacks() -> Iterator[dict[str, Stack]]:
    """Every shared stack that runs, by its spec."""
    running: dict[str, Stack] = {}
    yield running
    for stack in running.values():
        stack.stop()


@pytest.fixture(scope="module")
def stack(
    spec: Spec, door: str, stacks: dict[str, Stack], tmp_path_factory: pytest.TempPathFactory
) -> Stack:
    """An Envoy and a service, ready; shared by all modules that want the same."""
    wanted = dataclasses.replace(spec, door=door)
    if repr(wanted) not in stacks:
        stacks[repr(wanted)] = stack = Stack(wanted, tmp_path_factory.mktemp("stack"))
        asyncio.run(stack.start())
    return stacks[repr(wanted)]


@pytest.fixture
async def gateway(stack: Stack) -> AsyncIterator[Gateway]:
    """The module's gateway with fresh backends behind it, asserted to be idle after the test."""
    _say_where(stack)
    async with Gateway(stack) as gateway:
        yield gateway


@pytest.fixture
async def start(door: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """Start a gateway for this test alone; called more than once, it starts more than one."""
    async with contextlib.AsyncExitStack() as running:

        async def start(spec: Spec) -> Gateway:
            stack = Stack(dataclasses.replace(spec, door=door), tmp_path_factory.mktemp("stack"))
            _say_where(stack)
            running.callback(stack.stop)
            await stack.start()
            return await running.enter_async_context(Gateway(stack))

        yield start


def _say_where(stack: Stack) -> None:
    print(f"configurations and logs: {stack.directory}")  # noqa: T201 - shown when a test fails
