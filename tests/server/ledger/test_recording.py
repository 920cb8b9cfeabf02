"""The feed between the processor and who records it, the ledger's files, and their replay."""

import json
import re
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import LedgerError
from flowcontrol.events import Arrived, Left
from flowcontrol.replay.ledger import Checkpoint, Entry, Gap, Header, Turn
from flowcontrol.request import Request
from flowcontrol_server.cli import main
from flowcontrol_server.ledger.reader import header_of, parts_of, read_entries
from flowcontrol_server.ledger.recording import TurnFeed
from flowcontrol_server.ledger.writer import LedgerWriter
from tests.support.recorded import SECOND, Recording, busy, small_config
from tests.support.told import eventually

JOIN_S = 10.0
LARGE = 1 << 40
CONFIG_TEXT = """\
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
objectives: {directory: nowhere}
endpoints: {static: []}
saturation: {maxConcurrency: 8}
picker: least-loaded
flowControl: {maxRequests: 60, requestTTL: 2s, weights: {tenant-0: 3}}
"""


def turn(now_ns: int, *facts: Arrived | Left) -> Turn:
    """A turn without decisions."""
    return Turn(now_ns, facts, [])


def kinds(entries: Sequence[Entry]) -> list[str]:
    """What they are."""
    return [type(entry).__name__ for entry in entries]


def written(
    path: Path, recording: Recording, *, bytes_max: int = LARGE, files: int = 9, hides: bool = False
) -> LedgerWriter:
    """Write a recording as the service would, each turn given time to be taken."""
    feed = TurnFeed()
    writer = LedgerWriter(path, bytes_max, files, feed, hides_flows=hides)
    again = Recording(recording.config, recording.began_ns)
    writer.start(recording.config, recording.began_ns)
    for each in recording.turns:
        again.turn(each.now_ns, *each.facts)
        feed.turned(again.controller, each)
    writer.close(JOIN_S)
    return writer


