"""The scenario file: every mistake in the house's words, every value where it belongs."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from flowcontrol.config import BandSettings, Concurrency, Fairness, Limits, Picker
from flowcontrol.controller import FlowController
from flowcontrol.errors import ConfigError
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Ending
from flowcontrol.simulation.distributions import Exponential, Fixed, Lognormal, Uniform
from flowcontrol.simulation.faults import (
    ClockJumped,
    DecisionsSlow,
    DrainBegins,
    EndpointGone,
    EngineStalled,
    MetricsLie,
    MetricsStale,
    ObjectivesEdited,
    SettlementsLost,
    SettlementsSlow,
)
from flowcontrol.simulation.gates import ForgetfulGate, OpenGate
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol.simulation.pool import Balancer
from flowcontrol.simulation.results import Results
from flowcontrol.simulation.safety import Slots
from flowcontrol.simulation.traces import TraceRow
from flowcontrol.simulation.workload import (
    AtOnce,
    ClosedLoop,
    Independent,
    Poisson,
    Recorded,
    Replayed,
    Retry,
    Window,
    Workload,
)
from flowcontrol.simulation.world import World
from flowcontrol_server.tools.simulate.scenario import Scenario, load_scenario
from tests.support.simulated import MILLISECOND, SECOND

SCENARIOS = Path(__file__).parents[3] / "scenarios"
SHIPPED = sorted(SCENARIOS.rglob("*.yaml"))
TRACE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0000000,100,10
2023-11-16 18:15:48.0000000,200,20
2023-11-16 18:15:50.0000000,300,30
"""
MINIMAL = """\
apiVersion: flowcontrol/v1alpha1
kind: Scenario
duration: 10s
servers: [{}]
workloads:
  - name: people
    arrivals: {poisson: {perSecond: 1}}
    prompt: 100
    output: 10
"""
TENANTS_RULE = (
    "workloads[0].tenants must be names, names with shares, or count with zipf, such as "
    "{count: 50, zipf: 1.1}"
)
REQUESTS_RULE = "workloads must ask for at most 5,000,000 requests in all, got some"
TRACED = """\
apiVersion: flowcontrol/v1alpha1
kind: Scenario
duration: 10s
servers: [{}]
workloads: [{name: recorded, arrivals: {trace: {}}}]
"""


def load(directory: Path, changes: dict[str, Any] | None = None, text: str = MINIMAL) -> Scenario:
    """Load a scenario with some of its settings changed."""
    content = yaml.safe_load(text) | (changes or {})
    path = directory / "scenario.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_scenario(path)


