"""The house rules that a machine can check."""

import ast
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTION_LINES_MAX = 60

LOUD = re.compile("robust|seamless|enterprise-grade|sophisticated|high-performance", re.IGNORECASE)
OPEN_END = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|home|Users|root)/\w")
UNPUBLISHED = re.compile(r"""pip install (-\S+ )*['"]?flowcontrol(?![\w-])""")
POSSESSIVE_GROUP = re.compile(r"\)[*+?]\+")
NOQA = re.compile(r"# noqa: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)* - \S")
TYPE_IGNORE = re.compile(r"# type: ignore\[[a-z-]+(, [a-z-]+)*\](\s+# ?| - )\S")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
TEST_IMPORT = re.compile(r"^\s*from tests(\.\w+)*\.test_\w+ import")
WAIVER = re.compile(r"#\s*(noqa|type:\s*ignore)", re.IGNORECASE)


@cache
def files() -> tuple[Path, ...]:
    """Every file in git or about to be; but this one, which names what is forbidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    paths = (ROOT / name for name in done.stdout.decode().split("\0") if name)
    return tuple(sorted(path for path in paths if path.is_file() and path != Path(__file__)))


@cache
def text(path: Path) -> str:
    """What a file says; nothing, if it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def python_files(*folders: str) -> list[Path]:
    """The Python files below some folders."""
    parts = [path for path in files() if path.suffix == ".py"]
    return [path for path in parts if path.relative_to(ROOT).parts[0] in folders]


