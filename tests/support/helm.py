"""Helm for tests: the installed one, or one built from its Go module, kept in the cache."""

import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml

from tests.support.control_plane import KUBERNETES, cache_directory, go

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "flowcontrol"
MODULE: Final = "helm.sh/helm/v3/cmd/helm@v3.21.3"
Json = dict[str, Any]


@cache
def program() -> str:
    """Return the path of Helm; skip the test if there is none."""
    installed = shutil.which("helm")
    if installed is not None:
        return installed
    folder = cache_directory() / f"helm-{MODULE.rpartition(chr(64))[2]}"
    if not (folder / "helm").exists():
        folder.mkdir(parents=True, exist_ok=True)
        go("install", "-trimpath", "-ldflags", "-s -w", MODULE, cwd=folder, GOBIN=str(folder))
    return str(folder / "helm")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Helm; return its output."""
    command = [program(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def template(values: Path, namespace: str = "models") -> subprocess.CompletedProcess[str]:
    """Render the chart with a file of values."""
    # A Helm that was built without its Makefile takes itself for one of Kubernetes 1.20.
    where = ("--namespace", namespace, "--kube-version", KUBERNETES)
    return helm("template", "fc", str(CHART), *where, "--values", str(values))


def rendered(values: Mapping[str, Any], namespace: str = "models") -> list[Json]:
    """Return the manifests that the chart renders from values."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "values.yaml"
        file.write_text(yaml.safe_dump(dict(values)))
        done = template(file, namespace)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]
