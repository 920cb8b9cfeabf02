"""Envoy's configuration: the one made by hand, the one of Compose, and what `bootstrap` makes."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.addresses import Address, parse_address
from flowcontrol_server.common.extras import install
from flowcontrol_server.config.difference import differences
from flowcontrol_server.config.settings import Settings, load_settings
from flowcontrol_server.requests.classify import READ_HEADERS
from flowcontrol_server.requests.codec import ENGINE_HEADERS
from flowcontrol_server.requests.dialects import content_type_of, dialect_of, error_body
from flowcontrol_server.requests.replies import UNREACHABLE
from flowcontrol_server.tools.envoy.binary import envoy_binary
from flowcontrol_server.tools.envoy.config import EnvoyOptions, bootstrap
from flowcontrol_server.tools.envoy.filters import greater_than

ENVOY = Path(__file__).parents[3] / "envoy"
BY_HAND = ENVOY / "envoy.yaml", ENVOY / "flowcontrol.yaml"
COMPOSE = ENVOY / "compose" / "envoy.yaml", ENVOY / "compose" / "flowcontrol.yaml"
FILES = pytest.mark.parametrize(
    ("envoy_file", "settings_file"), [BY_HAND, COMPOSE], ids=["by-hand", "compose"]
)
CLOCKS = frozenset({"stream_idle_timeout", "request_timeout", "max_stream_duration"})
"""Envoy's clocks that run while a request is parked; `idle_timeout` is one on a route alone."""
pytestmark = pytest.mark.slow


STATIC = "10.0.0.5:8000"
SERVERS = "model_servers"
_WEBSOCKET = "'exact': 'websocket'"


def settings_with(*static: str, picker: str = "off", **sections: Any) -> Settings:
    """Settings for a pool of these endpoints."""
    return Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"directory": "."},
            "endpoints": {"static": static},
            "picker": picker,
            **sections,
        }
    )


def generated(settings: Settings, options: EnvoyOptions | None = None) -> dict[str, Any]:
    """What `bootstrap` makes, read back."""
    return parsed(bootstrap(settings, options or EnvoyOptions()))


def parsed(text: str) -> dict[str, Any]:
    """Plain YAML of a configuration."""
    content = yaml.safe_load(text)
    assert isinstance(content, dict)
    return content


def typed(configuration: dict[str, Any]) -> object:
    """The same as messages, where 1 equals 1.0 and 0.5s equals 0.500s."""
    # Not at the top: there it would come before tools.envoy.config, which calms its warnings.
    from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap  # noqa: PLC0415 - takes seconds

    return Bootstrap.from_dict(configuration)


