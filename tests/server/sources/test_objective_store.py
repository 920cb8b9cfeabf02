"""Objectives that callers put and delete, and the file they are kept in."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from structlog.testing import capture_logs

from flowcontrol_server.common.sections import PRIORITY_MAX
from flowcontrol_server.sources.folder import ObjectiveFolder
from flowcontrol_server.sources.objective_store import ObjectiveStore
from flowcontrol_server.sources.objectives import (
    GROUPS,
    NAME_LENGTH_MAX,
    OBJECTIVES_MAX,
    Objective,
    to_manifest,
)
from tests.support.told import Told, eventually, following

Priorities = Mapping[str, int]
CHAT = to_manifest(Objective("chat", 10, GROUPS[0]), "llama")
OTHER_POOLS = to_manifest(Objective("search", 5, GROUPS[0]), "qwen")


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    """Where objectives are kept."""
    return tmp_path / "objectives.yaml"


async def kept(file: Path | None) -> Priorities:
    """What a store that is opened now knows."""
    told: Told[Priorities] = Told()
    async with following(ObjectiveStore(file, "llama"), told):
        return await told.until(lambda _news: True)


class TestChanges:
    """Put and delete."""

    async def test_put_and_delete(self) -> None:
        """Each change is told at once, as a whole set."""
        store, told = ObjectiveStore(None, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)
            await store.put("batch", -1)
            await store.put("chat", 20)
            assert await store.delete("batch")
            assert not await store.delete("batch")

        assert told.news == [
            {},
            {"chat": 10},
            {"chat": 10, "batch": -1},
            {"chat": 20, "batch": -1},
            {"chat": 20},
        ]

    async def test_at_the_same_time(self, file: Path) -> None:
        """Changes at the same time do not lose each other."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await asyncio.gather(*(store.put(f"n{index}", index) for index in range(20)))

        assert await kept(file) == {f"n{index}": index for index in range(20)}

    @pytest.mark.parametrize(
        ("name", "priority", "problem"),
        [
            ("", 1, "name must be printable, of 1 to 253 characters, got ''"),
            ("a\n", 1, "name must be printable"),
            ("a" * (NAME_LENGTH_MAX + 1), 1, "name must be printable"),
            ("a", PRIORITY_MAX + 1, "priority must fit into 32 bits, got 2147483648"),
            ("a", -PRIORITY_MAX - 2, "priority must fit into 32 bits"),
        ],
    )
    async def test_out_of_range(self, name: str, priority: int, problem: str) -> None:
        """What the CRD would refuse is refused, and changes nothing."""
        store, told = ObjectiveStore(None, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            with pytest.raises(ValueError, match=problem):
                await store.put(name, priority)

        assert told.news == [{}]

    async def test_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is a limit to them; those that are there may still change."""
        assert OBJECTIVES_MAX >= 1000
        monkeypatch.setattr("flowcontrol_server.sources.objective_store.OBJECTIVES_MAX", 2)
        store, told = ObjectiveStore(None, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("a", 1)
            await store.put("b", 1)
            with pytest.raises(ValueError, match="at most 2"):
                await store.put("c", 1)
            await store.put("b", 2)

        assert told.news[-1] == {"a": 1, "b": 2}


class TestFile:
    """What is kept across restarts."""

    async def test_kept(self, file: Path) -> None:
        """What was put is there after a restart; what was deleted is not."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat: [", 10)
            await store.put("yes", -1)
            await store.put("gone", 1)
            await store.delete("gone")

        assert await kept(file) == {"chat: [": 10, "yes": -1}
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    async def test_it_is_a_manifest(self, file: Path) -> None:
        """The file can be moved into a folder of manifests as it is."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)

        assert ObjectiveFolder(file.parent, "llama").read() == {"chat": 10}

    @pytest.mark.parametrize("is_there", [True, False])
    async def test_link(self, file: Path, *, is_there: bool) -> None:
        """A link to the file, such as one into a volume, stays one."""
        target = file.parent / "volume" / "kept.yaml"
        target.parent.mkdir()
        if is_there:
            target.touch()
        file.symlink_to(target)
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)

        assert file.readlink() == target
        assert await kept(target) == {"chat": 10}

    async def test_no_file_yet(self, file: Path) -> None:
        """A file that is not there yet is an empty one."""
        assert await kept(file) == {}
        assert await kept(None) == {}

    @pytest.mark.parametrize(
        ("text", "problem"), [("[", "is not YAML"), ("a: !!map [b]", "objectives.yaml:")]
    )
    async def test_a_bad_file_is_left_alone(self, file: Path, text: str, problem: str) -> None:
        """A file that cannot be read is not written over; that is shown."""
        file.write_text(text)
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await eventually(lambda: store.problems)
            with pytest.raises(OSError, match=problem):
                await store.put("chat", 10)
            with pytest.raises(OSError, match=problem):
                await store.delete("chat")

        assert told.news == [], "what was in force before stays"
        assert file.read_text() == text
        assert (store.error_count, list(store.problems)) == (1, [file.name])

    async def test_a_bad_file_that_is_mended(self, file: Path) -> None:
        """As soon as it can be read it is told, and changes are taken; a mistake is said once."""

        def replace(text: str) -> None:
            (file.parent / "new").write_text(text)
            (file.parent / "new").rename(file)

        replace("[")
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        with capture_logs() as lines:
            async with following(store, told):
                await eventually(lambda: store.error_count == 1)
                replace("[")
                replace("- a")
                await eventually(lambda: store.error_count == 2)
                replace(yaml.safe_dump(to_manifest(Objective("chat", 10, GROUPS[0]), "llama")))
                await told.until_equal({"chat": 10})
                assert store.problems == {}
                await store.put("batch", -1)

        assert told.news == [{"chat": 10}, {"chat": 10, "batch": -1}]
        assert [line["event"] for line in lines] == ["objective_rejected"] * 2

    @pytest.mark.parametrize(
        ("more", "named"),
        [
            (OTHER_POOLS, "InferenceObjective 'search'"),
            ({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}}, "Service 'x'"),
            ({"apiVersion": "flowcontrol/v1alpha1", "kind": "FlowControlConfig"}, "a FlowControl"),
        ],
        ids=["another pool", "another kind", "no name"],
    )
    async def test_what_is_not_ours(self, file: Path, more: object, named: str) -> None:
        """What each change would write over counts, but no change is taken until it is moved."""
        text = yaml.safe_dump_all([CHAT, more])
        file.write_text(text)
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({"chat": 10})
            with pytest.raises(OSError, match=f"it also holds {named}"):
                await store.put("batch", -1)
            assert file.read_text() == text
            file.write_text(yaml.safe_dump(CHAT))
            await eventually(lambda: not store.problems)
            await store.put("batch", -1)

        assert await kept(file) == {"chat": 10, "batch": -1}

    async def test_written_by_others(self, file: Path) -> None:
        """What others write counts: by hand, or a replica that keeps its objectives there, too."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        other, heard = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told), following(other, heard):
            await told.until_equal({})
            await store.put("chat", 20)
            await heard.until_equal({"chat": 20})
            file.write_text(yaml.safe_dump(CHAT))
            await other.put("batch", -1)
            await told.until_equal({"chat": 10, "batch": -1})
            await other.delete("batch")
            await other.delete("chat")
            await told.until_equal({})

        assert {"chat": 10} in heard.news
        assert (store.error_count, other.error_count) == (0, 0)

    @pytest.mark.parametrize("is_there", [True, False])
    async def test_emptied(self, file: Path, is_there: bool) -> None:  # noqa: FBT001 - a parameter
        """A file that is being written, or has been removed, takes nothing back."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)
            if is_there:
                file.write_text("")
            else:
                file.unlink()
            await store.put("batch", -1)

        assert told.news[-1] == await kept(file) == {"chat": 10, "batch": -1}

    @pytest.mark.parametrize("way", ["to a file", "to memory", "to a file that is there"])
    async def test_in_place_of_another(self, file: Path, way: str) -> None:
        """Where they are kept changes while they count; what is in a file already counts more."""
        first = file if way == "to memory" else None
        old, told = ObjectiveStore(first, "llama"), Told[Priorities]()
        async with following(old, told):
            await told.until_equal({})
            await old.put("chat", 20)
        if way == "to a file that is there":
            file.write_text(yaml.safe_dump(CHAT))
        second = None if way == "to memory" else file
        new, heard = ObjectiveStore(second, "llama", old), Told[Priorities]()
        async with following(new, heard):
            await heard.until(lambda _news: True)
            await new.put("batch", -1)

        chat = 10 if way == "to a file that is there" else 20
        assert heard.news == [{"chat": chat}, {"chat": chat, "batch": -1}]
        if second is not None:
            assert await kept(file) == heard.news[-1]

    async def test_followed_again(self) -> None:
        """What is kept in memory alone outlives the following."""
        store, told = ObjectiveStore(None, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)
        again: Told[Priorities] = Told()
        async with following(store, again):
            await again.until_equal({"chat": 10})

    async def test_not_written(self, file: Path) -> None:
        """What could not be kept has not changed."""
        store, told = ObjectiveStore(file, "llama"), Told[Priorities]()
        async with following(store, told):
            await told.until_equal({})
            await store.put("chat", 10)
            file.unlink()
            file.mkdir()
            (file / "in the way").touch()
            with pytest.raises(OSError, match="irectory"):
                await store.put("chat", 20)

        assert told.news[-1] == {"chat": 10}
