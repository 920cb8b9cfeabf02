"""Watching a folder that is changed, swapped and removed."""

import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from watchfiles import Change, awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from flowcontrol_server.common.watched import watch_folder
from tests.support.told import Told, eventually, following

LOOK_AGAIN_MS = 50
REFUSALS = 3
Names = tuple[str, ...]
Changes = set[tuple[Change, str]]


def contains(name: str, names: Names) -> bool:
    """Whether a name is among some."""
    return name in names


class _Names:
    """Tells the names in a folder at every look."""

    def __init__(self, directory: Path, told: Told[Names]) -> None:
        self._directory = directory
        self._told = told

    async def follow(self, _changed: object) -> None:
        """Watch the folder."""
        await watch_folder(self._directory, self._look, LOOK_AGAIN_MS)

    async def _look(self) -> None:
        names = (
            (path.name for path in self._directory.iterdir()) if self._directory.is_dir() else ()
        )
        self._told.changed(tuple(sorted(names)))


async def test_changes(tmp_path: Path) -> None:
    """A look at once, and one after every change."""
    (tmp_path / "a").touch()
    told: Told[Names] = Told()
    async with following(_Names(tmp_path, told), told):
        await told.until_equal(("a",))
        for name in "bcd":
            (tmp_path / name).touch()
            await told.until(partial(contains, name))
        (tmp_path / "a").unlink()
        await told.until_equal(("b", "c", "d"))


async def test_a_folder_made_anew(tmp_path: Path) -> None:
    """A folder that is removed and made again is watched again."""
    folder = tmp_path / "folder"
    folder.mkdir()
    told: Told[Names] = Told()
    async with following(_Names(folder, told), told):
        await told.until_equal(())
        (folder / "a").touch()
        await told.until_equal(("a",))
        shutil.rmtree(folder)
        await told.until_equal(())
        folder.mkdir()
        (folder / "b").touch()
        await told.until_equal(("b",))
        (folder / "c").touch()
        await told.until_equal(("b", "c"))


async def test_a_link_that_is_swapped(tmp_path: Path) -> None:
    """As git-sync does: the folder is a link, which is replaced by one that leads elsewhere."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / f"from-{version}").touch()
    link = tmp_path / "current"
    link.symlink_to("1")
    told: Told[Names] = Told()
    async with following(_Names(link, told), told):
        await told.until_equal(("from-1",))
        new = tmp_path / "new"
        new.symlink_to("2")
        new.rename(link)
        await told.until_equal(("from-2",))
        (tmp_path / "2" / "later").touch()
        await told.until_equal(("from-2", "later"))


async def test_what_a_link_leads_to(tmp_path: Path) -> None:
    """A change outside of the folder, of a file that is in it by a link, is followed by a look."""
    folder, target = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    target.write_text("old")
    link = folder / "a"
    link.symlink_to(target)
    told: Told[str] = Told()

    async def look() -> None:
        told.changed(link.read_text() if link.exists() else "gone")

    class _Followed:
        async def follow(self, _changed: object) -> None:
            await watch_folder(folder, look, LOOK_AGAIN_MS)

    async with following(_Followed(), told):
        await told.until_equal("old")
        target.write_text("written in place")
        await told.until_equal("written in place")
        (tmp_path / "new").write_text("replaced")
        (tmp_path / "new").rename(target)
        await told.until_equal("replaced")
        target.unlink()
        await told.until_equal("gone")
        looks = len(told.news)
        (folder / "b").touch()
        await eventually(lambda: len(told.news) > looks)

    assert told.news[-1] == "gone"


async def test_not_there_yet(tmp_path: Path) -> None:
    """A folder that comes later is watched from then on."""
    folder = tmp_path / "folder"
    told: Told[Names] = Told()
    async with following(_Names(folder, told), told):
        await told.until_equal(())
        folder.mkdir()
        (folder / "a").touch()
        await told.until_equal(("a",))


@pytest.mark.parametrize(
    "refusal",
    [
        PermissionError("denied"),
        OSError("OS file watch limit reached."),
        WatchfilesRustInternalError("Error creating recommended watcher: Too many open files"),
    ],
    ids=["permission", "watches", "instances"],
)
async def test_a_folder_that_cannot_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """It is looked at again and again, until it can be watched; that is said once."""
    refused = 0

    async def watch(directory: Path, **settings: Any) -> AsyncIterator[Changes]:
        nonlocal refused
        if refused < REFUSALS:
            refused += 1
            raise refusal
        async for changes in awatch(directory, **settings):
            yield changes

    monkeypatch.setattr("flowcontrol_server.common.watched.awatch", watch)
    told: Told[Names] = Told()
    with capture_logs() as lines:
        async with following(_Names(tmp_path, told), told):
            await eventually(lambda: refused == REFUSALS <= len(told.news))
            (tmp_path / "a").touch()
            await told.until_equal(("a",))

    assert [(line["event"], line["reason"]) for line in lines] == [("folder_polled", str(refusal))]
    assert told.news[:REFUSALS] == [()] * REFUSALS


async def test_a_look_that_fails(tmp_path: Path) -> None:
    """Its error is the caller's, also if it is of a kind that watching raises."""

    async def look() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        await watch_folder(tmp_path, look, LOOK_AGAIN_MS)
