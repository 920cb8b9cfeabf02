"""The command line as a user meets it."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flowcontrol.errors import FlowControlError, ListenError
from flowcontrol_server.cli import main
from flowcontrol_server.common.extras import install
from flowcontrol_server.config.settings import load_settings
from flowcontrol_server.service import Service
from tests.support.certificates import Authority
from tests.support.ports import free_ports
from tests.support.served import configuration, lines_until, serving

TIMEOUT_S = 20.0
SLOW_TO_IMPORT = ("aiohttp", "asyncio", "google", "grpc", "pydantic", "structlog", "uvloop", "yaml")
COMMANDS = ("serve", "check-config", "envoy-config", "simulate-server", "simulate", "demo")


def run(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Signals as they were before a command had the process to itself."""
    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestHelp:
    """What there is."""

    def test_help_is_quick(self) -> None:
        """It imports nothing that takes long."""
        code = (
            f"import flowcontrol_server.cli, sys; print(set({SLOW_TO_IMPORT}) & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

        assert done.stdout == b"set()\n"

    @pytest.mark.parametrize("option", ["-h", "--help"])
    def test_commands(self, option: str) -> None:
        """Help names every command with a line of its own."""
        result = run(option)

        listed = result.stdout.partition("Commands:\n")[2].splitlines()
        assert result.exit_code == 0
        assert set(COMMANDS) <= {line.split()[0] for line in listed}
        assert all(len(line.split()) > 3 for line in listed)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_each_command(self, command: str) -> None:
        """Every command has help, with a sentence that says what it does."""
        result = run(command, "-h")

        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: main {command} ")
        assert result.stdout.splitlines()[2].strip()

    def test_without_a_command(self) -> None:
        """Without a command help is shown, and nothing was done."""
        result = CliRunner().invoke(main, [])

        assert result.exit_code == 2
        assert "Commands:" in result.output

    def test_version(self) -> None:
        """The version is the installed package's."""
        result = run("--version")

        assert result.stdout.split()[-1] == version("flowcontrol")
        assert result.exit_code == 0


class TestUsage:
    """What cannot be meant: exit status 2 and words on standard error."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["serv"], "No such command 'serv'"),
            (["serve"], "Missing option '--config'"),
            (["serve", "--config", "c.yaml", "--log-level", "loud"], "'loud' is not one of"),
            (["check-config"], "Missing argument 'CONFIG'"),
            (["check-config", "a.yaml", "b.yaml"], "unexpected extra argument"),
            (["envoy-config"], "Missing option '--config'"),
            (["simulate-server", "--port", "70000"], "70000 is not in the range"),
            (["demo", "--seconds", "nan"], "nan is not a number of seconds"),
            (
                ["demo", "--port-offset", "70000", "--output", "/"],
                "--port-offset must be from -7999 to 55634",
            ),
            (
                ["demo", "--port-offset", "-9000", "--output", "/"],
                "--port-offset must be from -7999 to 55634",
            ),
            (["demo", "--output", "/proc/nope"], "/proc/nope: No such file or directory"),
            (["top"], "top needs a terminal"),
            (["--verbose"], "No such option"),
        ],
        ids=" ".join,
    )
    def test_mistakes(self, arguments: list[str], words: str) -> None:
        """The mistake is named."""
        result = run(*arguments)

        assert result.exit_code == 2
        assert words in result.stderr
        assert not result.stdout

    @pytest.mark.parametrize(
        "arguments",
        [["serve", "--config"], ["check-config"], ["envoy-config", "--config"]],
        ids=lambda arguments: arguments[0],
    )
    def test_bad_configuration(self, tmp_path: Path, arguments: list[str]) -> None:
        """Every command says the same of a bad configuration, all of it, and exits with 2."""
        config = tmp_path / "flowcontrol.yaml"
        config.write_text("kind: Config\npicker: random\n")

        result = run(*arguments, str(config))

        assert result.exit_code == 2
        assert result.stderr.splitlines() == [
            f"{config}: apiVersion is required",
            f"{config}: kind must be 'FlowControlConfig', got 'Config'",
            f"{config}: pool is required",
            f"{config}: objectives is required",
            f"{config}: endpoints is required",
            f"{config}: picker must be 'off', 'least-loaded' or 'prefix-affinity', got 'random'",
        ]


class TestCheckConfig:
    """check-config; its messages have tests of their own in test_settings.py."""

    def test_warning(self, tmp_path: Path) -> None:
        """What is valid and may not be meant is a warning; the exit status stays 0."""
        config = tmp_path / "flowcontrol.yaml"
        config.write_text(
            "apiVersion: flowcontrol/v1alpha1\nkind: FlowControlConfig\npool: llama\n"
            "objectives: {directory: .}\nendpoints: {static: []}\n"
            "listen: {extProc: 0.0.0.0:9002}\n"
        )

        result = run("check-config", str(config))

        assert result.exit_code == 0
        assert "warning: listen.extProc is open to other machines at 0.0.0.0:9002" in result.stderr
        assert "ok, hash" in result.stdout

    def test_the_example(self) -> None:
        """The example that people copy is a good one."""
        example = Path(__file__).parents[2] / "envoy" / "flowcontrol.yaml"

        result = run("check-config", str(example))

        assert re.fullmatch(f"{re.escape(str(example))}: ok, hash [0-9a-f]{{12}}\n", result.stdout)
        assert result.exit_code == 0


@pytest.mark.slow
class TestServe:
    """serve, in a process of its own."""

    @pytest.fixture(name="ports")
    def _ports(self) -> list[int]:
        """Ports for ext_proc, gRPC and HTTP."""
        return free_ports(3)

    @pytest.fixture(name="config")
    def _config(self, tmp_path: Path, ports: list[int]) -> Path:
        """A configuration that listens on these ports."""
        return configuration(tmp_path, ports)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals(self, config: Path, number: signal.Signals) -> None:
        """SIGTERM and SIGINT drain the service and end it with status 0."""
        with serving(config) as process:
            started = lines_until(process, "service_started")
            process.send_signal(number)
            stopped = lines_until(process, "service_stopped")

            assert process.wait(TIMEOUT_S) == 0
        events = [line["event"] for line in started]
        assert [event for event in events if event != "configuration_warning"] == [
            "endpoints_changed",
            "objectives_changed",
            "admin_api_read_only",
            "service_started",
        ]
        assert [line["event"] for line in stopped] == ["drain_began", "service_stopped"]
        assert stopped[0]["cause"] == number.name
        assert stopped[1]["exit_status"] == 0

    @pytest.mark.parametrize("taken", [0, 1, 2], ids=["ext_proc", "grpc", "http"])
    def test_port_in_use(self, config: Path, ports: list[int], taken: int) -> None:
        """A port that is taken is named as the last word; nothing is left running; status 2."""
        with socket.create_server(("127.0.0.1", ports[taken])), serving(config) as process:
            _, errors = process.communicate(timeout=TIMEOUT_S)

        address = f"127.0.0.1:{ports[taken]}"
        words = f"cannot listen on {address}: in use by another process"
        assert errors.splitlines()[-1] == words
        assert "Traceback" not in errors
        assert process.returncode == 2

    @pytest.mark.parametrize("door", ["extProc", "grpc", "http"])
    @pytest.mark.parametrize(
        ("host", "reason"),
        [
            ("192.0.2.1", "address not assigned to this host"),
            ("nowhere.invalid", "host name does not resolve"),
        ],
    )
    async def test_not_here(self, config: Path, door: str, host: str, reason: str) -> None:
        """Why a port cannot be opened is said, whichever it is."""
        lines = config.read_text().splitlines()
        lines = [f"  {door}: {host}:4711" if f" {door}:" in line else line for line in lines]
        config.write_text("\n".join(lines))
        interval_s = sys.getswitchinterval()
        with pytest.raises(ListenError) as caught:
            await Service(load_settings(config), config).run()

        sys.setswitchinterval(interval_s)
        assert str(caught.value) == f"cannot listen on {host}:4711: {reason}"

    async def test_nothing_is_left_running(self, config: Path, ports: list[int]) -> None:
        """When a port is taken the processor has ended before that is said."""
        interval_s = sys.getswitchinterval()
        with socket.create_server(("127.0.0.1", ports[0])), pytest.raises(ListenError):
            await Service(load_settings(config), config).run()

        sys.setswitchinterval(interval_s)
        assert "flow-processor" not in {thread.name for thread in threading.enumerate()}

    async def test_traces_without_the_extra(
        self, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the extra is missing, the error says how to get it."""
        monkeypatch.setitem(
            sys.modules, "flowcontrol_server.telemetry.otel", None
        )  # it cannot be found
        with config.open("a") as file:
            file.write("traces: {exporter: otlp}\n")

        advice = f"traces.exporter: flowcontrol_server.telemetry.otel is missing: {install('otel')}"
        with pytest.raises(FlowControlError, match=re.escape(advice)):
            Service(load_settings(config), config)

    def test_without_assertions(self, config: Path) -> None:
        """With -O the service refuses to start: its assertions guard the ledger."""
        command = [
            sys.executable,
            "-O",
            "-m",
            "flowcontrol_server",
            "serve",
            "--config",
            str(config),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

        assert (
            done.stderr
            == "flowcontrol must not run with python -O: its assertions check invariants\n"
        )
        assert done.returncode == 2


class TestElsewhere:
    """A configuration is read on another machine than the service's: a ConfigMap on a desk."""

    FILES = """
tls: {certificate: /nowhere/tls.crt, key: /nowhere/tls.key}
admin: {tokenFile: /nowhere/token}
load: {tokenFile: /nowhere/key}
kubernetes: {kubeconfig: /nowhere/kubeconfig}
state: {directory: /nowhere/state}
ledger: {file: /nowhere/ledger}
"""

    @pytest.mark.parametrize(
        "arguments",
        [("envoy-config", "--tls-ca", "/nowhere/ca.crt", "--config"), ("diff-config", "{}")],
    )
    def test_files_of_the_service(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """What only the service reads need not be here."""
        config = configuration(tmp_path, [1, 2, 3, 4], self.FILES)

        result = run(*(each.format(config) for each in arguments), str(config))

        assert (result.stderr, result.exit_code) == ("", 0)

    def test_check_config(self, tmp_path: Path) -> None:
        """A check is one of the machine as well."""
        config = configuration(tmp_path, [1, 2, 3, 4], self.FILES)

        result = run("check-config", str(config))

        assert result.exit_code == 2
        for name in ("tls", "load.tokenFile", "kubernetes.kubeconfig", "state.directory", "ledger"):
            assert f"{config}: {name}" in result.stderr


class TestRefused:
    """What a command cannot make use of."""

    @pytest.mark.parametrize("size", ["99999E", "4Gi", "0", "much"])
    def test_buffer_limit(self, tmp_path: Path, size: str) -> None:
        """Envoy's buffer limit has bounds."""
        config = configuration(tmp_path, [1, 2, 3, 4])

        result = run("envoy-config", "--config", str(config), "--buffer-limit", size)

        rule = f"--buffer-limit must be a size below 4Gi such as 32Mi, got {size!r}"
        assert result.stderr == f"{rule}\n"
        assert result.exit_code == 2

    @pytest.mark.parametrize(
        ("option", "value", "rule"),
        [
            ("--max-heap", "much", "must be a size such as 4Gi"),
            ("--admin", "unix:admin", "must be unix: and an absolute path of at most 107 bytes"),
            ("--admin", "localhost:9901", "must have an IP address, such as 127.0.0.1"),
            ("--listen", "localhost:8080", "must have an IP address, such as 127.0.0.1"),
            (
                "--envoy-gateway",
                "models",
                "must be NAMESPACE/GATEWAY/LISTENER, such as models/models/http",
            ),
        ],
    )
    def test_envoy_options(self, tmp_path: Path, option: str, value: str, rule: str) -> None:
        """A limit or an address of Envoy's that is none is named."""
        config = configuration(tmp_path, [1, 2, 3, 4])

        result = run("envoy-config", "--config", str(config), option, value)

        assert result.stderr == f"{option} {rule}, got {value!r}\n"
        assert result.exit_code == 2

    @pytest.mark.parametrize(
        "token", ["short", "one-line-of-two\nthe-other-line", "sésame-ouvre-toi"]
    )
    def test_token(self, token: str) -> None:
        """A token that no service has and no header can carry is named, and not shown."""
        result = run("top", "--token", token)

        rule = "--token must hold 16 to 1024 visible ASCII characters"
        assert result.stderr == f"{rule}, got {len(token)} characters\n"
        assert result.exit_code == 2

    def test_route_alone(self, tmp_path: Path) -> None:
        """A route that nothing is written for is not passed over."""
        config = configuration(tmp_path, [1, 2, 3, 4])

        result = run("envoy-config", "--config", str(config), "--route", "llama")

        rule = "--route needs --envoy-gateway: a whole configuration has a route of its own"
        assert result.stderr == f"{rule}\n"
        assert result.exit_code == 2

    def test_http2_for_a_gateway(self, tmp_path: Path) -> None:
        """Envoy Gateway asks the Service how to speak to its pods."""
        config = configuration(tmp_path, [1, 2, 3, 4])

        result = run("envoy-config", "--config", str(config), "--http2", "--envoy-gateway")

        assert result.stderr.startswith("--http2 cannot be used with --envoy-gateway")
        assert result.exit_code == 2

    def test_token_from_a_file(self) -> None:
        """What an editor leaves at the end of a line does not count."""
        result = run("top", "--token", "open-sesame-open-sesame\r\n")

        assert result.stderr.startswith("top needs a terminal")

    @pytest.mark.parametrize("option", ["--tls-certificate", "--tls-key"])
    def test_half_of_tls(self, tmp_path: Path, option: str) -> None:
        """What Envoy would show where nobody asked for TLS is not passed over."""
        config = configuration(tmp_path, [1, 2, 3, 4])

        result = run("envoy-config", "--config", str(config), option, "x.pem")

        rule = "--tls-certificate and --tls-key need --tls-ca"
        assert result.stderr == f"{rule}: the signers of the service's certificate\n"
        assert result.exit_code == 2

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"certificate": "pair.pem"}, "--tls-certificate and --tls-key need --tls-ca: "),
            (
                {"ca": "ca.pem", "key": "pair.pem"},
                "--tls-certificate and --tls-key need each other",
            ),
            ({"ca": "none.pem"}, "none.pem: No such file or directory\n"),
            ({"ca": "empty.pem"}, "a file is not PEM, or not of the expected kind\n"),
            ({"ca": "ca.pem", "certificate": "ca.pem", "key": "pair.pem"}, "does not match"),
            ({"ca": "ca.pem"}, "top needs a terminal"),
            (
                {"ca": "ca.pem", "certificate": "pair.pem", "key": "pair.pem"},
                "top needs a terminal",
            ),
        ],
        ids=str,
    )
    def test_tls_of_top(self, tmp_path: Path, options: dict[str, str], words: str) -> None:
        """Files that are of no use are named before the screen is taken."""
        authority = Authority()
        (tmp_path / "ca.pem").write_bytes(authority.pem)
        (tmp_path / "pair.pem").write_bytes(b"".join(authority.issue()))
        (tmp_path / "empty.pem").write_bytes(b"")

        given = [(f"--tls-{name}", str(tmp_path / file)) for name, file in options.items()]
        result = run("top", *(word for pair in given for word in pair))

        assert words in result.stderr
        assert result.exit_code == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "arguments", [["check-config"], ["envoy-config", "--config"]], ids=lambda words: words[0]
    )
    def test_full_disk(self, tmp_path: Path, arguments: list[str]) -> None:
        """Where what is said cannot be written, that is one line, and status 2."""
        config = configuration(tmp_path, [1, 2, 3, 4])
        command = [sys.executable, "-m", "flowcontrol_server", *arguments, str(config)]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
            )

        words = "standard output cannot be written: No space left on device\n"
        said = [line for line in done.stderr.splitlines(keepends=True) if "warning:" not in line]
        assert (said, done.returncode) == ([words], 2)


