"""Between bands: the bounds of shares and promotions, and wrong accounts that break them."""

from collections.abc import Iterable
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcontrol.across import Across
from flowcontrol.band import Band
from flowcontrol.capacity import Capacity
from flowcontrol.config import BandSettings, BandTemplate, ControllerConfig, Fairness
from flowcontrol.estimates import Tokens
from flowcontrol.flow import Lease
from flowcontrol.lines import HasRoom
from flowcontrol.request import Request
from tests.support.queues import everywhere

TOLERANCE = 1e-6
PRIORITIES = (3, 2, 1, 0)
SHARES = {3: 0.0, 2: 0.3, 1: 0.2, 0: 0.1}
AFTER_NS = {3: None, 2: 7, 1: 0, 0: 20}
Step = tuple[str, int, int]
"""What happens, in the how manieth band, the cost of the request or the time that passes."""


def configured(
    shares: dict[int, float], after_ns: dict[int, int | None] | None = None
) -> ControllerConfig:
    """Return settings with these shares and promotions by priority."""
    templates = tuple(
        BandTemplate(
            priority_min=priority,
            priority_max=priority,
            settings=BandSettings(
                fairness=Fairness.GLOBAL_STRICT,
                share_min=share,
                promote_after_ns=(after_ns or {}).get(priority),
            ),
        )
        for priority, share in shares.items()
    )
    return ControllerConfig(templates=templates)


class Stack:
    """Bands in strict order under an account of the exceptions, never gated."""

    def __init__(self, across: Across, config: ControllerConfig) -> None:
        self.across = across
        self.config = config
        self.now_ns = 0
        self.bands = {each: Band(each, config, Capacity(config.limits), 0) for each in PRIORITIES}
        self.across.set_bands(self.bands.values())
        self.arrived_count = 0
        self.promoted_cost = 0.0

    @property
    def waiting(self) -> list[Lease]:
        """All that wait."""
        return [
            lease
            for band in self.bands.values()
            for flow in band.flows.values()
            for lease in flow.leases()
        ]

    def arrive(self, priority: int, cost: int) -> Lease:
        """Queue and admit a request."""
        self.arrived_count += 1
        band = self.bands[priority]
        flow = band.flow("a")
        lease = Lease(
            Request(self.arrived_count),
            flow,
            self.arrived_count,
            self.now_ns,
            Tokens(cost, 0),
            cost,
        )
        band.queue(lease, self.now_ns)
        band.admit(lease, self.now_ns)
        self.across.admitted(lease, band)
        return lease

    def dispatch(self) -> Lease:
        """Serve the next and let it end."""
        lease = self.across.next_exception(self.now_ns, everywhere)
        if lease is None:
            lease = next(b for b in self.bands.values() if b.waiting).next(everywhere)
        assert lease is not None, "somebody waits"
        band = self.bands[lease.flow.key.priority]
        self.across.dispatched(lease, band, self.now_ns, everywhere)
        band.dispatch(lease, self.now_ns)
        self.across.removed(lease, band)
        band.complete(lease)
        return lease

    def cancel(self, lease: Lease) -> None:
        """Take a waiting request out."""
        band = self.bands[lease.flow.key.priority]
        band.remove(lease, self.now_ns)
        self.across.removed(lease, band)

    def declare_anew(self, priority: int) -> bool:
        """Let an idle band go and come back; whether it was idle."""
        is_idle = self.bands[priority].is_idle
        if is_idle:
            others = [band for band in self.bands.values() if band.priority != priority]
            self.across.set_bands(others)
            self.bands[priority] = Band(
                priority, self.config, Capacity(self.config.limits), self.now_ns
            )
            self.across.set_bands(self.bands.values())
        return is_idle

    def is_due(self, lease: Lease) -> bool:
        """Whether a request has waited long enough to be promoted."""
        after_ns = self.bands[lease.flow.key.priority].settings.promote_after_ns
        return after_ns is not None and lease.arrived_ns + after_ns <= self.now_ns

    def take(self, step: Step) -> Lease | None:
        """Take a step as far as it is possible; return the request it dispatched."""
        what, number, size = step
        priority = PRIORITIES[number % len(PRIORITIES)]
        if what == "arrive":
            self.arrive(priority, size)
        elif what == "pass":
            self.now_ns += size
        elif what == "anew":
            self.declare_anew(priority)
        elif what == "cancel" and self.waiting:
            self.cancel(self.waiting[number % len(self.waiting)])
        elif what == "dispatch" and self.waiting:
            return self.dispatch()
        return None


