"""`flowcontrol simulate`: what is printed, drawn and written."""

from pathlib import Path

import pytest

from flowcontrol.events import Decision
from flowcontrol.request import Outcome
from flowcontrol.simulation.clients import Attempt, ClientCall
from flowcontrol.simulation.gates import OpenGate
from flowcontrol.simulation.results import Results, Waited
from flowcontrol.simulation.workload import AtOnce, ClosedLoop
from flowcontrol_server.tools.simulate.command import run_simulation
from flowcontrol_server.tools.simulate.report import Run, shown_tenants, summary
from tests.support.simulated import SECOND, make_plan, run, workload

SCENARIO = """\
apiVersion: flowcontrol/v1alpha1
kind: Scenario
duration: 20s
objectives: {chat: 10}
picker: least-loaded
saturation: {detector: concurrency, maxConcurrency: 16}
servers: [{count: 2}]
workloads:
  - name: people
    objective: chat
    tenants: [ann, bob]
    arrivals: {poisson: {perSecond: 2}}
    prompt: 100
    output: 20
    ttftSLO: 1s
  - name: job
    arrivals: {atOnce: {count: 60}}
    prompt: 100
    output: 50
"""
PNG = b"\x89PNG"


@pytest.fixture(name="scenario")
def _scenario(tmp_path: Path) -> Path:
    """A scenario of a few seconds."""
    path = tmp_path / "few-seconds.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.mark.slow
class TestOne:
    """One scenario."""

    def test_output(self, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The seed comes first; then bands and tenants; a picture and a transcript are kept."""
        output = scenario.parent / "new" / "result"
        assert run_simulation((scenario,), None, None, output) == 0

        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "seed 889"
        words = [line.split() for line in lines]
        assert any(line[:2] == ["10", "all"] for line in words)
        assert any(line[:1] == ["ann"] for line in words)
        assert any(line[:2] == ["0", "all"] for line in words)
        assert any("times faster than real time" in line for line in lines)
        assert sorted(path.name for path in output.iterdir()) == [
            "few-seconds.png",
            "few-seconds.transcript.txt",
        ]
        assert (output / "few-seconds.png").read_bytes().startswith(PNG)
        transcript = (output / "few-seconds.transcript.txt").read_text().splitlines()
        assert transcript[0].split()[1:4] == ["1", "dispatched", "0"]

    def test_seed(self, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A seed of one's own makes a run of its own, and the same again."""
        seen = []
        for name in ("a", "b"):
            output = scenario.parent / name
            assert run_simulation((scenario,), None, 5, output) == 0
            seen.append((output / "few-seconds.transcript.txt").read_text())
        assert capsys.readouterr().out.startswith("seed 5\n")
        assert seen[0] == seen[1]

    def test_unsafe(
        self, scenario: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run that breaks a rule is said so, with its seed, and fails."""
        decide = OpenGate.poll
        monkeypatch.setattr(OpenGate, "poll", lambda gate, now_ns: decide(gate, now_ns) * 2)
        scenario.write_text(SCENARIO + "gate: off\n")
        assert run_simulation((scenario,), None, 7, scenario.parent) == 1
        assert "few-seconds, seed 7: request 1 is not waiting" in capsys.readouterr().out


@pytest.mark.slow
class TestCompare:
    """Two scenarios side by side, under the seed of the first."""

    def test_side_by_side(self, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Each has its table; then comes what the second is of the first."""
        (scenario.parent / "bare").mkdir()
        bare = scenario.parent / "bare" / scenario.name
        bare.write_text("extends: ../few-seconds.yaml\ngate: off\nseed: 3\n")
        output = scenario.parent / "result"
        assert run_simulation((scenario, bare), None, None, output) == 0

        printed = capsys.readouterr().out
        assert printed.startswith("seed 889\n")
        side = printed[printed.index("side by side") :]
        assert "bare/few-seconds" in side
        rows = [line.split() for line in side.splitlines()]
        (calls,) = [row for row in rows if row[:2] == ["10", "calls"]]
        assert calls[2] == calls[3]
        assert calls[4] == "1.00"
        folder = scenario.parent.name
        assert (output / f"{folder}-few-seconds-and-bare-few-seconds.png").exists()
        assert len(list(output.glob("*.transcript.txt"))) == 2


class TestReport:
    """What the tables leave out, and add."""

    def test_predictions(self) -> None:
        """Where the engine predicted waits, it is said how far they came true, band by band."""
        results = run(make_plan(workload(AtOnce(1))))
        results.waited = [Waited(0, 2 * SECOND, 3 * SECOND, 4 * SECOND)] * 3
        results.waited += [Waited(0, 2 * SECOND, 0, SECOND)]
        assert summary(Run("a", results, 1.0))[-1] == (
            "band 0: 4 predicted waits, 75% of them within a factor of 2; "
            "the median wait took 1.50 times the prediction"
        )

    def test_no_predictions(self) -> None:
        """Where nobody waited, nothing is said of waits."""
        results = run(make_plan(workload(AtOnce(1))))
        assert "predicted" not in "".join(summary(Run("a", results, 1.0)))

    def test_prediction_is_kept(self) -> None:
        """A decision that carries a prediction is held against what came of it."""
        results = Results(SECOND)
        call = ClientCall(workload(AtOnce(1)), "a", 1, 1, None, 0)
        decision = Decision(
            1,
            Outcome.DISPATCHED,
            7,
            "a",
            waited_ns=3 * SECOND,
            expected_wait_ns=2 * SECOND,
            late_wait_ns=4 * SECOND,
        )
        results.decided(decision, Attempt(1, call, 0), 3 * SECOND)
        assert results.waited == [Waited(7, 2 * SECOND, 3 * SECOND, 4 * SECOND)]

    @pytest.mark.parametrize(
        ("predicted_ms", "realised_ms", "is_close"),
        [
            (1000, 2000, True),
            (1000, 2001, False),
            (2001, 1000, False),
            (0, 200, True),
            (1, 202, False),
        ],
    )
    def test_close(self, predicted_ms: int, realised_ms: int, is_close: bool) -> None:  # noqa: FBT001 - what is to be
        """A factor of two either way, or a fifth of a second."""
        waited = Waited(0, predicted_ms * 1_000_000, realised_ms * 1_000_000, 0)
        assert waited.is_close is is_close

    def test_busiest_tenants(self) -> None:
        """Of many tenants only those with the most calls are shown, by name."""
        tenants = {f"t{n:02}": float(n + 1) for n in range(30)}
        loop = workload(ClosedLoop(60), tenants=tenants)
        shown = shown_tenants(run(make_plan(loop, duration_ns=100_000_000)), 0)
        assert len(shown) == 8
        assert sorted(name for name, _ in shown) == [name for name, _ in shown]
