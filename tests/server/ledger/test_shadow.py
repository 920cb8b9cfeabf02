"""A candidate configuration beside a running service: following its ledger, and deciding along."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import LedgerError
from flowcontrol.replay.ledger import Checkpoint, Entry, Gap, Header, Turn, take_checkpoint
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import Totals
from flowcontrol_server.ledger.follow import Follower
from flowcontrol_server.ledger.reader import read_entries
from flowcontrol_server.ledger.recording import TurnFeed
from flowcontrol_server.ledger.shadow import Shadow, ShadowReport
from flowcontrol_server.ledger.writer import LedgerWriter
from flowcontrol_server.tools.shadow import ShadowCollector, table
from tests.support.recorded import Recording, busy, small_config

LARGE = 1 << 40
BEGAN_NS = 5


def entries_of(recording: Recording, run: str = "run") -> list[Entry]:
    """A recording as its ledger has it."""
    return [Header(run, 0, 1, recording.began_ns, recording.config), *recording.turns]


def shadowed(entries: Iterable[Entry], candidate: ControllerConfig) -> ShadowReport:
    """Let a candidate decide a whole ledger."""
    shadow = Shadow(candidate)
    shadow.play(entries)
    return shadow.report()


def outcomes(side: Mapping[int, Totals]) -> dict[int, Mapping[Outcome, int]]:
    """How often each band came to each end."""
    return {priority: totals.outcomes for priority, totals in side.items()}


def write(path: Path, recording: Recording, bytes_max: int = LARGE, files: int = 1000) -> None:
    """Write a recording as the service does, in parts of about that size."""
    feed = TurnFeed(LARGE)
    writer = LedgerWriter(path, bytes_max, files, feed, hides_flows=False)
    writer.start(recording.config, recording.began_ns)
    again = Recording(recording.config, recording.began_ns)
    for turn in recording.turns:
        again.turn(turn.now_ns, *turn.facts)
        feed.turned(again.controller, turn)
        if bytes_max != LARGE:
            written = writer.turns
            while writer.turns == written and writer.lost_turns == 0:
                pass
    writer.close(20.0)


class TestShadow:
    """What a candidate would have done."""

    def test_same_settings(self) -> None:
        """The control: every pair of outcomes is a pair of equals."""
        recording = busy(Recording(small_config(), BEGAN_NS), 500)
        report = shadowed(entries_of(recording), small_config())

        assert {pair: n for pair, n in report.pairs.items() if pair[0] is not pair[1]} == {}
        assert len(recording.decisions) == sum(report.pairs.values())
        assert outcomes(report.recorded) == outcomes(report.candidate)
        assert (report.waiting, report.in_flight, report.restarts) == (0, 0, 0)

    def test_other_settings(self) -> None:
        """Differences are counted by pairs of outcomes, and waits by band."""
        recording = busy(Recording(small_config(), BEGAN_NS), 500)
        report = shadowed(entries_of(recording), small_config(8))

        assert report.pairs[Outcome.EVICTED_TTL, Outcome.DISPATCHED] > 10
        assert {10, 0, -1} == report.candidate.keys()

    def test_gap(self) -> None:
        """After a gap it says nothing until a checkpoint, and begins again there."""
        recording = busy(Recording(small_config(), BEGAN_NS), 100)
        now_ns = recording.turns[-1].now_ns
        checkpoint = take_checkpoint(recording.controller, now_ns + 1)
        first = entries_of(recording)[:2]
        shadow = Shadow(small_config())
        shadow.play([*first, Gap(98)])
        before = shadow.report()
        shadow.play([recording.turns[-1], checkpoint, Turn(now_ns + 2, [], [])])

        assert shadow.report().candidate == before.candidate
        assert (before.restarts, shadow.report().restarts) == (0, 1)

    def test_service_restarted(self) -> None:
        """A new run begins with an empty engine; counts go on."""
        recording = busy(Recording(small_config(), BEGAN_NS), 200)
        once = shadowed(entries_of(recording), small_config())
        twice = shadowed(
            [*entries_of(recording), *entries_of(recording, "another run")], small_config()
        )

        assert sum(twice.pairs.values()) == 2 * sum(once.pairs.values())
        assert twice.restarts == 0


class TestFollower:
    """A reader keeps its place in a ledger that grows."""

    def test_added_lines(self, tmp_path: Path) -> None:
        """It yields what is there, then what is added, never half a line."""
        whole, path = tmp_path / "whole", tmp_path / "ledger"
        write(whole, busy(Recording(small_config(), BEGAN_NS), 50))
        text = whole.read_bytes()
        follower, found = Follower(path), list[Entry]()
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(text), 777):
                file.write(text[start : start + 777])
                if start:
                    found += follower.entries()
        follower.close()

        assert list(read_entries(whole)) == found

    @pytest.mark.slow
    def test_rotated(self, tmp_path: Path) -> None:
        """Parts that are renamed between two looks are read to their end, in order."""
        path = tmp_path / "ledger"
        parts = tmp_path / "parts"
        write(parts, busy(Recording(small_config(), BEGAN_NS), 200), 20_000)
        names = sorted(tmp_path.glob("parts*"), key=lambda each: each.stat().st_mtime_ns)
        assert len(names) > 3
        follower, found = Follower(path), list[Entry]()
        for number, name in enumerate(names):
            for older in range(number, 0, -1):
                newer = path if older == 1 else path.with_name(f"ledger.{older - 1}")
                newer.rename(path.with_name(f"ledger.{older}"))
            path.write_bytes(name.read_bytes())
            if number % 2:
                found += follower.entries()
        found += follower.entries()
        follower.close()

        assert [entry for name in names for entry in read_entries(name)] == found

    @pytest.mark.slow
    def test_missed_part(self, tmp_path: Path) -> None:
        """A part that was deleted before it was read is a gap."""
        path = tmp_path / "ledger"
        parts = tmp_path / "parts"
        write(parts, busy(Recording(small_config(), BEGAN_NS), 200), 20_000)
        first, _second, third, *_ = sorted(
            tmp_path.glob("parts*"), key=lambda each: each.stat().st_mtime_ns
        )
        path.write_bytes(first.read_bytes())
        follower = Follower(path)
        before = list(follower.entries())
        path.rename(path.with_name("ledger.1"))
        path.write_bytes(third.read_bytes())
        after = list(follower.entries())
        follower.close()

        assert not [entry for entry in before if isinstance(entry, Gap)]
        assert [Gap, Header, Checkpoint] == [type(entry) for entry in after[:3]]

    def test_no_ledger(self, tmp_path: Path) -> None:
        """A file that is none is refused, by name and line."""
        path = tmp_path / "ledger"
        path.write_text("nothing of the kind\n")

        with pytest.raises(LedgerError, match=f"{path}:1 "):
            list(Follower(path).entries())


class TestReport:
    """What is shown of it."""

    @pytest.fixture(name="report")
    def _report(self) -> ShadowReport:
        recording = busy(Recording(small_config(), BEGAN_NS), 300)
        return shadowed(entries_of(recording), small_config(8))

    def test_metrics(self, report: ShadowReport) -> None:
        """The families of the engine, with the pairs that differ beside them."""
        families = {each.name: each for each in ShadowCollector(report).collect()}
        differing = families["flowcontrol_shadow_differences"].samples

        assert {"evicted-ttl", "dispatched"} in [set(s.labels.values()) for s in differing]
        assert all(len(set(sample.labels.values())) == 2 for sample in differing)
        assert families["flowcontrol_shadow_wait_seconds"].samples

    def test_table(self, report: ShadowReport) -> None:
        """Every outcome of each band stands in it, with what differs in the last line."""
        *rows, last = table(report)
        differing = sum(n for (was, now), n in report.pairs.items() if was is not now)

        assert last == f"{differing} requests decided differently"
        counted = {(int(r[:6]), r[8:32].strip()): int(r[32:42]) for r in rows[1:]}
        assert counted[10, "dispatched"] == report.recorded[10].outcomes[Outcome.DISPATCHED]
