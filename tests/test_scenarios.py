"""The scenarios: what the engine does, in plain lines.

A scenario is a text file in `scenarios/`. It begins with a comment that says what it shows; then
come settings, then turns. A turn is what the processor's turn is: a batch of facts, one reading of
the clock, one poll. Below its `----` stands what came of it, rewritten by `pytest --rewrite`.

    # With one slot, chat overtakes batch.

    config in-flight-max=1 requests-max=2       bytes-max no-endpoint-ttl picker retry-after-max
    bands ..-1 ttl=1s                           as -1, 3..7, 10.. or any, first match wins;
                                                requests-max bytes-max ttl fairness
    at 0ms
    objectives chat=10 batch=-1                 or none
    endpoints a b                               or none
    arrive b1..b2 objective=batch               flow objective ttl bytes; b1..b2 is b1 and b2
    show bands                                  or flows, endpoints, totals; printed after the poll
    ----
    b1 dispatched, band -1, waited 0s
    band -1: 1 waiting, 0 bytes, 1 in flight
    waiting 1, in flight 1, next wake-up at 1s

    at wake-up                                  the moment the engine asked to be woken
    leave b1
    drain 5s
    ----
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flowcontrol.config import (
    BandSettings,
    BandTemplate,
    ControllerConfig,
    Fairness,
    Limits,
    Picker,
)
from flowcontrol.controller import FlowController
from flowcontrol.errors import ConfigError
from flowcontrol.events import (
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    Left,
    ObjectivesChanged,
)
from flowcontrol.request import DEFAULT_FLOW_ID, Request
from flowcontrol.snapshot import Snapshot

SCENARIOS = Path(__file__).parent / "scenarios"
UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
FLOWS_SHOWN_MAX = 10


class ScenarioError(Exception):
    """A scenario that cannot be read; says which file and line."""


@dataclass(slots=True)
class Replay:
    """Runs the commands of one scenario against a flow controller of its own."""

    config: dict[str, str] = field(default_factory=dict)
    """Words of the `config` line."""
    default_settings: BandSettings = field(default_factory=BandSettings)
    templates: list[BandTemplate] = field(default_factory=list)
    controller: FlowController | None = None
    """Made by the first turn; from then on the settings stand."""
    now_ns: int = 0
    is_turn_open: bool = False
    names: list[str] = field(default_factory=list)
    """Of the requests; a request's id is its index here."""
    shows: list[str] = field(default_factory=list)

    def command(self, line: str) -> None:
        """Obey one line.

        Raises:
            ValueError: the line is not understood, or comes at the wrong moment.
            ConfigError: the settings cannot be used.
        """
        words = line.split()
        if words[0] in ("config", "bands") and self.controller is not None:
            message = f"{words[0]} must come before the first turn"
            raise ValueError(message)
        match words:
            case ["config", *pairs]:
                self.config |= _pairs(pairs, _CONFIG_KEYS)
            case ["bands", "any", *pairs]:
                self.default_settings = _band_settings(pairs)
            case ["bands", priorities, *pairs]:
                low, high = _priority_range(priorities)
                template = BandTemplate(
                    priority_min=low, priority_max=high, settings=_band_settings(pairs)
                )
                self.templates.append(template)
            case ["at", moment]:
                self._begin_turn(moment)
            case [*_] if self.controller is None or not self.is_turn_open:
                message = f"a turn must begin with at, got {line!r}"
                raise ValueError(message)
            case ["show", "bands" | "flows" | "endpoints" | "totals" as what]:
                self.shows.append(what)
            case _:
                for fact in self._facts(words):
                    self.controller.handle(fact, self.now_ns)

    def decide(self) -> list[str]:
        """End the turn: poll, and return what is to be said about it."""
        if self.controller is None or not self.is_turn_open:
            message = "---- must end a turn"
            raise ValueError(message)
        self.is_turn_open = False
        decisions = self.controller.poll(self.now_ns)
        self.controller.check_invariants()
        snapshot = self.controller.snapshot(self.now_ns, FLOWS_SHOWN_MAX)
        shows, self.shows = self.shows, []
        shown = [line for what in shows for line in _show(what, snapshot)]
        return [*self._tell(decisions), *shown, self._tell_state(snapshot)]

    def _begin_turn(self, moment: str) -> None:
        if self.is_turn_open:
            message = "the turn before must end with ----"
            raise ValueError(message)
        wakeup_ns = None if self.controller is None else self.controller.next_wakeup_ns()
        if moment == "wake-up":
            if wakeup_ns is None:
                message = "there is no wake-up to wait for"
                raise ValueError(message)
            self.now_ns = wakeup_ns
        else:
            then_ns = _nanoseconds(moment)
            if then_ns < self.now_ns:
                message = f"time must not go back, it is {_spell(self.now_ns)}"
                raise ValueError(message)
            if wakeup_ns is not None and then_ns > wakeup_ns:
                message = f"the wake-up at {_spell(wakeup_ns)} must not be slept past"
                raise ValueError(message)
            self.now_ns = then_ns
        if self.controller is None:
            self.controller = FlowController(self._controller_config(), self.now_ns)
        self.is_turn_open = True

    def _controller_config(self) -> ControllerConfig:
        words = self.config
        return ControllerConfig(
            limits=_limits(words),
            templates=tuple(self.templates),
            default_settings=self.default_settings,
            no_endpoint_ttl_ns=_optional_ns(words.get("no-endpoint-ttl")),
            in_flight_max=int(words.get("in-flight-max", "1")),
            picker=Picker(words.get("picker", "off")),
            retry_after_max_ns=_nanoseconds(words.get("retry-after-max", "30s")),
        )

    def _facts(self, words: list[str]) -> Sequence[Fact]:
        match words:
            case ["arrive", names, *pairs]:
                values = _pairs(pairs, _REQUEST_KEYS)
                return [Arrived(self._request(name, values)) for name in _names(names)]
            case ["leave", names]:
                return [Left(self._request_id(name)) for name in _names(names)]
            case ["objectives", *pairs] if pairs:
                named = {} if pairs == ["none"] else _pairs(pairs, None)
                return [ObjectivesChanged({name: int(value) for name, value in named.items()})]
            case ["endpoints", *names] if names:
                return [EndpointsChanged(() if names == ["none"] else tuple(names))]
            case ["drain", budget]:
                return [DrainBegan(_nanoseconds(budget))]
            case _:
                message = f"there is no command {' '.join(words)!r}"
                raise ValueError(message)

    def _request(self, name: str, values: dict[str, str]) -> Request:
        if name in self.names:
            message = f"{name} must arrive only once"
            raise ValueError(message)
        self.names.append(name)
        return Request(
            request_id=self._request_id(name),
            flow_id=values.get("flow", DEFAULT_FLOW_ID),
            objective=values.get("objective"),
            byte_size=int(values.get("bytes", "0")),
            ttl_ns=_optional_ns(values.get("ttl")),
        )

    def _request_id(self, name: str) -> int:
        if name not in self.names:
            message = f"{name} must arrive before it leaves"
            raise ValueError(message)
        return self.names.index(name)

    def _tell(self, decisions: list[Decision]) -> list[str]:
        """Return a line per decision; neighbours with the same fate share one, as r1..r3."""
        told: list[tuple[str, str, str]] = []
        for decision in decisions:
            name, fate = self.names[decision.request_id], _fate(decision)
            if told and fate == told[-1][2] and _is_next(name, told[-1][1]):
                told[-1] = (told[-1][0], name, fate)
            else:
                told.append((name, name, fate))
        return [
            f"{first} {fate}" if first == last else f"{first}..{last} {fate}"
            for first, last, fate in told
        ]

    def _tell_state(self, snapshot: Snapshot) -> str:
        assert self.controller is not None
        wakeup_ns = self.controller.next_wakeup_ns()
        if self.controller.is_drained:
            end = "drained"
        elif wakeup_ns is None:
            end = "no wake-up"
        else:
            end = f"next wake-up at {_spell(wakeup_ns)}"
        return f"waiting {snapshot.waiting}, in flight {snapshot.in_flight}, {end}"


