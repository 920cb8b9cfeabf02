"""The configuration file: every mistake in its exact words, every value where it belongs.

Each file in bad_config/ makes one mistake and says in its first lines which words it expects.
"""

import os
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flowcontrol.config import (
    Auto,
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Detector,
    Fairness,
    Limits,
    Ordering,
    Picker,
    Role,
)
from flowcontrol_server.cli import main
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.difference import settings_hash
from flowcontrol_server.config.settings import Settings, load_policies, load_settings

BAD_CONFIGS = sorted((Path(__file__).parent / "bad_config").glob("*.yaml"))
EXAMPLE = Path(__file__).parents[3] / "envoy" / "flowcontrol.yaml"
SECOND = 1_000_000_000
MINIMAL = """\
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
objectives: {directory: .}
endpoints: {static: ["127.0.0.1:8000"]}
"""


def expected_lines(path: Path) -> list[str]:
    """The words that a bad configuration expects of check-config, after the name of the file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    comments = takewhile(lambda line: line.startswith("# expect: "), text.splitlines())
    lines = [line.removeprefix("# expect: ") for line in comments]
    return [
        (line if line.startswith("{file}:") else f"{{file}}: {line}")
        .replace("{file}", str(path))
        .replace("{folder}", str(path.parent))
        for line in lines
    ]


def check(path: Path) -> Result:
    """Run `flowcontrol check-config` on a file."""
    return CliRunner().invoke(main, ["check-config", str(path)], catch_exceptions=False)


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> Path:
    """A file that says no more than it must."""
    path = tmp_path / "flowcontrol.yaml"
    path.write_text(MINIMAL)
    return path


class TestBadConfig:
    """Every mistake has its words, on standard error, and exit status 2."""

    @pytest.mark.parametrize("path", BAD_CONFIGS, ids=lambda path: path.stem)
    def test_mistakes_are_named(self, path: Path) -> None:
        """Exactly the lines that the file itself expects are said, and nothing else."""
        expected = expected_lines(path)
        assert expected, "the file must begin with '# expect: ' lines"

        result = check(path)

        assert expected == result.stderr.splitlines()
        assert result.exit_code == 2
        assert not result.stdout

    def test_missing_file(self, tmp_path: Path) -> None:
        """A file that is not there is named with the system's reason."""
        path = tmp_path / "missing.yaml"

        result = check(path)

        assert result.stderr == f"{path}: cannot be read: No such file or directory\n"
        assert result.exit_code == 2

    def test_zero_bytes(self, config: Path) -> None:
        """A file without a byte is told what it must be."""
        config.write_bytes(b"")

        result = check(config)

        assert result.stderr == f"{config}: must be a mapping with apiVersion and kind\n"
        assert result.exit_code == 2

    def test_folder_in_place_of_a_file(self, tmp_path: Path) -> None:
        """A folder is no configuration."""
        result = check(tmp_path)

        assert "is a directory" in result.stderr
        assert result.exit_code == 2

    def test_control_character(self, config: Path) -> None:
        """A character that YAML forbids is reported against the file, on one line."""
        config.write_bytes(MINIMAL.encode() + b"\0")

        result = check(config)

        assert result.stderr.startswith(f"{config}: is not YAML: unacceptable character #x0000")
        assert "<unicode string>" not in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.exit_code == 2

    @pytest.mark.parametrize(
        "value",
        ["!!bool maybe", "0x_", "!!timestamp soon", "!!map [a]"],
    )
    def test_what_trips_the_yaml_reader(self, config: Path, value: str) -> None:
        """Text that the YAML library stumbles over is the file's mistake, not a traceback."""
        config.write_text(f"{MINIMAL}picker: {value}\n")

        result = check(config)

        assert result.stderr.startswith(f"{config}: is not YAML: ")
        assert result.exit_code == 2

    @pytest.mark.parametrize(
        ("where", "section"),
        [
            ("objectives.directory", "objectives: {directory: %s}"),
            ("objectives.api.file", "objectives: {api: {file: %s}}"),
            ("endpoints.file", "endpoints: {file: %s}"),
            ("kubernetes.kubeconfig", "kubernetes: {kubeconfig: %s}"),
            ("ledger.file", "ledger: {file: %s}"),
            ("admin", "admin: {tokenFile: %s}"),
            ("tls", "tls: {certificate: %s, key: %s}"),
        ],
    )
    def test_what_the_system_will_not_look_up(self, config: Path, where: str, section: str) -> None:
        """A path that the system refuses to look at is one mistake, with its reason."""
        name = section.partition(":")[0]
        kept = [line for line in MINIMAL.splitlines() if not line.startswith(name)]
        config.write_text("\n".join([*kept, section.replace("%s", "n" * 300)]))

        result = check(config)

        (line,) = result.stderr.splitlines()
        assert line.startswith(f"{config}: {where}")
        assert line.endswith("File name too long")
        assert result.exit_code == 2

    def test_pipe(self, tmp_path: Path) -> None:
        """A pipe is not waited for: it might never end."""
        path = tmp_path / "flowcontrol.yaml"
        os.mkfifo(path)

        result = check(path)

        assert result.stderr == f"{path}: cannot be read: not a regular file\n"
        assert result.exit_code == 2


