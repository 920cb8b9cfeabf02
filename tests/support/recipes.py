"""Pages whose commands are run as written: files are written, commands run, outputs compared.

In such a page a block of code after a line like

    `flowcontrol.yaml`, which may say something:

is the content of that file. Blocks of `sh` are commands, and a block of `text` directly after one
is their expected output; an ellipsis matches anything. Ports are replaced by free ones, including
the default ports of the service.
"""

import contextlib
import doctest
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, final

from flowcontrol_server.config.settings import Listen
from tests.support.ports import free_port

DONE_S: Final = 240.0
"""LiteLLM alone takes a minute to start on a busy machine."""
_BLOCK = re.compile(
    r"(?P<before>[^\n]*)\n+^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"^`(?P<name>[^` ]+\.\w+)`.*:$")
_PORT = re.compile(
    r"(?P<before>127\.0\.0\.1:|--port |--bind 127\.0\.0\.1 |port_value: )"
    r"(?P<port>\d{4,5})\b"
)
_MARK = "@@ end of block @@"
_ENDED = re.compile(
    r"^(?:bash|environment): line \d+: +\d+ (?:Killed|Terminated) .*\n", re.MULTILINE
)
"""Messages of bash on terminated programs, which an interactive user does not see."""
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A block of code and its purpose."""

    language: str
    text: str
    file: str | None
    """Name of the file with this content; None: no file."""


def blocks_of(page: str) -> Iterator[Block]:
    """Yield a page's blocks of code in order."""
    for found in _BLOCK.finditer(page):
        named = _FILE.match(found["before"])
        yield Block(found["language"], found["text"], named["name"] if named else None)


@final
class Recipe:
    """A page that is run in an empty folder.

    Args:
        page: the page.
        directory: the folder.
        environment: environment of its commands.
    """

    def __init__(self, page: Path, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._ports: dict[str, str] = {}
        self._listen = {
            name: address
            for name, field in Listen.model_fields.items()
            if isinstance(address := field.default, str) and _PORT.match(address)
        }
        self._blocks = [*blocks_of(page.read_text())]

    def run(self) -> Iterator[tuple[str, str, str]]:
        """Run the page; yield the expected and the actual output of each block, and their diff.

        Raises:
            AssertionError: a command failed.
        """
        printed = iter(self._output().split(f"{_MARK}\n"))
        last = ""
        for block in self._blocks:
            if block.file is None and block.language == "sh":
                last = next(printed)
            elif block.file is None and block.language == "text":
                wanted = self._replaced(block.text)
                checker = doctest.OutputChecker()
                is_so = checker.check_output(wanted, last, _FLAGS)
                yield wanted, last, "" if is_so else f"wanted:\n{wanted}\ngot:\n{last}"

    def _output(self) -> str:
        """Write the files and run the commands, in order."""
        script = ["set -eu"]
        for number, block in enumerate(self._blocks):
            text = self._replaced(block.text)
            if block.file is not None:
                kept = self._directory / f".block-{number}"
                kept.write_text(self._with_ports(text))
                script.append(f"mkdir -p \"$(dirname '{block.file}')\"; cp {kept} '{block.file}'")
            elif block.language == "sh":
                script += [text, f"echo '{_MARK}'"]
        log = self._directory / ".output"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ("bash", "-c", "\n".join(script)),
                cwd=self._directory,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(DONE_S)
            finally:
                with contextlib.suppress(ProcessLookupError):  # no process was left
                    os.killpg(process.pid, signal.SIGKILL)
        said = log.read_text()
        logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in self._logs())
        assert status == 0, f"status {status}:\n{said}\n{logs}"
        return _ENDED.sub("", said)

    def _logs(self) -> Iterator[Path]:
        yield from sorted(self._directory.glob("*.log"))

    def _with_ports(self, text: str) -> str:
        """Return a configuration of the service with free ports where it omits them."""
        if "kind: FlowControlConfig" not in text or "\nlisten:" in text:
            return text
        ports = ", ".join(
            f'{Listen.model_fields[name].alias or name}: "{self._replaced(at)}"'
            for name, at in self._listen.items()
        )
        return f"{text}listen: {{{ports}}}\n"

    def _replaced(self, text: str) -> str:
        return _PORT.sub(self._replace, text)

    def _replace(self, found: re.Match[str]) -> str:
        port = found["port"]
        if port not in self._ports:
            self._ports[port] = str(free_port())
        return found["before"] + self._ports[port]