def replayed(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


class Told:
    """A writer, told turn by turn.

    Args:
        path: its newest part.
        bytes_max: of a part, of which four are kept.
    """

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.count = 0
        """Of turns so far."""
        self._recording = Recording(small_config(), 5)
        self.feed = TurnFeed()
        self.writer = LedgerWriter(path, bytes_max, 4, self.feed, hides_flows=False)
        self.writer.start(self._recording.config, 5)

    def turn(self, turn: Turn | None = None) -> None:
        """Let the engine take another, in which a request arrives; or tell of one it never took."""
        self.count += 1
        self._recording.turn(self.count * SECOND, Arrived(Request(self.count)))
        self.feed.turned(self._recording.controller, turn or self._recording.turns[-1])

    async def until(self, *, turns: int, lost_turns: int = 0) -> None:
        """Wait until so many are written, and so many lost."""
        writer = self.writer
        await eventually(lambda: (writer.turns, writer.lost_turns) == (turns, lost_turns))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again without waiting."""
    monkeypatch.setattr("flowcontrol_server.ledger.writer.RETRY_S", 0.0)


@contextmanager
def file_size_max(bytes_max: int) -> Iterator[None]:
    """No file of this process can grow beyond that, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(path: Path) -> None:
    """Let the next part of a ledger be begun where there is no room, once."""
    path.with_name(f"{path.name}.new").symlink_to("/dev/full")


def part_number(path: Path) -> int | None:
    """Return the number of the newest part; None: it is just being begun."""
    try:
        return header_of(path).part
    except LedgerError:
        return None


def contents(folder: Path) -> dict[str, str]:
    """What is in its files."""
    return {each.name: each.read_text() for each in folder.iterdir()}


class TestFeed:
    """Never in the processor's way."""

    def test_in_order(self) -> None:
        """What went in comes out, and nothing after the end."""
        feed, controller = TurnFeed(), Recording(small_config()).controller
        turns = [turn(1), turn(2)]
        for each in turns:
            feed.turned(controller, each)
        feed.close()
        feed.turned(controller, turn(3))

        assert turns == list(feed.take(0))
        assert list(feed.take(0)) == []

    def test_what_does_not_fit_is_a_gap_with_a_checkpoint_behind_it(self) -> None:
        """Told as soon as there is room again."""
        feed, controller = TurnFeed(size_max=4), Recording(small_config()).controller
        for now_ns in range(1, 8):
            feed.turned(controller, turn(now_ns, Left(1)))
        taken = list(feed.take(0))
        feed.turned(controller, turn(8))
        feed.turned(controller, turn(9))

        assert kinds(taken) == ["Turn", "Turn"]
        assert [Gap(5), turn(8), turn(9)] == [
            each for each in feed.take(0) if not isinstance(each, Checkpoint)
        ]
        assert feed.missed_turns == 5

    def test_a_checkpoint_is_taken_when_wanted(self) -> None:
        """Behind the next turn, once."""
        feed, controller = TurnFeed(), Recording(small_config()).controller
        feed.want_checkpoint()
        feed.turned(controller, turn(1))
        feed.turned(controller, turn(2))

        assert kinds(feed.take(0)) == ["Turn", "Checkpoint", "Turn"]

    def test_sleep_ends_with_the_first_entry_or_the_end(self) -> None:
        """The taker waits for nothing else."""
        feed = TurnFeed()
        taken: list[Sequence[Entry]] = []
        taker = Thread(target=lambda: taken.extend((feed.take(0), feed.take(0))))
        taker.start()
        feed.turned(Recording(small_config()).controller, turn(1))
        feed.close()
        taker.join(JOIN_S)

        assert [turn(1)] == [each for batch in taken for each in batch]


class TestFiles:
    """Written, rotated, read."""

    def test_everything_is_there(self, tmp_path: Path) -> None:
        """Header and turns, for nobody else to read."""
        path = tmp_path / "ledger.jsonl"
        recording = busy(Recording(small_config(), 5), 50)
        writer = written(path, recording)
        header, *turns = read_entries(path)

        assert isinstance(header, Header)
        assert (0, 5, recording.config) == (header.part, header.now_ns, header.config)
        assert [Turn(t.now_ns, list(t.facts), t.decisions) for t in recording.turns] == turns
        assert (len(turns), 0) == (writer.turns, writer.lost_turns)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_parts_begin_with_a_checkpoint(self, tmp_path: Path) -> None:
        """So many are kept, each about as large as allowed."""
        path = tmp_path / "ledger.jsonl"
        for seed in range(8):
            written(path, busy(Recording(small_config(), 5), 40, seed), bytes_max=2000, files=3)

        assert sorted(each.name for each in tmp_path.iterdir()) == [
            "ledger.jsonl",
            "ledger.jsonl.1",
            "ledger.jsonl.2",
        ]

    def test_a_rotated_run_reads_as_one(self, tmp_path: Path) -> None:
        """Its parts in order, as long as all are there; another run's are not among them."""
        path = tmp_path / "ledger.jsonl"
        written(path, busy(Recording(small_config(), 5), 20))
        recording = Recording(small_config(), 5)
        feed = TurnFeed()
        writer = LedgerWriter(path, 1, 9, feed, hides_flows=False)
        writer.start(recording.config, 5)
        feed.want_checkpoint()
        recording.turn(7)
        feed.turned(recording.controller, recording.turns[0])
        writer.close(JOIN_S)
        parts = parts_of(path)

        assert [part.name for part in parts] == ["ledger.jsonl.1", "ledger.jsonl"]
        assert [kinds(list(read_entries(part))) for part in parts] == [
            ["Header", "Turn"],
            ["Header", "Checkpoint"],
        ]

    def test_a_full_disk_at_the_start(self, tmp_path: Path) -> None:
        """Is said, and what an earlier run left stays as it is."""
        path = tmp_path / "ledger.jsonl"
        written(path, busy(Recording(small_config(), 5), 20))
        before = contents(tmp_path)
        full_disk(path)
        writer = LedgerWriter(path, LARGE, 2, TurnFeed(), hides_flows=False)
        with pytest.raises(OSError, match="No space left"):
            writer.start(small_config(), 5)

        assert before == contents(tmp_path)

    async def test_a_write_that_fails_is_a_gap(self, tmp_path: Path) -> None:
        """Said once; with room again a new part begins with the gap, and can be decided again."""
        path = tmp_path / "ledger.jsonl"
        told = Told(path, LARGE)
        told.turn()
        await told.until(turns=1)
        before = path.read_text()
        with capture_logs() as logs, file_size_max(len(before) + 20):
            for lost_turns in (1, 2):
                told.turn()
                await told.until(turns=1, lost_turns=lost_turns)
        for _ in range(3):
            told.turn()
        told.writer.close(JOIN_S)
        older, newer = parts_of(path)
        result = replayed(path)

        assert [line["event"] for line in logs] == ["ledger_not_written"]
        assert (told.writer.turns, told.writer.lost_turns) == (4, 2)
        assert before == older.read_text()
        assert kinds(list(read_entries(newer))) == [
            *("Header", "Gap", "Turn", "Checkpoint", "Turn", "Turn"),
        ]
        assert Gap(2) in read_entries(newer)
        assert result.exit_code == 0, result.output
        assert "gap: 2 turn(s)" in result.output
        assert "decided again identically" in result.output

        older.unlink()
        result = replayed(path)

        assert result.exit_code == 0, result.output
        assert "approximate from" in result.output

    @pytest.mark.interpreted  # compiled, a request takes no such value
    def test_what_cannot_be_put_into_a_line_is_a_gap(self, tmp_path: Path) -> None:
        """Said with where it came from; the thread goes on."""
        path = tmp_path / "ledger.jsonl"
        told = Told(path, LARGE)
        with capture_logs() as logs:
            told.turn()
            told.turn(Turn(5, [Arrived(Request(1, b"no text"))], []))  # type: ignore[arg-type]  # the fault
            told.writer.close(JOIN_S)

        assert [type(line["exc_info"]) for line in logs] == [TypeError]
        assert (told.writer.turns, told.writer.lost_turns) == (0, 2)

    async def test_parts_that_cannot_be_begun_push_none_out(self, tmp_path: Path) -> None:
        """However often that is tried."""
        path = tmp_path / "ledger.jsonl"
        told = Told(path, 1)
        for _ in range(4):
            told.turn()
            await told.until(turns=told.count)
            await eventually(lambda: part_number(path) == told.count - 1)
        before = contents(tmp_path)
        for lost_turns in range(4):  # the first turn still goes to the part that is full
            full_disk(path)
            told.turn()
            await told.until(turns=5, lost_turns=lost_turns)
            await eventually(lambda: not path.with_name("ledger.jsonl.new").is_symlink())
        after = contents(tmp_path)
        told.turn()
        told.writer.close(JOIN_S)

        assert before.keys() == after.keys()
        assert after.pop("ledger.jsonl").startswith(before.pop("ledger.jsonl"))
        assert before == after
        assert (told.writer.turns, told.writer.lost_turns) == (6, 3)
        assert [kinds(list(read_entries(part))) for part in parts_of(path)][-2:] == [
            ["Header", "Checkpoint", "Turn"],
            ["Header", "Gap", "Turn", "Checkpoint"],
        ]

    def test_a_last_line_cut_off_is_left_out(self, tmp_path: Path) -> None:
        """As a crash may leave it."""
        path = tmp_path / "ledger.jsonl"
        written(path, busy(Recording(small_config(), 5), 20))
        text = path.read_text()
        path.write_text(text + '{"t": 12, "fac')

        assert len(text.splitlines()) == len(list(read_entries(path)))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must begin with a header"),
            ('{"t":1}\n', "must begin with a header"),
            ("{\n", r"ledger.jsonl:1 must be a line of a decision ledger, in JSON \(Expecting"),
            ('{"what":1}\n', r"ledger.jsonl:1 must be a header"),
            ("\udcff", "cannot be read"),
        ],
    )
    def test_what_is_no_ledger_is_not_read(self, tmp_path: Path, text: str, message: str) -> None:
        """With the line where there is one."""
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(text.encode(errors="surrogateescape"))

        with pytest.raises(LedgerError, match=message):
            parts_of(path)

    def test_no_file(self, tmp_path: Path) -> None:
        """Is no ledger either."""
        with pytest.raises(LedgerError, match="cannot be read"):
            parts_of(tmp_path / "ledger.jsonl")