class TestGoodConfig:
    """What is accepted."""

    def test_ok(self, config: Path) -> None:
        """A good file is confirmed by name, with exit status 0."""
        config.write_text(f"{MINIMAL}load: {{}}\n")
        (config.parent / "chat.yaml").write_text(
            "apiVersion: llm-d.ai/v1alpha2\nkind: InferenceObjective\nmetadata: {name: chat}\n"
            "spec: {poolRef: {name: llama}}\n"
        )
        result = check(config)

        assert result.stdout == f"{config}: ok, hash {settings_hash(load_settings(config))}\n"
        assert not result.stderr
        assert result.exit_code == 0

    def test_picker_off_needs_no_quotes(self, config: Path) -> None:
        """YAML reads a bare off as false; it still means off."""
        config.write_text(f"{MINIMAL}picker: off\n")

        assert load_settings(config).picker == "off"

    def test_merge_keys(self, config: Path) -> None:
        """YAML's anchors and merge keys may be used, as anywhere else."""
        bands = "[&batch {maxRequests: 5, fairness: global-strict}, {<<: *batch, maxRequests: 7}]"
        config.write_text(f"{MINIMAL}flowControl: {{bands: {bands}}}\n")

        band = load_settings(config).flow_control.bands[1]

        assert band.max_requests == 7
        assert band.fairness == "global-strict"

    def test_an_empty_pool(self, config: Path) -> None:
        """A pool may have no endpoint: everything waits."""
        config.write_text(MINIMAL.replace('["127.0.0.1:8000"]', "[]"))

        assert load_settings(config).endpoints.static == ()

    def test_roles_in_any_spelling(self, config: Path) -> None:
        """The role of an endpoint is found however its address is written."""
        given = 'endpoints: {static: ["[FD00:0::5]:80"], roles: {"[fd00::0:5]:080": prefill}}'
        lines = [line for line in MINIMAL.splitlines() if not line.startswith("endpoints")]
        config.write_text("\n".join([*lines, given]))

        assert load_settings(config).endpoints.role_of() == {"[fd00::5]:80": Role.PREFILL}

    def test_longest_patience(self, config: Path) -> None:
        """Budgets that together just fit into Envoy's hour are accepted."""
        config.write_text(f"{MINIMAL}flowControl: {{requestTTL: 60s, noEndpointTTL: 3510s}}\n")

        assert load_settings(config).longest_wait_ns == 3570 * SECOND


