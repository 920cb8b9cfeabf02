"""Live reload of the service's configuration: it is applied as a whole or not at all.

A file with an error, or with a change that a running service cannot make, changes nothing: the
settings in force stay, and the error is logged, counted and shown until the file is fixed.
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
from flowcontrol_server.common.watched import stamp_of, watch_folder
from flowcontrol_server.config.difference import differences, settings_hash
from flowcontrol_server.config.settings import Settings, load_settings

FOLLOW_AGAIN_S = 5.0
"""Pause after watching the file has failed, before it is tried again; SIGHUP works meanwhile."""
READ_AGAIN_S = 30.0
"""Interval at which a file with an error is reloaded: the cause may be another file, such as a
secret, whose folder is not watched."""
_RELOADS_PENDING_MAX = 2
"""One reload running, and one queued for changes since it began."""
_log = structlog.get_logger()


@final
class Configuration:
    """The settings in force, and the file that may change them. Owner: the loop.

    Args:
        settings: the settings at the start.
        path: the file.
        apply: puts other settings into force; if it raises FlowControlError, it has changed
            nothing.
    """

    def __init__(
        self, settings: Settings, path: Path, apply: Callable[[Settings], Awaitable[None]]
    ) -> None:
        self.settings = settings
        """The settings in force."""
        self.hash = settings_hash(settings)
        self.changed_s = time.time()
        """When they came into force, seconds since 1970."""
        self.changes: tuple[str, ...] = ()
        """Changes of the last reload."""
        self.reload_count = 0
        self.rejection_count = 0
        self.problems: Sequence[str] = ()
        """Why the current file is rejected; empty: it is in force."""
        self._path = path
        self._apply = apply
        self._turn = asyncio.Lock()
        self._read_stamp: tuple[int, ...] | None = ()
        """Stamp of the file when it was last read; the empty one equals no other."""

    async def follow(self) -> None:
        """Reload the file whenever it changes, and at SIGHUP, until cancelled."""
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            """Begin a reload, and keep the task until it is done."""
            if len(reloads) == _RELOADS_PENDING_MAX:
                return
            task = in_background(self.read(), "configuration_not_read")
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        # Not the loop's own handler: once that is removed, the signal ends the process.
        before = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(reload))
        repeated = in_background(self._retry(), "configuration_not_read")
        try:
            while True:
                try:
                    await watch_folder(self._path.parent, self._look)
                except Exception as error:  # noqa: BLE001 - shown until it is followed again
                    self._reject([f"cannot be followed: {error!r}"], error)
                await asyncio.sleep(FOLLOW_AGAIN_S)
        finally:
            repeated.cancel()
            signal.signal(signal.SIGHUP, before)

    async def _retry(self) -> None:
        """Reload the file at intervals while it has an error, until cancelled."""
        while True:
            await asyncio.sleep(READ_AGAIN_S)
            if self.problems:
                await self.read()

    async def _look(self) -> None:
        """Reload the file if it has changed since it was last read, or has an error.

        Other files in the folder may change, too: with a log that every request writes to, reading
        each time cost 80 us a request. The cause of an error may be another file in the folder.
        """
        if self.problems or self._stamp() != self._read_stamp:
            await self.read()

    async def read(self) -> None:
        """Read the file, and put it into force if it is valid and differs."""
        async with self._turn:
            self._read_stamp = self._stamp()  # before reading: a change meanwhile is read again
            try:
                settings = await asyncio.to_thread(load_settings, self._path)
                await self._change(settings)
            except FlowControlError as error:
                self._reject(error.problems if isinstance(error, ConfigError) else [str(error)])
            except Exception as error:  # noqa: BLE001 - the next file may be valid
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
        """Return a value that changes with the file, its content or mode; None: no file."""
        try:
            return stamp_of(self._path.stat())
        except OSError:
            return None

    async def _change(self, settings: Settings) -> None:
        changes = differences(self.settings, settings)
        if not changes:
            return
        fixed = [change for change in changes if not change.is_live]
        if fixed:
            rule = "cannot change while the service runs; restart it, or revert the change"
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
