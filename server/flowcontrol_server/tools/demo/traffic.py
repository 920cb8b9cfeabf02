"""The clients of the demo, people and a batch job: an open-loop plan, and the driver that sends it.

Open loop: people do not wait for each other's answers, so arrivals follow the plan, however fast
the servers are. The same seed gives the same plan.
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
"""Four times the requests that three model servers run at once. A batch job that only just fills
them delays people more with flow control than without: it queues nowhere, and full servers accept
more."""


@final
@dataclass(frozen=True, slots=True)
class DemoLoad:
    """The traffic of one phase."""

    seconds: float = 18.0
    """How long people send requests; the batch job keeps the pool busy for longer."""
    people_per_second: float = 6.0
    people: int = 5
    """Number of people, each with a fairness id."""
    person_tokens: int = 32
    batch_per_second: float = 16.0
    batch_tokens: int = 96
    prompt_characters: int = 480

    @property
    def batch_at_s(self) -> float:
        """When the batch job sends all its requests at once."""
        return self.seconds / 10

    @property
    def batch_requests(self) -> int:
        """Requests of the batch job: enough to queue in the servers, however short the phase."""
        return max(round(self.seconds * self.batch_per_second), _BATCH_MIN)


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """One planned request."""

    at_s: float
    kind: Kind
    flow_id: str
    output_tokens: int


@final
@dataclass(slots=True)
class DemoSample:
    """The result of one request; times in seconds since the start of the phase."""

    planned: Planned
    first_token_s: float | None = None
    end_s: float | None = None
    tokens: int = 0
    refusals: int = 0
    failure: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from the first attempt; None: there was no token."""
        return None if self.first_token_s is None else self.first_token_s - self.planned.at_s


def plan(load: DemoLoad, seed: int) -> list[Planned]:
    """Return the requests in order of arrival."""
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
    """Sends a plan to one gateway and updates `samples` meanwhile."""

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
        """Send until served; after a 429, wait as long as Retry-After demands."""
        try:
            while (wait_s := await self._attempt(session, sample)) is not None:
                sample.refusals += 1
                await asyncio.sleep(wait_s)
        except aiohttp.ClientError as error:
            sample.failure = type(error).__name__
        sample.end_s = self.now_s

    async def _attempt(self, session: aiohttp.ClientSession, sample: DemoSample) -> float | None:
        """Send once; return the wait before the next attempt; None: no further attempt."""
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