def all_settings(node: object, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every setting with the names of the settings it stands in."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield (*path, name), value
            yield from all_settings(value, *path, name)
    elif isinstance(node, list):
        for value in node:
            yield from all_settings(value, *path)


def the_only(configuration: object, name: str) -> Any:
    """The one setting of that name."""
    (value,) = [value for path, value in all_settings(configuration) if path[-1] == name]
    return value


def manager_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The HTTP connection manager's settings."""
    (chain,) = the_only(configuration, "filter_chains")
    manager: dict[str, Any] = chain["filters"][0]["typed_config"]
    return manager


def filter_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """The ext_proc filter's settings."""
    (config,) = [
        value["typed_config"]
        for value in manager_of(configuration)["http_filters"]
        if value["name"] == "envoy.filters.http.ext_proc"
    ]
    assert isinstance(config, dict)
    return config


def cluster_of(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    """One cluster's settings."""
    (cluster,) = [
        each for each in configuration["static_resources"]["clusters"] if each["name"] == name
    ]
    assert isinstance(cluster, dict)
    return cluster


def addresses_of(node: object) -> list[Address | Path]:
    """All addresses of sockets within, and paths of Unix sockets."""
    return [
        Path(value["path"])
        if path[-1] == "pipe"
        else Address(value["address"], value["port_value"])
        for path, value in all_settings(node)
        if path[-1] in {"socket_address", "pipe"}
    ]


def nanoseconds(text: str) -> int:
    """A duration as protobuf's JSON writes it."""
    duration = duration_pb2.Duration()
    duration.FromJsonString(text)
    return duration.ToNanoseconds()


def impatience(configuration: dict[str, Any], longest_wait_ns: int) -> list[str]:
    """What of Envoy would end a wait before the service does, in any way ENVOY.md C knows."""
    settings = list(all_settings(configuration))
    clocks = {
        ".".join(path[-2:]): nanoseconds(value)
        for path, value in settings
        if path[-1] in CLOCKS or path[-2:] == ("route", "idle_timeout")
    }
    if not any(name.endswith("stream_idle_timeout") for name in clocks):
        clocks["stream_idle_timeout, by default"] = nanoseconds("300s")
    short = [name for name, value in clocks.items() if 0 < value <= longest_wait_ns]
    if nanoseconds(filter_of(configuration).get("message_timeout", "0.2s")) <= longest_wait_ns:
        short.append("message_timeout")
    return short


class TestPatience:
    """A wait ends by our decision, never by Envoy's impatience."""

    @FILES
    def test_files(self, envoy_file: Path, settings_file: Path) -> None:
        """In the files people copy, no clock of Envoy's is shorter than the longest wait."""
        longest_wait_ns = load_settings(settings_file).longest_wait_ns

        assert impatience(parsed(envoy_file.read_text()), longest_wait_ns) == []

    @pytest.mark.parametrize(
        "queue",
        [
            {},
            {"requestTTL": "1ms", "noEndpointTTL": "1ms"},
            {"requestTTL": "1h", "noEndpointTTL": "1ms"},
            {"requestTTL": "1234567ns", "noEndpointTTL": "1ns"},
            {"requestTTL": "1770s", "noEndpointTTL": "1800s"},
            {"bands": [{"requestTTL": "50m"}]},
        ],
    )
    def test_generated(self, queue: dict[str, Any]) -> None:
        """Whatever wait the settings allow, Envoy waits longer."""
        try:
            settings = settings_with(flowControl=queue)
        except ValueError:
            assert queue["requestTTL"] == "1h", "only what Envoy cannot wait for is refused"
            return

        assert impatience(generated(settings), settings.longest_wait_ns) == []

    @pytest.mark.parametrize(
        ("place", "setting"),
        [
            ("hcm", {"stream_idle_timeout": "300s"}),
            ("hcm", {"request_timeout": "60s"}),
            ("hcm", {"common_http_protocol_options": {"max_stream_duration": "600s"}}),
            ("route", {"idle_timeout": "15s"}),
            ("ext_proc", {"message_timeout": "900s"}),
        ],
    )
    def test_impatience_is_seen(self, place: str, setting: dict[str, Any]) -> None:
        """Each of the clocks that run while a request is parked would be found too short."""
        configuration = parsed(BY_HAND[0].read_text())
        match place:
            case "hcm":
                manager_of(configuration).update(setting)
            case "route":
                the_only(configuration, "routes")[0]["route"] |= setting
            case _:
                filter_of(configuration).update(setting)

        (seen,) = impatience(configuration, load_settings(BY_HAND[1]).longest_wait_ns)

        (name, value), *_ = setting.items()
        assert seen.split(".")[-1] == (next(iter(value)) if isinstance(value, dict) else name)

    def test_defaults_are_impatient(self) -> None:
        """Leaving the clocks out does not help: Envoy's defaults are short."""
        configuration = parsed(BY_HAND[0].read_text())
        del manager_of(configuration)["stream_idle_timeout"]
        del filter_of(configuration)["message_timeout"]

        seen = impatience(configuration, load_settings(BY_HAND[1]).longest_wait_ns)

        assert seen == ["stream_idle_timeout, by default", "message_timeout"]


def changed(where: str, value: Any) -> Settings:
    """Settings in which one differs from `settings_with(STATIC)`, and what it needs beside it."""
    section, _, name = where.partition(".")
    sections: dict[str, Any] = {section: {name: value} if name else value}
    if where == "endpoints.roles":
        sections["endpoints"]["static"] = [STATIC]
    if where in {"pickerFallbacks", "requests.conformance"}:
        sections["picker"] = "least-loaded"
    return settings_with(**{"endpoints": {"static": [STATIC]}, **sections})


class TestChanges:
    """What a change of the settings says of Envoy's configuration."""

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("pool", "qwen"),
            ("listen.extProc", "127.0.0.1:9012"),
            ("traces.exporter", "otlp"),
            ("availability.election", "kubernetes"),
            ("picker", "least-loaded"),
            ("pickerFallbacks", 1),
            ("endpoints.static", ["10.0.0.6:8000"]),
            ("endpoints.dns", {"names": ["vllm.test:8000"]}),
            ("flowControl.maxRequests", 50_000),
            ("flowControl.requestTTL", "90s"),
            ("flowControl.noEndpointTTL", "90s"),
            ("flowControl.bands", [{"requestTTL": "90s"}]),
            ("requests.exemptPaths", ["/echo"]),
            ("requests.exemptWithoutGate", False),
            ("requests.onFault", "continue"),
            ("requests.rules", [{"objectiveFrom": "header:x-tier"}]),
            ("requests.trustEngineHeaders", True),
            ("requests.websockets", True),
            ("requests.inputTokensFrom", "header:x-tokens"),
            ("requests.readBodies", False),
            ("requests.readBodiesUpTo", "1Mi"),
            ("requests.responseHeaders", ["headroom"]),
            ("requests.conformance", True),
            ("settlement.accessLog", False),
            ("settlement.tokenUsage", False),
        ],
    )
    def test_in_envoy(self, where: str, value: Any) -> None:
        """What would be generated differs, and that is said."""
        before, after = settings_with(STATIC), changed(where, value)

        assert bootstrap(after, EnvoyOptions()) != bootstrap(before, EnvoyOptions())
        said = [str(each) for each in differences(before, after)]
        assert any("generate Envoy's configuration again" in each for each in said), said

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("endpoints.roles", {STATIC: "prefill"}),
            ("load", {}),
            ("saturation.maxConcurrency", 3),
            ("flowControl.maxBytes", "1Gi"),
            ("flowControl.drainBudget", "90s"),
            ("flowControl.bands", [{"maxRequests": 7}]),
            ("flowControl.ceilings", {"policy": "static"}),
            ("flowControl.weights", {"team-a": 2}),
            ("flowControl.reclaim", {"mode": "any-time"}),
            ("requests.trustHeaders", False),
            ("requests.enginePriority", "vllm"),
            ("requests.unseenHold", "5s"),
            ("settlement.lostAfter", "5s"),
            ("metrics.referenceNames", True),
        ],
    )
    def test_in_the_service_alone(self, where: str, value: Any) -> None:
        """Envoy's configuration stays as it is."""
        before, after = settings_with(STATIC), changed(where, value)

        assert bootstrap(after, EnvoyOptions()) == bootstrap(before, EnvoyOptions())
        said = [str(each) for each in differences(before, after)]
        assert said
        assert not any("Envoy" in each for each in said), said


