"""The command line. Each command imports what it needs, so that --help is fast."""

import os
import re
import sys
from errno import EPIPE
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from flowcontrol.errors import FlowControlError
from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol_server.common.extras import missing
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.common.signals import exit_at_stop_signals

if TYPE_CHECKING:
    import grpc

    from flowcontrol.config import ControllerConfig
    from flowcontrol_server.common.addresses import Address
    from flowcontrol_server.config.settings import Settings
    from flowcontrol_server.tools.envoy.config import EnvoyOptions

Opened = TypeVar("Opened")
USAGE_ERROR = 2
_NAMES = re.compile(r"([a-z0-9.-]+)/([a-z0-9.-]+)/([a-z0-9.-]+)")
_BUFFER_LIMIT_MAX = 2**32 - 1
"""Envoy stores it in 32 bits."""
_NEED_CA = "--tls-certificate and --tls-key need --tls-ca: the signers of the service's certificate"
_HTTP2_THERE = (
    "--http2 cannot be used with --envoy-gateway, where the Service decides it: set appProtocol: "
    "kubernetes.io/h2c at the port of the model servers"
)
_FILE = click.Path(path_type=Path, dir_okay=False)
CONFIG_OPTION = click.option(
    "--config",
    "config",
    required=True,
    type=_FILE,
    help="Configuration file.",
)


class _Commands(click.Group):
    """Reports the errors of commands without a traceback: ours, and the operating system's.

    In long-running commands an error of the operating system is a bug, and has its traceback.
    """

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(context)
        except FlowControlError as error:
            _fail(str(error))
        except OSError as error:
            if context.invoked_subcommand in {"serve", "simulate-server"} or error.errno == EPIPE:
                raise  # click exits silently when the reader is gone
            _leave_standard_output()
            where = error.filename or "standard output cannot be written"
            _fail(f"{where}: {error.strerror or error}")


def _leave_standard_output() -> None:
    """If standard output cannot be written, drop its buffer: Python would write it at exit."""
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
    help="At info, one line per request is written.",
)
def serve(config: Path, log_level: str) -> None:
    """Run the service. SIGTERM or ctrl-C drains it; a second one ends it at once."""
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
@click.argument("config", type=_FILE)
def check_config(config: Path) -> None:
    """Report every error of a configuration file; exit 2 if there is one.

    Settings that are valid but probably unintended are reported as warnings on standard error.
    """
    from flowcontrol_server.config.advice import advice
    from flowcontrol_server.config.difference import settings_hash
    from flowcontrol_server.sources.advice import source_advice

    settings = _load(config)
    for line in (*advice(settings), *source_advice(settings)):
        click.echo(f"{config}: warning: {line}", err=True)
    click.echo(f"{config}: ok, hash {settings_hash(settings)}")