def one_workload(directory: Path, **changes: Any) -> Workload:
    """Return the workload of a scenario that has one, with some settings changed or left out."""
    settings = {**yaml.safe_load(MINIMAL)["workloads"][0], **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    (workload,) = load(directory, {"workloads": [settings]}).plan().workloads
    return workload


def people(**changes: Any) -> dict[str, Any]:
    """Return a change of the one workload."""
    return {"workloads": [{**yaml.safe_load(MINIMAL)["workloads"][0], **changes}]}


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"duration": "ten"},
        ["duration must be a duration above zero such as 500ms, 60s or 5m, got 'ten'"],
    ),
    ({"kind": "Scene"}, ["kind must be 'Scenario', got 'Scene'"]),
    ({"color": "red"}, ["color is not a known setting"]),
    ({"gate": "ajar"}, ["gate must be 'on', 'off' or 'forgetful', got 'ajar'"]),
    ({"seed": -1}, ["seed must be >= 0, got -1"]),
    (
        {"saturation": {"maxConcurrency": 0}},
        [
            (
                "saturation.maxConcurrency must be a whole number from 1 such as 64 or 20k, "
                "or the word unlimited, got 0"
            )
        ],
    ),
    (
        {"flowControl": {"bands": [{"fairness": "fair"}]}},
        [
            (
                "flowControl.bands[0].fairness must be 'weighted-tokens', 'round-robin', "
                "'global-strict' or 'least-attained-service', got 'fair'"
            )
        ],
    ),
    (
        {"objectives": {"chat": "high"}},
        ["objectives must be names with whole numbers, such as {chat: 10, batch: -1}"],
    ),
    ({"servers": []}, ["servers must name a model server"]),
    ({"workloads": []}, ["workloads must name a workload, got []"]),
    (
        {"servers": [{"speed": 0}]},
        ["servers[0].speed must be a number above 0, at most 1e15, got 0"],
    ),
    (
        {"servers": [{"kvTokens": "lots"}]},
        ["servers[0].kvTokens must be a whole number from 1 such as 500, 20k or 4Ki, got 'lots'"],
    ),
    (
        {"servers": [{"sequencesMax": 600}]},
        ["servers[0] can never run: batched_tokens_max must be >= sequences_max (600), got 512"],
    ),
    ({"servers": [{}, {}]}, ["servers must differ in name, got server-0 again"]),
    (
        {"servers": [{"joinsAt": 5}]},
        ["servers[0].joinsAt must be a duration such as 0s, 500ms or 5m, got 5"],
    ),
    (
        {"workloads": people()["workloads"] * 2},
        ["workloads must name each workload once, got people again"],
    ),
    (
        people(arrivals={}),
        ["workloads[0].arrivals must set exactly one of poisson, atOnce, closedLoop and trace"],
    ),
    (
        people(arrivals={"poisson": {"perSecond": 1}, "atOnce": {"count": 1}}),
        ["workloads[0].arrivals must set exactly one of poisson, atOnce, closedLoop and trace"],
    ),
    (
        people(
            arrivals={
                "poisson": {"perSecond": 1, "bursts": [{"from": "5s", "until": "5s", "times": -1}]}
            }
        ),
        ["workloads[0].arrivals.poisson.bursts[0].times must be a number from 0 to 1e15, got -1"],
    ),
    (
        people(
            arrivals={
                "poisson": {"perSecond": 1, "bursts": [{"from": "5s", "until": "5s", "times": 2}]}
            }
        ),
        ["workloads[0].arrivals.poisson.bursts[0] must have from < until"],
    ),
    (
        people(arrivals={"trace": {"file": "none.csv"}}, prompt=None, output=None),
        ["workloads[0].arrivals.trace.file must be a file, got '{directory}/none.csv'"],
    ),
    (
        people(output=None),
        ["workloads[0] must have prompt and output, or lengthsFrom, or arrivals.trace"],
    ),
    (
        people(arrivals={"trace": {}}),
        ["workloads[0] must have prompt and output, or lengthsFrom, or arrivals.trace"],
    ),
    (
        people(prompt={"uniform": {"min": 5, "max": 4}}),
        ["workloads[0].prompt.uniform must have min <= max"],
    ),
    (
        people(patience={"uniform": {"min": "5s", "max": "4s"}}),
        ["workloads[0].patience.uniform must have min <= max"],
    ),
    (
        people(tenants=[]),
        [f"{TENANTS_RULE}, got []"],
    ),
    (
        people(tenants={"count": 5, "zip": 1}),
        [TENANTS_RULE],
    ),
    (
        people(retry={"honoursRetryAfter": "sometimes"}),
        ["workloads[0].retry.honoursRetryAfter must be true or false, got 'sometimes'"],
    ),
    (
        {"faults": [{"clockJumped": {"at": "1s", "by": "1s"}, "drainBegins": {}}]},
        ["faults[0].drainBegins.at is required", "faults[0].drainBegins.budget is required"],
    ),
    (
        {"faults": [{"endpointGone": {"server": "x", "from": "1s", "until": "2s"}}]},
        ["faults[0] must name a server such as server-0, got 'x'"],
    ),
    (
        people(servers=["server-0", "x"]),
        ["workloads[0].servers must name servers such as server-0, got 'x'"],
    ),
    (
        {"faults": [{"metricsLie": {"from": "1s", "until": "2s", "kvUsage": 2}}]},
        ["faults[0].metricsLie.kvUsage must be a number from 0 to 1, got 2"],
    ),
    (
        people(tenants={"count": 10**9}),
        ["workloads[0].tenants must have a count of at most 100000, got 1000000000"],
    ),
    ({"servers": [{"count": 10**9}]}, ["servers[0].count must be <= 10000, got 1000000000"]),
    (
        people(arrivals={"atOnce": {"count": "1T"}}),
        [f"{REQUESTS_RULE} 1,000,000,000,000"],
    ),
    (
        people(arrivals={"closedLoop": {"users": 5_000_001}}),
        [f"{REQUESTS_RULE} 5,000,001"],
    ),
    (
        {"duration": "300s"}
        | people(
            arrivals={
                "poisson": {
                    "perSecond": 20_000,
                    "bursts": [
                        {"from": "100s", "until": "200s", "times": 3},
                        {"from": "150s", "until": "10m", "times": 2},
                    ],
                    "onOff": {"on": "10s", "off": "10s"},
                }
            }
        ),
        [f"{REQUESTS_RULE} 7,500,000"],
    ),
    (
        {"duration": "8760h", "servers": [{"count": 2}, {"name": "more", "count": 2}]},
        [f"{REQUESTS_RULE} 31,536,000"],
    ),
    (
        {"duration": "8760h", "servers": [{"count": 4}]}
        | people(arrivals={"poisson": {"perSecond": 0.1}}),
        [
            (
                "scrape must be off, or take place at most 100,000,000 times in all, "
                "got 126,144,000 of 4 servers"
            ),
        ],
    ),
]


