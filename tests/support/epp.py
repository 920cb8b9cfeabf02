"""llm-d-router's endpoint picker as a process for tests, without Kubernetes."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

from flowcontrol_server.common.addresses import Address

BINARY: Final = os.environ.get("FLOWCONTROL_TEST_EPP", "")
"""The program, built in a checkout of llm-d-router; empty: none."""


def configuration(directory: Path, endpoints: Iterable[Address]) -> dict[str, Any]:
    """Write a file with these endpoints; return a configuration that picks any of them."""
    found = [
        {"name": f"server-{each.port}", "address": each.host, "port": str(each.port)}
        for each in endpoints
    ]
    path = directory / "endpoints.yaml"
    path.write_text(yaml.safe_dump({"endpoints": found}))
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "file-discovery", "name": "files", "parameters": {"path": str(path)}},
            {"type": "random-picker"},
        ],
        "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "random-picker"}]}],
        "dataLayer": {"discovery": {"pluginRef": "files"}},
    }


def options(config: Path, port: int, health_port: int, metrics_port: int) -> list[str]:
    """Return its command-line options: plain text, on these ports."""
    return [
        *("--config-file", str(config), "--pool-name", "llama"),
        *("--grpc-port", str(port), "--grpc-health-port", str(health_port)),
        *("--metrics-port", str(metrics_port), "--metrics-endpoint-auth=false"),
        *("--secure-serving=false", "--tracing=false", "--zap-log-level", "error"),
    ]
