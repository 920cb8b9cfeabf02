"""`flowcontrol`, and `python -m flowcontrol_server`."""

import sys

from flowcontrol_server.common.signals import exit_at_stop_signals


def main() -> None:
    """Run the command line."""
    if "serve" in sys.argv[1:2]:
        exit_at_stop_signals()  # before the import below, which takes a second
    from flowcontrol_server.cli import main as run  # noqa: PLC0415 - see above

    run()


if __name__ == "__main__":
    main()
