"""What FLOWCONTROL_COMPILE=1 compiles: mypyc goes on accepting it. `make compiled` runs it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["hooks"][
    "custom"
]
TO_C = """
import sys
from mypyc.build import mypycify
made = mypycify(sys.argv[2:], target_dir=sys.argv[1])
print(len(made))
"""


def named(option: str) -> set[str]:
    """Return the modules that an option of the build names."""
    return {str(path.relative_to(ROOT)) for glob in HOOK[option] for path in ROOT.glob(glob)}


class TestCompiled:
    """The modules on the way of a request."""

    def test_way_of_a_request(self) -> None:
        """What every request passes is among them; what is read by its hints is not."""
        compiled = named("compiled") - named("interpreted")

        assert {"flowcontrol/controller.py", "server/gate.py", "server/exchange.py"} < compiled
        assert {"server/http2/connection.py", "server/direct_line.py"} < compiled
        assert not compiled & {"flowcontrol/events.py", "flowcontrol/config.py"}

    @pytest.mark.slow
    def test_becomes_c(self, tmp_path: Path) -> None:
        """All of them, each as an extension, beside the one that holds the code."""
        modules = sorted(named("compiled") - named("interpreted"))

        said = subprocess.run(
            (sys.executable, "-c", TO_C, str(tmp_path), "--no-warn-unused-ignores", *modules),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr
        assert said.stdout.splitlines()[-1] == str(len(modules) + 1)