class TestByHand:
    """envoy/envoy.yaml is for reading, `bootstrap` for making: they must not drift apart."""

    def test_same_as_generated(self) -> None:
        """By hand or made for the same settings: the same configuration."""
        by_hand = typed(parsed(BY_HAND[0].read_text()))

        assert typed(generated(load_settings(BY_HAND[1]))) == by_hand

    def test_every_setting_has_a_reason(self) -> None:
        """Comments stand between the settings, at least one for every four lines."""
        before, _, script = BY_HAND[0].read_text().partition("inline_string: |\n")
        after = script[script.index("- name: envoy.filters.http.router") :]
        lines = [line.strip() for line in (before + after).splitlines() if line.strip()]
        comments = [line for line in lines if line.startswith("#")]

        assert len(lines) < 4 * len(comments)


class TestDenials:
    """What clients get from Envoy while this service is gone."""

    @pytest.mark.parametrize("content_type", ["application/json", "application/grpc+proto"])
    @pytest.mark.parametrize("query", ["", "?x=/v1/messages", "?x=:countTokens"])
    def test_in_the_same_words(self, query: str, content_type: str) -> None:
        """Envoy knows the API of each request as this service does."""
        local_replies = manager_of(parsed(BY_HAND[0].read_text()))["local_reply_config"]
        paths = (
            *(
                "/v1/chat/completions",
                "/v1/messages",
                "/x/v1/messages/count_tokens",
                "/v1/messagesx",
            ),
            *(
                "/api/chat",
                "/api/",
                "/api",
                "/api/v1/chat/completions",
                "/v2",
                "/v2/",
                "/v2/health",
            ),
            *("/v2beta", "/v1beta/models/a/b:generateContent", "/v1/models/a:predict"),
            "/countTokens",
        )
        said = [said_by_envoy(local_replies, path + query, content_type) for path in paths]

        assert said == [said_by_service(path, content_type) for path in paths]


def said_by_envoy(local_replies: dict[str, Any], path: str, content_type: str) -> tuple[str, str]:
    """What Envoy answers where it denies a request: content type and body."""
    headers = {":path": path, "content-type": content_type}
    body = next(
        mapper["body_format_override"]
        for mapper in local_replies["mappers"]
        if all(
            re.fullmatch(each["string_match"]["safe_regex"]["regex"], headers[each["name"]])
            for each in headers_asked(mapper["filter"])
        )
    )
    return body["content_type"], body["text_format_source"]["inline_string"]


def headers_asked(condition: dict[str, Any]) -> list[dict[str, Any]]:
    """The conditions on headers in the filter of a local reply."""
    parts = condition.get("and_filter", {}).get("filters", [])
    return [each["header_filter"]["header"] for each in parts if "header_filter" in each]


def said_by_service(path: str, content_type: str) -> tuple[str, str]:
    """The same, where this service answers."""
    dialect = dialect_of(path, content_type)
    body = error_body(dialect, UNREACHABLE.status, UNREACHABLE.reason, UNREACHABLE.message)
    return content_type_of(dialect), body.decode()


class TestGate:
    """The settings that make Envoy's filter a gate."""

    @FILES
    def test_files(self, envoy_file: Path, settings_file: Path) -> None:
        """The files say what they decide, also where it is Envoy's default."""
        configuration = parsed(envoy_file.read_text())
        gate = filter_of(configuration)

        assert gate["failure_mode_allow"] is True
        assert gate["allow_mode_override"] is True
        assert gate["processing_mode"] == {
            "request_header_mode": "SEND",
            "request_body_mode": "NONE",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SKIP",
            "response_body_mode": "NONE",
            "response_trailer_mode": "SEND",
        }
        assert addresses_of(cluster_of(configuration, "model_servers")) == list(
            load_settings(settings_file).endpoints.written
        )

    def test_generated_says_the_same(self) -> None:
        """The filter is the same for every pool but for its patience."""
        files = [filter_of(parsed(envoy_file.read_text())) for envoy_file, _ in (BY_HAND, COMPOSE)]
        empty = filter_of(generated(settings_with()))

        assert empty["failure_mode_allow"] is True
        for each in (empty, *files):
            each.pop("message_timeout")
        assert files[1] == empty
        assert files[0]["processing_mode"] == empty["processing_mode"]

    @FILES
    def test_service_alone_limits(self, envoy_file: Path, settings_file: Path) -> None:
        """Envoy's own limits lie above what the service lets wait."""
        limit = load_settings(settings_file).flow_control.max_requests
        assert limit is not None
        configuration = parsed(envoy_file.read_text())

        for name in ("ext_proc", "model_servers"):
            (thresholds,) = the_only(cluster_of(configuration, name), "thresholds")
            assert all(value > limit for value in thresholds.values())
            assert {
                "max_connections",
                "max_pending_requests",
                "max_requests",
                "max_retries",
            } == set(thresholds)
        assert the_only(configuration, "max_outbound_frames") > limit

    def test_buffer(self) -> None:
        """The buffer holds a large prompt, or what the operator says."""
        options = EnvoyOptions(buffer_limit_bytes=64 * 2**20)
        name = "per_connection_buffer_limit_bytes"

        window = "initial_stream_window_size"
        assert the_only(generated(settings_with(), options), window) == 64 * 2**20
        assert the_only(generated(settings_with()), name) == 32 * 2**20
        assert the_only(generated(settings_with(), options), name) == 64 * 2**20


