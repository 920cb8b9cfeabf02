"""What an engine has learnt goes on in another: accounts, estimates, limits and drain rates."""

from dataclasses import replace
from itertools import count
from math import inf, nan

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.auto import AutoDetector
from flowcontrol.config import (
    Adaptive,
    Auto,
    BandSettings,
    Concurrency,
    ControllerConfig,
    Detector,
    Fairness,
    Picker,
    Role,
)
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    EndpointsChanged,
    Left,
    LoadObserved,
    MemoryRestored,
    Reconfigured,
    Settled,
)
from flowcontrol.memory import (
    BandMemory,
    CountsMemory,
    Drain,
    EngineMemory,
    Estimate,
    PlaceMemory,
    ReserveMemory,
    StageMemory,
)
from flowcontrol.replay.plain import plainly
from flowcontrol.request import Request

A, B = "10.0.0.1:80", "10.0.0.2:80"
MS = 1_000_000
_ids = count(1)


def engine(
    fairness: Fairness = Fairness.WEIGHTED_TOKENS, detector: Detector | None = None
) -> FlowController:
    """An engine in front of A and B."""
    config = ControllerConfig(
        default_settings=BandSettings(fairness=fairness),
        detectors=(detector or Concurrency(requests_max=1),),
        picker=Picker.LEAST_LOADED,
    )
    controller = FlowController(config, 0)
    controller.handle(EndpointsChanged((A, B)), 0)
    return controller


def moved(controller: FlowController) -> EngineMemory:
    """Return its memory, written down and read again."""
    form = plainly(EngineMemory)
    memory: EngineMemory = form.read(form.write(controller.learned.memory(1000 * MS)))
    return memory


def arrive(controller: FlowController, flow_id: str, now_ns: int, tokens: int = 10) -> int:
    """Let a request arrive; return its id."""
    request = Request(next(_ids), flow_id, input_tokens=tokens, model="m", byte_size=40)
    controller.handle(Arrived(request), now_ns)
    return request.request_id


@pytest.mark.parametrize("fairness", [Fairness.WEIGHTED_TOKENS, Fairness.LEAST_ATTAINED_SERVICE])
def test_accounts(fairness: Fairness) -> None:
    """Who was served much lets the other go first, also where another engine served it."""
    before, after, fresh = engine(fairness), engine(fairness), engine(fairness)
    for _ in range(3):
        arrive(before, "little", 0, 1)
        arrive(before, "much", 0, 1000)
    before.poll(0)
    after.handle(MemoryRestored(moved(before)), 1000 * MS)
    order = []
    for controller in (after, fresh):
        for name in ("x", "y"):
            arrive(controller, name, 1000 * MS)
        controller.poll(1000 * MS)
        in_flight = [*controller.leases]
        for name in ("little", "much", "little"):
            arrive(controller, name, 1001 * MS)
        controller.poll(1001 * MS)
        next_ones = []
        for request_id in in_flight:
            controller.handle(Left(request_id), 1002 * MS)
            next_ones += [each.flow_id for each in controller.poll(1002 * MS)]
        order.append(next_ones)

    assert order == [["little", "little"], ["little", "much"]]


def test_estimates() -> None:
    """A tenant's answers are expected to be as long as before."""
    before, after = engine(), engine()
    request_id = arrive(before, "tenant", 0)
    before.poll(0)
    before.handle(Settled(request_id, input_tokens=10, output_tokens=777), 0)
    before.handle(Left(request_id), 0)
    after.handle(MemoryRestored(moved(before)), 0)
    arrive(after, "tenant", 0)
    after.poll(0)
    (lease,) = after.leases.values()

    assert lease.tokens.output == 777


