"""Writes the decision ledger to files, in a thread of its own.

`file` is the newest part, `file.1` the one before it, and so on, up to `files` in total.
"""

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, final

import structlog

from flowcontrol.config import ControllerConfig
from flowcontrol.replay.ledger import (
    BEGINNING,
    Checkpoint,
    Entry,
    Header,
    Turn,
    disguise_with,
    disguised,
    to_line,
)
from flowcontrol_server.common.parts import make_room
from flowcontrol_server.ledger.recording import TurnFeed

_LINGER_S = 0.1
"""Time for which turns are collected for one write: at most so much is lost in a crash."""
RETRY_S = 1.0
"""The same after a failure: each retry costs the processor a checkpoint, O(live requests)."""
_PRIVATE = 0o600
_log = structlog.get_logger()


@final
class LedgerWriter:
    """Writes the turns of a feed, until it is closed.

    A failed write loses the turns of its batch. It is logged and recorded as a gap, with which a
    new part begins once one can be written. The processor never waits for this thread.

    Args:
        path: the newest part.
        bytes_max: size of a part at which the next one begins.
        files_max: parts kept, at least 1.
        feed: provides the turns.
        hides_flows: whether to write hashes in place of flow ids.
    """

    def __init__(
        self, path: Path, bytes_max: int, files_max: int, feed: TurnFeed, *, hides_flows: bool
    ) -> None:
        self.turns = 0
        """Turns written."""
        self._path = path
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._feed = feed
        self._run = secrets.token_hex(8)
        self._salt = secrets.token_hex(8) if hides_flows else ""
        self._disguise = disguise_with(self._salt) if hides_flows else None
        self._part = 0
        self._file: IO[bytes] | None = None
        self._size = 0
        """Size of the part, including unwritten lines."""
        self._heading = ""
        """Header of a part that has not replaced the newest one yet; empty: none."""
        self._lines: list[str] = []
        self._unwritten: list[Entry] = []
        """Unwritten entries of this batch; `_lines` has the first of them as text."""
        self.failure: str | None = None
        """Why the last write failed; None: it did not."""
        self._thread = Thread(target=self._write_all, name="ledger-writer", daemon=True)

    @property
    def lost_turns(self) -> int:
        """Turns that are in no part."""
        return self._feed.missed_turns

    def start(self, config: ControllerConfig, made_ns: int) -> None:
        """Begin the ledger of an engine created at this time; older ledgers become older parts.

        Raises:
            OSError: the file cannot be written.
        """
        try:
            self._begin_part(config, made_ns)
            self._flush()
        except OSError:
            self._give_part_up()
            raise
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Write the remaining turns, and end."""
        self._feed.close()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while entries := self._feed.take(RETRY_S if self.failure else _LINGER_S):
            self._unwritten = list(entries)
            try:
                for entry in entries:
                    self._take(entry)
                self._flush()
                self.failure = None
            except Exception as error:  # noqa: BLE001 - a bug, too, is logged and costs one batch
                self._give_part_up()
                lost_turns = self._feed.lose(self._unwritten)
                if not isinstance(error, OSError):
                    _log.error("ledger_not_written", exc_info=error, lost_turns=lost_turns)
                elif self.failure is None:
                    _log.error("ledger_not_written", error=str(error), lost_turns=lost_turns)
                self.failure = str(error) or repr(error)
        self._close_file()

    def _take(self, entry: Entry) -> None:
        if isinstance(entry, Checkpoint) and (self._file is None or self._is_full):
            if self._file is not None:
                self._flush()
            self._begin_part(entry.config, entry.now_ns)
        line = self._line(entry)
        self._lines.append(line)
        self._size += len(line)
        if self._is_full:
            self._feed.want_checkpoint()

    @property
    def _is_full(self) -> bool:
        return self._size >= self._bytes_max

    def _flush(self) -> None:
        if self._file is None:
            message = f"{self._path} waits for a checkpoint"
            raise OSError(message)
        _write_whole(self._file, self._heading + "".join(self._lines))
        if self._heading:
            self._place_part()
        count = len(self._lines)
        self.turns += sum(isinstance(entry, Turn) for entry in self._unwritten[:count])
        del self._unwritten[:count]
        self._lines.clear()

    def _line(self, entry: Entry) -> str:
        shown = entry if self._disguise is None else disguised(entry, self._disguise)
        return json.dumps(to_line(shown), separators=(",", ":")) + "\n"

    def _begin_part(self, config: ControllerConfig, now_ns: int) -> None:
        """Begin a part beside the others; unwritten lines will follow its header."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = os.fdopen(os.open(self._new_path, flags, _PRIVATE), "wb", buffering=0)
        self._close_file()
        self._file = file
        wall_ns = time.time_ns() - (time.monotonic_ns() - now_ns)
        self._heading = self._line(
            Header(self._run, self._part, wall_ns, now_ns, config, self._salt)
        )
        self._size = len(self._heading) + sum(map(len, self._lines))

    def _place_part(self) -> None:
        """Make the new part the newest.

        That happens only after its first write, or each failed try would push out a good part.
        """
        make_room(self._path, self._files_max, self._bytes_max, BEGINNING)
        self._new_path.replace(self._path)
        self._heading = ""
        self._part += 1

    def _give_part_up(self) -> None:
        """End the part as it is; delete it if it has not replaced the newest one yet."""
        self._close_file()
        self._lines.clear()
        if self._heading:
            self._heading = ""
            with suppress(OSError):
                self._new_path.unlink()

    @property
    def _new_path(self) -> Path:
        return self._path.with_name(f"{self._path.name}.new")

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                _log.error("ledger_not_written", error=str(error), lost_turns=0)


def _write_whole(file: IO[bytes], text: str) -> None:
    """Write the whole text, or if possible nothing: turns counted as lost must not be read."""
    before = file.tell()
    rest = memoryview(text.encode())
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            file.truncate(before)
        raise
