"""`flowcontrol`, and `python -m flowcontrol_server`."""

import os
import sys

from flowcontrol_server.common.signals import exit_at_stop_signals


def main() -> None:
    """Run the command line."""
    _fill_standard_streams()
    if "serve" in sys.argv[1:2]:
        exit_at_stop_signals()  # before the import below, which takes a second
    from flowcontrol_server.cli import main as run  # noqa: PLC0415 - see above

    run()


def _fill_standard_streams() -> None:
    """Let no socket take the number of a standard stream that was closed before the start.

    What C libraries say on their way down would go to a client, and libuv aborts as it closes it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


if __name__ == "__main__":
    main()
