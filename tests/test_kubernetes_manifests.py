"""envoy/kubernetes/: what can be checked of it without a cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Address, Settings
from server.sources.kube_endpoints import POOL_GROUPS
from server.sources.objectives import GROUPS, read_objective

FOLDER = Path(__file__).parents[1] / "envoy" / "kubernetes"
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    """The documents of a file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def one(name: str, kind: str) -> Document:
    """The only document of a kind in a file."""
    (found,) = (each for each in documents(name) if each["kind"] == kind)
    return found


@pytest.fixture(name="settings")
def _settings() -> Settings:
    """What the ConfigMap says."""
    text = one("flowcontrol.yaml", "ConfigMap")["data"]["flowcontrol.yaml"]
    return Settings.model_validate(yaml.safe_load(text))


@pytest.fixture(name="container")
def _container() -> Document:
    """The container of the Deployment."""
    (container,) = one("flowcontrol.yaml", "Deployment")["spec"]["template"]["spec"]["containers"]
    found: Document = container
    return found


class TestFlowcontrol:
    """The service's own manifests."""

    def test_permissions(self) -> None:
        """The role permits what the sources ask for, in every group they ask, and nothing else."""
        rules = one("flowcontrol.yaml", "Role")["rules"]
        permitted = {
            (group, resource, verb)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        objective_groups = [group.partition("/")[0] for group in GROUPS]
        pool_groups = [group.partition("/")[0] for group in POOL_GROUPS]

        assert permitted == {
            *((group, "inferenceobjectives", verb) for group in objective_groups for verb in READ),
            *((group, "inferenceobjectives/status", "patch") for group in objective_groups),
            *((group, "inferencepools", verb) for group in pool_groups for verb in READ),
            *(("", "pods", verb) for verb in READ),
        }

    def test_names(self) -> None:
        """Whatever refers to something refers to something that is there."""
        binding = one("flowcontrol.yaml", "RoleBinding")
        deployment = one("flowcontrol.yaml", "Deployment")["spec"]
        pod = deployment["template"]["spec"]
        service = one("flowcontrol.yaml", "Service")["spec"]
        labels = deployment["template"]["metadata"]["labels"]

        assert binding["roleRef"]["name"] == one("flowcontrol.yaml", "Role")["metadata"]["name"]
        account = one("flowcontrol.yaml", "ServiceAccount")["metadata"]["name"]
        assert account == pod["serviceAccountName"] == binding["subjects"][0]["name"]
        assert labels.items() >= deployment["selector"]["matchLabels"].items()
        assert labels.items() >= service["selector"].items()
        (volume,) = pod["volumes"]
        config_map = one("flowcontrol.yaml", "ConfigMap")["metadata"]["name"]
        assert volume["configMap"]["name"] == config_map

    def test_ports(self, settings: Settings, container: Document) -> None:
        """The ports are those the service listens on; probes ask where it answers."""
        listen = settings.listen
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        service = one("flowcontrol.yaml", "Service")["spec"]["ports"]

        assert isinstance(listen.direct, Address)
        assert ports["ext-proc"] == listen.direct.port
        assert ports["grpc"] == listen.ext_proc.port
        assert ports["health"] == listen.health.port
        assert ports["http"] == listen.http.port
        assert {port["name"]: port["port"] for port in service} == ports
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == listen.health.port

    def test_configuration(self, settings: Settings, container: Document) -> None:
        """The configuration is good, mounted whole where it is read, and outlives its drain."""
        pod = one("flowcontrol.yaml", "Deployment")["spec"]["template"]["spec"]
        (mount,) = container["volumeMounts"]

        assert settings.objectives.kubernetes is not None
        assert settings.endpoints.kubernetes is not None
        assert container["args"][-1] == f"{mount['mountPath']}/flowcontrol.yaml"
        assert "subPath" not in mount
        grace_ns = pod["terminationGracePeriodSeconds"] * 10**9
        assert grace_ns > settings.flow_control.drain_budget

    def test_unprivileged(self, container: Document) -> None:
        """It needs no root, no capability and no writable file system."""
        pod = one("flowcontrol.yaml", "Deployment")["spec"]["template"]["spec"]

        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


class TestPool:
    """The pool and its objectives."""

    def test_objectives(self, settings: Settings) -> None:
        """Each is read as one of the pool's."""
        read = [read_objective(each, settings.pool) for each in documents("pool.yaml")]

        assert {each.name: each.priority for each in read if each} == {"chat": 10, "batch": -1}

    def test_picker(self, settings: Settings) -> None:
        """The pool is the one that is configured, and names the service's port."""
        pool = one("pool.yaml", "InferencePool")
        reference = pool["spec"]["endpointPickerRef"]

        assert pool["metadata"]["name"] == settings.pool
        assert reference["name"] == one("flowcontrol.yaml", "Service")["metadata"]["name"]
        assert isinstance(settings.listen.direct, Address)
        assert reference["port"]["number"] == settings.listen.direct.port


class TestEnvoyGateway:
    """The policy that puts the filter in."""

    def test_policy(self, settings: Settings) -> None:
        """It fails closed, waits longer than any request may, and lets the endpoint be chosen."""
        policy = one("envoy-gateway.yaml", "EnvoyExtensionPolicy")
        (filter_,) = policy["spec"]["extProc"]

        assert not filter_["failOpen"]
        patience_s = int(filter_["messageTimeout"].removesuffix("s"))
        assert patience_s * 10**9 > settings.longest_wait_ns
        assert filter_["metadata"] == {"writableNamespaces": ["envoy.lb", "flowcontrol"]}
        assert filter_["processingMode"] == {"request": {}}

    def test_patch(self) -> None:
        """It keeps the streams open to the end of the response."""
        (patch,) = one("envoy-gateway.yaml", "EnvoyPatchPolicy")["spec"]["jsonPatches"]

        operation = patch["operation"]
        assert (operation["path"], operation["value"]) == ("response_trailer_mode", "SEND")


READ = ("list", "watch")
