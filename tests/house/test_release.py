"""The release: workflow and Dockerfile, as far as they can be judged here."""

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
DIGEST = f"sha256:{'a1' * 32}"
BASE = re.compile(r"^FROM (\S+)", re.MULTILINE)


def steps(job: str) -> list[dict[str, Any]]:
    """The steps of a job of the workflow."""
    found: list[dict[str, Any]] = yaml.safe_load(WORKFLOW.read_text())["jobs"][job]["steps"]
    return found


class TestWorkflow:
    """.github/workflows/release.yml."""

    def test_schema(self) -> None:
        """It follows the schema of GitHub's workflows."""
        pytest.importorskip("check_jsonschema", reason="brings the schema")
        vendored = files("check_jsonschema") / "builtin_schemas" / "vendor"
        schema = json.loads((vendored / "github-workflows.json").read_text())
        document = yaml.safe_load(WORKFLOW.read_text())
        document["on"] = document.pop(True)  # as YAML 1.1 reads it

        jsonschema.validate(document, schema)

    def test_commands_exist(self) -> None:
        """Each script and make target that it runs is there."""
        lines = [
            each["run"] for job in ("packages", "image") for each in steps(job) if "run" in each
        ]
        scripts = set(re.findall(r"\.ci/[a-z-]+", " ".join(lines)))
        targets = set(re.findall(r"make ([a-z-]+)", " ".join(lines)))
        makefile = (ROOT / "Makefile").read_text()

        assert scripts == {".ci/wheel", ".ci/pin-images"}
        assert targets == {"release-check"}
        assert all((ROOT / script).exists() for script in scripts)
        assert all(f"\n{target}:" in makefile for target in targets)

    def test_provenance_and_contents(self) -> None:
        """The image carries both, and the packages are attested."""
        (image,) = [each["with"] for each in steps("image") if "build-push" in each.get("uses", "")]

        assert (image["provenance"], image["sbom"]) == ("mode=max", True)
        assert any("attest-build-provenance" in each.get("uses", "") for each in steps("packages"))


class TestPinImages:
    """.ci/pin-images."""

    def test_digests(self, tmp_path: Path) -> None:
        """Every stage is named by the digest at the registry, now and when it has changed."""
        (tmp_path / ".ci").mkdir()
        for name in (".ci/pin-images", "Dockerfile"):
            shutil.copy(ROOT / name, tmp_path / name)
        before = BASE.findall((tmp_path / "Dockerfile").read_text())
        skopeo = tmp_path / "skopeo"
        for digest in (DIGEST, DIGEST.replace("a", "b")):
            # The registry: answers for what is asked, and for nothing else.
            wanted = f"docker://docker.io/library/{before[0].partition('@')[0]}"
            skopeo.write_text(f'#!/bin/sh\n[ "$4" = {wanted} ] && echo {digest}\n')
            skopeo.chmod(0o755)
            done = subprocess.run(
                [tmp_path / ".ci/pin-images"],
                env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
                check=False,
                capture_output=True,
                text=True,
            )

            assert done.returncode == 0, done.stderr
            after = BASE.findall((tmp_path / "Dockerfile").read_text())
            assert after == [f"{each.partition('@')[0]}@{digest}" for each in before]
