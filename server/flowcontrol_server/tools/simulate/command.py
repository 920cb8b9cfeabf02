"""`flowcontrol simulate`: run scenarios on the virtual clock, and show the results."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flowcontrol.simulation.safety import LivenessError, SafetyError
from flowcontrol.simulation.world import World
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.common.yamlfile import naming
from flowcontrol_server.tools.simulate.picture import picture
from flowcontrol_server.tools.simulate.report import Run, comparison, summary, table
from flowcontrol_server.tools.simulate.scenario import Scenario, load_scenario

_STEPS = 200
"""Updates of the progress bar during a run."""
_PLAIN_WIDTH = 140
"""If the output is not a terminal."""
_FAILED = 1


def run_simulation(
    paths: tuple[Path, ...], trace: Path | None, seed: int | None, output: Path
) -> int:
    """Run each scenario with the same seed; show tables, save pictures and transcripts.

    Args:
        paths: the scenario, and optionally another to compare with it.
        trace: the trace for workloads that replay one; None: those named in the scenarios.
        seed: the seed; None: that of the first scenario.
        output: directory for the picture and one transcript per scenario; created if missing.

    Returns:
        0; 1: a run violated a safety rule or did not end, which is a bug in the engine.

    Raises:
        ConfigError: a scenario or the trace is invalid; nothing was run.
    """
    scenarios = [_loaded(path) for path in paths]
    chosen = scenarios[0].seed if seed is None else seed
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    worlds = [_world(scenario, trace, chosen) for scenario in scenarios]
    console.print(f"seed {chosen}", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, scenario, world in zip(_names(paths), scenarios, worlds, strict=True):
        try:
            run = _run(console, name, world, scenario.duration)
        except (SafetyError, LivenessError) as error:
            console.print(plain(f"{name}, seed {chosen}: {error}"), style="bold red", markup=False)
            return _FAILED
        runs.append(run)
        console.print(table(run))
        for line in summary(run):
            console.print(plain(line), highlight=False, markup=False)
        transcript = "".join(f"{plain(line)}\n" for line in run.results.transcript)
        (output / f"{_file_name(name)}.transcript.txt").write_text(transcript)
    if len(runs) > 1:
        console.print(comparison(runs[0], runs[1]))
    drawn = output / f"{'-and-'.join(_file_name(run.name) for run in runs)}.png"
    picture(runs, drawn)
    console.print(f"picture: {drawn}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _loaded(path: Path) -> Scenario:
    with naming(path):
        return load_scenario(path)


def _world(scenario: Scenario, trace: Path | None, seed: int) -> World:
    return World(scenario.engine(), scenario.plan(trace), seed, slots=scenario.slots())


def _run(console: Console, name: str, world: World, duration_ns: int) -> Run:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    began_s = time.process_time()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=_STEPS + 1)
        for step in range(1, _STEPS + 1):
            world.run_until(duration_ns * step // _STEPS)
            progress.update(task, completed=step)
        progress.update(task, description=f"{name}, until all requests have ended")
        results = world.finish()
    return Run(name, results, time.process_time() - began_s)


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Name scenarios by their files, and also by their folders if the files have equal names."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{path.resolve().parent.name}/{path.stem}" for path in paths]


def _file_name(name: str) -> str:
    return name.replace("/", "-")
