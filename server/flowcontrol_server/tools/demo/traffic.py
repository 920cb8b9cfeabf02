"""People and a batch job, as clients: an open-loop plan, and the driver that sends it.

Open loop: people do not wait for each other's answers, so arrivals follow the plan whatever the
servers do. The same seed makes the same plan.
"""

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Literal, final

import aiohttp

Kind = Literal["interactive", "batch"]
OBJECTIVES: dict[Kind, str] = {"interactive": "chat", "batch": "batch"}
TOO_MANY_REQUESTS = 429
_OK = 200
_BATCH_MIN = 192
"""Four times what three model servers run at once. A batch job that just fills them delays people
more with flow control than without: it queues nowhere, and servers that are full take more."""


@final
@dataclass(frozen=True, slots=True)
class DemoLoad:
    """What is sent."""

    seconds: float = 18.0
    """How long people keep coming; the batch job is sized to keep the pool busy longer."""
    people_per_second: float = 6.0
    people: int = 5
    """Fairness ids they share."""
    person_tokens: int = 32
    batch_per_second: float = 16.0
    batch_tokens: int = 96
    prompt_characters: int = 480

    @property
    def batch_at_s(self) -> float:
        """When the batch job drops all its requests at once."""
        return self.seconds / 10

    @property
    def batch_requests(self) -> int:
        """How many that are: enough to queue where nothing else decides, however short it is."""
        return max(round(self.seconds * self.batch_per_second), _BATCH_MIN)


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """One request to come."""

    at_s: float
    kind: Kind
    flow_id: str
    output_tokens: int


@final
@dataclass(slots=True)
class DemoSample:
    """What became of one request; times in seconds since the first of the phase."""

    planned: Planned
    first_token_s: float | None = None
    end_s: float | None = None
    tokens: int = 0
    refusals: int = 0
    failure: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from when the client first asked; None if there never was one."""
        return None if self.first_token_s is None else self.first_token_s - self.planned.at_s


def plan(load: DemoLoad, seed: int) -> list[Planned]:
    """Return the arrivals in order of time."""
    chance = random.Random(seed)  # noqa: S311 - a workload, not a secret
    requests = []
    at_s = chance.expovariate(load.people_per_second)
    while at_s < load.seconds:
        flow_id = f"person-{chance.randrange(load.people)}"
        requests.append(Planned(at_s, "interactive", flow_id, load.person_tokens))
        at_s += chance.expovariate(load.people_per_second)
    job = Planned(load.batch_at_s, "batch", "nightly-job", load.batch_tokens)
    return sorted([*requests, *[job] * load.batch_requests], key=lambda request: request.at_s)


@final
class Driver:
    """Sends a plan to one gateway and keeps what it sees in `samples`, live."""

    def __init__(self, url: str, load: DemoLoad, requests: list[Planned]) -> None:
        self.samples = [DemoSample(request) for request in requests]
        self._url = url
        self._prompt = "x" * load.prompt_characters
        self._start_s = 0.0

    @property
    def now_s(self) -> float:
        """Seconds since the phase began."""
        return asyncio.get_running_loop().time() - self._start_s

    async def run(self) -> None:
        """Send everything and wait until all of it is answered."""
        self._start_s = asyncio.get_running_loop().time()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            for sample in self.samples:
                await asyncio.sleep(max(0.0, sample.planned.at_s - self.now_s))
                group.create_task(self._send(session, sample))

    async def _send(self, session: aiohttp.ClientSession, sample: DemoSample) -> None:
        """Ask until served; told 429, come back when told to."""
        try:
            while (wait_s := await self._ask(session, sample)) is not None:
                sample.refusals += 1
                await asyncio.sleep(wait_s)
        except aiohttp.ClientError as error:
            sample.failure = type(error).__name__
        sample.end_s = self.now_s

    async def _ask(self, session: aiohttp.ClientSession, sample: DemoSample) -> float | None:
        """Send once; return how long to wait before asking again, None when that is not needed."""
        request = sample.planned
        headers = {
            "x-llm-d-inference-objective": OBJECTIVES[request.kind],
            "x-llm-d-inference-fairness-id": request.flow_id,
        }
        body = {
            "model": "llama",
            "stream": True,
            "max_tokens": request.output_tokens,
            "messages": [{"role": "user", "content": self._prompt}],
        }
        async with session.post(self._url, json=body, headers=headers) as response:
            if response.status == TOO_MANY_REQUESTS:
                return float(response.headers.get("retry-after", 1))
            if response.status != _OK:
                sample.failure = f"HTTP {response.status}"
                return None
            async for line in response.content:
                if line.startswith(b'data: {"') and _has_text(line):
                    if sample.first_token_s is None:
                        sample.first_token_s = self.now_s
                    sample.tokens += 1
        return None


def _has_text(line: bytes) -> bool:
    choices = json.loads(line[len(b"data: ") :])["choices"]
    return bool(choices) and bool(choices[0]["delta"].get("content"))
