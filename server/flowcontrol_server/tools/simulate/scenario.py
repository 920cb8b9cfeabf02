"""The scenario file of a simulation: its format, and its translation for the simulated world.

It uses the settings of the configuration file (`config.settings`) and reports errors like it.
Settings of the engine that a scenario omits have the defaults of the service.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import ConfigError
from flowcontrol.simulation.gates import Decider, ForgetfulGate, OpenGate
from flowcontrol.simulation.plan import Plan
from flowcontrol.simulation.pool import Balancer
from flowcontrol.simulation.safety import Slots, slots_of
from flowcontrol_server.common.sections import Duration, Section
from flowcontrol_server.common.yamlfile import read_mapping
from flowcontrol_server.config.engine import EngineSection
from flowcontrol_server.config.problems import problems_of
from flowcontrol_server.tools.simulate.parts import FaultSection, Priorities, Servers, demand
from flowcontrol_server.tools.simulate.workloads import WorkloadSection

EXTENDS_MAX = 8
"""Longest chain of files that extend one another; a longer one is taken for a cycle."""

_REQUESTS_MAX = 5_000_000
"""Each takes some 500 bytes of memory and 200 us."""
_SCRAPES_MAX = 100_000_000
"""Each takes some 15 us, so all take half an hour; three servers scraped a second for a year."""


def _on_or_off(value: object) -> object:
    """Return on or off for the booleans that YAML reads from the bare words."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _off_is_none(value: object) -> object:
    return None if value is False or value == "off" else value


class SettlementSection(Section):
    """Envoy's access log, which reports the actual usage of a request."""

    delay: Duration = Field(default="1s")  # type: ignore[assignment]  # read by its validator
    """Time from the end of a request to the arrival of its entry."""


class ScrapeSection(Section):
    """Load observed from the model servers' metrics."""

    every: Duration = Field(default="1s")  # type: ignore[assignment]  # read by its validator
    """Interval."""


class _Head(Section):
    """Settings of the file as a whole."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's format."""
    kind: Literal["Scenario"]
    """Kind of this file."""
    extends: str | None = None
    """Path of another scenario, relative to this one. Settings here replace those there; mappings
    are merged."""
    seed: int = Field(default=889, ge=0)
    """Seed of all random choices; `--seed` has precedence."""
    duration: Duration
    """How long requests arrive. The run goes on until all have ended."""
    gate: Annotated[Literal["on", "off", "forgetful"], BeforeValidator(_on_or_off)] = "on"
    """on: the engine decides. off: Envoy alone, no request waits at the gate. forgetful: the engine
    decides, but regards requests in flight for longer than forgetsAfter as ended."""
    forgets_after: Duration = Field(default="5m")  # type: ignore[assignment]  # read by its validator
    """For the forgetful gate. 5m: as the reference did (llm-d-router#2295)."""


