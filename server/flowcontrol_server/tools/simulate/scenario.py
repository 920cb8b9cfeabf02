"""The scenario file of a simulation: its shape, and what it means to the simulated world.

It speaks the words of the configuration file (`config.settings`), and makes its errors. What a
scenario does not say of the engine has the service's own default.
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
from flowcontrol_server.config.settings import problems_of
from flowcontrol_server.tools.simulate.parts import FaultSection, Priorities, Servers, demand
from flowcontrol_server.tools.simulate.workloads import WorkloadSection

EXTENDS_MAX = 8
"""Files that may extend one another; more are a circle."""

_REQUESTS_MAX = 5_000_000
"""Some 500 bytes of memory each, and 200 us."""
_SCRAPES_MAX = 100_000_000
"""Some 15 us each: half an hour; three servers a second for a year."""


def _on_or_off(value: object) -> object:
    """Read what YAML makes of a bare on or off."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _off_is_none(value: object) -> object:
    return None if value is False or value == "off" else value


class SettlementSection(Section):
    """Envoy's access log, which tells what a request really took."""

    delay: Duration = Field(default="1s")  # type: ignore[assignment]  # read by its validator
    """After the end of a request, when it arrives."""


class ScrapeSection(Section):
    """Load observed from the model servers' metrics."""

    every: Duration = Field(default="1s")  # type: ignore[assignment]  # read by its validator
    """How often."""


class _Head(Section):
    """What the file says of itself."""

    api_version: Literal["flowcontrol/v1alpha1"]
    """Version of this file's shape."""
    kind: Literal["Scenario"]
    """Kind of this file."""
    extends: str | None = None
    """Another scenario, relative to this one; what is set here replaces what is set there, mappings
    setting by setting."""
    seed: int = Field(default=889, ge=0)
    """Of all chance; `--seed` counts more."""
    duration: Duration
    """How long requests arrive. The run goes on until all have ended."""
    gate: Annotated[Literal["on", "off", "forgetful"], BeforeValidator(_on_or_off)] = "on"
    """on: the engine decides. off: Envoy alone, no request waits at the gate. forgetful: the engine
    decides, but takes what is in flight for longer than forgetsAfter for ended."""
    forgets_after: Duration = Field(default="5m")  # type: ignore[assignment]  # read by its validator
    """For the forgetful gate. 5m: as the reference did (llm-d-router#2295)."""


class Scenario(EngineSection, _Head):
    """The whole file."""

    balancer: Literal["least-request", "round-robin"] = "least-request"
    """How Envoy chooses, when it does."""
    objectives: Priorities = Field(default={})
    """InferenceObjectives: name to priority."""
    settlement: Annotated[SettlementSection | None, BeforeValidator(_off_is_none)] = (
        SettlementSection()
    )
    """Or off."""
    scrape: Annotated[ScrapeSection | None, BeforeValidator(_off_is_none)] = ScrapeSection()
    """Or off."""
    servers: tuple[Servers, ...]
    """The pool."""
    workloads: tuple[WorkloadSection, ...]
    """Who asks."""
    faults: tuple[FaultSection, ...] = ()
    """What goes wrong."""

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
        """Return the engine's settings; every wait is forecast, as results say how true that is."""
        return replace(super().controller_config(), forecasts=True)

    def engine(self) -> Decider:
        """Return who decides, new."""
        if self.gate == "off":
            return OpenGate()
        controller = FlowController(self.controller_config(), 0)
        if self.gate == "forgetful":
            return ForgetfulGate(controller, self.forgets_after)
        return controller

    def slots(self) -> Slots | None:
        """Return what may be in flight, for the ledger; None, if that is not checked."""
        has_roles = any(servers.role != "both" for servers in self.servers)
        return None if self.gate != "on" or has_roles else slots_of(self.controller_config())

    def plan(self, trace: Path | None = None) -> Plan:
        """Return what happens.

        Args:
            trace: replayed by every workload that replays one.

        Raises:
            ConfigError: a trace is missing or cannot be read, or none is replayed.
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
    """Read a scenario, and those it extends.

    Raises:
        ConfigError: naming every mistake in it, each with its path in the file.
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
            value = _merged(old, value)  # noqa: PLW2901 - what it comes to
        merged[key] = value
    return merged