def test_limits() -> None:
    """A limit that was found is where the other begins, for each endpoint that it knows."""
    adaptive = Adaptive()
    before, after = engine(detector=adaptive), engine(detector=adaptive)
    memory = moved(before)
    memory = EngineMemory(memory.bands, memory.estimates, {A: 20.0, "10.0.0.9:80": 3.0})
    after.handle(MemoryRestored(memory), 0)
    shared = engine(detector=adaptive)
    shared.handle(MemoryRestored(EngineMemory(limits={"": 30.0})), 0)

    assert sum(moved(before).limits.values()) == adaptive.limit_first * 2
    assert moved(after).limits == {A: 20.0, B: 20.0}
    assert moved(shared).limits == {"": 30.0}


def test_limits_before_endpoints() -> None:
    """They are kept until there is an endpoint, whatever settings count by then."""
    config = ControllerConfig(detectors=(Adaptive(),), picker=Picker.LEAST_LOADED)
    controller = FlowController(config, 0)
    controller.handle(MemoryRestored(EngineMemory(limits={A: 20.0, B: 30.0})), 0)
    meanwhile = moved(controller).limits
    later = replace(config, detectors=(Adaptive(limit_max=25),))
    controller.handle(Reconfigured(later), 0)
    controller.handle(EndpointsChanged((A, B)), 0)

    assert meanwhile == {A: 20.0, B: 30.0}
    assert moved(controller).limits == {A: 20.0, B: 25.0}


def test_found_before_endpoints() -> None:
    """So is what `auto` found, also where no source has told of any endpoint yet."""
    config = ControllerConfig(detectors=(Auto(),), picker=Picker.LEAST_LOADED)
    controller = FlowController(config, 0)
    stage = StageMemory(Role.BOTH, {A: FOUND})
    controller.handle(MemoryRestored(EngineMemory(stages=(stage,))), 0)
    controller.handle(EndpointsChanged((A,)), 0)

    assert moved(controller).stages == (stage,)


FOUND = PlaceMemory(
    requests=20.0, calm=18.0, tokens=9000.0, calm_tokens=8000.0, batch=24.0, batch_for_ns=5000 * MS
)
ELSEWHERE = PlaceMemory(requests=40.0, calm=40.0, is_starting=True)
"""Where no edge was found yet."""


def restored(
    places: dict[str, PlaceMemory], picker: Picker = Picker.LEAST_LOADED, *endpoints: str
) -> FlowController:
    """An engine with limits that another found, and these endpoints."""
    config = ControllerConfig(detectors=(Auto(),), picker=picker)
    controller = FlowController(config, 0)
    controller.handle(EndpointsChanged(endpoints), 0)
    memory = EngineMemory(stages=(StageMemory(Role.BOTH, places),))
    controller.handle(MemoryRestored(memory), 0)
    return controller


def found(controller: FlowController) -> dict[str, PlaceMemory]:
    """Return the limits by which it goes."""
    (stage,) = moved(controller).stages
    return dict(stage.places)


def detector_of(controller: FlowController) -> AutoDetector:
    """Return that of its one stage."""
    (detector,) = controller.pool.detectors[Role.BOTH]
    assert isinstance(detector, AutoDetector)
    return detector