def found(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """Where a pattern occurs, as path:line: text."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(text(path).splitlines(), 1)
        if pattern.search(line)
    ]


class TestSize:
    """A module is one idea, whatever its length; a function fits on a screen."""

    def test_functions(self) -> None:
        """No function is longer than 60 lines."""
        sizes = {
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
            for path in python_files("flowcontrol", "server")
            for node in ast.walk(ast.parse(text(path)))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if node.end_lineno is not None
        }
        assert len(sizes) > 100

        assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES_MAX} == {}


class TestOldestPython:
    """What Python 3.11.2, Debian 12's, does otherwise than later ones."""

    def test_patterns(self) -> None:
        """Its possessive repetition of a group matches half a repetition: groups are atomic."""
        assert found(POSSESSIVE_GROUP, python_files("flowcontrol", "server")) == []
        assert POSSESSIVE_GROUP.search("(?:ab)*+")


class TestWords:
    """What is written, and what is not."""

    def test_loud_prose(self) -> None:
        """Where a number or a bound could stand no loud word stands."""
        assert found(LOUD, list(files())) == []

    def test_open_ends(self) -> None:
        """Nothing is left for later without the number of an issue."""
        assert found(OPEN_END, list(files())) == []

    def test_machine_paths(self) -> None:
        """No file knows the machine it was written on."""
        assert found(MACHINE_PATH, list(files())) == []

    def test_unpublished(self) -> None:
        """Nobody is told to install by a name that anybody may register on a package index."""
        assert found(UNPUBLISHED, list(files())) == []

    def test_the_patterns(self) -> None:
        """The patterns above find what they are for, and no more."""
        assert LOUD.search("Robust")
        assert OPEN_END.search("# TODO: later")
        assert not OPEN_END.search("# TODO(#12): later")
        assert UNPUBLISHED.search("pip install -q 'flowcontrol[top]'")
        assert not UNPUBLISHED.search("pip install './flowcontrol-0.1.0-py3-none-any.whl[top]'")
        assert LINK.findall("[a](b.md#c), [d](https://e.org), [f](#g)") == ["b.md"]
        assert TEST_IMPORT.search("from tests.engine.test_flow import FLOW")
        assert not TEST_IMPORT.search("from tests.support.queues import test_queue")
        assert MACHINE_PATH.search("see /work/main/README.md")
        assert not MACHINE_PATH.search("demo-result/work/out, https://example.org/home/page")


class TestWaivers:
    """A rule that is waived is named, and so is the reason."""

    @staticmethod
    def waivers() -> list[str]:
        """Every comment that waives a rule, as path:line: comment."""
        lines = []
        for path in python_files("flowcontrol", "server", "tests", "hatch_build.py"):
            with path.open("rb") as file:
                for token in tokenize.tokenize(file.readline):
                    if token.type == tokenize.COMMENT and WAIVER.search(token.string):
                        place = f"{path.relative_to(ROOT)}:{token.start[0]}"
                        lines.append(f"{place}: {token.string}")
        return lines

    def test_code_and_reason(self) -> None:
        """Every noqa and every type: ignore has a code and says why."""
        waivers = self.waivers()
        assert waivers

        assert [w for w in waivers if not NOQA.search(w) and not TYPE_IGNORE.search(w)] == []

    @pytest.mark.parametrize(
        ("comment", "is_right"),
        [
            ("# noqa: S101 - a reason", True),
            ("# noqa: S101, ANN401 - a reason", True),
            ("# noqa: S101", False),
            ("# noqa", False),
            ("# type: ignore[arg-type]  # a reason", True),
            ("# type: ignore[arg-type]", False),
            ("# type: ignore", False),
        ],
    )
    def test_the_patterns(self, comment: str, is_right: bool) -> None:  # noqa: FBT001 - a table
        """The patterns above tell right from wrong."""
        assert WAIVER.search(comment)

        assert bool(NOQA.search(comment) or TYPE_IGNORE.search(comment)) == is_right


class TestTree:
    """What lies where."""

    def test_tests_mirror_the_rooms(self) -> None:
        """A test of the service lies in the folder of its room; no folder is without a room."""
        rooms = ROOT / "server" / "flowcontrol_server"
        folders = {
            path.relative_to(ROOT / "tests" / "server").parts[0]
            for path in python_files("tests")
            if path.is_relative_to(ROOT / "tests" / "server")
            if path.parent != ROOT / "tests" / "server"
        }

        assert folders
        assert {each for each in folders if not (rooms / each).is_dir()} == set()

    def test_helpers_are_in_support(self) -> None:
        """Where unit tests lie, there is nothing but tests; none imports another."""
        units = [
            path
            for path in python_files("tests")
            if path.relative_to(ROOT).parts[1] in {"engine", "server", "simulation", "house"}
        ]
        helpers = [
            str(path.relative_to(ROOT))
            for path in units
            if not path.name.startswith("test_") and path.name != "conftest.py"
        ]

        assert len(units) > 50
        assert helpers == []
        assert found(TEST_IMPORT, python_files("tests")) == []

    def test_links(self) -> None:
        """Every file that a page links exists."""
        pages = [path for path in files() if path.suffix == ".md"]
        links = [(page, link) for page in pages for link in LINK.findall(text(page))]

        assert links
        assert [
            f"{page.relative_to(ROOT)}: {link}"
            for page, link in links
            if not (page.parent / link).exists()
        ] == []

    def test_no_package_called_envoy(self) -> None:
        """A package called envoy would hide Envoy's messages."""
        assert not (ROOT / "envoy" / "__init__.py").exists()

    def test_nothing_generated(self) -> None:
        """Generated code is built, not kept."""
        names = [str(path.relative_to(ROOT)) for path in files()]

        assert [
            name for name in names if "_pb2" in name or name.startswith("flowcontrol/v1/")
        ] == []

    def test_one_name_one_class(self) -> None:
        """No two classes of engine and service share a name; private ones are their module's."""
        places: dict[str, list[str]] = {}
        for path in python_files("flowcontrol", "server"):
            for node in ast.walk(ast.parse(text(path))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))

        assert len(places) > 200
        assert {name: found for name, found in places.items() if len(found) > 1} == {}

    def test_typed(self) -> None:
        """Both packages tell type checkers that they are typed."""
        for package in ("flowcontrol", "server/flowcontrol_server"):
            assert (ROOT / package / "py.typed").read_bytes() == b""
