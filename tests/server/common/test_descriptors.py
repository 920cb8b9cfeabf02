"""The limit of open files."""

import subprocess
import sys

import pytest

_SCRIPT = (
    "import resource; from flowcontrol_server.common.descriptors import reserve_descriptors; "
    "part = reserve_descriptors(744); print(part, *resource.getrlimit(resource.RLIMIT_NOFILE))"
)


@pytest.mark.parametrize(
    ("soft", "hard", "shown"),
    [
        (512, 4096, "1.0 4096 4096"),  # not just what ports need: endpoints take some, too
        (4096, 4096, "1.0 4096 4096"),
        (256, 500, "0.5 500 500"),
    ],
)
def test_takes_what_the_system_allows(soft: int, hard: int, shown: str) -> None:
    """The soft limit becomes the hard one; who needs more than that gets its part."""
    command = f'ulimit -Sn {soft}; ulimit -Hn {hard}; exec "$@"'
    run = subprocess.run(
        ("sh", "-c", command, "sh", sys.executable, "-c", _SCRIPT),
        capture_output=True,
        check=True,
        text=True,
    )

    assert run.stdout.splitlines()[-1] == shown