class TestObjectivesDirectory:
    """Where the objectives are looked for."""

    def test_relative_to_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A relative folder starts at the file, wherever the process was started."""
        (tmp_path / "etc" / "objectives").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        config = tmp_path / "etc" / "flowcontrol.yaml"
        config.write_text(MINIMAL.replace("directory: .", "directory: ./objectives"))
        monkeypatch.chdir(tmp_path / "elsewhere")

        settings = load_settings(Path("../etc/flowcontrol.yaml"))

        assert settings.objectives.directory is not None
        assert settings.objectives.directory.samefile(tmp_path / "etc" / "objectives")

    def test_absolute(self, tmp_path: Path) -> None:
        """An absolute folder is taken as it is."""
        folder = tmp_path / "objectives"
        folder.mkdir()
        config = tmp_path / "flowcontrol.yaml"
        config.write_text(MINIMAL.replace("directory: .", f"directory: {folder}"))

        assert load_settings(config).objectives.directory == folder


class TestDefaults:
    """What a file means that says no more than it must."""

    def test_settings(self, config: Path) -> None:
        """Every setting that is left out has its documented default."""
        settings = load_settings(config)

        listen = settings.listen
        assert listen.ext_proc == Address("127.0.0.1", 9002)
        assert listen.grpc == Address("127.0.0.1", 9003)
        assert listen.http == Address("127.0.0.1", 9090)
        assert settings.picker == "off"
        assert settings.requests.on_fault == "refuse"
        assert settings.flow_control.drain_budget == 30 * SECOND
        assert settings.requests.exempt_paths == (
            *("/health", "/healthz", "/ping", "/ready", "/version", "/metrics"),
            *("/v1/models", "/v1/models/*"),
            *("/", "/api/tags", "/api/ps", "/api/version"),
            *("/info", "/v2", "/v2/health/*", "/v2/models/*"),
            "POST /grpc.health.v1.Health/*",
            *(
                f"POST /inference.GRPCInferenceService/{name}"
                for name in ("ServerLive", "ServerReady", "ModelReady")
            ),
        )

    @pytest.mark.parametrize(
        ("written", "detector"),
        [
            ("{}", Auto()),
            ("{maxConcurrency: 5}", Concurrency(requests_max=5)),
            ("{maxTokenConcurrency: 9}", Concurrency(requests_max=64, tokens_max=9)),
        ],
    )
    def test_detector(self, config: Path, written: str, detector: Detector) -> None:
        """Limits find themselves, but for one that is set."""
        config.write_text(config.read_text() + f"saturation: {written}\n")

        assert load_settings(config).controller_config().detectors == (detector,)

    def test_engine(self, config: Path) -> None:
        """The engine is told the same defaults."""
        expected = ControllerConfig(
            limits=Limits(requests_max=20_000, bytes_max=4 * 1024**3),
            templates=(),
            default_settings=BandSettings(
                limits=Limits(requests_max=None, bytes_max=None),
                ttl_ns=60 * SECOND,
                fairness=Fairness.WEIGHTED_TOKENS,
                ordering=Ordering.FCFS,
            ),
            no_endpoint_ttl_ns=300 * SECOND,
            detectors=(Auto(),),
            ceilings=CeilingSettings(policy=Ceilings.RESERVE),
            picker=Picker.OFF,
        )

        assert expected == load_settings(config).controller_config()

    def test_band(self, config: Path) -> None:
        """A template that says nothing matches every band, limits nothing and waits as all do."""
        config.write_text(f"{MINIMAL}flowControl: {{requestTTL: 7s, bands: [{{}}]}}\n")

        templates = load_settings(config).controller_config().templates

        expected = (BandTemplate(settings=BandSettings(ttl_ns=7 * SECOND)),)
        assert expected == templates


FULL = """\
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: qwen
listen:
  extProc: unix:/run/flowcontrol.sock
  grpc: "[::1]:19003"
  http: gateway.example:19090
  maxConnections: 20
objectives: {directory: .}
endpoints: {static: ["[fd00::5]:8000", "10.0.0.7:65535"]}
picker: least-loaded
saturation: {detector: concurrency, maxConcurrency: 8}
flowControl:
  maxRequests: 20k
  maxBytes: unlimited
  requestTTL: 1m30s
  noEndpointTTL: 500ms
  drainBudget: 1.5s
  bands:
    - match: {minPriority: 10, maxPriority: 19}
      maxRequests: 0
      maxBytes: 1Ki
      requestTTL: 5m
      fairness: global-strict
    - match: {minPriority: 15}
      maxRequests: unlimited
    - match: {maxPriority: -1}
      maxBytes: 0
