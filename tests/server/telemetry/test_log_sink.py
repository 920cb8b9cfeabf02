"""Log lines on their way to a file that may fail."""

import io
import json
from errno import ENOSPC
from pathlib import Path
from threading import Event, Thread
from typing import final

from typing_extensions import Buffer

from flowcontrol_server.telemetry.log_sink import Sink

LINES = "one\ntwo\nthree\n"
TIMEOUT_S = 10.0


class Disk(io.RawIOBase):
    """A file on a disk with so much room."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.content = b""

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, data: Buffer) -> int:
        """Take in what there is room for."""
        if not self.room:
            raise OSError(ENOSPC, "No space left on device")
        taken = bytes(data)[: self.room]
        self.content += taken
        self.room -= len(taken)
        return len(taken)


class TestSink:
    """A log decides nothing."""

    def test_lines(self) -> None:
        """Lines are written at once and whole, also where the file takes them in pieces."""

        class Pieces(io.BytesIO):
            def write(self, data: Buffer) -> int:
                return super().write(bytes(data)[:3])

        file = Pieces()
        sink = Sink(file)
        sink.write(LINES)

        assert file.getvalue().decode() == LINES
        assert sink.lost_lines == 0

    def test_full_disk(self) -> None:
        """What does not fit is lost and counted; once there is room that is told, and once."""
        disk = Disk(room=6)
        sink = Sink(disk)
        for _ in range(2):
            sink.write(LINES)
        assert (disk.content, sink.lost_lines) == (b"one\ntw", 6)

        disk.room = 1000
        sink.write("four\n")
        sink.write("five\n")
        cut, whole = disk.content.split(b"\n{", 1)
        told, *after = ("{" + whole.decode()).splitlines()
        line = json.loads(told)

        assert cut == b"one\ntw"
        assert line.pop("timestamp").endswith("+00:00")
        assert line == {"event": "log_lines_lost", "level": "warning", "lines": 6}
        assert after == ["four", "five"]
        assert sink.lost_lines == 6

    def test_lost_again(self) -> None:
        """Where there is room for the notice alone, what comes after it is counted anew."""
        disk = Disk(room=0)
        sink = Sink(disk)
        sink.write("one\n")
        disk.room = 120
        sink.write("x" * 120 + "\n")
        disk.room = 1000
        sink.write("three\n")

        assert sink.lost_lines == 2
        assert disk.content.startswith(b'{"event": "log_lines_lost"')
        assert disk.content.count(b'"lines": 1,') == 2

    def test_nowhere(self) -> None:
        """A file that is full, closed, or not there loses lines and raises nothing."""
        with Path("/dev/full").open("wb", buffering=0) as full:
            sinks = [Sink(full), Sink(_closed(io.BytesIO())), Sink(None)]
            for sink in sinks:
                sink.write(LINES)
                sink.flush()

        assert [sink.lost_lines for sink in sinks] == [3, 3, 3]

    def test_would_block(self) -> None:
        """A pipe that takes nothing now, and is not waited for, loses lines."""

        class Busy(io.RawIOBase):
            def write(self, _data: Buffer) -> None:
                return None

        sink = Sink(Busy())
        sink.write(LINES)

        assert sink.lost_lines == 3

    def test_no_code_point(self) -> None:
        """Half a surrogate pair is written as an escape."""
        file = io.BytesIO()
        Sink(file).write("\ud83d\n")

        assert file.getvalue() == b"\\ud83d\n"

    def test_threads(self) -> None:
        """Lines of several threads stay whole."""

        class Slow(io.BytesIO):
            def write(self, data: Buffer) -> int:
                return super().write(bytes(data)[:1])

        file = Slow()
        sink = Sink(file)

        def write() -> None:
            for _ in range(200):
                sink.write("a line\n")

        threads = [Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert file.getvalue() == b"a line\n" * 800


@final
class Reader(io.RawIOBase):
    """A file whose reader has stalled until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.is_written_to = Event()
        self.is_released = Event()
        self.content = b""

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, data: Buffer) -> int:
        """Take all, once released."""
        self.is_written_to.set()
        assert self.is_released.wait(TIMEOUT_S)
        self.content += bytes(data)
        return len(bytes(data))


class TestQueue:
    """A reader that stalls stops nobody."""

    def test_stalled_reader(self) -> None:
        """Lines wait up to the bound, those beyond are dropped; then one notice counts them."""
        reader = Reader()
        sink = Sink(reader, backlog_bytes_max=8)
        sink.start()
        sink.write("one\n")
        assert reader.is_written_to.wait(TIMEOUT_S)
        for line in ("two\n", "six\n", "seven\neight\n", "nine\n"):
            sink.write(line)
        assert sink.lost_lines == 3

        reader.is_released.set()
        assert sink.stop(TIMEOUT_S)
        first, notice, *queued = reader.content.decode().splitlines()
        assert (first, *queued) == ("one", "two", "six")
        assert json.loads(notice)["lines"] == 3
        assert sink.lost_lines == 3

    def test_stop(self) -> None:
        """Stopping writes what waits; from then on whoever calls writes."""
        file = io.BytesIO()
        sink = Sink(file)
        sink.start()
        sink.write(LINES)

        assert sink.stop(TIMEOUT_S)
        sink.write("four\n")
        assert file.getvalue().decode() == LINES + "four\n"
        assert sink.lost_lines == 0

    def test_stop_with_a_stalled_reader(self) -> None:
        """It waits no longer than it is told to; what is written afterwards is dropped."""
        reader = Reader()
        sink = Sink(reader)
        sink.start()
        sink.write("one\n")

        assert not sink.stop(0.01)
        sink.write("two\n")
        assert sink.lost_lines == 1
        reader.is_released.set()
        assert sink.stop(TIMEOUT_S)
        assert reader.content.startswith(b"one\n")


def _closed(file: io.BytesIO) -> io.BytesIO:
    file.close()
    return file
