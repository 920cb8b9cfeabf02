"""The manifests of Envoy Gateway."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowcontrol.errors import ConfigError
from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.doors.tls import Tls
from flowcontrol_server.requests.codec import ENGINE_HEADERS
from flowcontrol_server.tools.envoy.config import EnvoyOptions
from flowcontrol_server.tools.envoy.gateway import GatewayNames, manifests

KUBERNETES = Path(__file__).parents[3] / "envoy" / "kubernetes"
TRANSLATED = Path(__file__).with_name("envoy_gateway_translated.yaml")
OPTIONS = EnvoyOptions(ext_proc=Address("flowcontrol", 9002))
NAMES = GatewayNames("models", "models", "http", "llama")
pytestmark = pytest.mark.slow


def settings_with(**sections: Any) -> Settings:
    """Settings for a pool of pods."""
    return Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"kubernetes": {}},
            "endpoints": {"kubernetes": {}},
            "picker": "least-loaded",
            **sections,
        }
    )


def made(settings: Settings, options: EnvoyOptions = OPTIONS) -> dict[str, dict[str, Any]]:
    """The specs that are made, by kind."""
    documents = yaml.safe_load_all(manifests(settings, options, NAMES))
    return {each["kind"]: each["spec"] for each in documents}


def patches(settings: Settings) -> list[tuple[str, Any]]:
    """Last name of each patch's path, empty for the filters before the router, and its value."""
    found = made(settings)["EnvoyPatchPolicy"]["jsonPatches"]
    operations = [each["operation"] for each in found]
    return [(each.get("path", "").rpartition("/")[2], each["value"]) for each in operations]


class TestManifests:
    """What is written for the service's settings."""

    def test_file(self) -> None:
        """The file people copy is what is made for the manifests beside it."""
        documents = yaml.safe_load_all((KUBERNETES / "flowcontrol.yaml").read_text())
        (config,) = [each["data"] for each in documents if each["kind"] == "ConfigMap"]
        content = yaml.safe_load(config["flowcontrol.yaml"])
        settings = Settings.model_validate(content, context={"is_elsewhere": True})

        expected = (KUBERNETES / "envoy-gateway.yaml").read_text()
        assert manifests(settings, OPTIONS, NAMES) == expected

    def test_timeouts(self) -> None:
        """No clock of Envoy's ends a wait or a response before the service does."""
        settings = settings_with(flowControl={"requestTTL": "90500ms", "noEndpointTTL": "600s"})
        specs = made(settings)
        clients = specs["ClientTrafficPolicy"]["timeout"]["http"]

        assert specs["EnvoyExtensionPolicy"]["extProc"][0]["messageTimeout"] == "721s"
        assert clients["requestReceivedTimeout"] == "1021s"
        assert clients["streamIdleTimeout"] == "3600s"
        assert specs["BackendTrafficPolicy"]["timeout"]["http"]["requestTimeout"] == "0s"

    def test_limits(self) -> None:
        """One body fits Envoy's buffer, over HTTP/2 as well; nothing but the queue is full."""
        options = EnvoyOptions(ext_proc=OPTIONS.ext_proc, buffer_limit_bytes=2**26)
        specs = made(settings_with(flowControl={"maxRequests": 30_000}), options)
        clients = specs["ClientTrafficPolicy"]

        assert clients["connection"] == {
            "bufferLimit": 2**26,
            "connectionLimit": {"value": 60_000},
        }
        assert clients["http2"]["initialStreamWindowSize"] == 2**26
        for each in (
            specs["BackendTrafficPolicy"],
            specs["EnvoyExtensionPolicy"]["extProc"][0]["backendSettings"],
        ):
            assert set(each["circuitBreaker"].values()) == {1_000_000_000}

    @pytest.mark.parametrize(("picker", "is_followed"), [("least-loaded", True), ("off", False)])
    def test_picker(self, picker: str, *, is_followed: bool) -> None:
        """The pick is followed where there is one."""
        balancer = made(settings_with(picker=picker))["BackendTrafficPolicy"]["loadBalancer"]

        assert ("endpointOverride" in balancer) == is_followed

    def test_engine_headers(self) -> None:
        """A client's own choice of server or priority is removed unless it is trusted."""
        early = made(settings_with())["ClientTrafficPolicy"]["headers"]["earlyRequestHeaders"]
        trusting = made(settings_with(requests={"trustEngineHeaders": True}))

        assert early == {"remove": list(ENGINE_HEADERS)}
        assert "headers" not in trusting["ClientTrafficPolicy"]

    def test_gate(self) -> None:
        """ext_proc fails open, and what has no mark of the service's is denied, on our route."""
        found = patches(settings_with())
        own = [value["name"] for path, value in found if path in {"", "0"} and "name" in value]
        behind = [value for path, value in found if path == "" and "disabled" in value]

        assert made(settings_with())["EnvoyExtensionPolicy"]["extProc"][0]["failOpen"] is True
        assert [each["name"] for each in behind] == ["flowcontrol.2.rbac", "flowcontrol.3.lua"]
        assert all(each["disabled"] for each in behind)
        enabled = [path for path, value in found if value == {"@type": FILTER, "config": {}}]
        assert enabled == [name for name in own if name.startswith("flowcontrol.")]
        assert ("response_trailer_mode", "SEND") in found
        statuses = [each["status_code"] for each in dict(found)["local_reply_config"]["mappers"]]
        assert statuses == [503, 503, 503, 503, 503, 431]

    def test_continue(self) -> None:
        """Where the operator prefers to serve ungated, nothing is denied."""
        found = patches(settings_with(requests={"onFault": "continue"}))

        (reply,) = dict(found)["local_reply_config"]["mappers"]
        assert reply["status_code"] == 431
        assert not any("rbac" in str(value) for _, value in found)

    def test_access_log(self) -> None:
        """Reports go to the Service's name in the cluster, where they are wanted."""
        (cluster,) = [v for _, v in patches(settings_with()) if "load_assignment" in str(v)]
        without = patches(settings_with(settlement={"accessLog": False}))

        assert "'address': 'flowcontrol.models.svc.cluster.local'" in str(cluster)
        assert not any("load_assignment" in str(value) for _, value in without)

    def test_tls(self) -> None:
        """TLS to the service is not written."""
        tls = Tls.model_construct(certificate=Path("cert.pem"), key=Path("key.pem"))
        settings = settings_with().model_copy(update={"tls": tls})
        with pytest.raises(ConfigError) as caught:
            made(settings)

        assert caught.value.problems == [
            "tls must be left out with --envoy-gateway, which needs a BackendTLSPolicy for it"
        ]

    def test_service_is_named(self) -> None:
        """Envoy Gateway has to be told the service's name."""
        with pytest.raises(ConfigError) as caught:
            made(settings_with(), EnvoyOptions())

        assert caught.value.problems == [
            "--envoy-gateway needs --ext-proc: name and port of flowcontrol's Service"
        ]

    @pytest.mark.parametrize("host", ["flowcontrol.models.svc", "10.0.0.5", "::1"])
    def test_service_by_its_name_alone(self, host: str) -> None:
        """A reference of Kubernetes is to an object: a domain name or an address is none."""
        with pytest.raises(ConfigError) as caught:
            made(settings_with(), EnvoyOptions(ext_proc=Address(host, 9002)))

        (problem,) = caught.value.problems
        assert problem.startswith("--ext-proc must name a Service of namespace models with ")

    def test_route(self) -> None:
        """Left out, it is the pool's name, which need not be one of Kubernetes."""
        with pytest.raises(ConfigError) as caught:
            manifests(settings_with(), OPTIONS, replace(NAMES, route="Llama 3"))

        assert caught.value.problems == ["--route must be the name of an HTTPRoute, got 'Llama 3'"]


