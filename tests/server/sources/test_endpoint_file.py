"""Endpoints from a file: what may stand in it, and following it."""

import os
from errno import EACCES
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from flowcontrol.config import Role
from flowcontrol.errors import ConfigError
from flowcontrol.events import Endpoint
from flowcontrol_server.common.yamlfile import FILE_BYTES_MAX
from flowcontrol_server.sources.endpoint_file import (
    ENDPOINTS_MAX,
    SHOWN_MAX,
    EndpointFile,
    Listed,
    read_endpoints,
)
from tests.support.told import Told, eventually, following

A, B = Endpoint("10.0.0.5:8000"), Endpoint("10.0.0.6:8000")
Endpoints = tuple[Endpoint, ...]


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "endpoints.yaml"


def replace(path: Path, text: str) -> None:
    """Write a file all at once."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


class TestRead:
    """What may stand in it."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("[]", ()),
            ("- 10.0.0.5:8000\n- '[FD00::5]:8000'\n", (A, Endpoint("[fd00::5]:8000"))),
            ("- {address: 10.0.0.5, port: 8000}", (A,)),
            ('- {address: 10.0.0.5, port: "8000"}', (A,)),
            ("- {address: '10.0.0.5:8000'}", (A,)),
            ("- {address: 'fd00::5', port: 1}", (Endpoint("[fd00::5]:1"),)),
            ("- {address: vllm.test, port: 1}", (Endpoint("vllm.test:1"),)),
            (
                "- {address: 10.0.0.5, port: 8000, role: prefill}",
                (Endpoint(A.address, Role.PREFILL),),
            ),
            # llm-d-router's file discovery
            (
                (
                    "endpoints:\n- name: a\n  namespace: models\n  address: 10.0.0.5\n"
                    "  port: '8000'\n  labels: {llm-d.ai/role: decode}\n"
                ),
                (Endpoint(A.address, Role.DECODE),),
            ),
            ("- {address: 10.0.0.5, port: 8000, labels: {llm-d.ai/role: encode}}", ()),
        ],
    )
    def test_entries(self, path: Path, text: str, expected: Endpoints) -> None:
        """Each way to write an endpoint is read."""
        path.write_text(text)

        assert read_endpoints(path) == (expected, ())

    def test_host_names(self, path: Path) -> None:
        """Where endpoints are picked, those that Envoy would not find are left out, and told."""
        path.write_text(f"[vllm.test:1, {A.address}, '[fd00::5]:1', {{address: b, port: 2}}]")

        endpoints, oddities = read_endpoints(path, are_picked=True)
        assert endpoints == (A, Endpoint("[fd00::5]:1"))
        rule = "is left out, as it must have an IP address unless picker is off"
        assert oddities == (
            f"{path}: [0] {rule}, got vllm.test:1",
            f"{path}: [3] {rule}, got b:2",
        )

    def test_a_key_not_known(self, path: Path) -> None:
        """A key that says nothing to us is told, as it may be misspelt; the endpoint counts."""
        path.write_text("- {address: 10.0.0.5, port: 8000, rol: prefill}\n- 10.0.0.6:8000")

        oddity = f"{path}: [0] rol is not a known key and is ignored"
        assert read_endpoints(path) == ((A, B), (oddity,))

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "must be one list of endpoints"),
            ("a: b", "must be one list of endpoints"),
            ("[]\n---\n[]", "must be one list of endpoints"),
            (
                "- 10.0.0.5",
                "[0] must be host:port with a port from 1 to 65535, such as",
            ),
            ("- {port: 8000}", "[0] must be host:port"),
            ("- {address: , port: 8000}", "[0] must be host:port"),
            ("- {address: yes, port: 8000}", "[0] must be host:port"),
            ("- {address: '', port: 8000}", "[0] must be host:port"),
            ("- {address: 10.0.0.5, port: 0}", "[0] must be host:port"),
            (
                "- {address: '10.0.0.5:1', role: encode}",
                "[0] role must be one of both, prefill, decode, got",
            ),
            (
                "[10.0.0.5:1, 10.0.0.6:1, 10.0.0.5:1]",
                "[2] must not repeat an endpoint, got 10.0.0.5:1",
            ),
            (
                "[" + "1, " * (ENDPOINTS_MAX + 1) + "]",
                f"must list at most {ENDPOINTS_MAX} endpoints",
            ),
            ("#" * (FILE_BYTES_MAX + 1), f"must be at most {FILE_BYTES_MAX} bytes"),
            ("- [", "is not YAML"),
        ],
    )
    def test_mistakes(self, path: Path, text: str, problem: str) -> None:
        """Each mistake is named with its place."""
        path.write_text(text)

        with pytest.raises(ConfigError) as caught:
            read_endpoints(path)
        assert f"{path}" in caught.value.problems[0]
        assert problem in caught.value.problems[0]

    def test_all_at_once(self, path: Path) -> None:
        """All mistakes are named."""
        path.write_text("[a, 10.0.0.5:1, b]")

        with pytest.raises(ConfigError) as caught:
            read_endpoints(path)
        assert len(caught.value.problems) == 2

    def test_a_pipe(self, path: Path) -> None:
        """What would never end is not read."""
        os.mkfifo(path)

        with pytest.raises(ConfigError, match="not a regular file"):
            read_endpoints(path)


