"""The controller against a ledger that knows nothing of how it works."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    ControllerConfig,
    Fairness,
    Limits,
    Picker,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Left,
    ObjectivesChanged,
)
from flowcontrol.request import Outcome, Request

SECOND = 1_000_000_000
OBJECTIVES = {"batch": -1, "chat": 10, "urgent": 20}

limits = st.builds(
    Limits,
    requests_max=st.none() | st.integers(0, 5),
    bytes_max=st.none() | st.integers(0, 50),
)
band_settings = st.builds(
    BandSettings,
    limits=limits,
    ttl_ns=st.none() | st.integers(0, 5 * SECOND),
    fairness=st.sampled_from(Fairness),
)
configs = st.builds(
    ControllerConfig,
    limits=limits,
    templates=st.tuples(st.builds(BandTemplate, priority_max=st.just(-1), settings=band_settings)),
    default_settings=band_settings,
    no_endpoint_ttl_ns=st.none() | st.integers(0, 9 * SECOND),
    in_flight_max=st.integers(1, 3),
    picker=st.sampled_from(Picker),
)


class ControllerLedger(RuleBasedStateMachine):
    """Arrived = waiting + in flight + ended + refused, whatever happens in whatever order."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.count = 0
        self.decisions: dict[int, Decision] = {}
        self.arrived_ns: dict[int, int] = {}
        self.left: set[int] = set()
        self.endpoints: tuple[str, ...] = ()
        self.has_config = False
        self.is_draining = False

    @precondition(lambda self: not self.has_config)
    @rule(config=configs)
    def configure(self, config: ControllerConfig) -> None:
        """Begin with any configuration."""
        self.has_config = True
        self.config = config
        self.controller = FlowController(config, self.now_ns)

    @precondition(lambda self: self.has_config)
    @rule(
        target=requests,
        objective=st.sampled_from([None, "batch", "chat", "urgent", "nobody"]),
        flow=st.sampled_from("abc"),
        size=st.integers(0, 20),
        ttl=st.none() | st.integers(0, 3 * SECOND),
    )
    def arrive(self, objective: str | None, flow: str, size: int, ttl: int | None) -> int:
        """Let a request arrive, not yet polled: batches are cut anywhere."""
        self.count += 1
        request = Request(self.count, flow, objective, size, ttl)
        self.arrived_ns[self.count] = self.now_ns
        self.controller.handle(Arrived(request), self.now_ns)
        return self.count

    @precondition(lambda self: self.has_config)
    @rule(request=consumes(requests))
    def leave(self, request: int) -> None:
        """End a stream, whatever state its request is in."""
        self.left.add(request)
        self.controller.handle(Left(request), self.now_ns)

    @precondition(lambda self: self.has_config)
    @rule(count=st.integers(0, 3))
    def change_endpoints(self, count: int) -> None:
        """Grow, shrink or empty the pool."""
        self.endpoints = tuple(f"10.0.0.{index}:8000" for index in range(count))
        self.controller.handle(EndpointsChanged(self.endpoints), self.now_ns)

    @precondition(lambda self: self.has_config)
    @rule(names=st.sets(st.sampled_from(sorted(OBJECTIVES))))
    def change_objectives(self, names: set[str]) -> None:
        """Declare any subset; bands come and drain."""
        priorities = {name: OBJECTIVES[name] for name in sorted(names)}
        self.controller.handle(ObjectivesChanged(priorities), self.now_ns)

    @precondition(lambda self: self.has_config and not self.is_draining)
    @rule(budget=st.integers(0, 4 * SECOND))
    def drain(self, budget: int) -> None:
        """Begin to drain."""
        self.is_draining = True
        self.controller.handle(DrainBegan(budget), self.now_ns)

    @precondition(lambda self: self.has_config)
    @rule(passed=st.integers(0, 4 * SECOND))
    def pass_time(self, passed: int) -> None:
        """Poll at the wake-up the machine asked for, or earlier; never later."""
        self.poll()
        wakeup_ns = self.controller.next_wakeup_ns()
        then_ns = self.now_ns + passed
        self.now_ns = then_ns if wakeup_ns is None else max(self.now_ns, min(then_ns, wakeup_ns))

    @invariant()
    def accounts_agree(self) -> None:
        """Every request is decided exactly once, on time, and nothing waits beside a free slot."""
        if not self.has_config:
            return
        self.poll()
        self.controller.check_invariants()
        snapshot = self.controller.snapshot(self.now_ns, 10)
        outcomes = Counter(decision.outcome for decision in self.decisions.values())
        gone = {i for i in self.left if self.was_dispatched(i)}
        assert snapshot.in_flight == outcomes[Outcome.DISPATCHED] - len(gone)
        assert snapshot.waiting == self.count - len(self.decisions)
        counted: Counter[Outcome] = Counter()
        for totals in snapshot.totals.values():
            counted.update(totals.outcomes)
        assert counted == outcomes
        assert sum(totals.completed for totals in snapshot.totals.values()) == len(gone)
        self.check_limits()
        if self.is_draining and snapshot.waiting == 0:
            assert self.controller.is_drained

    def check_limits(self) -> None:
        """Nothing beyond a limit, nothing beyond a slot."""
        snapshot = self.controller.snapshot(self.now_ns, 10)
        total = self.config.limits
        assert total.requests_max is None or snapshot.waiting <= total.requests_max
        assert total.bytes_max is None or snapshot.waiting_bytes <= total.bytes_max
        for band in snapshot.bands:
            own = self.config.settings_for(band.priority).limits
            assert own.requests_max is None or band.waiting <= own.requests_max
            assert own.bytes_max is None or band.waiting_bytes <= own.bytes_max

    def was_dispatched(self, request: int) -> bool:
        """Whether the request's one decision was to go."""
        decision = self.decisions.get(request)
        return decision is not None and decision.outcome is Outcome.DISPATCHED

    def poll(self) -> None:
        """Ask for decisions and enter them in the ledger."""
        for decision in self.controller.poll(self.now_ns):
            assert decision.request_id not in self.decisions, "decided twice"
            self.decisions[decision.request_id] = decision
            waited_ns = self.now_ns - self.arrived_ns[decision.request_id]
            assert decision.waited_ns == waited_ns
            if decision.outcome is Outcome.DISPATCHED:
                assert self.endpoints, "dispatched to an empty pool"
            if decision.outcome is Outcome.EVICTED_CANCELLED:
                assert decision.request_id in self.left


TestControllerLedger = ControllerLedger.TestCase
TestControllerLedger.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
