"""The command line. Each command imports what it needs: --help does not wait for the rest."""

import os
import re
import sys
from errno import EPIPE
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from flowcontrol.errors import ConfigError, FlowControlError
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol_server.common.extras import missing
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.common.signals import exit_at_stop_signals

if TYPE_CHECKING:
    import grpc

    from flowcontrol_server.config.settings import Address, Settings
    from flowcontrol_server.tools.envoy.config import EnvoyOptions

Opened = TypeVar("Opened")
USAGE_ERROR = 2
_NAMES = re.compile(r"([a-z0-9.-]+)/([a-z0-9.-]+)/([a-z0-9.-]+)")
_BUFFER_LIMIT_MAX = 2**32 - 1
"""Envoy keeps it in 32 bits."""
_NEED_CA = "--tls-certificate and --tls-key need --tls-ca: who signs the service's certificate"
_PEM = click.Path(path_type=Path, dir_okay=False)
CONFIG_OPTION = click.option(
    "--config",
    "config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.",
)


class _Commands(click.Group):
    """Reports an error of the operating system in one line, as any other error.

    Not for commands that run for long: there it is a bug, reported with its traceback.
    """

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(context)
        except OSError as error:
            if context.invoked_subcommand in {"serve", "simulate-server"} or error.errno == EPIPE:
                raise  # click ends quietly when the reader is gone
            _leave_standard_output()
            where = error.filename or "standard output cannot be written"
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
        _fail("flowcontrol must not run with python -O: its assertions check invariants")


@main.command()
@CONFIG_OPTION
@click.option(
    "--log-level",
    default="info",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="info writes one line per request.",
)
def serve(config: Path, log_level: str) -> None:
    """Run the service until SIGTERM, then drain; a second SIGTERM or ctrl-C ends it at once."""
    exit_at_stop_signals()
    import structlog
    import uvloop

    from flowcontrol_server.telemetry import logs
    from flowcontrol_server.telemetry.output import queued_output

    settings = _load(config)
    logs.configure(log_level)
    with queued_output():
        try:
            status = uvloop.run(_serve(settings, config))
        except FlowControlError as error:
            _fail(str(error))
        except Exception:  # noqa: BLE001 - a traceback by Python itself could block
            structlog.get_logger().critical("service_failed", exc_info=True)
            status = 1
    raise SystemExit(status)


async def _serve(settings: "Settings", config: Path) -> int:
    from flowcontrol_server.service import Service

    return await Service(settings, config).run()


@main.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
def check_config(config: Path) -> None:
    """Say everything that is wrong with a configuration file; exit 2 if anything is.

    Settings that are valid but probably unintended are warnings, on standard error.
    """
    from flowcontrol_server.config.advice import advice
    from flowcontrol_server.config.difference import settings_hash
    from flowcontrol_server.sources.advice import objective_advice

    settings = _load(config)
    for line in (*advice(settings), *objective_advice(settings)):
        click.echo(f"{config}: warning: {line}", err=True)
    click.echo(f"{config}: ok, hash {settings_hash(settings)}")


