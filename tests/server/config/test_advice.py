"""What check-config says of a configuration that is valid and may not be meant."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from flowcontrol_server.config.advice import advice
from flowcontrol_server.config.settings import Settings

PLAIN = {
    "apiVersion": "flowcontrol/v1alpha1",
    "kind": "FlowControlConfig",
    "pool": "llama",
    "objectives": {"directory": "."},
    "endpoints": {"static": ["127.0.0.1:8000"]},
    "load": {},
}


def said(directory: Path, **changes: Any) -> list[str]:
    """What each line of the advice begins with: the setting."""
    settings = Settings.model_validate({**PLAIN, **changes}, context={"directory": directory})
    return [line.partition(" ")[0] for line in advice(settings)]


class TestPorts:
    """Ports that other machines reach."""

    def test_default(self, tmp_path: Path) -> None:
        """By default this machine alone connects, and there is nothing to say."""
        assert said(tmp_path) == []

    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.7", "gateway.example"])
    def test_open(self, tmp_path: Path, host: str) -> None:
        """Each port that is open without authentication is named."""
        listen = {"extProc": f"{host}:9002", "grpc": f"{host}:9003", "http": f"{host}:9090"}

        assert said(tmp_path, listen=listen) == ["listen.extProc", "listen.grpc", "listen.http"]

    def test_secret(self, tmp_path: Path) -> None:
        """A secret authenticates Envoy."""
        (tmp_path / "secret").write_text("known-to-envoy-alone")
        listen = {"extProc": "0.0.0.0:9002", "grpc": "0.0.0.0:9003", "secretFile": "secret"}

        assert said(tmp_path, listen=listen) == []

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "[::1]", "localhost"])
    def test_loopback(self, tmp_path: Path, host: str) -> None:
        """Loopback addresses are not open, nor is a Unix socket."""
        listen = {"extProc": "unix:/run/door.sock", "grpc": f"{host}:9003", "http": f"{host}:1"}

        assert said(tmp_path, listen=listen) == []


class TestCallers:
    """Callers that seem to be on this machine."""

    def test_in_a_pod(self, tmp_path: Path) -> None:
        """In Kubernetes a sidecar may stand in front."""
        pod: dict[str, Any] = {"objectives": {"kubernetes": {}}}

        assert said(tmp_path, **pod) == ["admin.trustLoopback"]
        assert said(tmp_path, **pod, admin={"trustLoopback": False}) == []


class TestConformance:
    """The switch for conformance tests."""

    def test_on(self, tmp_path: Path) -> None:
        """It is never on unnoticed."""
        on: dict[str, Any] = {"picker": "least-loaded", "requests": {"conformance": True}}

        assert said(tmp_path, picker="least-loaded") == []
        assert said(tmp_path, **on) == ["requests.conformance"]


class TestBodyRules:
    """Rules that a client can miss on purpose."""

    FOR_ALL: ClassVar = {"objective": "batch"}

    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            ([{"match": {"body:model": "large"}, "objective": "batch"}], ["requests.rules[0]"]),
            ([{"objectiveFrom": "body:user"}], ["requests.rules[0]"]),
            (
                [FOR_ALL, {"match": {"body:model": "large"}, "flowId": "large"}],
                ["requests.rules[1]"],
            ),
            ([{"match": {"body:model": "small"}, "objective": "chat"}, FOR_ALL], []),
            ([{"match": {"header:x-plan": "gold"}, "objective": "chat"}], []),
            ([FOR_ALL], []),
            ([], []),
        ],
    )
    def test_each(self, tmp_path: Path, rules: list[Any], expected: list[str]) -> None:
        """They need a rule for everybody behind them."""
        assert said(tmp_path, requests={"rules": rules}) == expected


class TestBands:
    """Templates of which others before them leave nothing."""

    @pytest.mark.parametrize(
        ("matches", "expected"),
        [
            ([{}], []),
            ([{}, {"maxPriority": -1}], [1]),
            ([{"maxPriority": -1}, {}], []),
            ([{"maxPriority": -1}, {"minPriority": 0}, {}, {"minPriority": 5}], [2, 3]),
            ([{"minPriority": 1}, {"maxPriority": -1}, {}], []),
            ([{"minPriority": 5}, {"minPriority": 5, "maxPriority": 5}], [1]),
            ([{"minPriority": 5, "maxPriority": 9}, {"minPriority": 5, "maxPriority": 10}], []),
            (
                [
                    {"minPriority": 8, "maxPriority": 10},
                    {"minPriority": 5, "maxPriority": 7},
                    {"minPriority": 5, "maxPriority": 10},
                ],
                [2],
            ),
        ],
    )
    def test_never_used(
        self, tmp_path: Path, matches: list[dict[str, int]], expected: list[int]
    ) -> None:
        """The first that matches counts: a general one before a narrow one takes all of it."""
        bands = [{"match": match} for match in matches]
        names = [f"flowControl.bands[{index}]" for index in expected]
        assert said(tmp_path, flowControl={"bands": bands}) == names


class TestRules:
    """Rules that are allowed and do nothing, and facts that nothing provides."""

    def test_metadata(self, tmp_path: Path) -> None:
        """Metadata comes from a filter that envoy-config does not generate."""
        rules = [{"flowIdFrom": "metadata:envoy.filters.http.jwt_authn:claims:org"}]
        assert said(tmp_path, requests={"rules": rules}) == ["requests"]

    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            ([{"flowId": "a"}, {"match": {"header:x": "y"}, "flowId": "b"}], [1]),
            ([{"flowId": "a"}, {"objective": "chat"}], []),
            ([{"flowId": "a"}, {"flowId": "b", "objective": "chat"}], []),
            ([{"flowIdFrom": "header:x"}, {"flowId": "b"}], []),
            ([{"match": {"header:x": "y"}, "flowId": "a"}, {"flowId": "b"}], []),
        ],
    )
    def test_never_used(
        self, tmp_path: Path, rules: list[dict[str, Any]], expected: list[int]
    ) -> None:
        """After a rule that always matches and says it, others that say the same do nothing."""
        names = [f"requests.rules[{index}]" for index in expected]
        assert said(tmp_path, requests={"rules": rules}) == names

    def test_no_load(self, tmp_path: Path) -> None:
        """Without metrics pages a dead model server is noticed by what fails there."""
        assert said(tmp_path, load={}) == []
        settings = Settings.model_validate(
            {key: value for key, value in PLAIN.items() if key != "load"},
            context={"directory": tmp_path},
        )
        assert [line.partition(" ")[0] for line in advice(settings)] == ["load"]