class TestReplay:
    """The command."""

    @pytest.mark.parametrize("hides", [False, True])
    def test_identical(self, tmp_path: Path, hides: bool) -> None:  # noqa: FBT001 - a parameter
        """All of it, in disguise too."""
        path = tmp_path / "ledger.jsonl"
        recording = busy(Recording(small_config(), 5), 500)
        written(path, recording, hides=hides)
        result = replayed(path)

        assert result.exit_code == 0
        assert f"all {len(recording.decisions)} decisions" in result.output
        assert ("tenant-" in path.read_text()) is not hides

    def test_tampered(self, tmp_path: Path) -> None:
        """The first difference is shown, and the status is 1."""
        path = tmp_path / "ledger.jsonl"
        written(path, busy(Recording(small_config(), 5), 100))
        text = path.read_text().replace('"outcome":"dispatched"', '"outcome":"evicted-ttl"', 1)
        path.write_text(text)
        result = replayed(path)

        assert result.exit_code == 1
        assert "not identical from" in result.output
        pattern = r"recorded request (\d+) evicted-ttl .*\n  again    request \1 dispatched"
        assert re.search(pattern, result.output)

    def test_terminal(self, tmp_path: Path) -> None:
        """A tenant's escapes for a terminal are shown, not obeyed."""
        path, config = tmp_path / "ledger.jsonl", tmp_path / "new.yaml"
        config.write_text(CONFIG_TEXT)
        written(path, busy(Recording(small_config(), 5), 500))
        path.write_text(path.read_text().replace("tenant-0", r"\u001b[2J\u009b"))
        result = replayed(path, "--config", config)

        assert r"\x1b[2J\x9b" in result.output
        assert all(each == "\n" or each.isprintable() for each in result.output)

    @pytest.mark.parametrize("hides", [False, True])
    def test_another_configuration(self, tmp_path: Path, hides: bool) -> None:  # noqa: FBT001 - a parameter
        """What would have been different, band by band and tenant by tenant."""
        path, config = tmp_path / "ledger.jsonl", tmp_path / "new.yaml"
        config.write_text(CONFIG_TEXT)
        written(path, busy(Recording(small_config(), 5), 500), hides=hides)
        result = replayed(path, "--config", config)

        assert result.exit_code == 0, result.output
        assert "requests decided differently" in result.output
        assert "evicted-ttl > dispatched" in result.output
        assert ("tenant-0" in result.output) is not hides

    def test_a_wrong_configuration(self, tmp_path: Path) -> None:
        """Every mistake in it is named."""
        path, config = tmp_path / "ledger.jsonl", tmp_path / "new.yaml"
        written(path, busy(Recording(small_config(), 5), 20))
        config.write_text(CONFIG_TEXT.replace("pool:", "pol:").replace(": 8", ": 0"))
        result = replayed(path, "--config", config)

        assert result.exit_code == 2
        assert "pol is not a known setting" in result.output
        assert "saturation.maxConcurrency must be a whole number from 1" in result.output

    def test_without_its_beginning_it_says_from_where_it_is_approximate(
        self, tmp_path: Path
    ) -> None:
        """And with a gap, where."""
        path = tmp_path / "ledger.jsonl"
        feed = TurnFeed(size_max=6)
        recording = Recording(small_config(), 5)
        writer = LedgerWriter(path, 1, 1, feed, hides_flows=False)
        feed.want_checkpoint()
        recording.turn(7)
        feed.turned(recording.controller, recording.turns[0])
        for _ in range(3):  # too large for the feed: a gap of three
            feed.turned(recording.controller, turn(8, *[Left(1)] * 6))
        recording.turn(SECOND)
        feed.turned(recording.controller, recording.turns[1])
        feed.want_checkpoint()
        recording.turn(2 * SECOND)
        feed.turned(recording.controller, recording.turns[2])
        recording.turn(3 * SECOND)
        feed.turned(recording.controller, recording.turns[3])
        writer.start(recording.config, 5)
        writer.close(JOIN_S)
        result = replayed(path)

        assert result.exit_code == 0, result.output
        assert "approximate from" in result.output
        assert "identically: all 0 decisions" in result.output

    def test_nothing_to_decide(self, tmp_path: Path) -> None:
        """Is an error, not a success."""
        path = tmp_path / "ledger.jsonl"
        written(path, Recording(ControllerConfig(), 5))
        result = replayed(path)

        assert result.exit_code == 2
        assert "holds no turn that can be decided again" in result.output


def test_lines_are_json_objects_with_times(tmp_path: Path) -> None:
    """What the documentation says of jq holds."""
    path = tmp_path / "ledger.jsonl"
    recording = Recording(small_config(), 5)
    recording.turn(7, Arrived(Request(1)))
    written(path, recording)
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    assert list(lines[0]) == ["header"]
    assert {"t": 7, "facts": [{"arrived": {"request": {"request_id": 1}}}]}.items() <= lines[
        1
    ].items()
