"""What Envoy Gateway made of our manifests, as a static configuration for Envoy.

The translation names its listener, routes and clusters as Envoy Gateway sends them; here each is in
the file, and the addresses are those of the test's own servers.
"""

from pathlib import Path
from typing import Any, Final

import yaml

TRANSLATED: Final = Path(__file__).parents[1] / "server" / "tools" / "envoy_gateway_translated.yaml"
UNGATED: Final = "/other"
"""Path of a route beside the model servers'."""
_LISTENER: Final = "models/models/http"
_MODEL_SERVERS: Final = "httproute/models/llama/rule/0"
_OTHER: Final = "httproute/models/other/rule/0"
_EXT_PROC: Final = "envoyextensionpolicy/models/flowcontrol/extproc/0"
_OURS: Final = {
    _MODEL_SERVERS: "model_servers",
    _OTHER: "model_servers",
    _EXT_PROC: "ext_proc",
    "access_log": "access_log",
}
"""Clusters of the translation, and those of the generated configuration with their addresses."""


def envoy_gateway(configuration: dict[str, Any]) -> None:
    """Put the translation in the place of the generated listener and clusters."""
    (dumped,) = yaml.safe_load(TRANSLATED.read_text())["xds"].values()
    dumps = {each["@type"].rpartition(".")[2]: each for each in dumped["configs"]}
    own = configuration["static_resources"]
    addresses = {each["name"]: each["load_assignment"] for each in own["clusters"]}
    clusters = [each["cluster"] for each in dumps["ClustersConfigDump"]["dynamicActiveClusters"]]
    for cluster in clusters:
        cluster.pop("edsClusterConfig", None)
        cluster["type"] = "STATIC"
        assigned = addresses[_OURS[cluster["name"]]]
        cluster["loadAssignment"] = assigned | {"cluster_name": cluster["name"]}
        cluster.pop("@type")
    (listener,) = (
        each["activeState"]["listener"]
        for each in dumps["ListenersConfigDump"]["dynamicListeners"]
        if each["activeState"]["listener"]["name"] == _LISTENER
    )
    (routes,) = (
        each["routeConfig"]
        for each in dumps["RoutesConfigDump"]["dynamicRouteConfigs"]
        if each["routeConfig"]["name"] == _LISTENER
    )
    manager = listener["defaultFilterChain"]["filters"][-1]["typedConfig"]
    del manager["rds"], routes["@type"], listener["@type"]
    manager["routeConfig"] = routes
    listener["address"] = own["listeners"][0]["address"]
    own["listeners"], own["clusters"] = [listener], clusters
