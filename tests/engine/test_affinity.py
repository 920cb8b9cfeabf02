"""A prompt goes where its beginning was served, as far as the load allows."""

from hypothesis import given
from hypothesis import strategies as st

from flowcontrol import picker as module
from flowcontrol.affinity import PrefixAffinity
from flowcontrol.config import Concurrency, ControllerConfig, Picker
from flowcontrol.controller import FlowController
from flowcontrol.events import Arrived, EndpointsChanged, Left
from flowcontrol.picker import BOUND, FULL, LIGHT, EndpointPicker
from flowcontrol.request import Request

SERVERS = ("a", "b", "c", "d")
CONFIG = ControllerConfig(detectors=(Concurrency(requests_max=20),), picker=Picker.PREFIX_AFFINITY)


class TestMemory:
    """What is remembered of prompts."""

    def test_longest_first(self) -> None:
        """The endpoint of the longest part comes first, each once."""
        affinity = PrefixAffinity()
        affinity.served((1, 2, 3, 4), "a")
        affinity.served((1, 2, 3, 5), "b")

        assert list(affinity.endpoints((1, 2, 3, 4))) == ["a", "b"]
        assert list(affinity.endpoints((1, 2, 3, 5))) == ["b"]

    def test_half_of_it(self) -> None:
        """A beginning shorter than half of the prompt is not worth it."""
        affinity = PrefixAffinity()
        affinity.served((1, 2), "a")

        assert list(affinity.endpoints((1, 2, 3, 4))) == ["a"]
        assert list(affinity.endpoints((1, 2, 3, 4, 5))) == []

    def test_bounded(self) -> None:
        """The blocks that were used least lately are forgotten."""
        affinity = PrefixAffinity(blocks_max=3)
        affinity.served((1, 2), "a")
        affinity.served((3,), "b")
        affinity.served((1,), "c")
        affinity.served((4,), "d")

        assert len(affinity) == 3
        assert list(affinity.endpoints((2,))) == []
        assert [list(affinity.endpoints((n,))) for n in (1, 3, 4)] == [["c"], ["b"], ["d"]]


class TestBound:
    """Affinity does not make the load uneven beyond its bound."""

    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(SERVERS),
                st.floats(0, 1.2),
                st.integers(1, 3),
                st.none() | st.sets(st.sampled_from(SERVERS), min_size=1),
            ),
            max_size=60,
        )
    )
    def test_held(self, steps: list[tuple[str, float, int, set[str] | None]]) -> None:
        """Whoever is picked for its cache served it, is below the bound, and in the subset."""
        picker = EndpointPicker()
        picker.set_affinity(is_on=True)
        picker.set_endpoints(SERVERS)
        loads = dict.fromkeys(SERVERS, 0.0)
        served: dict[int, str] = {}
        for server in SERVERS:
            picker.put(server, 0.0, is_held=False)
        for server, load, prompt, subset in steps:
            loads[server] = min(load, FULL)
            picker.put(server, load, is_held=False)
            request = Request(
                1, prefix=(prompt,), subset=None if subset is None else tuple(sorted(subset))
            )
            cached = picker.cached_at(request)
            bound = min(FULL, max(LIGHT, BOUND * sum(loads.values()) / len(loads)))
            last = served.get(prompt)
            may_have_more = (
                last is not None
                and loads[last] < bound - 1e-9
                and (subset is None or last in subset)
            )
            if cached is not None:
                assert cached == last
                assert loads[cached] < min(FULL, bound + 1e-9)
                assert subset is None or cached in subset
            assert not may_have_more or cached is not None
            picked = cached or picker.best()
            if picked is not None:
                picker.picked(picked, request)
                served[prompt] = picked

    def test_held_endpoint(self) -> None:
        """One that must be sent nothing for the moment is passed over."""
        picker = EndpointPicker()
        picker.set_affinity(is_on=True)
        picker.set_endpoints(("a", "b"))
        picker.put("a", 0.0, is_held=False)
        picker.put("b", 0.0, is_held=False)
        request = Request(1, prefix=(7,))
        picker.picked("a", request)
        assert picker.cached_at(request) == "a"
        picker.put("a", 0.0, is_held=True)

        assert picker.cached_at(request) is None


class TestController:
    """As the engine uses it."""

    def test_same_prompt(self) -> None:
        """Prompts alike go to one endpoint until it has more than its share, then to another."""
        controller = FlowController(CONFIG, 0)
        controller.handle(EndpointsChanged(SERVERS), 0)
        sent = []
        for number in range(1, 5):
            controller.handle(Arrived(Request(number, prefix=(1, 2))), number)
            (decision,) = controller.poll(number)
            sent.append(decision.endpoint)

        assert module.LIGHT * 20 == 2
        assert sent[0] == sent[1]
        assert sent[2] != sent[0]
        assert sent[3] == sent[2]

    def test_turned_off(self) -> None:
        """Nothing is remembered while another picker is on."""
        controller = FlowController(CONFIG, 0)
        controller.handle(EndpointsChanged(SERVERS), 0)
        for number in (1, 2):
            controller.handle(Arrived(Request(number, prefix=(1,))), number)
            controller.poll(number)
            controller.handle(Left(number), number)
            controller.pool.picker.set_affinity(is_on=number > 1)
        controller.handle(Arrived(Request(3, prefix=(1,))), 3)
        (decision,) = controller.poll(3)

        assert decision.endpoint == SERVERS[2]  # the one whose turn it is