_LIMIT_KEYS = frozenset({"requests-max", "bytes-max"})
_CONFIG_KEYS = _LIMIT_KEYS | {"in-flight-max", "no-endpoint-ttl", "picker", "retry-after-max"}
_BAND_KEYS = _LIMIT_KEYS | {"ttl", "fairness"}
_REQUEST_KEYS = frozenset({"flow", "objective", "ttl", "bytes"})


def replay(text: str, name: str) -> str:
    """Return a scenario with what stands below each `----` written anew.

    Raises:
        ScenarioError: naming the file and the line.
    """
    run = Replay()
    written: list[str] = []
    is_expected = False
    lines = text.splitlines()
    if not lines or not lines[0].startswith("# "):
        message = f"{name}:1: a scenario must begin with a comment that says what it shows"
        raise ScenarioError(message)
    for number, line in enumerate(lines, start=1):
        if is_expected:
            is_expected = bool(line)
            if line:
                continue
        written.append(line)
        try:
            if line == "----":
                is_expected = True
                written += run.decide()
            elif line and not line.startswith("#"):
                run.command(line)
        except (ValueError, ConfigError) as error:
            message = f"{name}:{number}: {error}"
            raise ScenarioError(message) from error
    if run.is_turn_open:
        message = f"{name}:{len(lines)}: the last turn must end with ----"
        raise ScenarioError(message)
    return "\n".join(written) + "\n"