@main.command()
@click.option("--config", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--header", multiple=True, metavar="NAME: VALUE", help="Of the request; repeatable.")
@click.option(
    "--metadata",
    multiple=True,
    metavar="NAMESPACE:KEY=VALUE",
    help="What another filter of Envoy has found, such as a claim; repeatable.",
)
@click.option("--body", default="", help="JSON, or @FILE.")
def classify(config: Path, header: tuple[str, ...], metadata: tuple[str, ...], body: str) -> None:
    """Show what a request would become: objective, priority, flow id, and by which rule.

    It is a POST of /v1/chat/completions unless --header ":path: /..." or ":method: ..." say else.
    """
    from flowcontrol_server.tools import classify as tool

    settings = _load(config)
    try:
        text = Path(body[1:]).read_text(encoding="utf-8") if body[:1] == "@" else body
        headers, found = tool.read_headers(header), tool.read_metadata(metadata)
    except (FlowControlError, OSError, UnicodeDecodeError) as error:
        _fail(str(error))
    for line in tool.verdict(settings, headers, found, text):
        click.echo(line)


@main.command()
@click.argument("before", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("after", type=click.Path(path_type=Path, dir_okay=False))
def diff_config(before: Path, after: Path) -> None:
    """Show in which settings two configuration files differ; exit 1 if they do.

    Settings that need a restart are marked. The files that they name need not be on this machine.
    """
    from flowcontrol_server.config.difference import differences

    changes = differences(_load(before, is_elsewhere=True), _load(after, is_elsewhere=True))
    for change in changes:
        click.echo(change)
    raise SystemExit(int(bool(changes)))


@main.command()
@CONFIG_OPTION
@click.option(
    "--envoy-gateway",
    metavar="NAMESPACE/GATEWAY/LISTENER",
    is_flag=False,
    flag_value="models/models/http",
    help="Write the manifests of Envoy Gateway instead. Without a value: models/models/http.",
)
@click.option("--route", help="HTTPRoute to gate, with --envoy-gateway. Left out: the pool's name.")
@click.option("--listen", default="0.0.0.0:8080", show_default=True, help="For clients.")
@click.option(
    "--admin",
    default="127.0.0.1:9901",
    show_default=True,
    help="Envoy's own pages: host:port (reading only), unix:/path (all of them), or off.",
)
@click.option(
    "--ext-proc",
    help="Where Envoy finds the service. Left out: listen.extProc, or if off listen.grpc.",
)
@click.option(
    "--tls-ca",
    help="PEM file on Envoy's machine: the authorities that sign the service's certificate.",
)
@click.option("--tls-certificate", help="PEM file of Envoy's own certificate, for tls.clientCa.")
@click.option("--tls-key", help="PEM file with the key of --tls-certificate.")
@click.option(
    "--buffer-limit",
    default="32Mi",
    show_default=True,
    help="Largest request Envoy buffers; must hold the largest prompt.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 2**31),
    help="Clients' connections. Left out: twice flowControl.maxRequests, and at least 10000.",
)
@click.option(
    "--max-heap",
    default="4Gi",
    show_default=True,
    help="Memory of Envoy: near to it, Envoy resets the requests that hold the most.",
)
@click.option(
    "--original-dst",
    is_flag=True,
    help="Send requests wherever the picker says, also to endpoints that Envoy does not know.",
)
def envoy_config(  # noqa: PLR0913 - click's options
    *,
    config: Path,
    envoy_gateway: str | None,
    route: str | None,
    listen: str,
    admin: str,
    ext_proc: str | None,
    tls_ca: str | None,
    tls_certificate: str | None,
    tls_key: str | None,
    buffer_limit: str,
    max_connections: int | None,
    max_heap: str,
    original_dst: bool,
) -> None:
    """Write an Envoy configuration that fits this service's configuration.

    Of the files that it names only listen.secretFile must be on this machine.
    """
    from flowcontrol_server.common.units import parse_quantity

    settings = _load(config, is_elsewhere=True)
    size = parse_quantity(buffer_limit)
    if not size or size > _BUFFER_LIMIT_MAX:
        _fail(f"--buffer-limit must be a size below 4Gi such as 32Mi, got {buffer_limit!r}")
    heap = parse_quantity(max_heap)
    if not heap:
        _fail(f"--max-heap must be a size such as 4Gi, got {max_heap!r}")
    if not tls_ca and (tls_certificate or tls_key):
        _fail(_NEED_CA)
    if route and envoy_gateway is None:
        _fail("--route needs --envoy-gateway: a whole configuration has a route of its own")
    try:
        from flowcontrol_server.tools.envoy.config import (
            EnvoyOptions,
            EnvoyTls,
            bootstrap,
        )

        options = EnvoyOptions(
            listen=_opened("--listen", _address("--listen", listen)),
            admin=_opened("--admin", _address_or_socket("--admin", admin)),
            ext_proc=_address("--ext-proc", ext_proc) if ext_proc else None,
            tls=EnvoyTls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
            buffer_limit_bytes=size,
            connections_max=max_connections,
            heap_bytes_max=heap,
            original_dst=original_dst,
        )
        if envoy_gateway is None:
            click.echo(bootstrap(settings, options), nl=False)
        else:
            click.echo(_gateway(settings, options, envoy_gateway, route), nl=False)
    except ConfigError as error:
        _fail(*error.problems)
    except FlowControlError as error:
        _fail(str(error))


def _gateway(settings: "Settings", options: "EnvoyOptions", named: str, route: str | None) -> str:
    from flowcontrol_server.tools.envoy.gateway import GatewayNames, manifests

    names = _NAMES.fullmatch(named)
    if names is None:
        _fail(
            "--envoy-gateway must be NAMESPACE/GATEWAY/LISTENER, such as models/models/http, "
            f"got {named!r}"
        )
    gateway = GatewayNames(names[1], names[2], names[3], route or settings.pool)
    return manifests(settings, options, gateway)


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
    from flowcontrol_server.telemetry import logs
    from flowcontrol_server.tools.model_server import run

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
    import asyncio

    try:
        from flowcontrol_server.tools.demo.run import run_demo
    except ModuleNotFoundError as error:
        _fail(missing(error, "demo"))
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
        from flowcontrol_server.tools.simulate.command import run_simulation
    except ModuleNotFoundError as error:
        _fail(missing(error, "demo"))
    paths = (scenario,) if compare is None else (scenario, compare)
    try:
        status = run_simulation(paths, trace, seed, output)
    except ConfigError as error:
        _fail(*error.problems)
    raise SystemExit(status)


@main.command()
@click.option(
    "--address", default="127.0.0.1:9003", show_default=True, help="listen.grpc of the service."
)
@click.option(
    "--token",
    envvar="FLOWCONTROL_ADMIN_TOKEN",
    help="Admin token; in FLOWCONTROL_ADMIN_TOKEN other users do not see it.",
)
@click.option(
    "--tls-ca",
    type=_PEM,
    help="PEM file with the authorities that sign the service's certificate; else plain text.",
)
@click.option("--tls-certificate", type=_PEM, help="PEM file to show to it, for tls.clientCa.")
@click.option("--tls-key", type=_PEM, help="PEM file with the key of --tls-certificate.")
def top(
    address: str,
    token: str | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Show a running service in the terminal: bands, tenants, endpoints, decisions."""
    try:
        from flowcontrol_server.tools.top import run
    except ModuleNotFoundError as error:
        _fail(missing(error, "top"))
    secret = _secret(token)
    credentials = _credentials(tls_ca, tls_certificate, tls_key)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _fail("top needs a terminal; a script can ask flowcontrol.v1.FlowControl/GetSnapshot")
    run(str(_address("--address", address)), secret, credentials)


def _credentials(
    ca: Path | None, certificate: Path | None, key: Path | None
) -> "grpc.ChannelCredentials | None":
    """Return what a client speaks TLS with; None for plain text."""
    from flowcontrol_server.doors.tls import client_credentials, reason_of

    if ca is None:
        if certificate or key:
            _fail(_NEED_CA)
        return None
    if (certificate is None) != (key is None):
        _fail("--tls-certificate and --tls-key need each other")
    try:
        return client_credentials(ca, certificate, key)
    except OSError as error:
        _fail(f"--tls-ca, --tls-certificate and --tls-key: {reason_of(error)}")


def _secret(token: str | None) -> str | None:
    """Return the admin token as the service reads its own; None if there is none."""
    from flowcontrol_server.common.secret_file import OWN_LENGTHS, checked

    text = (token or "").strip()
    try:
        return checked(text, OWN_LENGTHS) if text else None
    except ValueError as error:
        _fail(f"--token {error}")


@main.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Decide with these settings instead, and show what would have been different.",
)
def replay(ledger: Path, config: Path | None) -> None:
    """Decide a ledger again on a virtual clock; exit 1 if not all is decided alike."""
    from flowcontrol_server.common.yamlfile import naming
    from flowcontrol_server.config.settings import load_policies
    from flowcontrol_server.ledger.replay import replay as decide_again

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


@main.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False))
@CONFIG_OPTION
@click.option(
    "--listen", default="127.0.0.1:9091", show_default=True, help="Address of its own /metrics."
)
def shadow(ledger: Path, config: Path, listen: str) -> None:
    """Let another configuration decide what a running service decides, without effect.

    Follows the service's ledger until ctrl-C or SIGTERM, then prints the comparison.
    """
    from flowcontrol_server.common.yamlfile import naming
    from flowcontrol_server.config.settings import load_policies
    from flowcontrol_server.tools.shadow import run

    address = _address("--listen", listen)
    try:
        with naming(config):
            policies = load_policies(config)
        lines = run(ledger, policies, address)
    except ConfigError as error:
        _fail(*error.problems)
    except FlowControlError as error:
        _fail(str(error))
    click.echo("\n".join(lines))


def _opened(option: str, address: Opened) -> Opened:
    """Return what Envoy is to listen on: it looks up no name for that, and would not start."""
    from flowcontrol_server.config.settings import Address

    if isinstance(address, Address) and not address.is_ip:
        _fail(f"{option} must have an IP address, such as 127.0.0.1, got {str(address)!r}")
    return address


def _address_or_socket(option: str, text: str) -> "Address | Path | None":
    from pydantic_core import PydanticCustomError

    from flowcontrol_server.common.addresses import parse_address_or_socket

    try:
        return parse_address_or_socket(text)
    except PydanticCustomError as error:
        _fail(f"{option} {error.message()}, got {text!r}")


def _address(option: str, text: str) -> "Address":
    from pydantic_core import PydanticCustomError

    from flowcontrol_server.config.settings import parse_address

    try:
        return parse_address(text)
    except PydanticCustomError as error:
        _fail(f"{option} {error.message()}, got {text!r}")


def _load(config: Path, *, is_elsewhere: bool = False) -> "Settings":
    from flowcontrol_server.common.yamlfile import naming
    from flowcontrol_server.config.settings import load_settings

    try:
        with naming(config):
            settings = load_settings(config, is_elsewhere=is_elsewhere)
    except ConfigError as error:
        _fail(*error.problems)
    return settings


def _fail(*problems: str) -> NoReturn:
    for problem in problems:
        # Of a file or a service, and perhaps what a client wrote; it may have lines.
        click.echo("\n".join(map(plain, problem.splitlines())), err=True)
    raise SystemExit(USAGE_ERROR)