def share_excess(across: Across, steps: Iterable[Step], shares: dict[int, float]) -> float:
    """Return by how much the worst share falls short of its bound; at most 0 when all are kept.

    For every band with a share and every interval in which it waits: s T less what it got, against
    (k + 1 + bands declared again) C. Steps that pass time are for promotions, which T leaves out.
    """
    stack = Stack(across, configured(shares, AFTER_NS))
    scale = max(1.0, sum(shares.values()))
    parts = {priority: share / scale for priority, share in shares.items() if share > 0}
    short = dict.fromkeys(parts, 0.0)
    least: dict[int, float] = {}
    largest, anew, worst = 0, 0, -inf
    for step in steps:
        if step[0] == "anew":
            anew += stack.declare_anew(PRIORITIES[step[1] % len(PRIORITIES)])
            continue
        largest = max(largest, step[2] if step[0] == "arrive" else 0)
        due = {lease for lease in stack.waiting if stack.is_due(lease)}
        lease = stack.take(step)
        for priority, part in parts.items():
            if lease is not None and lease not in due:
                short[priority] += part * lease.cost
            if lease is not None and lease.flow.key.priority == priority:
                short[priority] -= lease.cost
            least[priority] = min(least.get(priority, inf), short[priority])
            bound = (len(parts) + 1 + anew) * largest
            worst = max(worst, short[priority] - least[priority] - bound)
            if not stack.bands[priority].waiting:
                del least[priority]
    return worst


def steps_of(*kinds: str) -> st.SearchStrategy[list[Step]]:
    """Return steps of these kinds."""
    return st.lists(
        st.tuples(st.sampled_from(kinds), st.integers(0, 9), st.integers(1, 9)), max_size=80
    )


def long_run(seed: int, *kinds: str) -> list[Step]:
    """Return many steps of a seeded generator, in which bands empty all the time."""
    chance = Random(seed)
    return [
        (chance.choice(kinds), chance.randrange(100), chance.randint(1, 9)) for _ in range(1500)
    ]


class Strict(Across):  # type: ignore[misc]  # planted
    """Makes no exception."""

    def next_exception(self, now_ns: int, has_room: HasRoom) -> Lease | None:
        """Return none."""
        del now_ns, has_room
        return None


class ForgivesDebt(Across):  # type: ignore[misc]  # planted
    """Lets a band begin without debt whenever it is empty."""

    def removed(self, lease: Lease, band: Band) -> None:
        """Forget credit and debt alike."""
        super().removed(lease, band)
        if band in self._credits and not band.waiting:
            self._credits[band] = 0.0


class EarnsByPromotions(Across):  # type: ignore[misc]  # planted
    """Lets promotions earn credit, as if they were not exceptions themselves."""

    def dispatched(self, lease: Lease, served: Band, now_ns: int, has_room: HasRoom) -> None:
        """Count a promotion like any other dispatch."""
        super().dispatched(lease, served, min(now_ns, lease.arrived_ns - 1), has_room)


class FirstComeFirst(Across):  # type: ignore[misc]  # planted
    """Promotes the request that came first, not the one that became due first."""

    def admitted(self, lease: Lease, band: Band) -> None:
        """Take the arrival for the time it becomes due."""
        if band.settings.promote_after_ns is not None:
            self._promotions.put(lease, lease.arrived_ns, None)


SHARING = ("arrive", "arrive", "dispatch", "dispatch", "cancel", "anew")