class TestAddresses:
    """Who listens where, and who is found where."""

    @pytest.mark.parametrize(
        ("listens", "found"),
        [
            ("0.0.0.0:9002", Address("127.0.0.1", 9002)),
            ("[::]:9002", Address("::1", 9002)),
            ("10.0.0.5:9002", Address("10.0.0.5", 9002)),
            ("[fd00::5]:9002", Address("fd00::5", 9002)),
            ("gate.example:9002", Address("gate.example", 9002)),
            ("unix:/run/door.sock", Path("/run/door.sock")),
        ],
    )
    def test_service_is_found(self, listens: str, found: Address | Path) -> None:
        """Envoy finds the service where it listens; every interface includes loopback."""
        configuration = generated(settings_with(listen={"extProc": listens}))

        for name in ("ext_proc", "access_log"):
            assert [found] == addresses_of(cluster_of(configuration, name))

    def test_door_is_off(self) -> None:
        """Without the port for Envoy it is served where everybody is, and reports to nobody."""
        configuration = generated(settings_with(listen={"extProc": "off"}))

        assert addresses_of(cluster_of(configuration, "ext_proc")) == [Address("127.0.0.1", 9003)]
        assert "access_log" not in {
            each["name"] for each in configuration["static_resources"]["clusters"]
        }
        assert "envoy.access_loggers.http_grpc" not in str(configuration)

    def test_options(self) -> None:
        """The operator's addresses go where they belong."""
        options = EnvoyOptions(
            listen=Address("::", 80), admin=Address("10.0.0.1", 81), ext_proc=Address("gate", 82)
        )
        configuration = generated(settings_with(), options)

        assert [Address("10.0.0.1", 81)] == addresses_of(configuration["admin"])
        (listener,) = configuration["static_resources"]["listeners"]
        assert [Address("::", 80)] == addresses_of(listener)
        assert [Address("gate", 82)] == addresses_of(cluster_of(configuration, "ext_proc"))

    @pytest.mark.parametrize(
        ("listens", "administers"),
        [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("10.0.0.1:80", "[::]:80"),
        ],
    )
    def test_in_each_others_way(self, listens: str, administers: str) -> None:
        """Envoy cannot have clients and its own pages at one address."""
        options = EnvoyOptions(listen=parse_address(listens), admin=parse_address(administers))
        rule = f"--listen and --admin must differ, got {listens} and {administers}"
        with pytest.raises(ConfigError) as caught:
            bootstrap(settings_with(), options)

        assert caught.value.problems == [rule]

    def test_side_by_side(self) -> None:
        """One port at two addresses of a machine is no matter."""
        options = EnvoyOptions(listen=Address("10.0.0.1", 80), admin=Address("127.0.0.1", 80))

        assert generated(settings_with(), options)

    @pytest.mark.parametrize(
        ("static", "discovery"),
        [
            ((), None),
            (("10.0.0.1:8000", "[fd00::1]:8000"), "STATIC"),
            (("10.0.0.1:8000", "model.example:8000"), "STRICT_DNS"),
        ],
    )
    def test_names_are_resolved(self, static: tuple[str, ...], discovery: str | None) -> None:
        """A single host name makes Envoy ask the DNS, IPv4 first."""
        cluster = cluster_of(generated(settings_with(*static)), "model_servers")

        assert cluster.get("type", "STATIC") == (discovery or "STATIC")
        assert ("dns_lookup_family" in cluster) == (discovery == "STRICT_DNS")
        assert len(static) == len(addresses_of(cluster))


class TestLimits:
    """What Envoy allows its clients."""

    def test_admin_reads(self) -> None:
        """At a port, Envoy's pages that change it are not served."""
        (allowed,) = generated(settings_with())["admin"]["allow_paths"]
        pages = re.compile(allowed["safe_regex"]["regex"])

        assert pages.fullmatch("/ready")
        assert pages.fullmatch("/stats/prometheus?usedonly")
        assert not pages.fullmatch("/quitquitquit")
        assert not pages.fullmatch("/ready/quitquitquit")
        assert not pages.fullmatch("/stats\n/quitquitquit")

    def test_admin_socket(self, tmp_path: Path) -> None:
        """At a Unix socket, which no browser reaches, all are."""
        options = EnvoyOptions(admin=tmp_path / "admin.sock")

        admin = generated(settings_with(), options)["admin"]

        assert admin == {"address": {"pipe": {"path": str(tmp_path / "admin.sock")}}}

    def test_admin_off(self) -> None:
        """Or there is no admin interface."""
        assert "admin" not in generated(settings_with(), EnvoyOptions(admin=None))

    @pytest.mark.parametrize(
        ("max_requests", "said", "expected"),
        [(20_000, None, 40_000), (10, None, 10_000), ("unlimited", None, 10_000), (10, 7, 7)],
    )
    def test_connections(self, max_requests: object, said: int | None, expected: int) -> None:
        """There is room for all that may wait, each on its own connection, and as many more."""
        settings = settings_with(flowControl={"maxRequests": max_requests})
        options = EnvoyOptions(connections_max=said, heap_bytes_max=2**30)
        configuration = generated(settings, options)

        assert the_only(configuration, "max_active_downstream_connections") == str(expected)
        assert the_only(configuration, "max_heap_size_bytes") == str(2**30)

    def test_trusted_engine_headers(self) -> None:
        """Where the operator trusts them, Envoy leaves the engines' headers alone."""
        name = "early_header_mutation_extensions"
        trusting = generated(settings_with(requests={"trustEngineHeaders": True}))

        assert the_only(generated(settings_with()), "mutations") == [
            {"remove": each} for each in ENGINE_HEADERS
        ]
        assert name not in {path[-1] for path, _ in all_settings(trusting)}


