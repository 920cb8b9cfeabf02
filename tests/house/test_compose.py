"""Dockerfile and docker-compose.yaml, as far as they can be judged without Docker."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from flowcontrol_server.cli import main
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.common.units import parse_duration
from flowcontrol_server.config.settings import Listen, Settings, load_settings
from hatch_build import COMPILE_NEEDS
from tests.support.dockerfile import arguments_of, copied

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SETTINGS_FILE = ROOT / "envoy" / "compose" / "flowcontrol.yaml"
ENVOY_FILE = ROOT / "envoy" / "compose" / "envoy.yaml"
CONTAINER_CONFIG = "/etc/flowcontrol/flowcontrol.yaml"
EACH_SERVICE = pytest.mark.parametrize("name", SERVICES)


def parse(command: Iterable[str]) -> dict[str, Any]:
    """Read a command as the command line does, without running it."""
    context = click.Context(main, info_name="flowcontrol", **main.context_settings)
    name, subcommand, rest = main.resolve_command(context, list(command))
    assert isinstance(subcommand, click.Command)
    with subcommand.make_context(name, rest, parent=context) as parsed:
        return {"command": name, **parsed.params}


def on_the_host(service: dict[str, Any], path: Path) -> Path:
    """Return the file of the checkout that a container sees at this path."""
    volumes: list[str] = service.get("volumes", [])
    for volume in volumes:
        source, target, *_ = volume.split(":")
        if path.is_relative_to(target):
            return ROOT / source / path.relative_to(target)
    raise AssertionError(path)


def seconds(text: str) -> float:
    """Return a duration of Compose in seconds."""
    duration_ns = parse_duration(text)
    assert duration_ns is not None
    return duration_ns / 1e9


@pytest.fixture(name="settings")
def _settings() -> Settings:
    """The service's settings in Compose."""
    return load_settings(SETTINGS_FILE)


class TestCompose:
    """docker-compose.yaml, service by service."""

    def test_schema(self) -> None:
        """It follows the Compose specification."""
        pytest.importorskip("check_jsonschema", reason="brings the specification's schema")
        path = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"

        jsonschema.validate(COMPOSE, json.loads(path.read_text()))

    @EACH_SERVICE
    def test_unprivileged(self, name: str) -> None:
        """Each service can write nothing, and do no more than a user."""
        service = SERVICES[name]

        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("user") == (None if "build" in service else "envoy")

    @EACH_SERVICE
    def test_dependencies_are_healthy(self, name: str) -> None:
        """What a service waits for has a health check here: podman's images have none."""
        for other, how in SERVICES[name].get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other]

    @EACH_SERVICE
    def test_mounts_exist(self, name: str) -> None:
        """Whatever is mounted is in the checkout, and cannot be written."""
        for volume in SERVICES[name].get("volumes", ()):
            source, _, mode = volume.split(":")
            assert (ROOT / source).exists()
            assert mode == "ro"

    @EACH_SERVICE
    def test_ports_are_local(self, name: str) -> None:
        """Nothing is published to other machines."""
        for port in SERVICES[name].get("ports", ()):
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)

    def test_published(self, settings: Settings) -> None:
        """The four ports people ask for are published, where somebody listens."""
        listen = settings.listen
        envoy = yaml.safe_load(ENVOY_FILE.read_text())
        (listener,) = envoy["static_resources"]["listeners"]
        ports = {
            "flowcontrol": [listen.grpc.port, listen.http.port],
            "envoy": [
                address["address"]["socket_address"]["port_value"]
                for address in (listener, envoy["admin"])
            ],
        }

        assert ports == {"flowcontrol": [9003, 9090], "envoy": [8080, 9901]}
        for name, expected in ports.items():
            published = [int(port.split(":")[-1]) for port in SERVICES[name]["ports"]]
            assert published == expected

    @pytest.mark.parametrize("name", [name for name in SERVICES if "build" in SERVICES[name]])
    def test_commands_are_ours(self, name: str) -> None:
        """The command line accepts each command."""
        parsed = parse(SERVICES[name]["command"])

        expected = "serve" if name == "flowcontrol" else "simulate-server"
        assert parsed["command"] == expected

    def test_configuration_is_found(self, settings: Settings) -> None:
        """The service finds its configuration and its objectives where they are mounted."""
        parsed = parse(SERVICES["flowcontrol"]["command"])
        path = on_the_host(SERVICES["flowcontrol"], parsed["config"])

        assert path.resolve() == SETTINGS_FILE
        mounted = parsed["config"].parent / "../objectives"
        folder = on_the_host(SERVICES["flowcontrol"], Path("/", *mounted.parts))
        assert settings.objectives.directory is not None
        assert folder.resolve() == settings.objectives.directory.resolve()

    def test_model_servers(self, settings: Settings) -> None:
        """The pool is the model servers of the file, each where it listens."""
        models = {name: parse(SERVICES[name]["command"]) for name in SERVICES if "model" in name}

        pool = tuple(Address(name, parsed["port"]) for name, parsed in models.items())
        assert settings.endpoints.static == pool
        for name, parsed in models.items():
            assert parsed["host"] == "0.0.0.0"
            assert f"http://127.0.0.1:{parsed['port']}/health" in str(SERVICES[name]["healthcheck"])

    def test_drain_is_awaited(self, settings: Settings) -> None:
        """Docker waits longer for the service than its drain takes."""
        grace_s = seconds(SERVICES["flowcontrol"]["stop_grace_period"])

        assert grace_s >= settings.flow_control.drain_budget / 1e9 + 10