class TestMistakes:
    """Each has its words."""

    @pytest.mark.parametrize(("changes", "expected"), MISTAKES)
    def test_named(self, tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
        """Exactly what is wrong is said, with its path in the file."""
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, changes)
        assert [line.replace("{directory}", str(tmp_path)) for line in expected] == (
            caught.value.problems
        )

    def test_all_at_once(self, tmp_path: Path) -> None:
        """Several mistakes are said together."""
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, {"picker": "me", "seed": "x", "scrape": {"every": "0s"}})
        assert caught.value.problems == [
            "seed must be a whole number, got 'x'",
            "picker must be 'off', 'least-loaded' or 'prefix-affinity', got 'me'",
            "scrape.every must be a duration above zero such as 500ms, 60s or 5m, got '0s'",
        ]

    def test_no_file(self, tmp_path: Path) -> None:
        """A file that is not there is named."""
        path = tmp_path / "none.yaml"
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: No such file"):
            load_scenario(path)

    @pytest.mark.parametrize(
        ("trace", "message"),
        [
            (None, "no trace.csv"),
            ("TIMESTAMP\n", "trace.csv: line 1: must be TIMESTAMP,ContextTokens"),
            ("\udcff", "trace.csv: cannot be read: not UTF-8 text"),
        ],
    )
    def test_trace(self, tmp_path: Path, trace: str | None, message: str) -> None:
        """A trace that cannot be replayed is named, and so is its absence."""
        scenario = load(tmp_path, text=TRACED)
        path = tmp_path / "trace.csv"
        if trace is None:
            with pytest.raises(ConfigError, match="a workload replays a trace: name one with"):
                scenario.plan()
            with pytest.raises(ConfigError, match=r"trace\.csv: cannot be read: No such file"):
                scenario.plan(path)
            return
        path.write_bytes(trace.encode(errors="surrogateescape"))
        with pytest.raises(ConfigError, match=message):
            scenario.plan(path)

    def test_trace_for_nobody(self, tmp_path: Path) -> None:
        """A trace that no workload replays is a mistake, not ignored."""
        with pytest.raises(ConfigError, match="no workload of the scenario replays a trace"):
            load(tmp_path).plan(tmp_path / "trace.csv")


