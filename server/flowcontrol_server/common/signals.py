"""Handling of signals until the service installs its own handlers.

In a container the process has number 1, for which SIGTERM and SIGINT have no default action. Sent
before there is a handler, they are lost, and the container is killed after its grace period.
"""

import os
import signal
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def exit_at_stop_signals() -> None:
    """Let SIGTERM and SIGINT end the process at once with status 0, and ignore SIGHUP.

    Valid while no port is open and no file is being written.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it requests a reload, and must not end us
    for number in STOP_SIGNALS:
        signal.signal(number, _exit)


def _exit(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)  # the module being imported could catch an exception
