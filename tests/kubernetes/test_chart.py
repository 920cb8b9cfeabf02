"""The Helm chart: what it renders, that flowcontrol reads it, and that an API server takes it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from flowcontrol_server.common.kubernetes_names import is_service
from flowcontrol_server.config.difference import FIXED
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.sources.objectives import read_objective
from flowcontrol_server.state.kube_lock import lease_name
from flowcontrol_server.tools.envoy.binary import envoy_binary
from tests.kubernetes.conftest import Place
from tests.support.control_plane import ControlPlane, manifests, module_directory
from tests.support.helm import CHART, helm, rendered, template

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]
Json = dict[str, Any]
ISTIO: Json = {"gateway": {"provider": "istio", "istio": {"selector": {"app": "gateway"}}}}
OLD = "inference.networking.x-k8s.io/v1alpha2"
NAME = "fc-flowcontrol-llama"
CHAT: Json = {"inferenceObjectives": [{"name": "chat", "priority": 10}]}
PORTS: Json = {"targetPorts": [{"number": 8000}, {"number": 8001}]}
ROUTE: Json = {"httpRoute": {"create": True, "inferenceGatewayName": "models"}}
OTHERS: Json = {"pool": "other", "recentDecisions": 5}
"""Settings that are no sections."""
PLAIN: Json = {}
FULL: Json = {
    "pools": [
        {
            "name": "llama",
            "replicas": 2,
            "config": {"flowControl": {"maxRequests": 100}, "picker": "off"},
            "inferencePool": {"targetPorts": [{"number": 8000}, {"number": 8001}]},
            "inferenceObjectives": [
                {"name": "chat", "priority": 10},
                {"name": "old", "priority": -1, "apiVersion": OLD},
            ],
            "resources": {"requests": {"cpu": "2"}},
        },
        {
            "name": "qwen",
            "httpRoute": {
                "port": 9000,
                "matches": [{"headers": [{"name": "x-model", "value": "qwen"}]}],
            },
        },
    ],
    "image": {"registry": "registry.example", "repository": "flowcontrol", "tag": "1.2.3"},
    "imagePullSecrets": [{"name": "pull"}],
    "inferencePool": {"create": True, "modelServers": {"matchLabels": {"app": "vllm"}}},
    "httpRoute": {"create": True, "inferenceGatewayName": "models", "backend": "vllm"},
    "networkPolicy": {
        "enabled": True,
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"name": "gateways"}}}],
    },
    "monitoring": {
        "labels": {"release": "prometheus"},
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    },
    "keda": {"enabled": True, "scaleTargetRef": {"name": "vllm"}},
    "gateway": {"provider": "envoy-gateway"},
    "priorityClassName": "system-cluster-critical",
    "env": [{"name": "A", "value": "b"}],
}
OLDER: Json = {
    "inferencePool": {
        "create": True,
        "apiVersion": OLD,
        "modelServers": {"matchLabels": {"app": "vllm"}},
    },
    **CHAT,
    "httpRoute": {"create": True, "inferenceGatewayName": "models"},
}
CRDS = (
    (
        "github.com/envoyproxy/gateway@v1.9.0",
        "charts/gateway-helm/charts/crds/crds/generated/*.yaml",
    ),
    (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0",
        "example/prometheus-operator-crd/*_servicemonitors.yaml",
    ),
    (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0",
        "example/prometheus-operator-crd/*_prometheusrules.yaml",
    ),
    ("github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases/keda.sh_scaledobjects.yaml"),
    (
        "sigs.k8s.io/gateway-api-inference-extension@v1.0.0",
        "config/crd/bases/*x-k8s.io_inferencepools.yaml",
    ),
    ("istio.io/api@v1.32.0", "kubernetes/customresourcedefinitions.gen.yaml"),
)


def of(documents: list[Json], kind: str, name: str | None = None) -> Json:
    """The one object of a kind, and a name."""
    (found,) = (
        each
        for each in documents
        if each["kind"] == kind and name in {None, each["metadata"]["name"]}
    )
    return found


def container(documents: list[Json]) -> Json:
    """The container of the only Deployment."""
    (found,) = of(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def settings(documents: list[Json], name: str) -> Settings:
    """The configuration in a ConfigMap, as the service reads it."""
    text = of(documents, "ConfigMap", name)["data"]["flowcontrol.yaml"]
    return Settings.model_validate(yaml.safe_load(text), context={"is_elsewhere": True})


class TestChart:
    """Without a cluster."""

    @pytest.mark.parametrize("values", [PLAIN, FULL, ISTIO], ids=["plain", "full", "istio"])
    def test_lint(self, tmp_path: Path, values: Json) -> None:
        """Helm finds nothing wrong with it."""
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        done = helm("lint", "--strict", str(CHART), "--values", str(file))

        assert done.returncode == 0, done.stdout

    def test_schema(self) -> None:
        """The schema is one, and has every value of the chart."""
        schema = json.loads((CHART / "values.schema.json").read_text())
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        Draft7Validator.check_schema(schema)

        assert set(values) <= set(schema["properties"])
        Draft7Validator(schema).validate(values)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"replica": 2}, "replica"),
            ({"pools": []}, "pools"),
            ({"pools": [{"name": "Llama"}]}, "pools"),
            ({"admin": {"token": "short"}}, "token"),
            ({"gateway": {"provider": "nginx"}}, "provider"),
            ({"stateVolume": {"sizeLimit": "64"}}, "sizeLimit"),
            ({"gateway": {"provider": "envoy-gateway"}}, "needs httpRoute.create"),
            ({"inferencePool": {"create": True}}, "matchLabels must be set"),
            ({"inferencePool": {"apiVersion": "v1"}}, "apiVersion"),
            ({"inferencePool": {**OLDER["inferencePool"], **PORTS}}, "must be one port"),
            ({"serviceAccount": {"create": False}}, "serviceAccount.name must be set"),
            ({"pools": [{"name": "a"}, {"name": "b"}], **ROUTE}, "set httpRoute.matches"),
            ({"pools": [{"name": "a.b"}, {"name": "a-b"}]}, "both have objects called"),
            (
                {"pools": [{"name": "a"}, {"name": "b"}], **CHAT},
                "both have InferenceObjective chat",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, values: Json, said: str) -> None:
        """Values that make no sense are refused, and the message names them."""
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        done = template(file)

        assert done.returncode != 0
        assert said in done.stderr

    def test_plain(self) -> None:
        """By default: what the plain manifests have, and flowcontrol reads the configuration."""
        documents = rendered(PLAIN)
        kinds = [each["kind"] for each in documents]
        config = settings(documents, "fc-flowcontrol-llama")

        assert sorted(kinds) == [
            "ConfigMap",
            "Deployment",
            "Role",
            "RoleBinding",
            "Service",
            "ServiceAccount",
        ]
        assert config.pool == "llama"
        assert config.objectives.kubernetes is not None
        assert config.endpoints.kubernetes is not None
        assert config.longest_wait_ns == 360_000_000_000

    def test_same_permissions(self) -> None:
        """The role is that of the plain manifests."""
        path = CHART.parents[2] / "envoy" / "kubernetes" / "flowcontrol.yaml"
        plain = [each for each in yaml.safe_load_all(path.read_text()) if each]

        assert of(rendered(PLAIN), "Role")["rules"] == of(plain, "Role")["rules"]

    def test_pools(self) -> None:
        """Each pool has its own; what it sets counts for it alone."""
        documents = rendered(FULL)
        llama = settings(documents, "fc-flowcontrol-llama")
        qwen = settings(documents, "fc-flowcontrol-qwen")
        deployments = [
            of(documents, "Deployment", f"fc-flowcontrol-{name}")["spec"]
            for name in ("llama", "qwen")
        ]
        pools = [of(documents, "InferencePool", name)["spec"] for name in ("llama", "qwen")]
        route = of(documents, "HTTPRoute", "fc-flowcontrol-qwen")["spec"]["rules"][0]

        assert (llama.pool, qwen.pool) == ("llama", "qwen")
        assert (llama.picker, qwen.picker) == ("off", "least-loaded")
        assert [each["replicas"] for each in deployments] == [2, 1]
        assert [len(each["targetPorts"]) for each in pools] == [2, 1]
        assert pools[0]["endpointPickerRef"] == {
            "name": "fc-flowcontrol-llama",
            "port": {"number": 9002},
            "failureMode": "FailClose",
        }
        assert route["backendRefs"] == [{"name": "vllm", "port": 9000}]
        assert route["matches"][0]["headers"][0]["value"] == "qwen"
        assert of(documents, "PodDisruptionBudget")["metadata"]["name"] == "fc-flowcontrol-llama"

    def test_names(self) -> None:
        """However a pool is called, its objects have names of their own, fit for a Service."""
        pools = ["llama-3.1-8b", "b", *(f"{'long-' * 10}{each}" for each in "ab")]
        documents = rendered({"pools": [{"name": each} for each in pools]})
        names = [each["metadata"]["name"] for each in documents if each["kind"] == "Service"]
        guarded = {
            settings(documents, each["metadata"]["name"]).pool
            for each in documents
            if each["kind"] == "Deployment"
        }

        assert len(set(names)) == len(pools)
        assert all(map(is_service, names))
        assert "fc-flowcontrol-llama-3-1-8b" in names
        assert guarded == set(pools)

    @pytest.mark.parametrize("name", ["resources", "config"])
    def test_null(self, name: str) -> None:
        """A section that is null is an empty one."""
        assert ("resources" in container(rendered({name: None}))) == (name != "resources")

    def test_objectives_of_one_pool(self) -> None:
        """A pool without objectives may say so where others have those of the top level."""
        documents = rendered(
            {"pools": [{"name": "a", "inferenceObjectives": []}, {"name": "b"}], **CHAT}
        )

        assert of(documents, "InferenceObjective")["spec"]["poolRef"]["name"] == "b"

    def test_objectives(self) -> None:
        """Flowcontrol reads them as what they are."""
        found = [
            read_objective(each, "llama")
            for each in rendered(FULL)
            if each["kind"] == "InferenceObjective"
        ]

        assert [(each.name, each.priority) for each in found if each] == [("chat", 10), ("old", -1)]

    def test_istio(self, tmp_path: Path) -> None:
        """Envoy takes the filter and the cluster's limits; nothing of a body comes here."""
        documents = rendered(ISTIO)
        spec = of(documents, "EnvoyFilter")["spec"]
        ext_proc, limits = (each["patch"]["value"] for each in spec["configPatches"])
        wanted = ext_proc["typed_config"]
        name = wanted["grpc_service"]["envoy_grpc"]["cluster_name"]
        route = {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        }
        manager = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network."
            "http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "gateway",
            "route_config": {"virtual_hosts": []},
            "http_filters": [ext_proc, {"name": "router", "typed_config": route}],
        }
        address = {"socket_address": {"address": "127.0.0.1", "port_value": 1}}
        listener = {
            "address": address,
            "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
        }
        path = tmp_path / "envoy.yaml"
        resources = {"listeners": [listener], "clusters": [{"name": name, **limits}]}
        path.write_text(yaml.safe_dump({"static_resources": resources}))
        command = [str(envoy_binary()), "--mode", "validate", "--config-path", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        modes = wanted["processing_mode"]
        waited_ns = settings(documents, "fc-flowcontrol-llama").longest_wait_ns

        assert done.returncode == 0, done.stderr
        assert spec["workloadSelector"]["labels"] == {"app": "gateway"}
        assert name == "outbound|9002||fc-flowcontrol-llama.models.svc.cluster.local"
        assert (modes["request_body_mode"], modes["response_body_mode"]) == ("NONE", "NONE")
        assert modes["response_trailer_mode"] == "SEND"
        assert int(wanted["message_timeout"].removesuffix("s")) * 10**9 > waited_ns

    def test_pool_of_the_older_group(self) -> None:
        """It has the fields of that group, and what refers to it says so."""
        documents = rendered(OLDER)
        pool = of(documents, "InferencePool")
        route = of(documents, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
        objective = of(documents, "InferenceObjective")["spec"]["poolRef"]

        assert pool["apiVersion"] == OLD
        assert pool["spec"] == {
            "selector": {"app": "vllm"},
            "targetPortNumber": 8000,
            "extensionRef": {
                "name": "fc-flowcontrol-llama",
                "portNumber": 9002,
                "failureMode": "FailClose",
            },
        }
        assert route["group"] == objective["group"] == OLD.partition("/")[0]

    @pytest.mark.parametrize(
        ("samples", "value"),
        [
            ({"waiting_requests": "priority='0',", "in_flight_requests": "priority='5',"}, [2.0]),
            ({"build_info": "version='1',"}, [0.0]),
            ({}, []),
        ],
        ids=["busy", "idle", "nobody is asked"],
    )
    def test_scaling(self, tmp_path: Path, samples: dict[str, str], value: list[float]) -> None:
        """Model servers are scaled by what waits and runs; that nothing is known is no zero."""
        promtool = shutil.which("promtool") or pytest.skip("promtool is not installed")
        trigger = of(rendered(FULL), "ScaledObject", NAME)["spec"]["triggers"][0]["metadata"]
        labels = f"namespace='models',service='{NAME}'"
        series = [
            {"series": f"flowcontrol_{name}{{{more}{labels}}}", "values": "1x9"}
            for name, more in samples.items()
        ]
        expected = [{"labels": "{}", "value": each} for each in value]
        test = {"expr": trigger["query"], "eval_time": "1m", "exp_samples": expected}
        file = tmp_path / "test.yaml"
        tests = [{"interval": "1m", "input_series": series, "promql_expr_test": [test]}]
        file.write_text(yaml.safe_dump({"tests": tests}))
        command = [promtool, "test", "rules", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stdout + done.stderr
        assert trigger["ignoreNullValues"] == "false"

    def test_every_listener_is_patched(self) -> None:
        """Each listener that a pool's route is attached to has the patch, in its namespace."""
        route = {"matches": [{"path": {"value": "/a"}}]}
        pools = [
            {"name": "a", "httpRoute": {"inferenceGatewayListener": "https", **route}},
            {"name": "b", "httpRoute": route},
            {"name": "c", "httpRoute": {"inferenceGatewayNamespace": "other"}},
        ]
        documents = rendered({**FULL, "pools": pools})
        attached = {
            f"{parent.get('namespace', 'models')}/{parent['name']}/{parent['sectionName']}"
            for each in documents
            if each["kind"] == "HTTPRoute"
            for parent in each["spec"]["parentRefs"]
        }
        patched = {
            (each["metadata"]["namespace"], patch["name"])
            for each in documents
            if each["kind"] == "EnvoyPatchPolicy"
            for patch in each["spec"]["jsonPatches"]
        }

        assert attached == {"models/models/https", "models/models/http", "other/models/http"}
        assert patched == {(each.partition("/")[0], each) for each in attached}

    def test_absence_of_one_pool(self) -> None:
        """The alert that nothing answers is about each pool, as far as labels tell them apart."""
        monitoring = {"prometheusRule": {"enabled": True}, "serviceMonitor": {"enabled": False}}
        pools = [{"name": "llama"}, {"name": "qwen"}]
        exprs = [
            of(rendered({"pools": pools, "monitoring": each}), "PrometheusRule")["spec"]["groups"][
                0
            ]["rules"][0]["expr"]
            for each in (monitoring, {**monitoring, "serviceMonitor": {"enabled": True}})
        ]

        labels = [f'namespace="models", service="fc-flowcontrol-{each["name"]}"' for each in pools]
        each_pool = " or ".join(f"absent(flowcontrol_build_info{{{each}}})" for each in labels)

        assert exprs == ["absent(flowcontrol_build_info)", each_pool]

    def test_secrets(self) -> None:
        """TLS and token are mounted, and the configuration names the files."""
        documents = rendered(
            {
                "tls": {"existingSecret": "tls", "clientCA": True},
                "admin": {"existingSecret": "admin"},
            }
        )
        config = yaml.safe_load(of(documents, "ConfigMap")["data"]["flowcontrol.yaml"])
        pod = of(documents, "Deployment")["spec"]["template"]["spec"]
        mounts = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        files = [*config["tls"].values(), config["admin"]["tokenFile"]]
        protocols = {
            each["name"]: each["appProtocol"] for each in of(documents, "Service")["spec"]["ports"]
        }

        assert {str(Path(file).parent) for file in files} <= mounts
        assert protocols["ext-proc"] == "https"

    def test_configuration_is_passed_through(self) -> None:
        """Settings that the chart does not know are handed on, and a Lease is permitted."""
        documents = rendered(
            {
                "config": {
                    "availability": {"election": "kubernetes"},
                    "state": {"valkey": {"url": "valkey://valkey:6379/0"}},
                    "objectives": {"api": {}},
                }
            }
        )
        config = yaml.safe_load(of(documents, "ConfigMap")["data"]["flowcontrol.yaml"])
        groups = [rule["apiGroups"] for rule in of(documents, "Role")["rules"]]

        assert config["availability"] == {"election": "kubernetes"}
        assert config["state"] == {"valkey": {"url": "valkey://valkey:6379/0"}}
        assert config["objectives"] == {"api": {}}
        assert ["coordination.k8s.io"] in groups

    @pytest.mark.parametrize("is_of_pool", [False, True], ids=["all", "pool"])
    def test_a_default_is_taken_back(self, *, is_of_pool: bool) -> None:
        """A setting of the chart that is null is left out, as Helm has it for values."""
        config = {"load": None, "flowControl": {"noEndpointTTL": None, "requestTTL": "5s"}}
        values: Json = {"config": config}
        if is_of_pool:
            values = {"pools": [{"name": "llama", **values}]}
        name = "fc-flowcontrol-llama"
        documents = rendered(values)
        written = yaml.safe_load(of(documents, "ConfigMap", name)["data"]["flowcontrol.yaml"])

        assert settings(rendered(PLAIN), name).load is not None
        assert settings(documents, name).load is None
        assert written["flowControl"] == {"requestTTL": "5s", "drainBudget": "30s"}


class TestElection:
    """Where the leader alone is ready."""

    @pytest.mark.parametrize("election", ["kubernetes", "valkey"])
    def test_no_wait_for_standbys(self, election: str) -> None:
        """Nothing waits for pods to be ready that never will be while another leads."""
        values = {
            "replicas": 2,
            "config": {
                "availability": {"election": election},
                "state": {"valkey": {"url": "valkey://valkey:6379/0"}},
            },
        }
        documents = rendered(values)
        rollout = of(documents, "Deployment")["spec"]["strategy"]["rollingUpdate"]
        budgets = [each for each in documents if each["kind"] == "PodDisruptionBudget"]

        assert rollout == {"maxSurge": "100%", "maxUnavailable": "100%"}
        assert budgets == []
        assert "lifecycle" not in container(documents)

    def test_leases(self) -> None:
        """Its own Leases may be changed, and nobody else's."""
        names = ["llama", "llama-3.1", "x.-a", f"{'long-' * 12}a"]
        elected = {"availability": {"election": "kubernetes"}}
        pools = [{"name": each, "config": elected} for each in ("llama-3.1", f"{'long-' * 12}a")]
        pools += [
            {"name": f"p{n}", "config": {**elected, "pool": each}} for n, each in enumerate(names)
        ]
        rules = of(rendered({"pools": [*pools, {"name": "other"}]}), "Role")["rules"]
        leases = [
            (rule["verbs"], set(rule.get("resourceNames", [])))
            for rule in rules
            if rule["resources"] == ["leases"]
        ]

        assert leases == [(["create"], set()), (["get", "update"], set(map(lease_name, names)))]

    def test_without(self) -> None:
        """All replicas serve: a rollout and a budget keep them."""
        documents = rendered({"replicas": 2})
        rollout = of(documents, "Deployment")["spec"]["strategy"]["rollingUpdate"]

        assert rollout == {"maxSurge": 1, "maxUnavailable": 0}
        assert container(documents)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
        assert of(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


class TestChanges:
    """What happens to the pods when values change."""

    def test_settings_that_stay_for_life(self) -> None:
        """Pods are replaced for what a running service cannot change, and for nothing else."""

        def pods(**config: object) -> Json:
            """The template of the pods."""
            found: Json = of(rendered({"config": config}), "Deployment")["spec"]["template"]
            return found

        plain = pods()
        fixed = [name for name in FIXED if name not in {"apiVersion", "kind"}]
        live = [name for name in Settings.model_json_schema()["properties"] if name not in FIXED]

        assert [each for each in fixed if pods(**{each: OTHERS.get(each, {"a": 1})}) == plain] == []
        assert [each for each in live if pods(**{each: {"a": 1}}) != plain] == []
        assert "flowControl" in live


class TestState:
    """What outlives a container that is started again in its pod."""

    def test_by_default(self) -> None:
        """What is learnt lies in a volume of the pod, with a bound, that can be written."""
        documents = rendered(PLAIN)
        directory = settings(documents, "fc-flowcontrol-llama").state.directory
        pod = of(documents, "Deployment")["spec"]["template"]["spec"]
        (mount,) = (
            each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "state"
        )
        (volume,) = (each for each in pod["volumes"] if each["name"] == "state")

        assert mount == {"name": "state", "mountPath": str(directory)}
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}

    def test_as_in_the_plain_manifests(self) -> None:
        """They keep the same, in the same way."""
        path = CHART.parents[2] / "envoy" / "kubernetes" / "flowcontrol.yaml"
        plain = [each for each in yaml.safe_load_all(path.read_text()) if each]
        chart = rendered(PLAIN)

        ours, theirs = (
            of(one, "Deployment")["spec"]["template"]["spec"]["volumes"] for one in (plain, chart)
        )
        named = settings(plain, "flowcontrol"), settings(chart, "fc-flowcontrol-llama")

        assert [each for each in ours if each["name"] == "state"] == [
            each for each in theirs if each["name"] == "state"
        ]
        assert named[0].state == named[1].state

    @pytest.mark.parametrize(
        "values",
        [
            {"stateVolume": {"enabled": False}},
            {"config": {"state": {"valkey": {"url": "valkey://valkey:6379/0"}}}},
            {"config": {"state": {"directory": "/data"}}},
            {"config": {"availability": {"election": "kubernetes"}}},
            {"pools": [{"name": "llama", "config": {"state": {"directory": "/data"}}}]},
        ],
        ids=["disabled", "valkey", "directory", "election", "pool"],
    )
    def test_other_settings(self, values: Json) -> None:
        """A store that is configured is the only one; where a leader is elected there is none."""
        documents = rendered(values)
        state = settings(documents, "fc-flowcontrol-llama").state
        pod = of(documents, "Deployment")["spec"]["template"]["spec"]

        assert state.directory in {None, Path("/data")}
        assert "state" not in {each["name"] for each in pod["volumes"]}

    def test_settings_beside_it(self) -> None:
        """What else is said of state holds, and the volume is there."""
        documents = rendered(
            {"config": {"state": {"leaseAgeMax": "5m"}, "availability": {"election": "off"}}}
        )
        state = settings(documents, "fc-flowcontrol-llama").state

        assert state.directory is not None
        assert state.lease_age_max == 300_000_000_000


class TestApplied:
    """On a real API server."""

    @pytest.mark.parametrize(
        "values", [PLAIN, FULL, ISTIO, OLDER], ids=["plain", "full", "istio", "older"]
    )
    async def test_they_apply(self, place: Place, values: Json) -> None:
        """It knows every field of every object, with the CRDs of those who define them."""
        documents = rendered(values, place.namespace)
        kinds = {each["kind"] for each in documents}
        for module, pattern in CRDS:
            for path in sorted(module_directory(module).glob(pattern)):
                used = [each for each in manifests(path) if each["spec"]["names"]["kind"] in kinds]
                await place.cluster.install(used)
        for document in documents:
            await place.cluster.apply(document, place.namespace)

    def test_installed(self, place: Place, tmp_path: Path) -> None:
        """Helm installs it, and says the next command with the names it has made."""
        user = {"token": ControlPlane.TOKEN}
        kubeconfig = place.running.kubeconfig(tmp_path, user, place.namespace)
        where = ("--kubeconfig", str(kubeconfig), "--namespace", place.namespace)
        done = helm("install", "fc", str(CHART), *where)

        assert "rollout status deployment/fc-flowcontrol-llama" in done.stdout, done.stderr
        assert "set image.registry" in done.stdout