class TestMeaning:
    """What a scenario means to the simulated world."""

    def test_defaults(self, tmp_path: Path) -> None:
        """A file that says no more than it must has the service's own defaults."""
        scenario = load(tmp_path)
        config = scenario.controller_config()
        plan = scenario.plan()

        assert scenario.seed == 889
        assert isinstance(scenario.engine(), FlowController)
        assert config.picker is Picker.OFF
        assert config.default_settings == BandSettings(ttl_ns=60 * SECOND)
        assert config.limits == Limits(requests_max=20_000, bytes_max=4 * 2**30)
        assert plan.balancer is Balancer.LEAST_REQUEST
        assert (plan.settlement_delay_ns, plan.scrape_interval_ns) == (SECOND, SECOND)
        (server,) = plan.servers
        assert (server.address, server.config, server.from_ns) == (
            "server-0",
            ModelServerConfig(),
            0,
        )

    def test_engine(self, tmp_path: Path) -> None:
        """The engine is told what the service would tell it."""
        changes = {
            "picker": "least-loaded",
            "saturation": {"maxConcurrency": 7},
            "flowControl": {
                "requestTTL": "9s",
                "bands": [{"match": {"maxPriority": -1}, "fairness": "global-strict"}],
            },
        }
        config = load(tmp_path, changes).controller_config()
        assert config.picker is Picker.LEAST_LOADED
        assert config.detectors == (Concurrency(requests_max=7),)
        assert config.settings_for(0).ttl_ns == 9 * SECOND
        assert config.settings_for(-3).fairness is Fairness.GLOBAL_STRICT

    @pytest.mark.parametrize(
        ("gate", "engine"),
        [(True, FlowController), ("off", OpenGate), ("forgetful", ForgetfulGate)],
    )
    def test_gate(self, tmp_path: Path, gate: object, engine: type) -> None:
        """On, off and forgetful; YAML's bare on and off are understood."""
        assert isinstance(load(tmp_path, {"gate": gate}).engine(), engine)

    def test_slots(self, tmp_path: Path) -> None:
        """The ledger counts slots where the engine does nothing but count them."""
        saturation = {"detector": "concurrency", "maxConcurrency": 7}
        fixed = {"saturation": saturation, "flowControl": {"ceilings": {"policy": "static"}}}
        assert load(tmp_path, fixed).slots() == Slots(7, is_picked=False)
        picked = {**fixed, "picker": "least-loaded"}
        assert load(tmp_path, picked).slots() == Slots(7, is_picked=True)
        assert load(tmp_path, {**fixed, "gate": False}).slots() is None
        assert load(tmp_path, {"saturation": saturation}).slots() is None

    def test_servers(self, tmp_path: Path) -> None:
        """Speed divides every time; servers of a kind are numbered."""
        fast = {"name": "fast", "count": 2, "speed": 2, "stepBase": "20ms", "joinsAt": "5s"}
        specs = load(tmp_path, {"servers": [fast, {"kvTokens": "64Ki"}]}).plan().servers
        assert [spec.address for spec in specs] == ["fast-0", "fast-1", "server-0"]
        assert specs[0].config.step_base_ns == 10 * MILLISECOND
        assert specs[0].config.sequence_ns == ModelServerConfig().sequence_ns // 2
        assert specs[1].from_ns == 5 * SECOND
        assert specs[2].config.kv_tokens == 65_536

    def test_switched_off(self, tmp_path: Path) -> None:
        """Settlement and scrapes can be switched off, or be slower."""
        plan = load(tmp_path, {"settlement": False, "scrape": "off"}).plan()
        assert (plan.settlement_delay_ns, plan.scrape_interval_ns) == (None, None)
        plan = load(tmp_path, {"settlement": {"delay": "5s"}, "scrape": {"every": "2s"}}).plan()
        assert (plan.settlement_delay_ns, plan.scrape_interval_ns) == (5 * SECOND, 2 * SECOND)

    def test_arrivals(self, tmp_path: Path) -> None:
        """Every way to come."""
        burst = {"from": "1s", "until": "2s", "times": 3}
        turns = {"on": "1s", "off": "4s"}
        loop = {"users": 3, "think": {"exponential": {"mean": "2s"}}, "ramp": "1s"}
        expected = {
            "poisson": (
                {"perSecond": 2.5, "bursts": [burst], "onOff": turns},
                Poisson(2.5, (Window(SECOND, 2 * SECOND, 3),), SECOND, 4 * SECOND),
            ),
            "atOnce": ({"count": 9}, AtOnce(9)),
            "closedLoop": (loop, ClosedLoop(3, Exponential(2 * SECOND), SECOND)),
        }
        for name, (settings, arrivals) in expected.items():
            assert arrivals == one_workload(tmp_path, arrivals={name: settings}).arrivals

    def test_lengths(self, tmp_path: Path) -> None:
        """Every way to be long; a trace lends its pairs."""
        lognormal = {"lognormal": {"median": 100, "sigma": 0.5, "max": "4k"}}
        workload = one_workload(
            tmp_path, prompt=lognormal, output={"uniform": {"min": 1, "max": 9}}
        )
        assert workload.lengths == Independent(Lognormal(100, 0.5, 4000), Uniform(1, 9))
        assert one_workload(tmp_path).lengths == Independent(Fixed(100), Fixed(10))
        (tmp_path / "trace.csv").write_text(TRACE)
        lent = one_workload(tmp_path, prompt=None, output=None, lengthsFrom="trace.csv")
        assert isinstance(lent.lengths, Recorded)
        assert lent.lengths.rows[1] == TraceRow(2 * SECOND, 200, 20)

    def test_trace(self, tmp_path: Path) -> None:
        """Replayed at its own rate or another; one named on the command line counts more."""
        (tmp_path / "trace.csv").write_text(TRACE)
        other = tmp_path / "other.csv"
        other.write_text(TRACE.replace("100,10", "7,7"))
        settings = {"file": "trace.csv", "perSecond": 1, "limit": 2}
        scenario = load(
            tmp_path, {"workloads": [{"name": "recorded", "arrivals": {"trace": settings}}]}
        )
        (workload,) = scenario.plan().workloads
        assert workload.arrivals == Replayed((TraceRow(0, 100, 10), TraceRow(SECOND, 200, 20)))
        (workload,) = scenario.plan(other).workloads
        assert isinstance(workload.arrivals, Replayed)
        assert workload.arrivals.rows[0] == TraceRow(0, 7, 7)

    def test_workload(self, tmp_path: Path) -> None:
        """The rest of a workload."""
        workload = one_workload(
            tmp_path,
            objective="chat",
            tenants=["ann", "bob"],
            **{"from": "1s", "until": "5s"},
            announcesPrompt=False,
            maxTokens=8,
            ttftSLO="2s",
            announcesSLO=False,
            requestTTL="3s",
            patience={"uniform": {"min": "1s", "max": "2s"}},
            retry={"attempts": 3, "honoursRetryAfter": False, "afterPatience": True},
            model="llama",
            servers=["server-0"],
        )
        assert workload == Workload(
            name="people",
            arrivals=Poisson(1.0),
            lengths=Independent(Fixed(100), Fixed(10)),
            tenants={"ann": 1.0, "bob": 1.0},
            objective="chat",
            from_ns=SECOND,
            until_ns=5 * SECOND,
            announces_prompt=False,
            output_tokens_max=8,
            ttft_slo_ns=2 * SECOND,
            announces_slo=False,
            ttl_ns=3 * SECOND,
            patience=Uniform(SECOND, 2 * SECOND),
            retry=Retry(attempts_max=3, honours_retry_after=False, after_patience=True),
            model="llama",
            subset=("server-0",),
        )

    def test_tenants(self, tmp_path: Path) -> None:
        """Shares as they are, or by Zipf's law."""
        shares = one_workload(tmp_path, tenants={"ann": 1, "hog": 9}).tenants
        assert shares == {"ann": 1.0, "hog": 9.0}
        zipf = one_workload(tmp_path, tenants={"count": 3, "zipf": 1}).tenants
        assert zipf == {"tenant-0": 1.0, "tenant-1": 0.5, "tenant-2": pytest.approx(1 / 3)}

    def test_faults(self, tmp_path: Path) -> None:
        """Everything that can go wrong."""
        span = {"from": "1s", "until": "2s"}
        times = {"from_ns": SECOND, "until_ns": 2 * SECOND}
        late = {"delay_ns": 5 * SECOND}
        expected = [
            (
                {"endpointGone": {"server": "server-0", "noticedAfter": "5s", **span}},
                EndpointGone(address="server-0", noticed_after_ns=5 * SECOND, **times),
            ),
            ({"metricsStale": span}, MetricsStale(from_ns=SECOND, until_ns=2 * SECOND)),
            (
                {"metricsLie": {"servers": ["server-0"], "waiting": 3, "kvUsage": 0.5, **span}},
                MetricsLie(addresses=("server-0",), waiting=3, kv_usage=0.5, **times),
            ),
            ({"settlementSlow": {"delay": "5s", **span}}, SettlementsSlow(**late, **times)),
            ({"settlementLost": span}, SettlementsLost(**times)),
            ({"decisionsSlow": {"delay": "5s", **span}}, DecisionsSlow(**late, **times)),
            ({"engineStalled": span}, EngineStalled(**times)),
            ({"clockJumped": {"at": "0s", "by": "9s"}}, ClockJumped(at_ns=0, by_ns=9 * SECOND)),
            (
                {"objectivesEdited": {"at": "1s", "objectives": {"chat": 1}}},
                ObjectivesEdited(at_ns=SECOND, priorities={"chat": 1}),
            ),
            (
                {"drainBegins": {"at": "1s", "budget": "9s"}},
                DrainBegins(at_ns=SECOND, budget_ns=9 * SECOND),
            ),
        ]
        plan = load(tmp_path, {"faults": [settings for settings, _ in expected]}).plan()
        assert [fault for _, fault in expected] == list(plan.faults)


