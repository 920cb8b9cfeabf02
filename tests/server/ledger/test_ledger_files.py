"""Whose files a ledger may take."""

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowcontrol.config import ControllerConfig
from flowcontrol.errors import LedgerError
from flowcontrol.replay.ledger import BEGINNING
from flowcontrol_server.cli import main
from flowcontrol_server.common.parts import SMALL_MAX, make_room, part_path, stranger_among
from flowcontrol_server.config.ledger import LedgerSection
from flowcontrol_server.ledger.ledger import Ledger

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


class TestRoom:
    """Which parts are kept when another comes: 3 of 100 bytes, or as many small ones as fit."""

    @pytest.mark.parametrize(
        ("sizes", "kept"),
        [
            ([], []),
            ([99], [99]),
            ([100, 100], [100, 100]),
            ([100, 100, 100], [100, 100]),
            ([150, 150, 150], [150, 150]),
            ([20, 20, 100], [20, 20, 100]),
            ([20, 20, 20, 100], [20, 20, 20, 100]),
            ([100, 20, 20, 20, 100], [100, 20, 20, 20]),
            ([20, 100, 20, 20, 20, 100, 100], [20, 100, 20, 20, 20]),
        ],
    )
    def test_restarts_push_nothing_out(
        self, tmp_path: Path, sizes: list[int], kept: list[int]
    ) -> None:
        """Small parts leave room for older ones; together they are never more than 3 full ones."""
        path = tmp_path / "ledger"
        for number, size in enumerate(sizes):
            part_path(path, number).write_bytes(BEGINNING.ljust(size))
        make_room(path, 3, 100, BEGINNING)
        path.write_bytes(BEGINNING)
        names = sorted(tmp_path.iterdir(), key=lambda each: (len(each.name), each.name))

        assert [each.name for each in names][1:] == [f"ledger.{n + 1}" for n in range(len(kept))]
        assert [each.stat().st_size for each in names][1:] == kept

    def test_only_the_newest(self, tmp_path: Path) -> None:
        """With one part the next replaces it."""
        path = tmp_path / "ledger"
        path.write_bytes(BEGINNING)
        make_room(path, 1, 100, BEGINNING)

        assert [each.name for each in tmp_path.iterdir()] == ["ledger"]

    def test_not_without_end(self, tmp_path: Path) -> None:
        """A service that cannot start leaves so many and no more."""
        path = tmp_path / "ledger"
        for _ in range(3 + SMALL_MAX + 5):
            make_room(path, 3, 10_000, BEGINNING)
            path.write_bytes(BEGINNING)

        assert len(list(tmp_path.iterdir())) == 3 + SMALL_MAX

    def test_a_stranger_ends_the_row(self, tmp_path: Path) -> None:
        """Another's file beyond the parts that are set is left where it is."""
        path = tmp_path / "ledger"
        (tmp_path / "ledger.4").write_text("precious\n")
        for _ in range(9):
            make_room(path, 3, 10_000, BEGINNING)
            path.write_bytes(BEGINNING)

        names = ["ledger", "ledger.1", "ledger.2", "ledger.3", "ledger.4"]
        assert sorted(each.name for each in tmp_path.iterdir()) == names
        assert (tmp_path / "ledger.4").read_text() == "precious\n"


class TestLock:
    """One process at a time."""

    def test_in_use(self, tmp_path: Path) -> None:
        """A ledger that is written by another is not started, until that one has closed it."""
        settings = LedgerSection(file=tmp_path / "ledger")
        first, second = Ledger(settings), Ledger(settings)
        first.start(ControllerConfig(), 0)
        rule = f"ledger.file must not be in use by another process, got {tmp_path / 'ledger'}"
        with pytest.raises(LedgerError, match=re.escape(rule)):
            second.start(ControllerConfig(), 0)
        second.close()
        first.close()
        third = Ledger(settings)
        third.start(ControllerConfig(), 0)
        third.close()

        assert sorted(each.name for each in tmp_path.iterdir()) == [
            "ledger",
            "ledger.1",
            "ledger.lock",
        ]
