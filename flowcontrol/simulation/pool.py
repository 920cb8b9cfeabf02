"""Pure. The model servers of a pool on the virtual clock, and Envoy's load balancer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from random import Random
from typing import assert_never, final

from flowcontrol.config import Role
from flowcontrol.events import LoadObserved
from flowcontrol.simulation.clock import VirtualClock
from flowcontrol.simulation.model_server import ModelServer, ModelServerConfig, TokenEvent


class Balancer(Enum):
    """How Envoy chooses an endpoint if the engine does not."""

    LEAST_REQUEST = "least-request"
    """Of two random endpoints, the one with fewer requests: Envoy's default for this policy."""
    ROUND_ROBIN = "round-robin"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One model server."""

    address: str
    """host:port, unique in its pool."""
    config: ModelServerConfig = field(default_factory=ModelServerConfig)
    from_ns: int = 0
    """When it first joins the pool."""
    role: Role = Role.BOTH
    """A request goes to a server that decodes; first to one that prefills, if that only decodes."""


@final
class SimulatedServer:
    """One model server at work, with an account of how busy it was.

    Args:
        spec: its description.
        clock: schedules its steps.
        generated: called with every first and last token, at its time.
    """

    def __init__(
        self, spec: ServerSpec, clock: VirtualClock, generated: Callable[[TokenEvent], None]
    ) -> None:
        self.spec = spec
        self.is_up = False
        self.in_flight: dict[int, None] = {}
        """Ids of the requests it has, oldest first."""
        self.up_ns = 0
        """How long it was up, until the last update."""
        self.busy_ns = 0
        """How much of that time it was working."""
        self.running_ns = 0
        """Running sequences, integrated over that time."""
        self.in_flight_most = 0
        self.waiting_most = 0
        self._clock = clock
        self._generated = generated
        self._model = ModelServer(spec.config, milestones_only=True)
        self._tokens_before = 0
        """Tokens generated before its last crash."""
        self._looked_ns = 0
        self._planned_ns: int | None = None

    @property
    def cached_share(self) -> float:
        """Part of the prompts' tokens that its prefix cache had, until the last update."""
        return self._model.cached_tokens_total / max(1, self._model.prompt_tokens_total)

    @property
    def tokens_generated(self) -> int:
        """Tokens it has generated, until the last update."""
        return self._tokens_before + self._model.generated_tokens_total

    def load(self) -> LoadObserved:
        """Return what a scrape would see now."""
        self._look()
        model = self._model
        address = self.spec.address
        return LoadObserved(
            address,
            model.waiting_count,
            model.running_count,
            model.kv_usage,
            model.kv_tokens,
        )

    def submit(  # noqa: PLR0913 - what a request consists of
        self,
        request_id: int,
        prompt_tokens: int,
        output_tokens: int,
        *,
        prefix: tuple[int, ...] = (),
        is_prefilled: bool = False,
        priority: int = 0,
    ) -> bool:
        """Submit a request, while the server is up; return whether it accepts it."""
        if self._planned_ns is None:
            self._look()  # it was idle until now
        try:
            self._model.submit(
                request_id,
                prompt_tokens,
                output_tokens,
                self._clock.now_ns,
                prefix=prefix,
                is_prefilled=is_prefilled,
                priority=priority,
            )
        except ValueError:
            return False  # longer than its KV cache: a real one answers 400
        self.in_flight[request_id] = None
        self.in_flight_most = max(self.in_flight_most, len(self.in_flight))
        self.waiting_most = max(self.waiting_most, self._model.waiting_count)
        self._plan()
        return True

    def abort(self, request_id: int) -> None:
        """Remove a request, unless its last token comes at the same time."""
        self._look()
        if request_id in self.in_flight:
            del self.in_flight[request_id]
            self._model.abort(request_id)
            self._plan()

    def rise(self) -> None:
        """Accept requests from now on."""
        self._look()
        self.is_up = True

    def crash(self) -> list[int]:
        """Lose all requests, and accept none; return the ids of those lost."""
        self._look()
        self.is_up = False
        self._tokens_before += self._model.generated_tokens_total
        lost = list(self.in_flight)
        self.in_flight.clear()
        self._model = ModelServer(self.spec.config, milestones_only=True)
        self._planned_ns = None
        return lost

    def _look(self) -> None:
        """Bring the engine and the accounts up to now.

        The running sequences change only at the engine's wake-ups, so they are those of the last
        update.
        """
        now_ns = self._clock.now_ns
        if self.is_up:
            passed_ns = now_ns - self._looked_ns
            self.up_ns += passed_ns
            self.running_ns += passed_ns * self._model.running_count
            self.busy_ns += 0 if self._planned_ns is None else passed_ns
        self._looked_ns = now_ns
        for event in self._model.advance(now_ns):
            if event.is_last:
                del self.in_flight[event.job_id]
            self._generated(event)
        self._plan()

    def _plan(self) -> None:
        wakeup_ns = self._model.next_wakeup_ns()
        if wakeup_ns is not None and wakeup_ns != self._planned_ns:
            self._clock.at(wakeup_ns, partial(self._wake, wakeup_ns))
        self._planned_ns = wakeup_ns

    def _wake(self, planned_ns: int) -> None:
        if planned_ns == self._planned_ns:
            self._look()


@final
class ServerPool:
    """All model servers, and Envoy's load balancer.

    Args:
        specs: the servers; none is up at first.
        clock: schedules their steps.
        balancer: how Envoy chooses.
        chance: for Envoy's choice.
        generated: called with every first and last token, at its time.
    """

    def __init__(
        self,
        specs: tuple[ServerSpec, ...],
        clock: VirtualClock,
        balancer: Balancer,
        chance: Random,
        generated: Callable[[TokenEvent], None],
    ) -> None:
        self.servers = {spec.address: SimulatedServer(spec, clock, generated) for spec in specs}
        assert len(self.servers) == len(specs), "addresses are unique"
        self._balancer = balancer
        self._chance = chance
        self._decoding: list[str] = []
        """Endpoints that Envoy chooses from."""
        self._prefilling: list[SimulatedServer] = []
        """Known servers that only prefill, for those that only decode."""
        self._turn = 0

    def set_known(self, addresses: tuple[str, ...]) -> None:
        """Set the endpoints that Envoy takes to be there."""
        known = [self.servers[address] for address in addresses]
        self._decoding = [s.spec.address for s in known if s.spec.role is not Role.PREFILL]
        self._prefilling = [s for s in known if s.spec.role is Role.PREFILL]

    def route(self, address: str | None) -> SimulatedServer | None:
        """Return the server of an address, or of Envoy's choice; None: Envoy knows none."""
        address = self._choose() if address is None else address
        return None if address is None else self.servers[address]

    def prefiller_for(self, server: SimulatedServer) -> SimulatedServer | None:
        """Return the least busy server that prefills for a server.

        None: the server prefills itself, because it does everything, or there is no other.
        """
        if server.spec.role is not Role.DECODE:
            return None
        return min(self._prefilling, key=lambda each: len(each.in_flight), default=None)

    def _choose(self) -> str | None:
        if not self._decoding:
            return None
        match self._balancer:
            case Balancer.ROUND_ROBIN:
                self._turn += 1
                return self._decoding[(self._turn - 1) % len(self._decoding)]
            case Balancer.LEAST_REQUEST:
                one, other = (self._chance.choice(self._decoding) for _ in range(2))
                fewer = len(self.servers[other].in_flight) < len(self.servers[one].in_flight)
                return other if fewer else one
            case _:
                assert_never(self._balancer)
