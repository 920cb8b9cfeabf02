"""Runs a scenario, a text file in `scenarios/`, against a new flow controller.

A scenario begins with a comment on its purpose, followed by settings and turns. A turn is the same
as for the processor: a batch of facts, one reading of the clock, one poll. The lines below its
`----` are the results; `pytest --rewrite` rewrites them.

    # With one slot, chat overtakes batch.

    config in-flight-max=1 requests-max=2       bytes-max no-endpoint-ttl picker
    bands ..-1 ttl=1s                           as -1, 3..7, 10.. or any, first match wins;
                                                requests-max bytes-max flow-requests-max
                                                flow-bytes-max ttl fairness ordering share-min
                                                promote-after
    detector utilization waiting-max=5          or concurrency or adaptive, with their settings;
                                                instead of in-flight-max; several: the fullest
    ceilings soft-reflective                    ceiling-max ceiling-min
    weights a=2                                 of flows
    prices input=1 cached-input=0 output=0
    reclaim before-first-byte at-once-max=2     or any-time or off; patience

    at 0ms
    objectives chat=10 batch=-1                 or none
    endpoints a b p=prefill d=decode            or none
    arrive b1..b2 objective=batch               flow objective ttl bytes input output-max slo model;
                                                b1..b2 is b1 and b2
    show bands                                  or flows, endpoints, totals; printed after the poll
    ----
    b1 dispatched, band -1, waited 0s
    band -1: 1 waiting, 0 bytes, 1 in flight
    waiting 1, in flight 1, next wake-up at 1s

    at wake-up                                  the time of the engine's next wake-up
    answered b1                                 its first byte arrived
    settle b1 output=500                        input cached output ttft generation failed=yes
    load a waiting=3 kv=0.5                     the reported load of an endpoint
    leave b1
    ----

    at 5s
    config in-flight-max=2                      new settings, then
    reconfigure                                 apply all settings
    drain 5s
    ----
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowcontrol import config as engine_config
from flowcontrol.controller import FlowController
from flowcontrol.errors import ConfigError
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    Left,
    LoadObserved,
    ObjectivesChanged,
    Reconfigured,
    Settled,
)
from flowcontrol.request import DEFAULT_FLOW_ID, Request
from flowcontrol.views.snapshot import Snapshot
from flowcontrol.views.view import take_snapshot

UNITS_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
FLOWS_SHOWN_MAX = 10


class ScenarioError(Exception):
    """A scenario is invalid; with file and line."""


def nanoseconds(word: str) -> int:
    """Parse a time."""
    match = re.fullmatch(r"(\d+)(ns|us|ms|s)", word)
    if match is None:
        message = f"a time must be like 5s, 20ms, 3us or 7ns, got {word!r}"
        raise ValueError(message)
    return int(match[1]) * UNITS_NS[match[2]]


def spell(time_ns: int) -> str:
    """Format a time in the largest unit in which it is exact."""
    unit = next(unit for unit, size_ns in UNITS_NS.items() if time_ns % size_ns == 0)
    return f"{time_ns // UNITS_NS[unit]}{unit}"


_Words = Mapping[str, Callable[[str], Any]]
"""Names of settings, with the functions that parse their values."""

_LIMITS: _Words = {"requests-max": int, "bytes-max": int}
_CONFIG: _Words = {
    **_LIMITS,
    "in-flight-max": int,
    "no-endpoint-ttl": nanoseconds,
    "picker": engine_config.Picker,
}
_BAND: _Words = {
    **_LIMITS,
    "flow-requests-max": int,
    "flow-bytes-max": int,
    "ttl": nanoseconds,
    "fairness": engine_config.Fairness,
    "ordering": engine_config.Ordering,
    "share-min": float,
    "promote-after": nanoseconds,
}
_DETECTORS: Mapping[str, tuple[Callable[..., engine_config.Detector], _Words]] = {
    "concurrency": (engine_config.Concurrency, {"requests-max": int, "tokens-max": int}),
    "utilization": (
        engine_config.Utilization,
        {
            "waiting-max": int,
            "kv-usage-max": float,
            "stale-after": nanoseconds,
            "staleness": engine_config.Staleness,
            "requests-max": int,
        },
    ),
    "adaptive": (engine_config.Adaptive, {"limit-first": int, "limit-max": int}),
}
_CEILINGS: _Words = {"ceiling-max": float, "ceiling-min": float}
_PRICES: _Words = {"input": float, "cached-input": float, "output": float}
_RECLAIM: _Words = {"at-once-max": int, "patience": nanoseconds}
_REQUEST: _Words = {
    "flow": str,
    "objective": str,
    "ttl": nanoseconds,
    "bytes": int,
    "input": int,
    "output-max": int,
    "slo": nanoseconds,
    "model": str,
}
_SETTLED: _Words = {
    "input": int,
    "cached": int,
    "output": int,
    "ttft": nanoseconds,
    "generation": nanoseconds,
    "failed": str,
}
_LOAD: _Words = {"waiting": int, "running": int, "kv": float}
_RENAMED = {"ttl": "ttl_ns", "promote_after": "promote_after_ns", "stale_after": "stale_after_ns"}
_RENAMED |= {"patience": "patience_ns"}
"""Words that differ from the names of their settings."""


@dataclass(slots=True)
class _Settings:
    """The settings of a scenario so far."""

    words: dict[str, Any] = field(default_factory=dict)
    """Words of the `config` lines."""
    default_settings: engine_config.BandSettings = field(default_factory=engine_config.BandSettings)
    templates: dict[str, engine_config.BandTemplate] = field(default_factory=dict)
    detectors: dict[str, engine_config.Detector] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def read(self, words: list[str]) -> bool:
        """Read one line; return whether it contains settings."""
        match words:
            case ["config", *pairs]:
                self.words |= read_pairs(pairs, _CONFIG)
            case ["bands", "any", *pairs]:
                self.default_settings = _band_settings(pairs)
            case ["bands", priorities, *pairs]:
                low, high = _priority_range(priorities)
                self.templates[priorities] = engine_config.BandTemplate(
                    priority_min=low, priority_max=high, settings=_band_settings(pairs)
                )
            case ["detector", name, *pairs] if name in _DETECTORS:
                build, known = _DETECTORS[name]
                defaults = {"requests_max": None} if name == "concurrency" else {}
                self.detectors[name] = build(**defaults | _named(read_pairs(pairs, known)))
            case ["ceilings", policy, *pairs]:
                ends = _named(read_pairs(pairs, _CEILINGS))
                self.others["ceilings"] = engine_config.CeilingSettings(
                    policy=engine_config.Ceilings(policy), **ends
                )
            case ["weights", *pairs]:
                self.others["weights"] = _free_pairs(pairs, float)
            case ["prices", *pairs]:
                self.others["prices"] = engine_config.TokenPrices(
                    **_named(read_pairs(pairs, _PRICES))
                )
            case ["reclaim", "off"]:
                self.others["reclaim"] = engine_config.Reclaim()
            case ["reclaim", "before-first-byte" | "any-time" as mode, *pairs]:
                self.others["reclaim"] = engine_config.Reclaim(
                    is_enabled=True,
                    is_only_before_first_byte=mode == "before-first-byte",
                    **_named(read_pairs(pairs, _RECLAIM)),
                )
            case _:
                return False
        return True

    def config(self) -> engine_config.ControllerConfig:
        """Return the configuration."""
        words = self.words
        detectors = tuple(self.detectors.values())
        if not detectors:
            detectors = (engine_config.Concurrency(requests_max=words.get("in-flight-max", 1)),)
        return engine_config.ControllerConfig(
            limits=_limits(words),
            templates=tuple(self.templates.values()),
            default_settings=self.default_settings,
            no_endpoint_ttl_ns=words.get("no-endpoint-ttl"),
            detectors=detectors,
            picker=words.get("picker", engine_config.Picker.OFF),
            **self.others,
        )


@dataclass(slots=True)
class Replay:
    """Runs the commands of one scenario against a new flow controller."""

    settings: _Settings = field(default_factory=_Settings)
    controller: FlowController | None = None
    """Created by the first turn, with the settings so far; `reconfigure` applies later ones."""
    now_ns: int = 0
    is_turn_open: bool = False
    names: list[str] = field(default_factory=list)
    """Names of the requests; a request's id is its index here."""
    shows: list[str] = field(default_factory=list)

    def command(self, line: str) -> None:
        """Execute one line.

        Raises:
            ValueError: the line is invalid, or not allowed at this point.
            ConfigError: the settings are invalid.
        """
        words = line.split()
        if words[0] == "at":
            self._begin_turn(*words[1:])
        elif self.settings.read(words):
            if self.controller is not None and not self.is_turn_open:
                message = f"{words[0]} must come before the first turn, or in a turn"
                raise ValueError(message)
        elif self.controller is None or not self.is_turn_open:
            message = f"a turn must begin with at, got {line!r}"
            raise ValueError(message)
        elif words[0] == "show" and words[1:] and words[1] in _SHOWN:
            self.shows.append(words[1])
        else:
            for fact in self._facts(words):
                self.controller.handle(fact, self.now_ns)

    def decide(self) -> list[str]:
        """End the turn: poll, and return the lines of results."""
        if self.controller is None or not self.is_turn_open:
            message = "---- must end a turn"
            raise ValueError(message)
        self.is_turn_open = False
        decisions = self.controller.poll(self.now_ns)
        self.controller.check_invariants()
        snapshot = take_snapshot(self.controller, self.now_ns, FLOWS_SHOWN_MAX)
        shows, self.shows = self.shows, []
        shown = [line for what in shows for line in _SHOWN[what](snapshot)]
        return [*self._decision_lines(decisions), *shown, self._state_line(snapshot)]

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
            then_ns = nanoseconds(moment)
            if then_ns < self.now_ns:
                message = f"time must not go back, it is {spell(self.now_ns)}"
                raise ValueError(message)
            if wakeup_ns is not None and then_ns > wakeup_ns:
                message = f"the wake-up at {spell(wakeup_ns)} must not be slept past"
                raise ValueError(message)
            self.now_ns = then_ns
        if self.controller is None:
            self.controller = FlowController(self.settings.config(), self.now_ns)
        self.is_turn_open = True

    def _facts(self, words: list[str]) -> Sequence[Fact]:
        facts: Sequence[Fact]
        match words:
            case ["arrive", names, *pairs]:
                values = read_pairs(pairs, _REQUEST)
                facts = [Arrived(self._request(name, values)) for name in _names(names)]
            case ["leave", names]:
                facts = [Left(self._request_id(name)) for name in _names(names)]
            case ["answered", names]:
                facts = [Answered(self._request_id(name)) for name in _names(names)]
            case ["settle", names, *pairs]:
                values = read_pairs(pairs, _SETTLED)
                facts = [self._settled(name, values) for name in _names(names)]
            case ["load", address, *pairs]:
                load = read_pairs(pairs, _LOAD)
                waiting, running = load.get("waiting", 0), load.get("running", 0)
                facts = [LoadObserved(address, waiting, running, load.get("kv", 0.0))]
            case ["objectives", *pairs] if pairs:
                facts = [ObjectivesChanged({} if pairs == ["none"] else _free_pairs(pairs, int))]
            case ["endpoints", *names] if names:
                facts = [_endpoints(() if names == ["none"] else names)]
            case ["reconfigure"]:
                facts = [Reconfigured(self.settings.config())]
            case ["drain", budget]:
                facts = [DrainBegan(nanoseconds(budget))]
            case _:
                message = f"there is no command {' '.join(words)!r}"
                raise ValueError(message)
        return facts

    def _request(self, name: str, values: dict[str, Any]) -> Request:
        if name in self.names:
            message = f"{name} must arrive only once"
            raise ValueError(message)
        self.names.append(name)
        return Request(
            request_id=self._request_id(name),
            flow_id=values.get("flow", DEFAULT_FLOW_ID),
            objective=values.get("objective"),
            byte_size=values.get("bytes", 0),
            ttl_ns=values.get("ttl"),
            input_tokens=values.get("input"),
            output_tokens_max=values.get("output-max"),
            ttft_slo_ns=values.get("slo"),
            model=values.get("model", ""),
        )

    def _settled(self, name: str, values: dict[str, Any]) -> Settled:
        return Settled(
            self._request_id(name),
            values.get("input"),
            values.get("cached"),
            values.get("output"),
            values.get("ttft"),
            values.get("generation"),
            "failed" not in values,
        )

    def _request_id(self, name: str) -> int:
        if name not in self.names:
            message = f"{name} must arrive before it leaves"
            raise ValueError(message)
        return self.names.index(name)

    def _decision_lines(self, decisions: list[Decision]) -> list[str]:
        """Return a line per decision; consecutive equal ones share a line, as r1..r3."""
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

    def _state_line(self, snapshot: Snapshot) -> str:
        assert self.controller is not None
        wakeup_ns = self.controller.next_wakeup_ns()
        if self.controller.is_drained:
            end = "drained"
        elif wakeup_ns is None:
            end = "no wake-up"
        else:
            end = f"next wake-up at {spell(wakeup_ns)}"
        return f"waiting {snapshot.waiting}, in flight {snapshot.in_flight}, {end}"


