"""The service's own configuration, followed live."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from flowcontrol.errors import ListenError
from flowcontrol_server.common.watched import watch_folder
from flowcontrol_server.config.difference import settings_hash
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.config.settings import Settings, load_settings
from tests.support.told import Told, eventually, following

PLAIN: dict[str, Any] = {
    "apiVersion": "flowcontrol/v1alpha1",
    "kind": "FlowControlConfig",
    "pool": "llama",
    "objectives": {"directory": "."},
    "endpoints": {"static": ["127.0.0.1:8000"]},
}


def write(path: Path, **changes: Any) -> None:
    """Write a configuration, all at once."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({**PLAIN, **changes}))
    new.rename(path)


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    """A configuration file."""
    path = tmp_path / "flowcontrol.yaml"
    write(path)
    return path


class _Followed:
    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration

    async def follow(self, _changed: object) -> None:
        """Follow the file."""
        await self._configuration.follow()


@asynccontextmanager
async def followed(path: Path) -> AsyncIterator[tuple[Configuration, Told[Settings]]]:
    """A configuration that is followed, and what was put into force."""
    told: Told[Settings] = Told()

    async def apply(settings: Settings) -> None:
        if settings.endpoints.static == ():
            address = "an endpoint"
            raise ListenError(address, "in use")
        told.changed(settings)

    configuration = Configuration(load_settings(path), path, apply)
    async with following(_Followed(configuration), Told[object]()):
        yield configuration, told