def texts(content: Any) -> set[str]:
    """All texts in a document that are no keys."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return set().union(*map(texts, content))
    return {content} if isinstance(content, str) else set()


class TestTranslated:
    """What Envoy Gateway 1.9.0 made of the file people copy: every patch found its place."""

    def test_in_step(self) -> None:
        """It was made of the file as it is: it has every text of its patches."""
        documents = yaml.safe_load_all((KUBERNETES / "envoy-gateway.yaml").read_text())
        (patched,) = [each["spec"] for each in documents if each["kind"] == "EnvoyPatchPolicy"]
        values = [each["operation"]["value"] for each in patched["jsonPatches"]]
        missing = texts(values) - texts(yaml.safe_load(TRANSLATED.read_text()))

        assert not missing, f"make it again, as its first lines say: {missing}"

    def test_filters(self) -> None:
        """The gate stands in order: bodies are read before it, denial is right behind it."""
        text = TRANSLATED.read_text()
        names = (
            "- disabled: true\n.*name: flowcontrol.0.json_to_metadata",
            "- disabled: true\n.*name: envoy.filters.http.ext_proc/.*/flowcontrol/extproc/0",
            "failureModeAllow: true",
            "responseTrailerMode: SEND",
            "- disabled: true\n.*name: flowcontrol.2.rbac",
            "- disabled: true\n.*name: flowcontrol.3.lua",
            "localReplyConfig:",
        )
        places = [[found.start() for found in re.finditer(name, text)] for name in names]

        assert [len(each) for each in places] == [1] * len(names)
        assert places == sorted(places)


FILTER = "type.googleapis.com/envoy.config.route.v3.FilterConfig"