@main.command()
@CONFIG_OPTION
@click.option(
    "--header", multiple=True, metavar="NAME: VALUE", help="Header of the request; repeatable."
)
@click.option(
    "--metadata",
    multiple=True,
    metavar="NAMESPACE:KEY=VALUE",
    help="Dynamic metadata from another Envoy filter, such as a claim; repeatable.",
)
@click.option("--body", default="", help="Body of the request: JSON, or @FILE.")
def classify(config: Path, header: tuple[str, ...], metadata: tuple[str, ...], body: str) -> None:
    """Show how a request would be classified: objective, priority and flow id, and by which rule.

    The request is POST /v1/chat/completions, unless --header ":path: ..." or ":method: ..." is set.
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
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
def diff_config(before: Path, after: Path) -> None:
    """Show the settings in which two configuration files differ; exit 1 if they do.

    Settings that need a restart are marked. The files they name need not be on this machine.
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
    help="Write manifests for Envoy Gateway instead. Without a value: models/models/http.",
)
@click.option("--route", help="HTTPRoute to gate, with --envoy-gateway. Default: the pool's name.")
@click.option("--listen", default="0.0.0.0:8080", show_default=True, help="Address for clients.")
@click.option(
    "--admin",
    default="127.0.0.1:9901",
    show_default=True,
    help="Envoy's admin pages: host:port (read-only), unix:/path (all of them), or off.",
)
@click.option(
    "--ext-proc",
    help="Address of the service for Envoy. Default: listen.extProc; if that is off, listen.grpc.",
)
@click.option(
    "--tls-ca",
    help="PEM file on Envoy's machine: CAs that sign the service's certificate.",
)
@click.option(
    "--tls-certificate", help="PEM file on Envoy's machine: Envoy's certificate, for tls.clientCa."
)
@click.option("--tls-key", help="PEM file on Envoy's machine: the key of --tls-certificate.")
@click.option(
    "--buffer-limit",
    default="32Mi",
    show_default=True,
    help="Largest request that Envoy buffers; the largest prompt must fit.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 2**31),
    help="Most client connections. Default: twice flowControl.maxRequests, at least 10000.",
)
@click.option(
    "--max-heap",
    default="4Gi",
    show_default=True,
    help="Memory limit of Envoy. Close to it, Envoy resets the requests that use the most.",
)
@click.option(
    "--original-dst",
    is_flag=True,
    help="Send requests to the picked endpoint even if it is not in Envoy's cluster.",
)
@click.option(
    "--http2",
    is_flag=True,
    help="Use HTTP/2 to the model servers, which gRPC needs. Default: HTTP/1.1.",
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
    http2: bool,
) -> None:
    """Write an Envoy configuration that matches the configuration of the service.

    Of the files it names, only listen.secretFile must be on this machine.
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
    from flowcontrol_server.tools.envoy.config import EnvoyOptions, EnvoyTls, bootstrap

    options = EnvoyOptions(
        listen=_opened("--listen", _address("--listen", listen)),
        admin=_opened("--admin", _address_or_socket("--admin", admin)),
        ext_proc=_address("--ext-proc", ext_proc) if ext_proc else None,
        tls=EnvoyTls(tls_ca, tls_certificate, tls_key) if tls_ca else None,
        buffer_limit_bytes=size,
        connections_max=max_connections,
        heap_bytes_max=heap,
        original_dst=original_dst,
        http2=http2,
    )
    if envoy_gateway is None:
        click.echo(bootstrap(settings, options), nl=False)
    else:
        click.echo(_gateway(settings, options, envoy_gateway, route), nl=False)


def _gateway(settings: "Settings", options: "EnvoyOptions", named: str, route: str | None) -> str:
    from flowcontrol_server.tools.envoy.gateway import GatewayNames, manifests

    if options.http2:
        _fail(_HTTP2_THERE)
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
    help="Most requests in a batch.",
)
def simulate_server(host: str, port: int, model: str, sequences_max: int) -> None:
    """Run a simulated model server with OpenAI's API and vLLM's metrics."""
    from flowcontrol_server.telemetry import logs
    from flowcontrol_server.tools.model_server import run

    logs.configure("info")
    run(host, port, model, ModelServerConfig(sequences_max=sequences_max))


@main.command()
@click.option("--keep", is_flag=True, help="Leave everything running until ctrl-C.")
@click.option("--port-offset", default=0, show_default=True, help="Add this to every port.")
@click.option("--seed", default=889, show_default=True, help="Seed of the traffic.")
@click.option(
    "--seconds",
    default=18.0,
    show_default=True,
    type=click.FloatRange(2, 600),
    callback=_finite,
    help="How long people send requests in each of the two phases, in seconds.",
)
@click.option(
    "--output",
    default="demo-result",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the picture, the samples, the configurations and the logs.",
)
def demo(keep: bool, port_offset: int, seed: int, seconds: float, output: Path) -> None:  # noqa: FBT001 - click's flag
    """Compare Envoy with and without flow control, on simulated model servers.

    Sends the same requests of people and a batch job through both.
    """
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
@click.argument("scenario", type=_FILE)
@click.option(
    "--compare",
    type=_FILE,
    help="Another scenario to compare with, run with the same seed.",
)
@click.option(
    "--trace",
    type=_FILE,
    help="Request trace to replay: Azure CSV or Mooncake JSONL.",
)
@click.option("--seed", type=int, help="Replaces the scenario's seed.")
@click.option(
    "--output",
    default="simulation-result",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the picture and the transcripts.",
)
def simulate(
    scenario: Path, compare: Path | None, trace: Path | None, seed: int | None, output: Path
) -> None:
    """Run a scenario on a virtual clock, with the same engine as the service."""
    try:
        from flowcontrol_server.tools.simulate.command import run_simulation
    except ModuleNotFoundError as error:
        _fail(missing(error, "demo"))
    paths = (scenario,) if compare is None else (scenario, compare)
    raise SystemExit(run_simulation(paths, trace, seed, output))


@main.command()
@click.option(
    "--address",
    default="127.0.0.1:9003",
    show_default=True,
    help="Address of the service: its listen.grpc.",
)
@click.option(
    "--token",
    envvar="FLOWCONTROL_ADMIN_TOKEN",
    help="Admin token. Set it as FLOWCONTROL_ADMIN_TOKEN to hide it from other users.",
)
@click.option(
    "--tls-ca",
    type=_FILE,
    help="PEM file with the CAs that sign the service's certificate. Default: no TLS.",
)
@click.option(
    "--tls-certificate", type=_FILE, help="PEM file with the client certificate, for tls.clientCa."
)
@click.option("--tls-key", type=_FILE, help="PEM file with the key of --tls-certificate.")
def top(
    address: str,
    token: str | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Show a running service in the terminal: bands, tenants, endpoints and decisions."""
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
    """Return the credentials of a TLS client; None: no TLS."""
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
    """Return the admin token, read like the service reads its own; None: there is none."""
    from flowcontrol_server.common.secret_file import OWN_LENGTHS, checked

    text = (token or "").strip()
    try:
        return checked(text, OWN_LENGTHS) if text else None
    except ValueError as error:
        _fail(f"--token {error}")