class TestFollow:
    """Changes are told."""

    async def test_live(self, path: Path) -> None:
        """Endpoints that come and go are told; a file that says the same is no news."""
        path.write_text(f"- {A.address}")
        told: Told[Endpoints] = Told()
        async with following(EndpointFile(path), told):
            await told.until_equal((A,))
            replace(path, f"# the same\n- {A.address}")
            replace(path, f"- {A.address}\n- {B.address}")
            await told.until_equal((A, B))
            path.write_text("[]")
            await told.until_equal(())

            assert told.news == [(A,), (A, B), ()]

    async def test_a_folder_that_may_not_be_entered(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was last good stays in force; that is told and counted once, until it is mended."""
        path.write_text(f"- {A.address}")
        told: Told[Endpoints] = Told()
        source = EndpointFile(path, look_again_ms=50)
        looks = 0

        def refuse(_path: Path, **_settings: bool) -> Listed:
            nonlocal looks
            looks += 1
            raise PermissionError(EACCES, os.strerror(EACCES))

        async with following(source, told):
            await told.until_equal((A,))
            with monkeypatch.context() as patch:
                patch.setattr("flowcontrol_server.sources.endpoint_file.read_endpoints", refuse)
                replace(path, f"- {B.address}")
                problem = f"{path}: cannot be read: Permission denied"
                await eventually(lambda: source.problems == {path.name: problem})
                looks = 0
                replace(path, f"- {B.address}")
                await eventually(lambda: looks)
            assert source.error_count == 1
            assert told.news == [(A,)]
            replace(path, f"- {B.address}")
            await told.until_equal((B,))

            assert source.problems == {}

    async def test_oddities(self, path: Path) -> None:
        """What is odd in a file that counts is told and counted once, until it is mended."""
        path.write_text("- {address: 10.0.0.5, port: 8000, rol: prefill}")
        told: Told[Endpoints] = Told()
        source = EndpointFile(path)
        async with following(source, told):
            await told.until_equal((A,))
            problem = f"{path}: [0] rol is not a known key and is ignored"
            assert source.problems == {path.name: problem}
            replace(path, f"- {{address: 10.0.0.5, port: 8000, rol: prefill}}\n- {B.address}")
            await told.until_equal((A, B))
            assert source.error_count == 1
            replace(path, f"- {B.address}")
            await told.until_equal((B,))
            assert source.problems == {}
            replace(path, "[" + "a, " * (SHOWN_MAX + 2) + "]")
            await eventually(lambda: source.problems)

            lines = source.problems[path.name].splitlines()
            assert (len(lines), lines[-1]) == (SHOWN_MAX + 1, "and 2 more")

    async def test_mistakes_change_nothing(self, path: Path) -> None:
        """A bad file, or none, leaves what was last good in force; said once until it changes."""
        path.write_text(f"- {A.address}")
        told: Told[Endpoints] = Told()
        source = EndpointFile(path, look_again_ms=50)
        with capture_logs() as lines:
            async with following(source, told):
                await told.until_equal((A,))
                replace(path, "- nonsense")
                await eventually(lambda: source.error_count == 1)
                (path.parent / "other").touch()  # a look that finds the same mistake
                path.unlink()
                await eventually(lambda: source.error_count == 2)
                assert list(source.problems) == [path.name]
                assert told.news == [(A,)]
                replace(path, f"- {B.address}")
                await told.until_equal((B,))

                assert source.problems == {}
        assert [line["event"] for line in lines] == ["endpoints_rejected"] * 2