def _pairs(words: list[str], known: frozenset[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals or not value:
            message = f"a setting must be like key=value, got {word!r}"
            raise ValueError(message)
        if known is not None and key not in known:
            message = f"a setting must be one of {' '.join(sorted(known))}, got {key!r}"
            raise ValueError(message)
        if key in pairs:
            message = f"{key} must be given once"
            raise ValueError(message)
        pairs[key] = value
    return pairs


def _band_settings(words: list[str]) -> BandSettings:
    values = _pairs(words, _BAND_KEYS)
    return BandSettings(
        limits=_limits(values),
        ttl_ns=_optional_ns(values.get("ttl")),
        fairness=Fairness(values.get("fairness", "round-robin")),
    )


def _limits(values: dict[str, str]) -> Limits:
    requests_max, bytes_max = values.get("requests-max"), values.get("bytes-max")
    return Limits(
        requests_max=None if requests_max is None else int(requests_max),
        bytes_max=None if bytes_max is None else int(bytes_max),
    )


def _priority_range(word: str) -> tuple[int | None, int | None]:
    low, dots, high = word.partition("..")
    if not dots:
        return int(low), int(low)
    return int(low) if low else None, int(high) if high else None


def _names(word: str) -> list[str]:
    match = re.fullmatch(r"([a-z-]+)(\d+)\.\.\1(\d+)", word)
    if match is None:
        return [word]
    stem, first, last = match.groups()
    return [f"{stem}{index}" for index in range(int(first), int(last) + 1)]


def _is_next(name: str, before: str) -> bool:
    return _names(f"{before}..{name}") == [before, name]


def _fate(decision: Decision) -> str:
    parts = [
        f"{decision.outcome.value}, band {decision.priority}",
        f"waited {_spell(decision.waited_ns)}",
    ]
    if decision.endpoint is not None:
        parts.append(f"endpoint {decision.endpoint}")
    if decision.retry_after_ns is not None:
        parts.append(f"retry after {_spell(decision.retry_after_ns)}")
    return ", ".join(parts)


def _nanoseconds(word: str) -> int:
    match = re.fullmatch(r"(\d+)(ns|us|ms|s)", word)
    if match is None:
        message = f"a time must be like 5s, 20ms, 3us or 7ns, got {word!r}"
        raise ValueError(message)
    return int(match[1]) * UNITS_NS[match[2]]


def _optional_ns(word: str | None) -> int | None:
    return None if word is None else _nanoseconds(word)


def _spell(time_ns: int) -> str:
    unit = next(unit for unit, size_ns in UNITS_NS.items() if time_ns % size_ns == 0)
    return f"{time_ns // UNITS_NS[unit]}{unit}"


def _show(what: str, snapshot: Snapshot) -> list[str]:
    match what:
        case "bands":
            return [
                f"band {band.priority}: {band.waiting} waiting, {band.waiting_bytes} bytes, "
                f"{band.in_flight} in flight{'' if band.is_declared else ', not declared'}"
                for band in snapshot.bands
            ]
        case "flows":
            return [
                f"flow {flow.flow_id} of band {band.priority}: {flow.waiting} waiting, "
                f"{flow.waiting_bytes} bytes, {flow.in_flight} in flight"
                + (f", oldest {_spell(flow.oldest_wait_ns)}" if flow.oldest_wait_ns else "")
                for band in snapshot.bands
                for flow in band.flows
            ]
        case "endpoints":
            return [
                f"endpoint {each.address}: up to {each.in_flight_max} in flight"
                + ("" if each.in_flight is None else f", now {each.in_flight}")
                for each in snapshot.endpoints
            ]
        case _:
            return [
                f"total of {priority}: "
                + "".join(f"{count} {what.value}, " for what, count in totals.outcomes.items())
                + f"{totals.completed} completed"
                for priority, totals in snapshot.totals.items()
            ] + [f"unknown objectives: {snapshot.unknown_objectives}"]


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
        assert expected == _spell(time_ns)
        assert time_ns == _nanoseconds(expected)

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
            ("# .\nat 0s\n----\n\nconfig picker=off", "5: config must come before the first turn"),
            ("# .\nconfig picker", "2: a setting must be like key=value, got 'picker'"),
            ("# .\nconfig pick=off", "2: a setting must be one of bytes-max in-flight-max"),
            ("# .\nat 0s\narrive r1 flow=a flow=b", "3: flow must be given once"),
            ("# .\nbands any fairness=luck", "2: 'luck' is not a valid Fairness"),
            ("# .\nbands 3..x ttl=5s", "2: invalid literal for int()"),
            ("# .\nconfig in-flight-max=0\nat 0s", "3: in_flight_max must be >= 1, got 0"),
            ("# .\nat 0s\nleave r1", "3: r1 must arrive before it leaves"),
            ("# .\nat 0s\narrive r1..r3\narrive r2", "4: r2 must arrive only once"),
        ],
    )
    def test_errors_name_file_and_line(self, lines: str, expected: str) -> None:
        """A scenario that cannot be read says where and what must be."""
        with pytest.raises(ScenarioError, match="^" + re.escape(f"bad.txt:{expected}")):
            replay(lines, "bad.txt")
