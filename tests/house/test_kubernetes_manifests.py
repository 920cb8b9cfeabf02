"""envoy/kubernetes/: what can be checked of it without a cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowcontrol_server.common.addresses import Address
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.service import LOADS_WITHIN_S
from flowcontrol_server.sources.feed import PATIENCE_S
from flowcontrol_server.sources.kube_endpoints import POOL_GROUPS
from flowcontrol_server.sources.objectives import GROUPS, read_objective

FOLDER = Path(__file__).parents[2] / "envoy" / "kubernetes"
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
    return Settings.model_validate(yaml.safe_load(text), context={"is_elsewhere": True})


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
        configuration, tls, _state = pod["volumes"]
        config_map = one("flowcontrol.yaml", "ConfigMap")["metadata"]["name"]
        assert configuration["configMap"]["name"] == config_map
        assert tls["secret"]["optional"], "it starts without TLS, too"

    def test_ports(self, settings: Settings, container: Document) -> None:
        """The ports are those the service listens on; probes ask where it answers."""
        listen = settings.listen
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        service = one("flowcontrol.yaml", "Service")["spec"]["ports"]

        assert isinstance(listen.ext_proc, Address)
        assert ports["ext-proc"] == listen.ext_proc.port
        assert ports["grpc"] == listen.grpc.port
        assert ports["http"] == listen.http.port
        assert {port["name"]: port["port"] for port in service} == ports
        for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
            assert container[probe]["httpGet"] == {"path": path, "port": "http"}

    def test_start(self, container: Document) -> None:
        """Kubelet leaves a start alone that waits as long as it may for the Kubernetes API.

        Without a startupProbe the third probe of liveness, 10 s after the first, would end it.
        """
        probe = container["startupProbe"]
        longest_s = PATIENCE_S + LOADS_WITHIN_S

        assert probe["httpGet"] == container["livenessProbe"]["httpGet"]
        assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * longest_s

    def test_configuration(self, settings: Settings, container: Document) -> None:
        """The configuration is good, mounted whole where it is read, and outlives its drain."""
        pod = one("flowcontrol.yaml", "Deployment")["spec"]["template"]["spec"]
        mount, tls, _state = container["volumeMounts"]
        text = one("flowcontrol.yaml", "ConfigMap")["data"]["flowcontrol.yaml"]

        assert settings.objectives.kubernetes is not None
        assert settings.endpoints.kubernetes is not None
        assert container["args"][-1] == f"{mount['mountPath']}/flowcontrol.yaml"
        assert "subPath" not in mount
        assert text.count(f"{tls['mountPath']}/") == 3, "the files of the commented section tls"
        pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        grace_ns = (pod["terminationGracePeriodSeconds"] - pause_s) * 10**9
        assert grace_ns > settings.flow_control.drain_budget

    def test_state(self, settings: Settings, container: Document) -> None:
        """The folder for state is a volume of the pod, with a bound, that can be written."""
        pod = one("flowcontrol.yaml", "Deployment")["spec"]["template"]["spec"]
        mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
        mount = mounts[str(settings.state.directory)]
        volumes = {each["name"]: each for each in pod["volumes"]}

        assert "readOnly" not in mount
        assert volumes[mount["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}

    def test_network_policy(self, settings: Settings) -> None:
        """Of other pods Envoy's reach its port, Prometheus's the metrics, and nobody else."""
        policy = one("flowcontrol.yaml", "NetworkPolicy")["spec"]
        template = one("flowcontrol.yaml", "Deployment")["spec"]["template"]
        assert isinstance(settings.listen.ext_proc, Address)
        allowed = [{each["port"] for each in rule["ports"]} for rule in policy["ingress"]]

        assert policy["podSelector"]["matchLabels"] == template["metadata"]["labels"]
        assert allowed == [{settings.listen.ext_proc.port}, {settings.listen.http.port}]
        assert all(rule["from"] for rule in policy["ingress"])

    def test_binds(self, settings: Settings) -> None:
        """What it listens on is written out, and a sidecar's loopback is not trusted."""
        listen = settings.listen
        addresses = (listen.ext_proc, listen.grpc, listen.http)
        hosts = {each.host for each in addresses if isinstance(each, Address)}

        assert hosts == {"0.0.0.0"}
        assert not settings.admin.trust_loopback

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
        assert isinstance(settings.listen.ext_proc, Address)
        assert reference["port"]["number"] == settings.listen.ext_proc.port


READ = ("list", "watch")