class TestExtends:
    """A scenario may be another with a few changes."""

    def test_merged(self, tmp_path: Path) -> None:
        """Mappings are merged setting by setting, everything else is replaced."""
        (tmp_path / "base.yaml").write_text(MINIMAL + "flowControl: {requestTTL: 9s}\n")
        (tmp_path / "sub").mkdir()
        path = tmp_path / "sub" / "other.yaml"
        path.write_text("extends: ../base.yaml\ngate: off\nflowControl: {maxRequests: 5}\n")
        scenario = load_scenario(path)
        assert scenario.gate == "off"
        queue = scenario.flow_control
        assert (queue.request_ttl, queue.max_requests) == (9 * SECOND, 5)

    def test_circle(self, tmp_path: Path) -> None:
        """A circle is noticed."""
        path = tmp_path / "self.yaml"
        path.write_text("extends: self.yaml\n")
        with pytest.raises(ConfigError, match="extends more than 8 scenarios, or itself"):
            load_scenario(path)


def run_shipped(name: str, minutes: int) -> Results:
    """Run the first minutes of a shipped scenario; coverage makes the whole of it slow."""
    scenario = load_scenario(SCENARIOS / f"{name}.yaml")
    scenario = scenario.model_copy(update={"duration": minutes * 60 * SECOND})
    world = World(scenario.engine(), scenario.plan(), scenario.seed, slots=scenario.slots())
    return world.finish()