class Scenario(EngineSection, _Head):
    """The whole file."""

    balancer: Literal["least-request", "round-robin"] = "least-request"
    """Envoy's load balancing, if the engine does not pick."""
    objectives: Priorities = Field(default={})
    """InferenceObjectives: name to priority."""
    settlement: Annotated[SettlementSection | None, BeforeValidator(_off_is_none)] = (
        SettlementSection()
    )
    """Or off: no access log."""
    scrape: Annotated[ScrapeSection | None, BeforeValidator(_off_is_none)] = ScrapeSection()
    """Or off: no scrapes."""
    servers: tuple[Servers, ...]
    """The pool."""
    workloads: tuple[WorkloadSection, ...]
    """The clients."""
    faults: tuple[FaultSection, ...] = ()
    """The faults."""

    @field_validator("workloads")
    @classmethod
    def _each_once(cls, value: tuple[WorkloadSection, ...]) -> tuple[WorkloadSection, ...]:
        demand(bool(value), "must name a workload")
        names = [workload.name for workload in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        demand(not twice, f"must name each workload once, got {', '.join(twice)} again")
        return value

    @model_validator(mode="after")
    def _servers_are_known(self) -> Self:
        demand(bool(self.servers), "servers must name a model server")
        names = [spec.address for servers in self.servers for spec in servers.specs()]
        twice = sorted({name for name in names if names.count(name) > 1})
        demand(not twice, f"servers must differ in name, got {', '.join(twice)} again")
        for index, fault in enumerate(self.faults):
            for name in fault.server_names:
                rule = f"faults[{index}] must name a server such as {names[0]}, got {name!r}"
                demand(name in names, rule)
        for index, workload in enumerate(self.workloads):
            for name in workload.servers or ():
                rule = (
                    f"workloads[{index}].servers must name servers such as {names[0]}, got {name!r}"
                )
                demand(name in names, rule)
        return self

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        requests = sum(each.expected(self.duration) for each in self.workloads)
        rule = f"must ask for at most {_REQUESTS_MAX:,} requests in all, got some {requests:,.0f}"
        demand(requests <= _REQUESTS_MAX, f"workloads {rule}")
        if self.scrape is not None:
            count = sum(each.count for each in self.servers)
            scrapes = count * self.duration // self.scrape.every
            rule = (
                f"scrape must be off, or take place at most {_SCRAPES_MAX:,} times in all, "
                f"got {scrapes:,} of {count} servers"
            )
            demand(scrapes <= _SCRAPES_MAX, rule)
        return self

    def controller_config(self) -> ControllerConfig:
        """Return the engine's settings; every wait is forecast, to measure the accuracy."""
        return replace(super().controller_config(), forecasts=True)

    def engine(self) -> Decider:
        """Return a new gate, which decides requests."""
        if self.gate == "off":
            return OpenGate()
        controller = FlowController(self.controller_config(), 0)
        if self.gate == "forgetful":
            return ForgetfulGate(controller, self.forgets_after)
        return controller

    def slots(self) -> Slots | None:
        """Return the limits of slots for the safety checks; None: not checked."""
        has_roles = any(servers.role != "both" for servers in self.servers)
        return None if self.gate != "on" or has_roles else slots_of(self.controller_config())

    def plan(self, trace: Path | None = None) -> Plan:
        """Return the plan of the simulation.

        Args:
            trace: replaces the trace of every workload that replays one; None: their own.

        Raises:
            ConfigError: a trace is missing or unreadable, or no workload replays the given one.
        """
        if trace is not None and not any(each.arrivals.trace for each in self.workloads):
            raise ConfigError([f"{trace}: no workload of the scenario replays a trace"])
        return Plan(
            duration_ns=self.duration,
            servers=tuple(spec for servers in self.servers for spec in servers.specs()),
            workloads=tuple(each.workload(trace) for each in self.workloads),
            objectives=self.objectives,
            faults=tuple(each.fault() for each in self.faults),
            balancer=Balancer(self.balancer),
            settlement_delay_ns=None if self.settlement is None else self.settlement.delay,
            scrape_interval_ns=None if self.scrape is None else self.scrape.every,
        )


def load_scenario(path: Path) -> Scenario:
    """Read a scenario, and the scenarios it extends.

    Raises:
        ConfigError: the scenario is invalid; lists every problem with its path in the file.
    """
    content = _extended(path, EXTENDS_MAX)
    try:
        return Scenario.model_validate(content, context={"directory": path.parent})
    except ValidationError as error:
        raise ConfigError(problems_of(error)) from error


def _extended(path: Path, depth: int) -> dict[Any, Any]:
    content = read_mapping(path)
    base = content.get("extends")
    if not isinstance(base, str):
        return content
    if depth == 0:
        raise ConfigError([f"{path}: extends more than {EXTENDS_MAX} scenarios, or itself"])
    return _merged(_extended(path.parent / base, depth - 1), content)


def _merged(base: dict[Any, Any], changes: dict[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)  # noqa: PLW2901 - the merged value
        merged[key] = value
    return merged
