"""The command line."""

from pathlib import Path
from typing import NoReturn

import click
import uvloop

from flowcontrol.errors import ConfigError, FlowControlError
from server import logs
from server.settings import Settings, load_settings

USAGE_ERROR = 2
CONFIG_OPTION = click.option(
    "--config",
    "config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    settings = _load(config)
    logs.configure(log_level)
    try:
        status = uvloop.run(_serve(settings))
    except FlowControlError as error:
        _fail(str(error))
    raise SystemExit(status)


async def _serve(settings: Settings) -> int:
    from server.service import Service  # noqa: PLC0415 - other commands start faster without grpc

    return await Service(settings).run()


@main.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
def check_config(config: Path) -> None:
    """Say everything that is wrong with a configuration file; exit 2 if anything is."""
    _load(config)
    click.echo(f"{config}: ok")


def _load(config: Path) -> Settings:
    try:
        return load_settings(config)
    except ConfigError as error:
        _fail(*error.problems)


def _fail(*problems: str) -> NoReturn:
    for problem in problems:
        click.echo(problem, err=True)
    raise SystemExit(USAGE_ERROR)