class TestShipped:
    """The scenarios that come with the project show what they say they show."""

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(SCENARIOS)))
    def test_loads(self, path: Path, tmp_path: Path) -> None:
        """Each begins with a comment, and can be run; those without flow control are short."""
        assert path.read_text().startswith("# ")
        trace = None
        if path.stem in {"replayed-trace", "shared-prefixes"}:
            trace = tmp_path / "trace.csv"
            trace.write_text(TRACE)
        assert load_scenario(path).plan(trace).workloads

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "minutes", "least", "most"),
        [
            ("burst-and-recovery", 50, 10, 50),
            ("without-flow-control/burst-and-recovery", 30, 500, 1000),
            ("without-flow-control/burst-and-recovery-forgetful", 40, 150, 500),
        ],
    )
    def test_burst_and_recovery(self, name: str, minutes: int, least: int, most: int) -> None:
        """At first 28 or so are in flight, and in the end as many again, or ever more."""
        scenario = load_scenario(SCENARIOS / f"{name}.yaml")
        world = World(scenario.engine(), scenario.plan(), scenario.seed, slots=scenario.slots())
        world.run_until(minutes * 60 * SECOND)

        samples = world.results.samples
        before = [each.in_flight for each in samples if each.at_ns < 600 * SECOND]
        assert max(before) < 60
        assert least < samples[-1].in_flight < most
        if scenario.gate == "on":
            assert world.results.in_flight_most == 96

    @pytest.mark.slow
    def test_two_tenants_one_hog(self) -> None:
        """By tokens both have the same; by turns the hog has more, and without a gate most."""
        fair, by_turns, bare = (
            run_shipped(name, 3).jain(10) or 0
            for name in (
                "two-tenants-one-hog",
                "other-policies/two-tenants-one-hog-by-turns",
                "without-flow-control/two-tenants-one-hog",
            )
        )
        assert 0.5 < bare < by_turns < 0.7
        assert fair > 0.99

    def test_tied_to_servers(self) -> None:
        """Tokens by weight among those passed over in every turn; the others wait for nobody."""
        results = run_shipped("tied-to-servers", 3)
        gold, tin = (results.tenants[10, name].tokens_served for name in ("gold", "tin"))
        assert 2.8 < gold / tin < 3.2
        people = [results.tenants[10, f"tenant-{number}"] for number in range(5)]
        assert all((each.wait_ns(99) or 0) < SECOND // 10 for each in people)

    def test_interactive_beside_batch(self) -> None:
        """People hardly notice the job with the gate, and half of them do without."""
        gated, bare = (
            run_shipped(f"{folder}interactive-beside-batch", 5)
            for folder in ("", "without-flow-control/")
        )
        assert (gated.band(10).goodput or 0) > 0.95
        assert (bare.band(10).goodput or 1) < 0.6
        assert gated.band(-1).tokens_served == bare.band(-1).tokens_served

    @pytest.mark.slow
    def test_scrape_outage(self) -> None:
        """Who falls back to counting is not stopped by an outage; who closes is."""
        fallback, closed = (
            run_shipped(name, 4)
            for name in ("scrape-outage", "other-policies/scrape-outage-closed")
        )
        assert (fallback.band(10).goodput or 0) > 0.9
        assert (closed.band(10).goodput or 1) < 0.6

    def test_scale_from_zero(self) -> None:
        """Nobody is refused; without the gate a quarter fails."""
        gated, bare = (
            run_shipped(f"{folder}scale-from-zero", 4) for folder in ("", "without-flow-control/")
        )
        assert gated.band(0).goodput == 1.0
        assert (bare.band(0).goodput or 1) < 0.8

    @pytest.mark.slow
    def test_low_band_under_high(self) -> None:
        """Strictly it is never served; with a share soon, and with promotion when it is due."""
        strict = run_shipped("other-policies/low-band-under-high-strict", 15)
        assert strict.band(-1).tokens_served == strict.band(-2).tokens_served == 0
        generous = run_shipped("low-band-under-high", 15)
        assert generous.band(-1).endings[Ending.REFUSED] == 0
        assert (generous.band(-1).wait_ns(99) or 0) < 15 * SECOND
        waits_ns = generous.band(-2).waits_ns
        assert 30 * SECOND <= median(waits_ns) <= max(waits_ns) < 33 * SECOND

    def test_reclaim(self) -> None:
        """People wait for nothing that can wait for them, and the job loses little."""
        reclaiming, patient = (
            run_shipped(name, 3) for name in ("reclaim", "other-policies/reclaim-off")
        )
        assert (reclaiming.band(10).goodput or 0) > 0.95
        assert (patient.band(10).goodput or 1) < 0.5
        assert reclaiming.band(-1).outcomes[Outcome.RECLAIMED] > 0
        assert reclaiming.band(-1).tokens_served > 0.8 * patient.band(-1).tokens_served

    @pytest.mark.slow
    def test_mixed_pool(self) -> None:
        """The limit of fast and slow servers is found; dealt out in turn, half wait for ever."""
        gated, bare = (
            run_shipped(f"{folder}mixed-pool", 5) for folder in ("", "without-flow-control/")
        )
        assert (gated.band(0).goodput or 0) > 0.98
        assert (bare.band(0).goodput or 1) < 0.7

    def test_prefill_decode(self) -> None:
        """Short questions do not wait behind long documents, and those are still read in time."""
        gated, bare = (
            run_shipped(f"{folder}prefill-decode", 4) for folder in ("", "without-flow-control/")
        )
        assert (gated.band(10).goodput or 0) > 0.75
        assert (bare.band(10).goodput or 1) < 0.5
        assert gated.band(10).endings[Ending.GAVE_UP] == 0
        assert gated.band(-1).tokens_served > 0.9 * bare.band(-1).tokens_served

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "priority"),
        [
            ("two-tenants-one-hog", 10),
            ("low-band-under-high", 10),
            ("low-band-under-high", -1),
            ("scrape-outage", -1),
        ],
    )
    def test_predicted_waits(self, name: str, priority: int) -> None:
        """Most waits come true within a factor of two, and in the middle nearly as predicted."""
        calibration = run_shipped(name, 5).calibration(priority)
        assert calibration is not None
        assert calibration.close > 0.7
        assert 0.7 < calibration.ratio < 1.4
