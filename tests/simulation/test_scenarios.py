"""The scenarios: what the engine does, in plain lines. `replay` says how they are written."""

import re
from pathlib import Path

import pytest

from tests.support.replay import ScenarioError, nanoseconds, replay, spell

SCENARIOS = Path(__file__).parents[1] / "scenarios"


class TestScenarios:
    """Every scenario, held against the engine of today."""

    @pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.txt")), ids=lambda path: path.stem)
    def test_engine_decides_as_written(self, path: Path, pytestconfig: pytest.Config) -> None:
        """The engine decides what the scenario says, line by line."""
        expected = path.read_text()

        actual = replay(expected, path.name)
        if pytestconfig.getoption("rewrite"):
            path.write_text(actual)
            return

        assert expected == actual

    def test_there_are_scenarios(self) -> None:
        """A wrong folder does not pass for silence."""
        assert len(list(SCENARIOS.glob("*.txt"))) >= 20


class TestReplay:
    """The grammar of scenarios."""

    def test_rewriting_leaves_commands_and_comments_alone(self) -> None:
        """Only what stands below `----` is replaced; a wrong expectation does not survive."""
        text = "# Shows.\n\nat 0ms\nendpoints a\narrive r1\n----\nwrong\nwrong\n\n# Later.\n"

        expected = (
            "# Shows.\n\nat 0ms\nendpoints a\narrive r1\n----\n"
            "r1 dispatched, band 0, waited 0s\nwaiting 0, in flight 1, no wake-up\n\n# Later.\n"
        )

        assert expected == replay(text, "shows.txt")

    def test_rewriting_twice_changes_nothing(self) -> None:
        """A rewritten scenario is one the engine agrees with."""
        once = replay("# Shows.\nat 0ms\narrive r1 ttl=5s\n----\n\nat wake-up\n----\n", "shows.txt")

        assert once == replay(once, "shows.txt")

    @pytest.mark.parametrize(
        ("time_ns", "expected"),
        [(0, "0s"), (5_000_000_000, "5s"), (1_500_000_000, "1500ms"), (1_001, "1001ns")],
    )
    def test_times_are_spelled_in_the_largest_exact_unit(self, time_ns: int, expected: str) -> None:
        """What is written can be read again, to the nanosecond."""
        assert expected == spell(time_ns)
        assert time_ns == nanoseconds(expected)

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ("at 0ms\n----", "1: a scenario must begin with a comment that says what it shows"),
            ("# .\njump 3", "2: a turn must begin with at, got 'jump 3'"),
            ("# .\nat 0ms\njump 3", "3: there is no command 'jump 3'"),
            ("# .\nat 0ms\nendpoints", "3: there is no command 'endpoints'"),
            ("# .\nat 0ms\nobjectives", "3: there is no command 'objectives'"),
            ("# .\nat 0ms\nshow all", "3: there is no command 'show all'"),
            ("# .\narrive r1", "2: a turn must begin with at, got 'arrive r1'"),
            ("# .\n----", "2: ---- must end a turn"),
            ("# .\nat 0ms\n\nat 1ms", "4: the turn before must end with ----"),
            ("# .\nat 0ms\narrive r1", "3: the last turn must end with ----"),
            ("# .\nat 5\n----", "2: a time must be like 5s, 20ms, 3us or 7ns, got '5'"),
            ("# .\nat 5s\n----\n\nat 4s\n----", "5: time must not go back, it is 5s"),
            (
                "# .\nat 0s\narrive r1 ttl=5s\n----\n\nat 6s",
                "6: the wake-up at 5s must not be slept",
            ),
            ("# .\nat wake-up\n----", "2: there is no wake-up to wait for"),
            ("# .\nat 0s\n----\n\nat wake-up", "5: there is no wake-up to wait for"),
            (
                "# .\nat 0s\n----\n\nconfig picker=off",
                "5: config must come before the first turn, or in",
            ),
            ("# .\nconfig picker", "2: a setting must be like key=value, got 'picker'"),
            ("# .\nconfig pick=off", "2: a setting must be one of bytes-max in-flight-max"),
            ("# .\nat 0s\narrive r1 flow=a flow=b", "3: flow must be given once"),
            ("# .\nbands any fairness=luck", "2: 'luck' is not a valid Fairness"),
            ("# .\nbands 3..x ttl=5s", "2: invalid literal for int()"),
            (
                "# .\nconfig in-flight-max=0\nat 0s",
                "3: detectors[0].requests_max must be >= 1, got 0",
            ),
            ("# .\nat 0s\nleave r1", "3: r1 must arrive before it leaves"),
            ("# .\nat 0s\narrive r1..r3\narrive r2", "4: r2 must arrive only once"),
        ],
    )
    def test_errors_name_file_and_line(self, lines: str, expected: str) -> None:
        """A scenario that cannot be read says where and what must be."""
        with pytest.raises(ScenarioError, match="^" + re.escape(f"bad.txt:{expected}")):
            replay(lines, "bad.txt")