class TestAuto:
    """Limits that found themselves, the edge of the batch, and whether the start is over."""

    def test_by_endpoint(self) -> None:
        """Each has its own again; who was not known has what is usual."""
        controller = restored({A: FOUND, B: ELSEWHERE}, Picker.LEAST_LOADED, A, B, "new:80")
        detector = detector_of(controller)

        assert found(controller) == {A: FOUND, B: ELSEWHERE, "new:80": ELSEWHERE}
        assert [detector.limit_of(each) for each in (A, B)] == [20, 40]
        assert detector.limit == 100

    def test_fills_at_once(self) -> None:
        """As many are dispatched as the other let in flight, not as few as a start would."""
        controller = restored({A: replace(FOUND, tokens=None)}, Picker.LEAST_LOADED, A)
        for _ in range(30):
            arrive(controller, "tenant", 0)
        controller.poll(0)

        assert sum(each.is_in_flight for each in controller.leases.values()) == 20

    def test_nothing_known(self) -> None:
        """Without a word about the stage the start is as ever."""
        controller = restored({}, Picker.LEAST_LOADED, A)

        assert found(controller) == {A: PlaceMemory(requests=8.0, calm=0.0, is_starting=True)}

    @pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
    def test_who_picks(self, picker: Picker) -> None:
        """Limits are of one endpoint, however many there are and whoever picks among them."""
        kept = {A: FOUND} if picker is Picker.OFF else {"": FOUND}
        controller = restored(kept, picker, A, B)
        detector = detector_of(controller)

        assert detector.limit == 40
        assert detector.tokens_limit == 18_000
        assert [*found(controller).values()] == [FOUND] * (1 if picker is Picker.OFF else 2)

    def test_before_endpoints(self) -> None:
        """As long as there is no endpoint nothing is lost: the first to come go on with it."""
        controller = restored({A: FOUND})
        before = found(controller)
        controller.handle(EndpointsChanged((A,)), 0)

        assert before == {A: FOUND}
        assert found(controller) == {A: FOUND}

    def test_stages(self) -> None:
        """What was found where prompts are read is not for those that answer."""
        roles = {A: Role.PREFILL, B: Role.DECODE}
        config = ControllerConfig(detectors=(Auto(),), picker=Picker.LEAST_LOADED)
        controller = FlowController(config, 0)
        controller.handle(EndpointsChanged((A, B), roles), 0)
        stages = (
            StageMemory(Role.PREFILL, {"": ELSEWHERE}),
            StageMemory(Role.DECODE, {B: FOUND}),
        )
        controller.handle(MemoryRestored(EngineMemory(stages=stages)), 0)

        assert moved(controller).stages == stages


def test_drain_rates() -> None:
    """Retry-After goes by what the other engine saw."""
    before, after = engine(), engine()
    ids = [arrive(before, "tenant", 0) for _ in range(6)]
    before.poll(0)
    for step, request_id in enumerate(ids[:4], start=1):
        before.handle(Left(request_id), step * 100 * MS)
        before.poll(step * 100 * MS)
    memory = moved(before)
    after.handle(MemoryRestored(memory), 1000 * MS)

    assert memory.drain is not None
    assert memory.drain.requests == 4
    assert moved(after).drain == memory.drain
    assert moved(after).bands[0].drain == memory.bands[0].drain


def test_nothing_learnt() -> None:
    """A new engine has nothing to tell, and is not changed by that."""
    controller = engine()
    memory = moved(controller)
    controller.handle(MemoryRestored(memory), 0)
    controller.poll(0)
    controller.check_invariants()

    assert memory == EngineMemory()
    assert moved(controller) == memory


@pytest.mark.parametrize("detector", [Auto(), Adaptive()])
def test_less_than_one_each(detector: Detector) -> None:
    """Of one for all endpoints together each gets one, once they have limits of their own."""
    off = ControllerConfig(detectors=(detector,), picker=Picker.OFF)
    controller = FlowController(off, 0)
    controller.handle(EndpointsChanged((A, B, "10.0.0.3:80")), 0)
    stages = (StageMemory(Role.BOTH, {"": PlaceMemory(requests=0.1, calm=0.1)}),)
    controller.handle(MemoryRestored(EngineMemory(limits={"": 1.0}, stages=stages)), 0)
    controller.handle(Reconfigured(replace(off, picker=Picker.LEAST_LOADED)), 0)
    first = arrive(controller, "a", 0)
    controller.poll(0)
    controller.handle(Settled(first, ttft_ns=MS), MS)
    for _ in range(5):
        arrive(controller, "a", MS)
    controller.poll(MS)

    assert controller.in_flight == 3


