"""Objectives from a folder of manifests, read once and followed live."""

import asyncio
import itertools
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, final

import pytest
import structlog
from structlog.testing import capture_logs
from structlog.typing import EventDict

from flowcontrol_server.common.yamlfile import FILE_BYTES_MAX, read_documents
from flowcontrol_server.sources.folder import ObjectiveFolder

NEW, OLD = "llm-d.ai/v1alpha2", "inference.networking.x-k8s.io/v1alpha2"
TIMEOUT_S = 3.0


def manifest(
    name: str, priority: int | None = None, *, pool: str = "llama", group: str = NEW
) -> str:
    """An InferenceObjective as one YAML document."""
    said = "" if priority is None else f"  priority: {priority}\n"
    return (
        f"apiVersion: {group}\nkind: InferenceObjective\nmetadata:\n  name: {name}\n"
        f"spec:\n{said}  poolRef:\n    name: {pool}\n"
    )


CHAT = manifest("chat", 10)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> ObjectiveFolder:
    """The objectives of the pool `llama` in an empty folder."""
    return ObjectiveFolder(tmp_path, "llama")


class TestRead:
    """What counts as an objective."""

    def test_empty(self, folder: ObjectiveFolder) -> None:
        """An empty folder declares nothing, and that is no mistake."""
        assert folder.read() == {}
        assert folder.error_count == 0

    @pytest.mark.parametrize("group", [NEW, OLD])
    def test_groups(self, tmp_path: Path, folder: ObjectiveFolder, group: str) -> None:
        """Both API groups are read."""
        (tmp_path / "chat.yaml").write_text(manifest("chat", 10, group=group))

        assert folder.read() == {"chat": 10}

    @pytest.mark.parametrize(("first", "second"), [(NEW, OLD), (OLD, NEW)])
    def test_precedence(
        self, tmp_path: Path, folder: ObjectiveFolder, first: str, second: str
    ) -> None:
        """Where both groups declare a name llm-d.ai counts, in whatever file, without complaint."""
        priorities = {NEW: 1, OLD: 2}
        (tmp_path / "a.yaml").write_text(manifest("chat", priorities[first], group=first))
        (tmp_path / "b.yaml").write_text(manifest("chat", priorities[second], group=second))

        assert folder.read() == {"chat": 1}
        assert folder.error_count == 0

    def test_documents(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A file may hold several documents, empty ones too, and end in .yml."""
        documents = [manifest("chat", 10), "", manifest("batch", -1), "# nothing\n"]
        (tmp_path / "all.yml").write_text("---\n".join(documents))
        (tmp_path / "urgent.yaml").write_text(manifest("urgent", 2**31 - 1))

        assert folder.read() == {"chat": 10, "batch": -1, "urgent": 2**31 - 1}
        assert folder.error_count == 0

    def test_default_priority(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """An objective without a priority has priority 0, as in the CRD."""
        (tmp_path / "plain.yaml").write_text(manifest("plain"))

        assert folder.read() == {"plain": 0}

    def test_others_are_passed_over(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """Other kinds, other pools and other files are not our business."""
        (tmp_path / "a.yaml").write_text(CHAT + "---\napiVersion: v1\nkind: ConfigMap\n")
        (tmp_path / "b.yaml").write_text(manifest("other", 99, pool="qwen"))
        (tmp_path / "c.json").write_text("{")
        (tmp_path / "README.md").write_text(manifest("readme", 1))
        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "d.yaml").write_text(manifest("later", 1))

        assert folder.read() == {"chat": 10}
        assert folder.error_count == 0

    @pytest.mark.parametrize("kind", ["List", "InferenceObjectiveList"])
    def test_lists(self, tmp_path: Path, folder: ObjectiveFolder, kind: str) -> None:
        """A list is read, as `kubectl get -o yaml` prints it; others in it are passed over."""
        items = [manifest("chat", 10), "apiVersion: v1\nkind: Secret\n", manifest("batch", -1)]
        indented = ("  " + each.strip().replace("\n", "\n  ") for each in items)
        text = "\n".join(each.replace("  ", "- ", 1) for each in indented)
        (tmp_path / "all.yaml").write_text(f"apiVersion: v1\nkind: {kind}\nitems:\n{text}\n")

        assert folder.read() == {"chat": 10, "batch": -1}
        assert folder.error_count == 0

    def test_files_of_editors(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """What editors and tools leave beside a manifest is no manifest."""
        for name in (".chat.yaml", "#chat.yaml", "chat.yaml~", ".chat.yaml.swp", "chat.yaml.bak"):
            (tmp_path / name).write_text(CHAT)
        (tmp_path / ".#chat.yaml").symlink_to("who@where.1:2")

        assert folder.read() == {}
        assert folder.error_count == 0

    def test_fields_not_known(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """Metadata and status are let be; a field of the spec that is not known is told.

        It may be of a later version, so the objective counts; or misspelt, so it is said.
        """
        path = tmp_path / "chat.yaml"
        text = CHAT + "status:\n  conditions: []\n"
        path.write_text(text.replace("name: chat", "name: chat\n  labels: {}"))
        assert folder.read() == {"chat": 10}
        assert folder.error_count == 0

        path.write_text(CHAT.replace("priority", "priorty"))
        assert [folder.read(), folder.read()] == [{"chat": 0}] * 2
        assert folder.problems == {
            "chat.yaml": "'chat': spec.priorty is not a known field and is ignored, "
            "did you mean priority?"
        }
        assert folder.error_count == 1

        path.write_text(CHAT.replace("priority", "ttft: 1\n  priorty"))
        assert folder.read() == {"chat": 0}
        assert folder.problems == {
            "chat.yaml": "'chat': spec.ttft is not a known field and is ignored, and 1 more"
        }

    def test_removal(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """An objective is gone with its file."""
        (tmp_path / "chat.yaml").write_text(CHAT)
        (tmp_path / "batch.yaml").write_text(manifest("batch", -1))
        folder.read()
        (tmp_path / "chat.yaml").unlink()

        assert folder.read() == {"batch": -1}
        assert folder.error_count == 0

    def test_duplicates(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """Of one name in one group the first file counts, and the second is complained of."""
        (tmp_path / "a.yaml").write_text(CHAT)
        (tmp_path / "b.yaml").write_text(manifest("chat", 20))

        with capture_logs() as lines:
            assert folder.read() == {"chat": 10}

        assert folder.error_count == 1
        expected = {
            "event": "objective_rejected",
            "file": str(tmp_path / "b.yaml"),
            "problem": "'chat' is declared in a.yaml already",
            "log_level": "error",
        }
        assert lines == [expected]

    def test_duplicates_in_one_file(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """Within one file the first document counts."""
        (tmp_path / "a.yaml").write_text(CHAT + "---\n" + manifest("chat", 20))

        assert folder.read() == {"chat": 10}
        assert folder.error_count == 1


KIND_RULE = "kind must be InferenceObjective or the full name of another kind, got"
BAD = {
    "no mapping": ("- a\n", "1: must be a mapping with apiVersion and kind"),
    "text": ("chat\n", "1: must be a mapping with apiVersion and kind"),
    "no kind": ("apiVersion: v1\n", "1: must be a mapping with apiVersion and kind"),
    "kind in other letters": (
        CHAT.replace("InferenceObjective", "inferenceobjective"),
        f"2: inferenceobjective 'chat': {KIND_RULE} 'inferenceobjective'",
    ),
    "kind misspelt": (
        CHAT.replace("InferenceObjective", "InferenceObjectve"),
        f"2: InferenceObjectve 'chat': {KIND_RULE} 'InferenceObjectve'",
    ),
    "kind in the plural": (
        CHAT.replace("InferenceObjective", "InferenceObjectives"),
        f"2: InferenceObjectives 'chat': {KIND_RULE} 'InferenceObjectives'",
    ),
    "version": (
        CHAT.replace("v1alpha2", "v9"),
        f"1: InferenceObjective 'chat': apiVersion must be one of {NEW}, {OLD}, got 'llm-d.ai/v9'",
    ),
    "no version": (
        "kind: InferenceObjective\n",
        f"1: apiVersion must be one of {NEW}, {OLD}, got None",
    ),
    "no name": (CHAT.replace("name: chat", "labels: {}"), "3: metadata.name is required"),
    "no pool": (
        CHAT.replace("poolRef:\n    name: llama", "ref: llama"),
        "5: InferenceObjective 'chat': spec.poolRef is required",
    ),
    "priority is text": (
        CHAT.replace("10", "high"),
        "6: InferenceObjective 'chat': spec.priority must be a whole number, got 'high'",
    ),
    "priority is quoted": (
        CHAT.replace("10", "'10'"),
        "6: InferenceObjective 'chat': spec.priority must be a whole number, got '10'",
    ),
    "priority is a boolean": (
        CHAT.replace("10", "yes"),
        "6: InferenceObjective 'chat': spec.priority must be a whole number, got True",
    ),
    "priority is a fraction": (
        CHAT.replace("10", "1.5"),
        "6: InferenceObjective 'chat': spec.priority must be a whole number, got 1.5",
    ),
    "priority is too large": (
        CHAT.replace("10", str(2**31)),
        "6: InferenceObjective 'chat': spec.priority must be <= 2147483647, got 2147483648",
    ),
    "priority is too small": (
        CHAT.replace("10", str(-(2**31) - 1)),
        "6: InferenceObjective 'chat': spec.priority must be >= -2147483648, got -2147483649",
    ),
    "second document": (
        CHAT + "---\n" + manifest("batch").replace("name: llama", "kind: Pool"),
        "15: document 2, InferenceObjective 'batch': spec.poolRef.name is required",
    ),
    "in a list": (
        "kind: List\napiVersion: v1\nitems:\n- kind: Secret\n- {kind: InferenceObjective}\n",
        f"5: apiVersion must be one of {NEW}, {OLD}, got None",
    ),
    "a list of nothing": ("kind: List\nitems: x\n", "2: items of a List must be a list, got 'x'"),
}
UNREADABLE = {
    "syntax": b"kind: [",
    "not UTF-8": b"kind: \xff",
    "control character": b"kind: \0",
    "no such day": b"kind: InferenceObjective\ncreated: 2026-02-30\n",
    "no number": b"kind: 0x_",
    "no boolean": b"kind: !!bool maybe",
    "no time": b"kind: !!timestamp soon",
    "no mapping": b"pool: !!map [a]",
}


class TestMistakes:
    """One bad manifest never takes the others down."""

    @pytest.mark.parametrize(("text", "problem"), BAD.values(), ids=BAD)
    def test_words(self, tmp_path: Path, folder: ObjectiveFolder, text: str, problem: str) -> None:
        """The error is counted, and names file, line, document, object, field and value."""
        path = tmp_path / "chat.yaml"
        path.write_text(text)
        (tmp_path / "other.yaml").write_text(manifest("other", 1))

        with capture_logs() as lines:
            assert folder.read() == {"other": 1}

        assert folder.error_count == 1
        assert [line["file"] for line in lines] == [str(path)]
        assert [line["problem"] for line in lines] == [f"{path}:{problem}"]

    @pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
    def test_unreadable(self, tmp_path: Path, folder: ObjectiveFolder, content: bytes) -> None:
        """What cannot be read at all is a mistake in that file, like any other."""
        (tmp_path / "chat.yaml").write_bytes(content)
        (tmp_path / "other.yaml").write_text(manifest("other", 1))

        with capture_logs() as lines:
            assert folder.read() == {"other": 1}

        assert folder.error_count == 1
        assert re.search(r"chat\.yaml(:\d+)?: (is not YAML|cannot be read): ", lines[0]["problem"])
        assert "\n" not in lines[0]["problem"]

    def test_last_good_counts(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """What a file last said without a mistake keeps counting, until it is mended."""
        path = tmp_path / "chat.yaml"
        path.write_text(CHAT + "---\n" + manifest("batch", -1))
        folder.read()

        path.write_text(manifest("chat", 20) + "---\nspec: {}\n")
        assert folder.read() == {"chat": 10, "batch": -1}
        assert folder.error_count == 1

        path.write_text(manifest("chat", 20))
        assert folder.read() == {"chat": 20}
        assert folder.error_count == 1

    @pytest.mark.parametrize(
        "text",
        ["", "# later\n", "kind: ConfigMap\n", CHAT.replace("llama", "lla"), CHAT[:35], CHAT[:7]],
        ids=["emptied", "comment", "kind", "pool", "half a kind", "half a line"],
    )
    def test_none_left(self, tmp_path: Path, folder: ObjectiveFolder, text: str) -> None:
        """A file that has declared objectives and declares none is taken for half written."""
        path = tmp_path / "chat.yaml"
        path.write_text(CHAT)
        folder.read()
        path.write_text(text)

        assert [folder.read(), folder.read()] == [{"chat": 10}] * 2
        assert list(folder.problems) == ["chat.yaml"]
        assert folder.error_count == 1
        path.unlink()
        assert folder.read() == {}
        assert folder.problems == {}

    def test_every_half(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """However little of a file has been written, what it declared stays."""
        path = tmp_path / "chat.yaml"
        path.write_text(CHAT)
        folder.read()
        known = []
        with capture_logs():
            for length in range(len(CHAT)):
                path.write_text(CHAT[:length])
                known.append(folder.read())

        assert known == [{"chat": 10}] * len(CHAT)

    def test_half_a_kind(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """So it is in the last of several documents; one that is gone as a whole is gone."""
        path = tmp_path / "all.yaml"
        path.write_text(CHAT + "---\n" + manifest("batch", 2))
        folder.read()
        path.write_text(CHAT + f"---\napiVersion: {NEW}\nkind: Infer")
        assert folder.read() == {"chat": 10, "batch": 2}
        assert folder.problems == {
            "all.yaml": f"{path}:11: document 2: kind must be InferenceObjective or the full "
            "name of another kind, got 'Infer'"
        }
        path.write_text(CHAT)

        assert folder.read() == {"chat": 10}
        assert folder.problems == {}

    def test_last_good_goes_with_its_file(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """What a removed file once said does not count when it comes back bad."""
        path = tmp_path / "chat.yaml"
        path.write_text(CHAT)
        folder.read()
        path.unlink()
        folder.read()
        path.write_text("[")

        assert folder.read() == {}

    def test_dangling_link(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A link to nothing is a mistake; so is a folder that is called like a manifest."""
        (tmp_path / "chat.yaml").symlink_to(tmp_path / "nothing")
        (tmp_path / "folder.yaml").mkdir()

        assert folder.read() == {}
        assert folder.error_count == 2

    def test_what_would_never_end(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A pipe is not read, and neither is what is too large; the others are."""
        os.mkfifo(tmp_path / "pipe.yaml")
        (tmp_path / "large.yaml").write_bytes(b"#" * (FILE_BYTES_MAX + 1))
        (tmp_path / "chat.yaml").write_text(CHAT)

        assert folder.read() == {"chat": 10}
        assert folder.error_count == 2
        assert "not a regular file" in folder.problems["pipe.yaml"]
        assert "must be at most 1048576 bytes" in folder.problems["large.yaml"]

    def test_standing_mistakes(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """What is wrong now can be asked for, until it is mended."""
        path = tmp_path / "chat.yaml"
        path.write_text("- a")
        folder.read()
        assert list(folder.problems) == ["chat.yaml"]
        path.write_text(CHAT)
        folder.read()

        assert folder.problems == {}

    def test_said_once(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A mistake that stands is said and counted once; another, and one that comes again, too.

        However often the folder is looked at, and whatever becomes of other files.
        """
        bad, twice = tmp_path / "a.yaml", tmp_path / "c.yaml"
        bad.write_text("- a")
        (tmp_path / "b.yaml").write_text(CHAT + "---\n" + manifest("batch", -1))
        twice.write_text(CHAT + "---\n" + manifest("batch", -2))

        with capture_logs() as lines:
            for index in range(10):
                (tmp_path / "d.yaml").write_text(manifest("other", index))
                assert folder.read() == {"chat": 10, "batch": -1, "other": index}
            assert [(Path(line["file"]).name, line["problem"]) for line in lines] == [
                ("c.yaml", "'chat' is declared in b.yaml already, and 1 more"),
                ("a.yaml", f"{bad}:1: must be a mapping with apiVersion and kind"),
            ]
            assert folder.error_count == 2
            twice.write_text(CHAT)
            folder.read()
            assert folder.problems["c.yaml"] == "'chat' is declared in b.yaml already"
            bad.unlink()
            folder.read()
            assert list(folder.problems) == ["c.yaml"]
            bad.write_text("- a")
            folder.read()

        assert folder.error_count == len(lines) == 4

    def test_the_folder_itself(self, tmp_path: Path) -> None:
        """When the folder cannot be read what was known stays; that is a mistake, too."""
        directory = tmp_path / "folder"
        directory.mkdir()
        (directory / "chat.yaml").write_text(CHAT)
        folder = ObjectiveFolder(directory, "llama")
        folder.read()
        directory.rename(tmp_path / "elsewhere")

        assert folder.read() == {"chat": 10}
        assert folder.read() == {"chat": 10}
        assert folder.error_count == 1
        assert folder.problems == {"folder": "cannot be read: No such file or directory"}


@final
class Told:
    """What a follower was told, in order."""

    def __init__(self) -> None:
        self.sets: list[dict[str, int]] = []
        self._news = asyncio.Event()

    def changed(self, priorities: Mapping[str, int]) -> None:
        """Take one set."""
        self.sets.append(dict(priorities))
        self._news.set()

    async def until(self, expected: dict[str, int], timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the latest set is the one expected."""
        async with asyncio.timeout(timeout_s):
            while not self.sets or self.sets[-1] != expected:
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def following(folder: ObjectiveFolder, directory: Path) -> AsyncIterator[Told]:
    """Follow a folder; begin when the watcher, which does not say so itself, is seen to watch."""
    before = folder.read()
    told = Told()
    task = asyncio.create_task(folder.follow(told.changed))
    probes: list[Path] = []
    for number in itertools.count():
        probes.append(directory / f"probe-{number}.yaml")
        probes[-1].write_text(manifest(f"probe-{number}", 1))
        with suppress(TimeoutError):
            await told.until({**before, **{probe.stem: 1 for probe in probes}}, 0.3)
            break
    for probe in probes:
        probe.unlink()
    await told.until(before)
    told.sets.clear()
    try:
        yield told
        assert not task.done(), "whatever happens, following goes on"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def mistakes_heard() -> AsyncIterator[asyncio.Event]:
    """An event that is set when a mistake is complained of, in whatever thread."""
    loop, heard = asyncio.get_running_loop(), asyncio.Event()

    def hear(_logger: object, _method: str, event: EventDict) -> EventDict:
        loop.call_soon_threadsafe(heard.set)
        return event

    processors = structlog.get_config()["processors"]
    structlog.configure(processors=[hear, *processors])
    try:
        yield heard
    finally:
        structlog.configure(processors=processors)


class TestFollow:
    """Changes are told while the service runs."""

    async def test_files(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """New, changed, replaced and removed files are all noticed."""
        path = tmp_path / "chat.yaml"
        async with following(folder, tmp_path) as told:
            path.write_text(CHAT)
            await told.until({"chat": 10})

            path.write_text(manifest("chat", 11))
            await told.until({"chat": 11})

            replacement = tmp_path / "chat.tmp"
            replacement.write_text(manifest("chat", 12))
            replacement.rename(path)
            await told.until({"chat": 12})

            path.unlink()
            await told.until({})

    async def test_a_mounted_config_map(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """Kubernetes swaps one link to exchange all files of a ConfigMap at once."""

        def mount(version: str, files: dict[str, str]) -> None:
            (tmp_path / version).mkdir()
            for name, text in files.items():
                (tmp_path / version / name).write_text(text)
            (tmp_path / "..data_tmp").symlink_to(version)
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")

        mount("..2026_01", {"chat.yaml": CHAT, "batch.yaml": manifest("batch", -1)})
        for name in ("chat.yaml", "batch.yaml"):
            (tmp_path / name).symlink_to(Path("..data") / name)
        assert folder.read() == {"chat": 10, "batch": -1}
        async with following(folder, tmp_path) as told:
            mount(
                "..2026_02",
                {"chat.yaml": manifest("chat", 20), "batch.yaml": manifest("batch", -2)},
            )

            await told.until({"chat": 20, "batch": -2})

        assert folder.error_count == 0

    async def test_half_written(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A file caught half written changes nothing; when it is complete, it counts."""
        path, marker = tmp_path / "chat.yaml", tmp_path / "marker.yaml"
        path.write_text(CHAT)
        async with following(folder, tmp_path) as told:
            whole = manifest("chat", 20)
            path.write_text(whole[:30])
            marker.write_text(manifest("marker", 1))
            await told.until({"chat": 10, "marker": 1})

            path.write_text(whole)
            await told.until({"chat": 20, "marker": 1})

        assert folder.error_count > 0

    async def test_only_differences(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A file that is touched but says the same is no news."""
        path = tmp_path / "chat.yaml"
        path.write_text(CHAT)
        async with following(folder, tmp_path) as told, mistakes_heard() as heard:
            path.write_text("# a comment\n" + CHAT)
            (tmp_path / "bad.yaml").write_text("[")  # so that the read is heard
            await asyncio.wait_for(heard.wait(), TIMEOUT_S)
            (tmp_path / "last.yaml").write_text(manifest("last", 1))
            await told.until({"chat": 10, "last": 1})

            assert told.sets == [{"chat": 10, "last": 1}]

    async def test_a_stumbling_block(self, tmp_path: Path, folder: ObjectiveFolder) -> None:
        """A manifest that the YAML reader stumbles over does not end the following."""
        async with following(folder, tmp_path) as told:
            (tmp_path / "bad.yaml").write_bytes(UNREADABLE["no such day"])
            (tmp_path / "chat.yaml").write_text(CHAT)

            await told.until({"chat": 10})

    async def test_an_error_nobody_thought_of(
        self, tmp_path: Path, folder: ObjectiveFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is the file's problem, told once; the others go on, also what changes after it."""

        def read(path: Path, bytes_max: int) -> list[Any]:
            if path.name == "bad.yaml":
                message = "what\nnow"
                raise ZeroDivisionError(message)
            return read_documents(path, bytes_max)

        monkeypatch.setattr("flowcontrol_server.sources.folder.read_documents", read)
        (tmp_path / "bad.yaml").touch()
        (tmp_path / "chat.yaml").write_text(CHAT)
        async with following(folder, tmp_path) as told:
            (tmp_path / "chat.yaml").write_text(manifest("chat", 11))
            await told.until({"chat": 11})

        problem = f"{tmp_path}/bad.yaml: cannot be read: ZeroDivisionError: what now"
        assert folder.problems == {"bad.yaml": problem}
        assert folder.error_count == 1

    async def test_changes_since_the_last_read(
        self, tmp_path: Path, folder: ObjectiveFolder
    ) -> None:
        """What has changed between the first read and the following is told, not swallowed."""
        told = Told()
        assert folder.read() == {}
        (tmp_path / "chat.yaml").write_text(CHAT)

        task = asyncio.create_task(folder.follow(told.changed))
        try:
            await told.until({"chat": 10}, 1.0)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
