"""Pure. The model servers of a pool on the virtual clock, and Envoy's choice between them."""

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
    """How Envoy chooses an endpoint when the engine does not."""

    LEAST_REQUEST = "least-request"
    """Of two drawn by chance, the one with fewer requests: Envoy's default of its kind."""
    ROUND_ROBIN = "round-robin"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One model server."""

    address: str
    """As host:port; unique in its pool."""
    config: ModelServerConfig = field(default_factory=ModelServerConfig)
    from_ns: int = 0
    """When it first joins the pool."""
    role: Role = Role.BOTH
    """A request goes to one that decodes; if it does nothing else, to one that prefills before."""


@final
class SimulatedServer:
    """One model server at work, with an account of how busy it was.

    Args:
        spec: what it is.
        clock: plans its steps.
        told: hears every first and last token, at its time.
    """

    def __init__(
        self, spec: ServerSpec, clock: VirtualClock, told: Callable[[TokenEvent], None]
    ) -> None:
        self.spec = spec
        self.is_up = False
        self.in_flight: dict[int, None] = {}
        """Ids of the requests it has, oldest first."""
        self.up_ns = 0
        """How long it was there, until it was last looked at."""
        self.busy_ns = 0
        """How much of that time it worked on something."""
        self.running_ns = 0
        """Sequences running, summed up over that time."""
        self.in_flight_most = 0
        self.waiting_most = 0
        self._clock = clock
        self._told = told
        self._model = ModelServer(spec.config, milestones_only=True)
        self._tokens_before = 0
        """Generated before its last crash."""
        self._looked_ns = 0
        self._planned_ns: int | None = None

    @property
    def cached_share(self) -> float:
        """Part of the prompts' tokens that its prefix cache had, until it was last looked at."""
        return self._model.cached_tokens_total / max(1, self._model.prompt_tokens_total)

    @property
    def tokens_generated(self) -> int:
        """Tokens it has generated, until it was last looked at."""
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
        """Give it a request while it is up; whether it takes it."""
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
        """Take a request from it, unless its last token comes at this very moment."""
        self._look()
        if request_id in self.in_flight:
            del self.in_flight[request_id]
            self._model.abort(request_id)
            self._plan()

    def rise(self) -> None:
        """Take requests from now on."""
        self._look()
        self.is_up = True

    def crash(self) -> list[int]:
        """Lose everything, and take nothing; return the ids of what it had."""
        self._look()
        self.is_up = False
        self._tokens_before += self._model.generated_tokens_total
        lost = list(self.in_flight)
        self.in_flight.clear()
        self._model = ModelServer(self.spec.config, milestones_only=True)
        self._planned_ns = None
        return lost

    def _look(self) -> None:
        """Bring engine and accounts up to the present.

        What runs changes only where the engine asks to be woken, so it has run since the last look.
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
            self._told(event)
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
    """All model servers, and Envoy's choice between them.

    Args:
        specs: the servers; none is up at first.
        clock: plans their steps.
        balancer: how Envoy chooses.
        chance: for Envoy's choice.
        told: hears every first and last token, at its time.
    """

    def __init__(
        self,
        specs: tuple[ServerSpec, ...],
        clock: VirtualClock,
        balancer: Balancer,
        chance: Random,
        told: Callable[[TokenEvent], None],
    ) -> None:
        self.servers = {spec.address: SimulatedServer(spec, clock, told) for spec in specs}
        assert len(self.servers) == len(specs), "every server has an address of its own"
        self._balancer = balancer
        self._chance = chance
        self._decoding: list[str] = []
        """Endpoints known to Envoy, to choose from."""
        self._prefilling: list[SimulatedServer] = []
        """The same, of those that only prefill, to which decoding servers turn."""
        self._turn = 0

    def set_known(self, addresses: tuple[str, ...]) -> None:
        """Tell Envoy which endpoints there are, true or not."""
        known = [self.servers[address] for address in addresses]
        self._decoding = [s.spec.address for s in known if s.spec.role is not Role.PREFILL]
        self._prefilling = [s for s in known if s.spec.role is Role.PREFILL]

    def route(self, address: str | None) -> SimulatedServer | None:
        """Return the server of an address; None: of Envoy's choice, if it knows any."""
        address = self._choose() if address is None else address
        return None if address is None else self.servers[address]

    def prefiller_for(self, server: SimulatedServer) -> SimulatedServer | None:
        """Return who prefills for a server: of those there are for it, the one with least to do.

        None if it does so itself, because it does everything, or there is none for it.
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
