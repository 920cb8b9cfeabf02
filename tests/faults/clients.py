"""Clients that write down what they asked and what they were answered."""

import asyncio
import random
import time
from typing import Final, final

from flowcontrol_server.common.addresses import Address
from tests.e2e.client import CHAT, Caller, call
from tests.faults.accounts import Asked

FLOWS: Final = 4
PATIENCE_S: Final = 60.0
LEAVE_PART: Final = 0.03
"""Of the clients that leave before they are answered."""
LONG_PART: Final = 0.1
"""Of the answers that take 0.3 to 1 s."""
LONGEST_PART: Final = 0.02
"""Of those that take 3 to 6 s: with the slots they hold, a gate that forgets them is found out."""
_REFUSED_PAUSE_S = 0.05


@final
class Clients:
    """Asks one after the other, so many at a time, until so many have been asked.

    Args:
        gateway: Envoy's address.
        requests: how many.
        concurrency: at a time.
        chance: decides sizes, flows and who leaves.
    """

    def __init__(
        self, gateway: Address, requests: int, concurrency: int, chance: random.Random
    ) -> None:
        self.asked: list[Asked] = []
        self._gateway = gateway
        self._requests = requests
        self._concurrency = concurrency
        self._chance = chance

    @property
    def is_over(self) -> bool:
        """Whether all have been asked."""
        return len(self.asked) >= self._requests

    def part(self) -> float:
        """Return which part has been asked."""
        return len(self.asked) / self._requests

    async def run(self) -> None:
        """Ask until all is asked and answered."""
        await asyncio.gather(*(self._go() for _ in range(self._concurrency)))

    async def _go(self) -> None:
        while not self.is_over:
            number = len(self.asked)
            flow = f"flow-{self._chance.randrange(FLOWS)}"
            asked = Asked(f"request-{number}", flow, time.monotonic())
            self.asked.append(asked)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._ask(asked)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                asked.problem = repr(error)
            asked.ended_s = time.monotonic()
            if asked.status != 200:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _ask(self, asked: Asked) -> None:
        drawn = self._chance.random()
        pieces = 1 if drawn >= LONG_PART else self._chance.randint(4, 12)
        if drawn < LONGEST_PART:
            pieces = self._chance.randint(40, 75)
        pause_ms = self._chance.uniform(60, 90) if pieces > 1 else self._chance.uniform(20, 60)
        headers = {
            "x-request-id": asked.name,
            "x-llm-d-inference-fairness-id": asked.flow,
            "x-pieces": str(pieces),
            "x-pause-ms": f"{pause_ms:.1f}",
        }
        leaves_after_s = None
        if self._chance.random() < LEAVE_PART:
            leaves_after_s = self._chance.uniform(0.0, 0.3)
        caller = await self._connected(headers)
        caller.patience_s = PATIENCE_S
        try:
            async with asyncio.timeout(leaves_after_s):
                await self._read(caller, asked, pieces)
        except TimeoutError:
            if leaves_after_s is None:
                raise
            asked.is_left = True
        finally:
            caller.reset()

    async def _connected(self, headers: dict[str, str]) -> Caller:
        """Send a request; where Envoy does not listen, wait until it does."""
        while True:
            try:
                return await call(self._gateway, CHAT, headers=headers)
            except ConnectionRefusedError:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _read(self, caller: Caller, asked: Asked, pieces: int) -> None:
        asked.status = await caller.head()
        body = await caller.rest()
        if asked.status == 200:
            expected = "".join(f"{asked.name} {number}\n" for number in range(pieces))
            asked.is_whole = body == expected.encode()
            asked.problem = "" if asked.is_whole else f"got {body[:60]!r}"