def replay(text: str, name: str) -> str:
    """Return a scenario with new results below each `----`.

    Raises:
        ScenarioError: the scenario is invalid; with file and line.
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
        except (ValueError, TypeError, ConfigError) as error:
            message = f"{name}:{number}: {error}"
            raise ScenarioError(message) from error
    if run.is_turn_open:
        message = f"{name}:{len(lines)}: the last turn must end with ----"
        raise ScenarioError(message)
    return "\n".join(written) + "\n"


def read_pairs(words: Sequence[str], known: _Words) -> dict[str, Any]:
    """Parse words like key=value; each of these keys at most once."""
    pairs: dict[str, Any] = {}
    for key, value in _split(words):
        if key not in known:
            message = f"a setting must be one of {' '.join(sorted(known))}, got {key!r}"
            raise ValueError(message)
        if key in pairs:
            message = f"{key} must be given once"
            raise ValueError(message)
        pairs[key] = known[key](value)
    return pairs


def _free_pairs(words: Sequence[str], read: Callable[[str], Any]) -> dict[str, Any]:
    return {key: read(value) for key, value in _split(words)}


def _split(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals or not value:
            message = f"a setting must be like key=value, got {word!r}"
            raise ValueError(message)
        pairs.append((key, value))
    return pairs


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {key: key.replace("-", "_") for key in values}
    return {_RENAMED.get(name, name): values[key] for key, name in names.items()}


def _band_settings(words: list[str]) -> engine_config.BandSettings:
    values = read_pairs(words, _BAND)
    own = {key: value for key, value in values.items() if not key.endswith(("ests-max", "es-max"))}
    flow = {key.removeprefix("flow-"): values[key] for key in values if key.startswith("flow-")}
    return engine_config.BandSettings(
        limits=_limits(values), flow_limits=_limits(flow), **_named(own)
    )


def _limits(values: Mapping[str, Any]) -> engine_config.Limits:
    return engine_config.Limits(
        requests_max=values.get("requests-max"), bytes_max=values.get("bytes-max")
    )


def _priority_range(word: str) -> tuple[int | None, int | None]:
    low, dots, high = word.partition("..")
    if not dots:
        return int(low), int(low)
    return int(low) if low else None, int(high) if high else None


def _endpoints(names: Sequence[str]) -> EndpointsChanged:
    pairs = [name.partition("=") for name in names]
    roles = {address: engine_config.Role(role) for address, equals, role in pairs if equals}
    return EndpointsChanged(tuple(address for address, _, _ in pairs), roles)


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
        f"waited {spell(decision.waited_ns)}",
    ]
    if decision.endpoint is not None:
        parts.append(f"endpoint {decision.endpoint}")
    if decision.retry_after_ns is not None:
        parts.append(f"retry after {spell(decision.retry_after_ns)}")
    return ", ".join(parts)


def _show_bands(snapshot: Snapshot) -> list[str]:
    return [
        f"band {band.priority}: {band.waiting} waiting, {band.waiting_bytes} bytes, "
        f"{band.in_flight} in flight"
        + ("" if band.ceiling == 1 else f", ceiling {band.ceiling:g}")
        + ("" if band.is_declared else ", not declared")
        for band in snapshot.bands
    ]


def _show_flows(snapshot: Snapshot) -> list[str]:
    return [
        f"flow {flow.flow_id} of band {band.priority}: {flow.waiting} waiting, "
        f"{flow.waiting_bytes} bytes, {flow.in_flight} in flight"
        + (f", oldest {spell(flow.oldest_wait_ns)}" if flow.oldest_wait_ns else "")
        for band in snapshot.bands
        for flow in band.flows
    ]


def _show_endpoints(snapshot: Snapshot) -> list[str]:
    return [
        f"endpoint {each.address}: saturation {each.saturation:g}"
        + ("" if each.in_flight is None else f", {each.in_flight} in flight")
        for each in snapshot.endpoints
    ]


def _show_totals(snapshot: Snapshot) -> list[str]:
    return [
        f"total of {priority}: "
        + "".join(f"{count} {what.value}, " for what, count in totals.outcomes.items())
        + f"{totals.completed} completed"
        for priority, totals in snapshot.totals.items()
    ] + [f"unknown objectives: {snapshot.unknown_objectives}"]


_SHOWN: Mapping[str, Callable[[Snapshot], list[str]]] = {
    "bands": _show_bands,
    "flows": _show_flows,
    "endpoints": _show_endpoints,
    "totals": _show_totals,
}