NUMBERS = st.floats(0, 1e15)
COUNTS = st.builds(lambda bins: {"bins": bins, "means": bins, "squares": bins}, st.lists(NUMBERS))
WRITTEN = st.fixed_dictionaries(
    {},
    optional={
        "bands": st.lists(
            st.fixed_dictionaries(
                {"priority": st.sampled_from([0, 10])},
                optional={
                    "accounts": st.dictionaries(st.sampled_from("ab"), NUMBERS),
                    "drain": st.fixed_dictionaries({"requests": NUMBERS, "time_ns": NUMBERS}),
                },
            )
        ),
        "estimates": st.lists(
            st.fixed_dictionaries(
                {"flow_id": st.sampled_from(["a", None]), "model": st.just("m")},
                optional=dict.fromkeys(("output", "prompt", "bytes"), NUMBERS)
                | dict.fromkeys(("answers", "prompts"), st.integers(0, 10**15)),
            )
        ),
        "limits": st.dictionaries(st.sampled_from([A, ""]), NUMBERS),
        "stages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["both", "decode"]),
                    "places": st.dictionaries(
                        st.sampled_from([A, ""]),
                        st.fixed_dictionaries(
                            {"requests": NUMBERS, "calm": NUMBERS},
                            optional=dict.fromkeys(
                                ("tokens", "calm_tokens", "cache_per_token", "batch"), NUMBERS
                            )
                            | {
                                "batch_for_ns": st.integers(0, 10**15),
                                "is_starting": st.booleans(),
                            },
                        ),
                    ),
                }
            )
        ),
        "reserve": st.fixed_dictionaries(
            {
                "bands": st.lists(
                    st.fixed_dictionaries(
                        {"priority": st.just(0), "arrivals": COUNTS, "load": NUMBERS}
                    )
                ),
                "departures": COUNTS,
                "fullness": NUMBERS,
            }
        ),
    },
)


@given(WRITTEN, st.sampled_from([Auto(), Adaptive()]))
def test_odd(written: object, detector: Detector) -> None:
    """Whatever was kept and is not refused, the engine works with it, within its limits."""
    memory: EngineMemory = plainly(EngineMemory).read(written)
    try:
        memory.check()
    except ValueError:
        reject()
    controller = engine(detector=detector)
    controller.handle(MemoryRestored(memory), 0)
    for step in range(1, 40):
        now_ns = step * 300 * MS
        request_id = arrive(controller, "a", now_ns)
        controller.handle(LoadObserved(A, waiting=0, running=1, kv_usage=0.5), now_ns)
        controller.poll(now_ns)
        controller.handle(Settled(request_id, input_tokens=9, output_tokens=9, ttft_ns=MS), now_ns)
        controller.check_invariants()
        if step % 3 == 0:
            controller.handle(Left(request_id), now_ns)
    (found,) = controller.pool.detectors[Role.BOTH]
    assert isinstance(found, AutoDetector | AdaptiveDetector)

    assert found.limit >= 2
    assert controller.in_flight <= found.limit


DAMAGED = (
    EngineMemory(bands=(BandMemory(0, {"a": nan}),)),
    EngineMemory(bands=(BandMemory(0, drain=Drain(1.0, -1.0)),)),
    EngineMemory(estimates=(Estimate("a", "m", answers=-1),)),
    EngineMemory(estimates=(Estimate("a", "m", prompts=1, prompt=5.0),)),
    EngineMemory(estimates=(Estimate("a", "m", large_prompts=1, large_prompt=5.0),)),
    EngineMemory(limits={A: inf}),
    EngineMemory(drain=Drain(inf, 1.0)),
    EngineMemory(stages=(StageMemory(Role.BOTH, {A: replace(FOUND, requests=nan)}),)),
    EngineMemory(stages=(StageMemory(Role.BOTH, {A: replace(FOUND, tokens=-1.0)}),)),
    EngineMemory(stages=(StageMemory(Role.BOTH, {A: replace(FOUND, batch_for_ns=-1)}),)),
    EngineMemory(reserve=ReserveMemory((), CountsMemory((nan,), (), ()), 0.5)),
    EngineMemory(reserve=ReserveMemory((), CountsMemory((), (), ()), -0.5)),
)


@pytest.mark.parametrize("memory", DAMAGED)
def test_damaged(memory: EngineMemory) -> None:
    """What no engine can have learnt is refused."""
    with pytest.raises(ValueError, match=r"what was learnt must be|prompts must have bytes"):
        memory.check()