class TestShares:
    """What a band gets in any case."""

    @given(steps=steps_of(*SHARING, "pass"))
    @settings(max_examples=150)
    def test_no_band_falls_short_of_its_bound(self, steps: list[Step]) -> None:
        """Whatever waits above it, and whichever bands come and go meanwhile."""
        assert share_excess(Across(), steps, SHARES) <= TOLERANCE

    @pytest.mark.parametrize("seed", range(4))
    def test_the_bound_does_not_grow_with_time(self, seed: int) -> None:
        """Over hundreds of requests, too, and when shares add up to more than 1."""
        steps = long_run(seed, "arrive", "arrive", "dispatch", "cancel")

        assert share_excess(Across(), steps, SHARES) <= TOLERANCE
        assert share_excess(Across(), steps, dict.fromkeys(PRIORITIES, 0.9)) <= TOLERANCE

    @pytest.mark.interpreted
    def test_strict_order_breaks_the_bound(self) -> None:
        """Without shares a low band gets nothing while a high one waits."""
        steps: list[Step] = [("arrive", 0, 5), ("arrive", 3, 1)] * 60 + [("dispatch", 0, 0)] * 59

        assert share_excess(Strict(), steps, SHARES) > 1
        assert share_excess(Across(), steps, SHARES) <= TOLERANCE

    @pytest.mark.interpreted
    def test_debts_forgiven_break_the_bound(self) -> None:
        """A band that comes with one large request at a time would pay for none of them."""
        busy: list[Step] = [("arrive", 0, 1), ("arrive", 3, 1)] * 200
        visit: list[Step] = [("arrive", 1, 9), ("dispatch", 0, 0), ("dispatch", 0, 0)]
        steps = busy + visit * 150
        shares = {2: 0.3, 0: 0.5}

        assert share_excess(ForgivesDebt(), steps, shares) > 1
        assert share_excess(Across(), steps, shares) <= TOLERANCE

    @pytest.mark.interpreted
    def test_promotions_that_earn_break_the_bound(self) -> None:
        """Credit earned all at once by one band is spent all at once, before the others'."""
        waiting: list[Step] = [("arrive", 3, 1), ("arrive", 1, 9)] * 60
        promotions: list[Step] = [("arrive", 2, 9), ("dispatch", 0, 0)] * 100
        steps = [*waiting, *promotions, *[("dispatch", 0, 0)] * 60]
        shares = {2: 0.45, 1: 0.05, 0: 0.45}

        assert share_excess(EarnsByPromotions(), steps, shares) > 1
        assert share_excess(Across(), steps, shares) <= TOLERANCE

    def test_shares_are_met(self) -> None:
        """Beside a permanent high band each gets its part, in cost, whatever its requests cost."""
        steps: list[Step] = [("arrive", 0, 1), ("arrive", 1, 2), ("arrive", 2, 3), ("arrive", 3, 5)]
        stack = Stack(Across(), configured(SHARES))
        for step in steps * 1000:
            stack.take(step)
        got = dict.fromkeys(PRIORITIES, 0.0)
        for _ in range(1000):
            lease = stack.dispatch()
            got[lease.flow.key.priority] += lease.cost
        parts = {priority: cost / sum(got.values()) for priority, cost in got.items()}

        assert parts == pytest.approx({3: 0.4, 2: 0.3, 1: 0.2, 0: 0.1}, abs=0.02)

    def test_low_band_waits_no_longer_than_its_bound(self) -> None:
        """With one share of a tenth, the next goes before twenty others of its size have."""
        stack = Stack(Across(), configured({0: 0.1}))
        for _ in range(100):
            stack.arrive(3, 1)
            stack.arrive(0, 1)
        order = [stack.dispatch().flow.key.priority for _ in range(100)]
        gaps = [len(run) for run in "".join(map(str, order)).split("0")]

        assert max(gaps) <= 20
        assert order.count(0) == pytest.approx(10, abs=2)

    def test_quiet_night_is_not_held_against_a_band(self) -> None:
        """What it got while nothing waited above leaves no debt."""
        stack = Stack(Across(), configured({0: 0.5}))
        for _ in range(100):
            stack.arrive(0, 1)
        for _ in range(50):
            stack.dispatch()
        for _ in range(50):
            stack.arrive(3, 1)

        assert [stack.dispatch().flow.key.priority for _ in range(6)] == [3, 0, 3, 0, 3, 0]

    def test_band_that_comes_back_has_no_claim_to_the_past(self) -> None:
        """Credit is gone with the last that waited, cancelled or served."""
        stack = Stack(Across(), configured({0: 0.5}))
        gone = stack.arrive(0, 1)
        for _ in range(9):
            stack.arrive(3, 1)
        stack.dispatch()
        stack.cancel(gone)
        stack.arrive(0, 1)

        assert stack.dispatch().flow.key.priority == 3

    def test_without_shares_or_promotions_there_is_no_exception(self) -> None:
        """Strict order is all there is by default."""
        stack = Stack(Across(), ControllerConfig())
        for priority in (0, 3, 0, 1, 3):
            stack.arrive(priority, 1)

        assert [stack.dispatch().flow.key.priority for _ in range(5)] == [3, 3, 1, 0, 0]

    def test_band_without_a_share_any_more_has_no_credit(self) -> None:
        """Settings may change while it waits."""
        stack = Stack(Across(), configured({0: 0.5}))
        stack.arrive(0, 1)
        stack.arrive(3, 1)
        stack.arrive(3, 1)
        stack.dispatch()
        stack.bands[0].reconfigure(ControllerConfig(), 0)
        stack.across.set_bands(stack.bands.values())

        assert stack.across.next_exception(0, everywhere) is None