class TestWhichFile:
    """Where several files are read, a mistake is said of the one it is in."""

    def test_diff_config(self, tmp_path: Path) -> None:
        """The first of two that has a mistake is named."""
        good = configuration(tmp_path, [1, 2, 3, 4])
        bad = tmp_path / "bad.yaml"
        bad.write_text(f"{good.read_text()}colour: red\n")

        for pair in ((good, bad), (bad, good)):
            result = run("diff-config", *map(str, pair))

            assert result.stderr == f"{bad}: colour is not a known setting\n"
            assert result.exit_code == 2

    def test_compare(self, tmp_path: Path) -> None:
        """Of two scenarios, too."""
        scenario = Path(__file__).parents[2] / "scenarios" / "scale-from-zero.yaml"
        other = tmp_path / "other.yaml"
        other.write_text("apiVersion: flowcontrol/v1alpha1\nkind: Scenario\ncolour: red\n")

        result = run("simulate", str(scenario), "--compare", str(other))

        assert f"{other}: colour is not a known setting" in result.stderr.splitlines()
        assert result.exit_code == 2


class TestSimulate:
    """`flowcontrol simulate`."""

    @pytest.mark.slow
    def test_shipped_scenario(self, tmp_path: Path) -> None:
        """The seed first, then the figures; picture and transcript where they were asked for."""
        scenario = Path(__file__).parents[2] / "scenarios" / "scale-from-zero.yaml"

        result = run("simulate", str(scenario), "--seed", "7", "--output", str(tmp_path))

        assert result.exit_code == 0
        assert result.stdout.startswith("seed 7\n")
        assert "times faster than real time" in result.stdout
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".txt"]

    def test_mistake(self, tmp_path: Path) -> None:
        """A scenario's mistakes are told as a configuration's are."""
        scenario = tmp_path / "scenario.yaml"
        scenario.write_text("apiVersion: flowcontrol/v1alpha1\nkind: Scenario\ncolour: red\n")

        result = run("simulate", str(scenario), "--output", str(tmp_path))

        assert result.exit_code == 2
        assert "colour is not a known setting" in result.stderr

    def test_no_folder(self, tmp_path: Path) -> None:
        """What the result cannot be put into is named."""
        scenario = Path(__file__).parents[2] / "scenarios" / "scale-from-zero.yaml"
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "x"

        result = run("simulate", str(scenario), "--output", str(output))

        assert result.stderr == f"{output}: Not a directory\n"
        assert result.exit_code == 2
