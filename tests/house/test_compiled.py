"""What FLOWCONTROL_COMPILE=1 compiles: mypyc goes on accepting it. `make compiled` runs it."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hatch_build import compiled_modules

ROOT = Path(__file__).parents[2]
HOOK = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["hooks"][
    "custom"
]
MODULES = compiled_modules(ROOT, HOOK)
TO_C = """
import sys
from pathlib import Path
from hatch_build import make_c
print(len(make_c(sys.argv[2:], Path(sys.argv[1]))))
"""


def final_tuples_of_floats(source: str) -> list[str]:
    """Return the constants of a module whose type is a tuple of so many floats."""
    return [
        ast.unparse(each.target)
        for each in ast.parse(source).body
        if isinstance(each, ast.AnnAssign)
        and ast.unparse(each.annotation) == "Final"
        and isinstance(each.value, ast.Tuple)
        and any(
            isinstance(part, ast.Constant) and isinstance(part.value, float)
            for part in ast.walk(each.value)
        )
    ]


class TestCompiled:
    """The modules on the way of a request."""

    def test_way_of_a_request(self) -> None:
        """What every request passes is among them; what is read by its hints is not."""
        compiled = set(MODULES)

        assert {
            "flowcontrol/controller.py",
            "server/flowcontrol_server/requests/gate.py",
            "server/flowcontrol_server/requests/exchange.py",
        } < compiled
        assert {
            "server/flowcontrol_server/doors/http2/connection.py",
            "server/flowcontrol_server/doors/direct/connection.py",
        } < compiled
        assert not compiled & {"flowcontrol/memory.py", "flowcontrol/config.py"}

    @pytest.mark.slow
    def test_becomes_c(self, tmp_path: Path) -> None:
        """All of them, each as an extension, beside the one that holds the code."""
        said = subprocess.run(
            (sys.executable, "-c", TO_C, str(tmp_path / "c"), *MODULES),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

        assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr
        assert said.stdout.splitlines()[-1] == str(len(MODULES) + 1)

    @pytest.mark.parametrize("module", MODULES)
    def test_no_final_tuple_of_floats(self, module: str) -> None:
        """Compiled, one counts as never set: its type is to be Final[tuple[float, ...]]."""
        assert final_tuples_of_floats((ROOT / module).read_text()) == []

    def test_it_would_be_found(self) -> None:
        """One with a type of its own is none; of integers or names neither."""
        source = (
            "A: Final = (-2.5, 1.0)\nB: Final[tuple[float, ...]] = (1.5,)\nC: Final = (1, X.Y)\n"
        )

        assert final_tuples_of_floats(source) == ["A"]