class TestPromotions:
    """A request that waited too long goes first."""

    @staticmethod
    def out_of_order(across: Across, steps: Iterable[Step]) -> int:
        """Return how many dispatches were not of the request that had been due longest."""
        stack = Stack(across, configured(SHARES, AFTER_NS))
        admitted: dict[Lease, int] = {}
        wrong = 0
        for step in steps:
            for lease in stack.waiting:
                admitted.setdefault(lease, len(admitted))
            due = [lease for lease in stack.waiting if stack.is_due(lease)]
            due.sort(key=lambda lease: lease.arrived_ns + (AFTER_NS[lease.flow.key.priority] or 0))
            lease_sent = stack.take(step)
            wrong += lease_sent is not None and bool(due) and lease_sent not in _ties(due, AFTER_NS)
        return wrong

    @given(steps=steps_of("arrive", "arrive", "dispatch", "dispatch", "cancel", "pass"))
    @settings(max_examples=150)
    def test_goes_in_the_order_of_becoming_due(self, steps: list[Step]) -> None:
        """Held against a sorted list of all that wait."""
        assert self.out_of_order(Across(), steps) == 0

    @pytest.mark.interpreted
    def test_wrong_orders_are_seen(self) -> None:
        """The check fails for strict order, and for promotion by arrival."""
        steps: list[Step] = [
            *[("arrive", 0, 1)] * 4,
            ("arrive", 3, 1),
            ("pass", 0, 9),
            *[("arrive", 1, 1)] * 4,
            ("pass", 0, 12),
            *[("dispatch", 0, 0)] * 9,
        ]

        assert self.out_of_order(Strict(), steps) > 0
        assert self.out_of_order(FirstComeFirst(), steps) > 0
        assert self.out_of_order(Across(), steps) == 0

    @pytest.mark.parametrize("due_before", [0, 1, 7])
    def test_waits_for_nobody_but_those_due_before(self, due_before: int) -> None:
        """Whatever arrives above meanwhile."""
        stack = Stack(Across(), configured(SHARES, AFTER_NS))
        for _ in range(due_before):
            stack.arrive(0, 1)
        stack.now_ns = 1
        mine = stack.arrive(0, 1)
        stack.now_ns = 21
        sent = []
        for _ in range(due_before + 1):
            stack.arrive(3, 1)
            sent.append(stack.dispatch())

        assert sent[-1] is mine

    def test_next_promotion_is_the_next_to_become_due(self) -> None:
        """So that the machine can ask to be woken then."""
        stack = Stack(Across(), configured(SHARES, AFTER_NS))
        assert stack.across.next_promotion_ns(everywhere) is None

        stack.arrive(0, 1)
        second = stack.arrive(2, 1)
        assert stack.across.next_promotion_ns(everywhere) == 7

        stack.cancel(second)
        assert stack.across.next_promotion_ns(everywhere) == 20

    def test_band_that_promotes_no_more_lets_its_requests_wait(self) -> None:
        """Reconfiguration counts for what waits."""
        stack = Stack(Across(), configured(SHARES, AFTER_NS))
        lease = stack.arrive(0, 1)
        stack.bands[0].reconfigure(ControllerConfig(), 0)
        stack.across.admitted(lease, stack.bands[0])

        assert stack.across.next_promotion_ns(everywhere) is None

    def test_own_promotion_is_paid_from_credit(self) -> None:
        """It is served; that it was out of turn makes it no present."""
        stack = Stack(Across(), configured({0: 0.5}, {0: 10}))
        stack.arrive(0, 1)
        for _ in range(3):
            stack.arrive(3, 1)
        assert stack.dispatch().flow.key.priority == 3

        stack.now_ns = 10
        assert stack.dispatch().flow.key.priority == 0
        stack.arrive(0, 1)
        assert stack.dispatch().flow.key.priority == 3


def _ties(due: list[Lease], after_ns: dict[int, int | None]) -> list[Lease]:
    """Return those that became due first, at the same time."""
    times = [lease.arrived_ns + (after_ns[lease.flow.key.priority] or 0) for lease in due]
    return [lease for lease, time in zip(due, times, strict=True) if time == times[0]]