@main.command()
@click.argument("ledger", type=_FILE)
@click.option(
    "--config",
    type=_FILE,
    help="Replay with this configuration, and show what would have been different.",
)
def replay(ledger: Path, config: Path | None) -> None:
    """Replay a decision ledger on a virtual clock; exit 1 if any decision differs."""
    from flowcontrol_server.ledger.replay import replay as decide_again

    policies = None if config is None else _load_policies(config)
    status, lines = decide_again(ledger, policies)
    click.echo("\n".join(lines))
    raise SystemExit(status)


@main.command()
@click.argument("ledger", type=_FILE)
@CONFIG_OPTION
@click.option(
    "--listen",
    default="127.0.0.1:9091",
    show_default=True,
    help="Address of this command's own /metrics.",
)
def shadow(ledger: Path, config: Path, listen: str) -> None:
    """Run another configuration beside a running service, without effect on it.

    Follows the ledger of the service until ctrl-C or SIGTERM, then prints a comparison.
    """
    from flowcontrol_server.tools.shadow import run

    address = _address("--listen", listen)
    lines = run(ledger, _load_policies(config), address)
    click.echo("\n".join(lines))


def _opened(option: str, address: Opened) -> Opened:
    """Return an address for Envoy to listen on; a host name would keep it from starting."""
    from flowcontrol_server.common.addresses import Address

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

    from flowcontrol_server.common.addresses import parse_address

    try:
        return parse_address(text)
    except PydanticCustomError as error:
        _fail(f"{option} {error.message()}, got {text!r}")


def _load(config: Path, *, is_elsewhere: bool = False) -> "Settings":
    from flowcontrol_server.common.yamlfile import naming
    from flowcontrol_server.config.settings import load_settings

    with naming(config):
        return load_settings(config, is_elsewhere=is_elsewhere)


def _load_policies(config: Path) -> "ControllerConfig":
    from flowcontrol_server.common.yamlfile import naming
    from flowcontrol_server.config.settings import load_policies

    with naming(config):
        return load_policies(config)


def _fail(*problems: str) -> NoReturn:
    for problem in problems:
        # Of a file or a service, and perhaps what a client wrote; it may have lines.
        click.echo("\n".join(map(plain, problem.splitlines())), err=True)
    raise SystemExit(USAGE_ERROR)