class TestChanges:
    """What is put into force."""

    async def test_neighbours(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What else is written into its folder does not make anybody read it again."""
        reads: list[int] = []
        looks: list[Callable[[], Awaitable[None]]] = []

        def load(path: Path) -> Settings:
            reads.append(len(looks))
            return load_settings(path)

        async def watch(_folder: Path, look: Callable[[], Awaitable[None]]) -> None:
            for _ in range(3):
                looks.append(look)
                await look()
            write(path, picker="least-loaded")
            await look()
            raise asyncio.CancelledError

        async def apply(_settings: Settings) -> None:
            pass

        monkeypatch.setattr("flowcontrol_server.config.reload.load_settings", load)
        monkeypatch.setattr("flowcontrol_server.config.reload.watch_folder", watch)
        configuration = Configuration(load_settings(path), path, apply)
        with pytest.raises(asyncio.CancelledError):
            await configuration.follow()

        assert reads == [1, 3]
        assert configuration.settings.picker == "least-loaded"

    async def test_a_change(self, path: Path) -> None:
        """It is applied, said with its difference, and the hash is another."""
        with capture_logs() as lines:
            async with followed(path) as (configuration, told):
                before, since_s = configuration.hash, configuration.changed_s
                write(path, picker="least-loaded")
                settings = await told.until(lambda settings: settings.picker == "least-loaded")
                await eventually(lambda: configuration.settings is settings)

        assert configuration.hash == settings_hash(settings) != before
        assert configuration.changed_s >= since_s
        assert (configuration.reload_count, configuration.rejection_count) == (1, 0)
        assert lines == [
            {
                "event": "configuration_changed",
                "log_level": "info",
                "before": before,
                "hash": configuration.hash,
                "changes": [
                    'picker: "off" -> "least-loaded" (generate Envoy\'s configuration again)'
                ],
            }
        ]

    async def test_no_change(self, path: Path) -> None:
        """A file that says the same in other words is not applied."""
        async with followed(path) as (configuration, told):
            write(path, picker="off", saturation={})
            write(path, picker="least-loaded")
            await told.until(lambda settings: settings.picker == "least-loaded")

            assert len(told.news) == 1
            assert configuration.rejection_count == 0

    async def test_back_again(self, path: Path) -> None:
        """The same settings have the same hash, whatever was in between."""
        async with followed(path) as (configuration, _told):
            before = configuration.hash
            write(path, picker="least-loaded")
            await eventually(lambda: configuration.reload_count == 1)
            write(path)
            await eventually(lambda: configuration.reload_count == 2)

            assert configuration.hash == before

    async def test_the_same_time_and_size(self, path: Path) -> None:
        """A file that is written in place and looks as old as before: some tools set its time."""
        async with followed(path) as (configuration, told):
            write(path, picker="least-loaded")
            await eventually(lambda: configuration.reload_count == 1)
            times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
            path.write_text(path.read_text().replace("8000", "8001"))
            os.utime(path, ns=times)
            await eventually(lambda: configuration.reload_count == 2)

        assert path.stat().st_mtime_ns == times[1]
        assert [str(each) for each in told.news[-1].endpoints.static or ()] == ["127.0.0.1:8001"]

    async def test_hang_up(self, path: Path, tmp_path: Path) -> None:
        """SIGHUP has the file read, also where no change of its folder is seen."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        write(elsewhere / "flowcontrol.yaml")
        path.unlink()
        path.symlink_to("elsewhere/flowcontrol.yaml")
        async with followed(path) as (configuration, _told):
            await eventually(lambda: callable(signal.getsignal(signal.SIGHUP)))
            write(elsewhere / "flowcontrol.yaml", picker="least-loaded")
            os.kill(os.getpid(), signal.SIGHUP)
            await eventually(lambda: configuration.reload_count == 1)

    async def test_a_follower_that_fails(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That stands as a problem; SIGHUP is heeded, and the file is followed again."""
        failures = 0

        async def watch(folder: Path, look: Callable[[], Awaitable[None]]) -> None:
            nonlocal failures
            if not failures:
                failures += 1
                message = "planted"
                raise RuntimeError(message)
            await watch_folder(folder, look)

        monkeypatch.setattr("flowcontrol_server.config.reload.watch_folder", watch)
        monkeypatch.setattr("flowcontrol_server.config.reload.FOLLOW_AGAIN_S", 0.2)
        async with followed(path) as (configuration, _told):
            await eventually(lambda: configuration.problems)
            assert "cannot be followed: RuntimeError('planted')" in configuration.problems
            write(path, picker="least-loaded")
            os.kill(os.getpid(), signal.SIGHUP)
            await eventually(lambda: configuration.reload_count == 1)
            write(path, picker="off")
            await eventually(lambda: configuration.reload_count == 2)
            assert not configuration.problems

    async def test_a_mounted_config_map(self, tmp_path: Path) -> None:
        """Kubernetes swaps a link to exchange the file."""
        for version, picker in (("..1", "off"), ("..2", "least-loaded")):
            (tmp_path / version).mkdir()
            write(tmp_path / version / "flowcontrol.yaml", picker=picker)
        (tmp_path / "..data").symlink_to("..1")
        path = tmp_path / "flowcontrol.yaml"
        path.symlink_to("..data/flowcontrol.yaml")
        async with followed(path) as (configuration, _told):
            (tmp_path / "..new").symlink_to("..2")
            (tmp_path / "..new").rename(tmp_path / "..data")
            await eventually(lambda: configuration.settings.picker == "least-loaded")


class TestRejections:
    """What leaves all as it was."""

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            (
                {"picker": "best"},
                "picker must be 'off', 'least-loaded' or 'prefix-affinity', got 'best'",
            ),
            ({"colour": "red"}, "colour is not a known setting"),
            (
                {"pool": "qwen", "picker": "least-loaded"},
                (
                    "pool cannot change while the service runs; restart it, or revert the "
                    'change, got "qwen"'
                ),
            ),
            (
                {"listen": {"extProc": "127.0.0.1:1"}},
                (
                    "listen.extProc cannot change while the service runs; restart it, or revert "
                    'the change, got "127.0.0.1:1"'
                ),
            ),
            ({"endpoints": {"static": []}}, "cannot listen on an endpoint"),
        ],
    )
    async def test_mistakes(self, path: Path, changes: dict[str, Any], problem: str) -> None:
        """Nothing changes, in whole or in part; that is counted, and shown until it is mended.

        So it is with a mistake, with what needs a restart and with what cannot be applied.
        """
        async with followed(path) as (configuration, told):
            before = configuration.hash
            write(path, **changes)
            await eventually(lambda: configuration.problems)
            assert configuration.problems[0].startswith(problem)
            assert (configuration.hash, told.news) == (before, [])
            write(path, picker="least-loaded")
            await told.until(lambda settings: settings.picker == "least-loaded")
            await eventually(lambda: not configuration.problems)

            assert (configuration.reload_count, configuration.rejection_count) == (1, 1)

    @pytest.mark.parametrize(("election", "hash_changes"), [("off", True), ("kubernetes", False)])
    async def test_where_the_leader_is_elected(
        self,
        path: Path,
        election: str,
        hash_changes: bool,  # noqa: FBT001 - a parameter
    ) -> None:
        """The Lease does not move with the sources to another namespace: both stay."""
        fixed = {"availability": {"election": election}}
        write(path, **fixed, kubernetes={"namespace": "models"})
        async with followed(path) as (configuration, _told):
            before = configuration.hash
            write(path, **fixed, kubernetes={"namespace": "others"})
            await eventually(lambda: configuration.problems or configuration.reload_count)

            assert (configuration.hash != before) is hash_changes
            said = [] if hash_changes else ["kubernetes.namespace cannot change"]
            assert [each.partition(" while")[0] for each in configuration.problems] == said

    @pytest.mark.parametrize(
        "changes",
        [{"endpoints": {"file": "n" * 300}}, {"objectives": {"directory": "n" * 300}}],
        ids=["endpoints", "objectives"],
    )
    async def test_not_to_be_looked_up(self, path: Path, changes: dict[str, Any]) -> None:
        """A path that the system refuses to look at is rejected, and the file still followed."""
        async with followed(path) as (configuration, _told):
            write(path, **changes)
            await eventually(lambda: configuration.rejection_count == 1)
            write(path, picker="least-loaded")
            await eventually(lambda: configuration.reload_count == 1)

            assert configuration.problems == ()

    async def test_pipe(self, path: Path) -> None:
        """A pipe in the file's place is rejected, not waited for."""
        async with followed(path) as (configuration, _told):
            path.unlink()
            os.mkfifo(path)
            await eventually(lambda: configuration.rejection_count)
            assert configuration.problems[0].endswith("cannot be read: not a regular file")
            write(path, picker="least-loaded")
            await eventually(lambda: configuration.reload_count == 1)

    async def test_a_fault_of_ours(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the reading trips over is rejected and said once; the next file is read."""

        def trip(_path: Path) -> Settings:
            message = "unforeseen"
            raise TypeError(message)

        monkeypatch.setattr("flowcontrol_server.config.reload.load_settings", trip)
        with capture_logs() as lines:
            async with followed(path) as (configuration, _told):
                await eventually(lambda: configuration.rejection_count)
                await configuration.read()
                monkeypatch.undo()
                write(path, picker="least-loaded")
                await eventually(lambda: configuration.reload_count == 1)

        rejected, changed = lines
        assert rejected["problems"] == ["cannot be read: TypeError('unforeseen')"]
        assert isinstance(rejected["exc_info"], TypeError)
        assert changed["event"] == "configuration_changed"

    async def test_a_mistake_about_another_folder(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was missing there comes, and the file counts as it is."""
        monkeypatch.setattr("flowcontrol_server.config.reload.READ_AGAIN_S", 0.1)
        elsewhere = path.parent / "secrets"
        elsewhere.mkdir()
        async with followed(path) as (configuration, told):
            write(path, endpoints={"file": "secrets/endpoints.yaml"})
            await eventually(lambda: configuration.problems)
            (elsewhere / "endpoints.yaml").write_text("[]")
            await told.until(lambda settings: settings.endpoints.file is not None)

        assert (configuration.reload_count, configuration.rejection_count) == (1, 1)
        assert configuration.problems == ()

    async def test_said_once(self, path: Path) -> None:
        """The same mistake is said once, however often the file is looked at."""
        with capture_logs() as lines:
            async with followed(path) as (configuration, _told):
                write(path, picker="best")
                await eventually(lambda: configuration.problems)
                for _ in range(3):
                    await configuration.read()
        assert [line["event"] for line in lines] == ["configuration_rejected"]

    async def test_no_file(self, path: Path) -> None:
        """A file that is removed leaves what was in force; when it is back, it counts."""
        async with followed(path) as (configuration, _told):
            path.unlink()
            await eventually(lambda: configuration.problems)
            write(path, picker="least-loaded")
            await eventually(lambda: configuration.reload_count == 1)

            assert configuration.problems == ()

    async def test_one_at_a_time(self, path: Path) -> None:
        """Two changes are applied one after the other."""
        busy = 0

        async def apply(_settings: Settings) -> None:
            nonlocal busy
            busy += 1
            assert busy == 1
            await asyncio.sleep(0)
            busy -= 1

        configuration = Configuration(load_settings(path), path, apply)
        write(path, picker="least-loaded")
        await asyncio.gather(configuration.read(), configuration.read(), configuration.read())

        assert configuration.reload_count == 1
