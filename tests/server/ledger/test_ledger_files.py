"""Whose files a ledger may take."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowcontrol.errors import LedgerError
from flowcontrol.replay.ledger import BEGINNING
from flowcontrol_server.cli import main
from flowcontrol_server.common.parts import stranger_among
from flowcontrol_server.ledger.claim import LedgerLock

CONFIG = """\
apiVersion: flowcontrol/v1alpha1
kind: FlowControlConfig
pool: llama
objectives: {directory: .}
endpoints: {static: []}
ledger: {file: ledger, files: 3}
"""


def complaints(folder: Path) -> list[str]:
    """What check-config says where the ledger is a file called so in a folder."""
    path = folder / "flowcontrol.yaml"
    path.write_text(CONFIG)
    lines = CliRunner().invoke(main, ["check-config", str(path)]).stderr.splitlines()
    lines = [line for line in lines if "warning:" not in line]
    return [line.removeprefix(f"{path}: ") for line in lines]


class TestStrangers:
    """What must not be renamed nor written over."""

    @pytest.mark.parametrize("text", ["", '{"hea', '{"header":{"run":"a"}}\n{"t":5}\n'])
    def test_ledgers(self, tmp_path: Path, text: str) -> None:
        """Ledgers may be, also such as a crash leaves behind; and what is not there."""
        (tmp_path / "ledger").write_text(text)
        (tmp_path / "ledger.2").write_text(text)

        assert stranger_among(tmp_path / "ledger", 3, BEGINNING) is None
        assert complaints(tmp_path) == []

    @pytest.mark.parametrize("name", ["ledger", "ledger.1", "ledger.2"])
    def test_other_files(self, tmp_path: Path, name: str) -> None:
        """A file of anybody else's is named, wherever in the row it stands."""
        (tmp_path / name).write_text("precious\n")

        path = str(tmp_path / name)
        rule = f"ledger must not overwrite a file that is not a ledger, got {path!r}"
        assert complaints(tmp_path) == [rule]

    def test_beyond(self, tmp_path: Path) -> None:
        """What stands behind the last part is nobody's business."""
        (tmp_path / "ledger.3").write_text("precious\n")

        assert stranger_among(tmp_path / "ledger", 3, BEGINNING) is None

    def test_folder(self, tmp_path: Path) -> None:
        """A folder is no file."""
        (tmp_path / "ledger").mkdir()

        path = str(tmp_path / "ledger")
        rule = f"ledger.file must be a file in an existing folder, got {path!r}"
        assert complaints(tmp_path) == [rule]

    def test_pipe(self, tmp_path: Path) -> None:
        """A pipe is not opened."""
        os.mkfifo(tmp_path / "ledger")

        assert stranger_among(tmp_path / "ledger", 3, BEGINNING) == tmp_path / "ledger"


class TestClaim:
    """One at a time."""

    def test_taken(self, tmp_path: Path) -> None:
        """What one holds no other gets, until it is let go."""
        first, second = LedgerLock(tmp_path / "ledger"), LedgerLock(tmp_path / "ledger")
        first.take()
        with pytest.raises(LedgerError, match="in use by another process"):
            second.take()
        first.release()
        second.take()
        second.release()
