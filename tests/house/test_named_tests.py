"""Pages that say what was tried name tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("security-review.md", "gateways.md")}
SHORT = {"conformance.py": "tests/e2e/test_e2e_conformance.py"}
"""Files that docs/gateways.md names by a shorter name."""
NAMED = sorted(
    {
        found
        for page in PAGES.values()
        for found in re.findall(r"`(tests/[a-z0-9_/]+\.py|conformance\.py)(?:::(\w+))?`", page)
    }
)
SUITE = {
    "EppUnAvailableFailOpen",
    "GatewayDestinationEndpointServed",
    "GatewayFollowingEPPRouting",
    "GatewayFollowingEPPRoutingWithDataParallelism",
    "GatewayWeightedAcrossTwoInferencePools",
    "HTTPRouteInvalidInferencePoolRef",
    "HTTPRouteMultipleGatewaysDifferentPools",
    "HTTPRouteMultipleRulesDifferentPools",
    "InferencePoolAccepted",
    "InferencePoolAppProtocol",
    "InferencePoolHTTPRoutePortValidation",
    "InferencePoolInvalidEPPService",
    "InferencePoolMissingEPPRef",
    "InferencePoolResolvedRefsCondition",
}
"""The conformance tests of the Gateway API Inference Extension v1.6."""


def test_some_are_named() -> None:
    """Each row of the security review's tables names a test."""
    lines = PAGES["security-review.md"].splitlines()
    rows = [line for line in lines if line.startswith("| ") and "tried" not in line]

    assert rows
    assert all("`tests/" in row for row in rows)


def test_conformance_suite() -> None:
    """The table of conformance tests has each of them once."""
    _, _, section = PAGES["gateways.md"].partition("## Conformance")
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    names = [name.strip() for cell in cells[1:] for name in cell.split(",")]

    assert sorted(names) == sorted(SUITE)


@pytest.mark.parametrize(("file", "function"), NAMED)
def test_is_there(file: str, function: str) -> None:
    """The file is there, and the function in it."""
    text = (ROOT / SHORT.get(file, file)).read_text()

    assert not function or re.search(rf"def {function}\(", text)