requests:
  exemptPaths: [/live, /static/*]
  onFault: continue
"""


class TestValues:
    """What a file means that says everything."""

    @pytest.fixture(name="settings")
    def _settings(self, config: Path) -> Settings:
        """A file in which every setting differs from its default."""
        config.write_text(FULL)
        return load_settings(config)

    def test_addresses(self, settings: Settings) -> None:
        """IPv4, IPv6 and names are split into host and port, and written as they were read."""
        listen = settings.listen
        assert listen.ext_proc == Path("/run/flowcontrol.sock")
        assert listen.grpc == Address("::1", 19003)
        assert listen.http == Address("gateway.example", 19090)
        assert settings.endpoints.static == (
            Address("fd00::5", 8000),
            Address("10.0.0.7", 65535),
        )
        dumped = listen.model_dump()
        assert dumped == {
            "ext_proc": "unix:/run/flowcontrol.sock",
            "grpc": "[::1]:19003",
            "http": "gateway.example:19090",
            "connections_max": 20,
            "secret_file": None,
        }

    def test_engine(self, settings: Settings) -> None:
        """Units are taken off, words become choices, templates keep the order of the file."""
        own = BandSettings(ttl_ns=90 * SECOND)
        first = BandSettings(
            limits=Limits(requests_max=0, bytes_max=1024),
            ttl_ns=300 * SECOND,
            fairness=Fairness.GLOBAL_STRICT,
        )
        expected = ControllerConfig(
            limits=Limits(requests_max=20_000, bytes_max=None),
            templates=(
                BandTemplate(priority_min=10, priority_max=19, settings=first),
                BandTemplate(priority_min=15, settings=own),
                BandTemplate(priority_max=-1, settings=replace(own, limits=Limits(bytes_max=0))),
            ),
            default_settings=own,
            no_endpoint_ttl_ns=SECOND // 2,
            detectors=(Concurrency(requests_max=8),),
            picker=Picker.LEAST_LOADED,
        )

        assert expected == settings.controller_config()

    @pytest.mark.parametrize(
        ("priority", "requests_max", "bytes_max"),
        [
            *((10, 0, 1024), (15, 0, 1024), (19, 0, 1024), (20, None, None)),
            *((9, None, None), (0, None, None), (-1, None, 0), (-7, None, 0)),
        ],
    )
    def test_first_template_counts(
        self, settings: Settings, priority: int, requests_max: int | None, bytes_max: int | None
    ) -> None:
        """A band takes the first template that matches; both ends of a range are included."""
        expected = Limits(requests_max=requests_max, bytes_max=bytes_max)

        assert expected == settings.controller_config().settings_for(priority).limits

    def test_the_rest(self, settings: Settings) -> None:
        """What the engine need not know is kept for the service."""
        assert settings.pool == "qwen"
        assert settings.flow_control.drain_budget == 1_500_000_000
        assert settings.requests.exempt_paths == ("/live", "/static/*")
        assert settings.requests.on_fault == "continue"

    def test_position_needs_forecasts(self, config: Path) -> None:
        """Every wait is forecast only where a response header says its position."""
        config.write_text(f"{MINIMAL}requests: {{responseHeaders: [position]}}\n")
        told = load_settings(config).controller_config()
        config.write_text(f"{MINIMAL}requests: {{responseHeaders: [headroom]}}\n")

        assert told.forecasts
        assert not load_settings(config).controller_config().forecasts
        assert load_policies(config) == load_settings(config).controller_config()

    def test_longest_wait(self, settings: Settings) -> None:
        """A request can be parked for its band's budget and then for the empty pool's."""
        assert settings.longest_wait_ns == 300 * SECOND + SECOND // 2


class TestExample:
    """envoy/flowcontrol.yaml, which people copy."""

    def test_it_loads(self) -> None:
        """The example is a good configuration."""
        settings = load_settings(EXAMPLE)

        config = settings.controller_config()
        assert settings.pool == "llama"
        assert len(settings.endpoints.written) == 3
        assert settings.objectives.directory == EXAMPLE.parent / "objectives"
        assert config.detectors == (Auto(),)
        assert config.settings_for(10).limits == Limits(requests_max=5000)
        assert config.settings_for(0) == config.default_settings
        assert config.settings_for(-1).ttl_ns == 600 * SECOND