class TestFault:
    """What Envoy does while the service is gone."""

    def test_refuse(self) -> None:
        """Only what carries the mark passes; exempt requests without it, by their own route."""
        configuration = generated(settings_with(requests={"exemptPaths": ["/up", "POST /a.b*"]}))
        exempt = the_only(configuration, "routes")[:-1]
        expected = [
            ({"safe_regex": {"regex": "GET|HEAD|OPTIONS"}}, {"regex": "/up"}),
            ({"safe_regex": {"regex": "POST"}}, {"regex": r"/a\.b.*"}),
        ]

        assert the_only(configuration, "not_id")["sourced_metadata"]["metadata_matcher"] == {
            "filter": "flowcontrol",
            "path": [{"key": "admitted"}],
            "value": {"bool_match": True},
        }
        assert expected == [
            (the_only(each["match"], "headers")[0]["string_match"], each["match"]["safe_regex"])
            for each in exempt
        ]
        assert expected == [
            (method["header"]["string_match"], path["url_path"]["path"]["safe_regex"])
            for method, path in (
                each["and_rules"]["rules"] for each in the_only(configuration, "or_rules")["rules"]
            )
        ]

    def test_exempt_only_with_gate(self) -> None:
        """Exempt requests have no route of their own where they need the service."""
        settings = settings_with(requests={"exemptWithoutGate": False})

        assert len(the_only(generated(settings), "routes")) == 1

    def test_continue(self) -> None:
        """Everything passes: the filter behind ext_proc is left out, and its replies."""
        configuration = generated(settings_with(requests={"onFault": "continue"}))
        names = {path[-1] for path, _ in all_settings(configuration)}
        (reply,) = manager_of(configuration)["local_reply_config"]["mappers"]

        assert filter_of(configuration)["failure_mode_allow"] is True
        assert "envoy.filters.http.rbac" not in names
        assert reply["status_code"] == 431
        assert "rbac" not in TestReaders.filters(configuration)


class TestElection:
    """What Envoy does where one of several replicas decides."""

    def test_off(self) -> None:
        """A single replica is given time to start again; its log stream needs no more."""
        configuration = generated(settings_with("10.0.0.1:8000"))

        assert the_only(configuration, "retry_back_off")["base_interval"] == "0.500s"
        assert "health_checks" not in cluster_of(configuration, "access_log")
        assert "grpc_stream_retry_policy" not in dict(named(configuration))

    def test_on(self) -> None:
        """Streams of both kinds find the leader within half a second, and outlast a lease."""
        settings = settings_with(
            "10.0.0.1:8000",
            state={"valkey": {"url": "valkey://127.0.0.1"}},
            availability={"election": "valkey"},
        )
        configuration = generated(settings)
        found = dict(named(configuration))
        log, service = (cluster_of(configuration, name) for name in ("access_log", "ext_proc"))

        assert found["grpc_stream_retry_policy"] == found["retry_policy"]
        assert found["retry_policy"]["num_retries"] == 60
        assert found["retry_policy"]["retry_back_off"] == {
            "base_interval": "0.050s",
            "max_interval": "0.500s",
        }
        assert log["health_checks"] == service["health_checks"]
        assert log["health_checks"][0]["interval"] == "0.500s"


