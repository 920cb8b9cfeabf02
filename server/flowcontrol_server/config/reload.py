"""The service's own configuration, followed live: checked, compared, applied whole or not at all.

A file with a mistake, or with a change that a running service cannot make, changes nothing: what
was in force stays in force, and that is said, counted and shown until the file is mended.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import final

import structlog

from flowcontrol.errors import ConfigError, FlowControlError
from flowcontrol_server.common.background import in_background
from flowcontrol_server.common.watched import watch_folder
from flowcontrol_server.config.difference import differences, settings_hash
from flowcontrol_server.config.settings import Settings, load_settings

FOLLOW_AGAIN_S = 5.0
"""After a fault in following the file, until it is followed again; SIGHUP is heeded meanwhile."""
READ_AGAIN_S = 30.0
"""How often a file with a mistake is read again: what the mistake is about may be another file, a
secret say, whose folder is not watched."""
_RELOADS_PENDING_MAX = 2
"""One that reads, and one that reads what has changed since."""
_log = structlog.get_logger()


@final
class Configuration:
    """The settings in force, and the file that may change them. Owner: the loop.

    Args:
        settings: as read at the start.
        path: the file.
        apply: puts other settings into force; may raise FlowControlError, and has then changed
            nothing.
    """

    def __init__(
        self, settings: Settings, path: Path, apply: Callable[[Settings], Awaitable[None]]
    ) -> None:
        self.settings = settings
        """In force."""
        self.hash = settings_hash(settings)
        self.changed_s = time.time()
        """When they were put into force, seconds since 1970."""
        self.changes: tuple[str, ...] = ()
        """What the last reload changed."""
        self.reload_count = 0
        self.rejection_count = 0
        self.problems: Sequence[str] = ()
        """Why the file as it now is has been rejected; empty when it is in force."""
        self._path = path
        self._apply = apply
        self._turn = asyncio.Lock()
        self._read_stamp: tuple[int, ...] | None = ()
        """Of the file as it was read last; nothing is like an empty one."""

    async def follow(self) -> None:
        """Read the file whenever it changes, and at SIGHUP; until cancelled."""
        loop = asyncio.get_running_loop()
        hangups: set[asyncio.Task[None]] = set()

        def hang_up() -> None:
            """Read, and keep hold of the task until it has."""
            if len(hangups) == _RELOADS_PENDING_MAX:
                return
            task = in_background(self.read(), "configuration_not_read")
            hangups.add(task)
            task.add_done_callback(hangups.discard)

        # Not the loop's own handler: once that is removed, the signal ends the process.
        before = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(hang_up))
        again = in_background(self._read_again(), "configuration_not_read")
        try:
            while True:
                try:
                    await watch_folder(self._path.parent, self._look)
                except Exception as error:  # noqa: BLE001 - shown until it is followed again
                    self._reject([f"cannot be followed: {error!r}"], error)
                await asyncio.sleep(FOLLOW_AGAIN_S)
        finally:
            again.cancel()
            signal.signal(signal.SIGHUP, before)

    async def _read_again(self) -> None:
        """Read the file now and then while a mistake stands; until cancelled."""
        while True:
            await asyncio.sleep(READ_AGAIN_S)
            if self.problems:
                await self.read()

    async def _look(self) -> None:
        """Read the file if it is another than was read last, or a mistake stands.

        The folder may hold more: with a log in it that every request writes to, reading each time
        cost 80 us a request. What a mistake is about may be another file in it.
        """
        if self.problems or self._stamp() != self._read_stamp:
            await self.read()

    async def read(self) -> None:
        """Read the file, and put it into force if it is right and differs."""
        async with self._turn:
            self._read_stamp = self._stamp()  # before: a change in between is read once more
            try:
                settings = await asyncio.to_thread(load_settings, self._path)
                await self._change(settings)
            except FlowControlError as error:
                self._reject(error.problems if isinstance(error, ConfigError) else [str(error)])
            except Exception as error:  # noqa: BLE001 - the next file may be good, and is to be read
                self._reject([f"cannot be read: {error!r}"], error)
            else:
                self.problems = ()

    def _reject(self, problems: Sequence[str], fault: Exception | None = None) -> None:
        if list(problems) == list(self.problems):
            return
        self.rejection_count += 1
        self.problems = tuple(problems)
        _log.error(
            "configuration_rejected", file=str(self._path), problems=problems, exc_info=fault
        )

    def _stamp(self) -> tuple[int, ...] | None:
        """Return what differs once the file has been replaced or rewritten; None without a file."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size

    async def _change(self, settings: Settings) -> None:
        changes = differences(self.settings, settings)
        if not changes:
            return
        fixed = [change for change in changes if not change.is_live]
        if fixed:
            rule = "cannot change while the service runs; restart it, or take the change back"
            raise ConfigError([f"{each.where} {rule}, got {each.after}" for each in fixed])
        await self._apply(settings)
        self.settings = settings
        before, self.hash = self.hash, settings_hash(settings)
        self.changed_s = time.time()
        self.changes = tuple(map(str, changes))
        self.reload_count += 1
        _log.info(
            "configuration_changed", before=before, hash=self.hash, changes=[*map(str, changes)]
        )