class TestEnvoyFile:
    """envoy/compose/envoy.yaml is made, not written."""

    def test_in_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The command in its first line makes the rest of it."""
        monkeypatch.chdir(ROOT)
        first, _, rest = ENVOY_FILE.read_text().partition("\n")
        program, *command = shlex.split(first.removeprefix("# Made by: "))
        result = CliRunner().invoke(main, command, catch_exceptions=False)

        assert program == "flowcontrol"
        assert result.exit_code == 0
        assert result.output == rest, f"make it again: {first}"

    def test_service_is_found(self, settings: Settings) -> None:
        """Envoy finds the service by its name in Compose, at its port."""
        clusters = yaml.safe_load(ENVOY_FILE.read_text())["static_resources"]["clusters"]
        address = settings.listen.ext_proc
        for cluster in clusters[:2]:  # ext_proc, access_log
            (locality,) = cluster["load_assignment"]["endpoints"]
            (host,) = locality["lb_endpoints"]
            socket = host["endpoint"]["address"]["socket_address"]

            assert socket["address"] in SERVICES
            assert Address("0.0.0.0", socket["port_value"]) == address
            assert cluster["type"] == "STRICT_DNS"

    def test_is_mounted(self) -> None:
        """Envoy starts with it."""
        *_, path = SERVICES["envoy"]["command"]

        assert on_the_host(SERVICES["envoy"], Path(path)).resolve() == ENVOY_FILE


class TestDockerfile:
    """The image, read instruction by instruction."""

    def test_runs_as_a_user(self) -> None:
        """The last stage ends as a user, by number, and never becomes root again."""
        (user,) = arguments_of("USER")

        assert int(user) > 0

    def test_health_check(self) -> None:
        """Docker asks the service whether it is ready, where it listens by default."""
        (check,) = arguments_of("HEALTHCHECK")
        options, _, command = check.partition(" CMD ")
        program, *_, code = json.loads(command)

        assert "--start-period=" in options
        assert SERVICES["flowcontrol"]["healthcheck"]["test"] == ["CMD", *json.loads(command)]
        assert program == "python"
        assert f"http://127.0.0.1:{Listen().http.port}/readyz" in code
        compile(code, "healthcheck", "exec")

    def test_health_check_asks_no_proxy(self) -> None:
        """Docker gives each container the proxies of its client's settings; loopback is not there.

        So do the checks of docker-compose.yaml.
        """
        (check,) = arguments_of("HEALTHCHECK")
        codes = [json.loads(check.partition(" CMD ")[2])[-1]]
        checks = [service["healthcheck"]["test"] for service in SERVICES.values()]
        codes += [test[-1] for test in checks if test[1] == "python"]
        answers = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        Thread(target=answers.serve_forever, daemon=True).start()
        environment = {"http_proxy": "http://127.0.0.1:1"}
        outcomes = []
        with answers:
            for code in codes:
                here = re.sub(r"127\.0\.0\.1:\d+/\w+", f"127.0.0.1:{answers.server_port}/", code)
                command = (sys.executable, "-c", here)
                outcomes.append(subprocess.run(command, env=environment, check=False).returncode)
            answers.shutdown()

        assert len(codes) == 5
        assert outcomes == [0] * 5

    def test_can_compile(self) -> None:
        """It builds without isolation, and so installs itself what compiling needs."""
        words = " ".join(arguments_of("RUN", stage=0)).replace("'", " ").split()

        assert {need.partition(">")[0] for need in COMPILE_NEEDS} < set(words)

    def test_labels(self) -> None:
        """Whoever holds the image can tell what it is, and under which licence."""
        labels = dict(each.split("=", 1) for each in shlex.split(" ".join(arguments_of("LABEL"))))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

        prefix = "org.opencontainers.image."
        assert labels == {
            f"{prefix}title": project["name"],
            f"{prefix}description": project["description"],
            f"{prefix}licenses": project["license"],
            f"{prefix}version": project["version"],
            f"{prefix}revision": "$REVISION",
        }

    def test_command(self) -> None:
        """The image starts the service, with the configuration that is mounted."""
        (entry,), (command,) = arguments_of("ENTRYPOINT"), arguments_of("CMD")
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

        assert [*scripts] == json.loads(entry)
        parsed = parse(json.loads(command))
        assert (parsed["command"], parsed["config"]) == ("serve", Path(CONTAINER_CONFIG))

    def test_ports(self) -> None:
        """The ports it names are the defaults."""
        (ports,) = arguments_of("EXPOSE")
        listen = Listen()
        assert isinstance(listen.ext_proc, Address)

        assert [int(port) for port in ports.split()] == [
            listen.ext_proc.port,
            listen.grpc.port,
            listen.http.port,
        ]

    def test_context_is_enough(self) -> None:
        """.dockerignore lets through what is copied, and nothing else."""
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]

        assert "*" in lines
        assert sorted(allowed) == sorted(copied())