def named(configuration: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of calls to the service by their last name."""
    for path, value in all_settings(configuration):
        if path[-1] in {"grpc_stream_retry_policy", "retry_policy"} and "route" not in path:
            yield path[-1], value


class TestPicker:
    """Who chooses the endpoint."""

    def test_off(self) -> None:
        """Envoy chooses the server with the fewest requests, looking at all."""
        cluster = cluster_of(generated(settings_with("10.0.0.1:8000")), "model_servers")
        policy = the_only(cluster, "typed_extension_config")

        assert policy["name"] == "envoy.load_balancing_policies.least_request"
        assert policy["typed_config"]["selection_method"] == "FULL_SCAN"

    def test_least_loaded(self) -> None:
        """Envoy follows the service's choice, which comes as metadata that only it can set."""
        settings = settings_with("10.0.0.1:8000", "[fd00::1]:8000", picker="least-loaded")
        configuration = generated(settings)
        cluster = cluster_of(configuration, "model_servers")
        (policy,) = cluster["load_balancing_policy"]["policies"]
        override = policy["typed_extension_config"]["typed_config"]

        assert override["override_host_sources"] == [
            {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
        ]
        (fallback,) = override["fallback_policy"]["policies"]
        name = fallback["typed_extension_config"]["name"]
        assert name == "envoy.load_balancing_policies.round_robin"
        assert filter_of(configuration)["metadata_options"]["receiving_namespaces"] == {
            "untyped": ["envoy.lb", "flowcontrol"]
        }
        assert "outlier_detection" not in cluster

    @pytest.mark.parametrize("original_dst", [False, True])
    @pytest.mark.parametrize(
        ("http2", "expected"),
        [(False, {"http_protocol_options": {}}), (True, {"http2_protocol_options": {}})],
    )
    def test_protocol(
        self, *, original_dst: bool, http2: bool, expected: dict[str, dict[str, Any]]
    ) -> None:
        """HTTP/1.1, which every model server speaks, or HTTP/2, which gRPC needs."""
        options = EnvoyOptions(original_dst=original_dst, http2=http2)
        configuration = generated(settings_with("10.0.0.1:1", picker="least-loaded"), options)

        assert the_only(cluster_of(configuration, SERVERS), "explicit_http_config") == expected

    def test_other_attempts_are_asked_about(self) -> None:
        """Envoy asks the service before it sends a request to another endpoint than was picked."""
        configuration = generated(settings_with("10.0.0.1:8000", picker="least-loaded"))
        model_servers = cluster_of(configuration, "model_servers")
        delegate, codec = the_only(model_servers, "http_filters")
        asking = delegate["typed_config"]["extension_config"]["typed_config"]
        (host,) = manager_of(configuration)["route_config"]["virtual_hosts"]
        policies = [each["route"]["retry_policy"] for each in host["routes"]]

        assert the_only(delegate, "header_name") == "x-envoy-attempt-count"
        assert the_only(delegate, "value_match") == {"exact": "1"}
        assert codec["name"] == "envoy.filters.http.upstream_codec"
        assert "upstream.address" in asking["request_attributes"]
        assert asking["metadata_options"]["forwarding_namespaces"] == {"untyped": ["flowcontrol"]}
        assert asking["failure_mode_allow"] is True
        assert asking["message_timeout"] == filter_of(configuration)["message_timeout"]
        assert host["include_request_attempt_count"] is True
        assert {policy["num_retries"] for policy in policies} == {10}
        assert {policy["retry_host_predicate"][0]["name"] for policy in policies} == {
            "envoy.retry_host_predicates.previous_hosts"
        }

    def test_other_attempts_where_envoy_chooses(self) -> None:
        """Envoy counts for itself where it chooses; to the picked address it has no alternative."""
        off = generated(settings_with("10.0.0.1:8000"))
        by_address = generated(
            settings_with(picker="least-loaded"), EnvoyOptions(original_dst=True)
        )

        for configuration in (off, by_address):
            names = {
                path[-1] for path, _ in all_settings(cluster_of(configuration, "model_servers"))
            }
            assert "http_filters" not in names
        assert "outlier_detection" in cluster_of(off, "model_servers")

    def test_original_dst(self) -> None:
        """Or sends each request where the service says, known to Envoy or not, by metadata."""
        settings = settings_with(picker="least-loaded")
        configuration = generated(settings, EnvoyOptions(original_dst=True))
        cluster = cluster_of(configuration, "model_servers")

        assert cluster["type"] == "ORIGINAL_DST"
        assert cluster["lb_policy"] == "CLUSTER_PROVIDED"
        assert cluster["original_dst_lb_config"] == {
            "metadata_key": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}
        }
        assert "load_assignment" not in cluster

    @pytest.mark.parametrize(
        "endpoints", [{"kubernetes": {}}, {"dns": {"srv": ["_http._tcp.vllm.test"]}}]
    )
    @pytest.mark.parametrize("picker", ["off", "least-loaded"])
    def test_endpoints_that_only_the_service_knows(
        self, endpoints: dict[str, Any], picker: str
    ) -> None:
        """They need an Envoy that goes wherever it is told; another is not made."""
        settings = settings_with(picker=picker, endpoints=endpoints)

        with pytest.raises(ConfigError, match="need --original-dst, and with it picker"):
            bootstrap(settings, EnvoyOptions())
        if picker != "off":
            cluster = cluster_of(generated(settings, EnvoyOptions(original_dst=True)), SERVERS)
            assert cluster["type"] == "ORIGINAL_DST"

    def test_names(self) -> None:
        """Names that the service resolves Envoy resolves, too, beside the static addresses."""
        endpoints = {"static": ["10.0.0.5:8000"], "dns": {"names": ["vllm.test:8000"]}}
        cluster = cluster_of(generated(settings_with(endpoints=endpoints)), SERVERS)

        assert cluster["type"] == "STRICT_DNS"
        assert addresses_of(cluster) == [Address("10.0.0.5", 8000), Address("vllm.test", 8000)]

    def test_original_dst_without_picker(self) -> None:
        """Without a picker no address would be chosen."""
        rule = "picker must not be off with --original-dst: no address would be chosen"
        with pytest.raises(ConfigError, match=f"^{rule}$"):
            bootstrap(settings_with(), EnvoyOptions(original_dst=True))

    def test_original_dst_takes_one_address(self) -> None:
        """Such a cluster knows no list of addresses."""
        settings = settings_with(picker="least-loaded", pickerFallbacks=2)
        rule = "pickerFallbacks must be 0 with --original-dst, got 2"
        with pytest.raises(ConfigError, match=f"^{rule}$"):
            bootstrap(settings, EnvoyOptions(original_dst=True))

    def test_subset_is_forwarded(self) -> None:
        """With a picker the service is told which endpoints a request may go to."""
        forwarded = filter_of(generated(settings_with(picker="least-loaded")))["metadata_options"][
            "forwarding_namespaces"
        ]

        assert forwarded == {"untyped": ["envoy.lb.subset_hint", "flowcontrol.request"]}


def _regex_of(predicate: dict[str, Any]) -> str:
    """What the announced size must match."""
    regex: str = predicate["single_predicate"]["value_match"]["safe_regex"]["regex"]
    return regex


class TestReaders:
    """What Envoy reads of bodies and reports of requests."""

    @staticmethod
    def filters(configuration: dict[str, Any]) -> list[str]:
        """The last words of the filters' names, in order."""
        return [each["name"].rpartition(".")[2] for each in the_only(configuration, "http_filters")]

    @pytest.mark.parametrize(
        ("reads_bodies", "access_log", "token_usage", "expected"),
        [
            (True, True, True, ["match_delegate", "ext_proc", "rbac", "lua", "router"]),
            (True, True, False, ["match_delegate", "ext_proc", "rbac", "router"]),
            (True, False, True, ["match_delegate", "ext_proc", "rbac", "router"]),
            (False, True, True, ["ext_proc", "rbac", "lua", "router"]),
            (False, True, False, ["ext_proc", "rbac", "router"]),
            (False, False, False, ["ext_proc", "rbac", "router"]),
        ],
    )
    def test_as_wanted(
        self, *, reads_bodies: bool, access_log: bool, token_usage: bool, expected: list[str]
    ) -> None:
        """Each reader is there if somebody needs it, and what is read before ext_proc before it."""
        settings = settings_with(
            requests={"readBodies": reads_bodies},
            settlement={"accessLog": access_log, "tokenUsage": token_usage},
        )
        configuration = generated(settings)
        logs = [each["name"].rpartition(".")[2] for each in the_only(configuration, "access_log")]
        names = {path[-1] for path, _ in all_settings(configuration)}

        assert self.filters(configuration) == expected
        assert logs == (["stdout", "http_grpc"] if access_log else ["stdout"])
        assert ("request_rules" in names) is reads_bodies
        assert ("forwarding_namespaces" in names) is reads_bodies

    @pytest.mark.parametrize(("size", "bytes_max"), [(None, 65_536), ("20k", 20_000)])
    def test_small_bodies_alone(self, size: str | None, bytes_max: int) -> None:
        """Large requests pass the reader by."""
        requests = {} if size is None else {"readBodiesUpTo": size}
        configuration = generated(settings_with(requests=requests))

        assert self.filters(configuration)[:2] == ["match_delegate", "ext_proc"]
        read, held = the_only(configuration, "and_matcher")["predicate"]
        assert _regex_of(read) == greater_than(bytes_max)
        assert _regex_of(held["not_matcher"]) == greater_than(32 * 2**20)

    @pytest.mark.parametrize(
        "requests",
        [
            {"readBodiesUpTo": "unlimited"},
            {"rules": [{"match": {"body:model": "large"}, "objective": "chat"}]},
            {"inputTokensFrom": "body:max_tokens"},
        ],
    )
    def test_every_body(self, requests: dict[str, Any]) -> None:
        """While a rule asks for a fact of the body, no client evades it by its prompt's size."""
        configuration = generated(settings_with(requests=requests))

        assert self.filters(configuration)[0] == "json_to_metadata"

    def test_rules_and_a_size(self) -> None:
        """A size that is set holds for rules, too."""
        rule = {"match": {"body:model": "large"}, "objective": "chat"}
        requests = {"rules": [rule], "readBodiesUpTo": "64Ki"}

        assert self.filters(generated(settings_with(requests=requests)))[0] == "match_delegate"

    @pytest.mark.parametrize("size", ["64Ki", "unlimited"])
    def test_websockets(self, size: str) -> None:
        """Where they are let through, none is held for a body that it has not."""
        off, on = (
            generated(settings_with(requests={"readBodiesUpTo": size, "websockets": websockets}))
            for websockets in (False, True)
        )

        assert _WEBSOCKET not in str(the_only(off, "http_filters")[0])
        assert _WEBSOCKET in str(the_only(on, "http_filters")[0])
        assert self.filters(on)[0] == "match_delegate"

    @given(st.integers(1, 10**12), st.integers(0, 10**12))
    def test_greater(self, limit: int, size: int) -> None:
        """Envoy can compare no numbers, but their digits."""
        regex = greater_than(limit)

        assert (re.fullmatch(regex, str(size)) is not None) == (size > limit)
        assert re.fullmatch(regex, str(limit)) is None
        assert re.fullmatch(regex, str(limit + 1)) is not None

    def test_headers_that_are_read(self) -> None:
        """Envoy sends the headers that are read, and those that rules ask for; no others."""
        rule = {"match": {"header:X-Plan": "gold"}, "flowIdFrom": "header:x-org"}
        counted = {"inputTokensFrom": "header:x-prompt-tokens"}
        rules = the_only(
            generated(settings_with(requests={"rules": [rule], **counted})), "patterns"
        )

        asked = {"x-plan", "x-org", "x-prompt-tokens"}
        assert {each["exact"] for each in rules} == {*READ_HEADERS, *asked}

    def test_metadata_of_rules_is_forwarded(self) -> None:
        """What another filter has found, and a rule asks for, is passed on."""
        rule = {"flowIdFrom": "metadata:envoy.filters.http.jwt_authn:claims:org"}
        settings = settings_with(requests={"rules": [rule], "readBodies": False})

        assert the_only(generated(settings), "forwarding_namespaces") == {
            "untyped": ["envoy.filters.http.jwt_authn"]
        }

    def test_response_headers(self) -> None:
        """The headers that are wanted are made of our metadata, and no others."""
        settings = settings_with(requests={"responseHeaders": ["headroom"]})
        (option,) = the_only(generated(settings), "response_headers_to_add")

        assert option["header"] == {
            "key": "x-llm-d-flow-headroom",
            "value": "%DYNAMIC_METADATA(flowcontrol:headroom)%",
        }
        none = generated(settings_with(requests={"responseHeaders": []}))
        assert "response_headers_to_add" not in {path[-1] for path, _ in all_settings(none)}


class TestText:
    """What is written is for people, too."""

    def test_stable(self) -> None:
        """The same settings give the same text, names first."""
        settings = load_settings(BY_HAND[1])
        text = bootstrap(settings, EnvoyOptions())

        assert text == bootstrap(settings, EnvoyOptions())
        assert text.startswith(
            "# Envoy for pool 'llama'. envoy/envoy.yaml explains each setting.\n"
        )
        assert text.index("- name: ext_proc") < text.index("- name: model_servers")

    def test_pool_cannot_write_settings(self) -> None:
        """A pool's name, whatever it is, stays in the comment."""
        settings = settings_with().model_copy(update={"pool": "a\nadmin: b"})

        assert set(generated(settings)) == {
            *("admin", "overload_manager", "layered_runtime", "static_resources")
        }

    def test_missing_extra(self) -> None:
        """Without envoy-data-plane the error says what to install."""
        module = "flowcontrol_server.tools.envoy.config"
        code = f"import sys; sys.modules['betterproto2'] = None; import {module}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )

        assert done.returncode == 1
        last = f"FlowControlError: betterproto2 is missing: {install('envoy')}"
        assert done.stderr.splitlines()[-1].endswith(last)


@pytest.mark.e2e
class TestRealEnvoy:
    """Envoy itself accepts the configurations, without a warning but the one we know of."""

    @FILES
    def test_files(self, envoy_file: Path, settings_file: Path) -> None:
        """The files people copy are valid."""
        assert settings_file.exists()
        assert complaints(envoy_file) == []

    @pytest.mark.parametrize(
        ("static", "picker"),
        [
            *itertools.product(
                [(), ("10.0.0.1:8000", "10.0.0.2:8000"), ("[::1]:8000", "10.0.0.1:8000")],
                ["off", "least-loaded"],
            ),
            (("model.example:8000", "10.0.0.1:8000"), "off"),
        ],
    )
    def test_generated(self, tmp_path: Path, static: tuple[str, ...], picker: str) -> None:
        """So is what is made for any pool and picker."""
        path = tmp_path / "envoy.yaml"
        options = EnvoyOptions(Address("::", 80), Address("::1", 81), Address("gate.example", 82))
        for each in (EnvoyOptions(), options):
            path.write_text(bootstrap(settings_with(*static, picker=picker), each))
            assert complaints(path) == []

    @pytest.mark.parametrize(("reads_bodies", "token_usage"), [(True, False), (False, True)])
    def test_readers(self, tmp_path: Path, *, reads_bodies: bool, token_usage: bool) -> None:
        """So is each reader alone, and endpoints that Envoy does not know."""
        settings = settings_with(
            picker="least-loaded",
            requests={"readBodies": reads_bodies, "responseHeaders": ["headroom"]},
            settlement={"tokenUsage": token_usage},
        )
        path = tmp_path / "envoy.yaml"
        path.write_text(bootstrap(settings, EnvoyOptions(original_dst=True)))

        assert complaints(path) == []

    def test_mistakes_are_seen(self, tmp_path: Path) -> None:
        """A patience that Envoy does not have is refused."""
        path = tmp_path / "envoy.yaml"
        text = BY_HAND[0].read_text()
        path.write_text(text.replace("message_timeout: 930s", "message_timeout: 3601s"))

        assert complaints(path) != []


UNFINISHED = "marked as work-in-progress"
"""What Envoy says of the filter that reads streams; envoy.yaml says it too."""


def complaints(path: Path) -> list[str]:
    """What Envoy says against a configuration: errors, or warnings of deprecated settings."""
    done = subprocess.run(
        [envoy_binary(), "--mode", "validate", "--config-path", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    lines = done.stderr.splitlines()
    found = [
        line
        for line in lines
        if ("[warning]" in line and UNFINISHED not in line) or "[critical]" in line
    ]
    return found or ([] if done.returncode == 0 else lines)
