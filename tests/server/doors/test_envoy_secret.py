"""What Envoy has to show, from a file that changes under way."""

from pathlib import Path

import pytest

from flowcontrol_server.doors import envoy_secret as module
from flowcontrol_server.doors.envoy_secret import EnvoySecret

OLD, NEW = "the-secret-of-yesterday", "the-secret-of-today"


class TestSecret:
    """One file, one or more secrets."""

    def test_shown(self, tmp_path: Path) -> None:
        """One of the secrets, whole, behind Bearer; nothing else."""
        path = tmp_path / "secret"
        path.write_text(f"{NEW}\n{OLD}\n")
        secret = EnvoySecret(path)
        shown = (f"Bearer {NEW}", f"Bearer {OLD}".encode(), NEW, f"Bearer {NEW}x", "Bearer ", "é")

        assert [secret.is_shown(each) for each in shown] == [True, True, False, False, False, False]
        assert secret.metadata() == f"Bearer {NEW}"

    def test_metadata(self, tmp_path: Path) -> None:
        """It stands in the metadata of a call, whatever else does."""
        path = tmp_path / "secret"
        path.write_text(NEW)
        secret = EnvoySecret(path)

        assert secret.is_among([("te", "trailers"), ("authorization", f"Bearer {NEW}")])
        assert not secret.is_among([("te", f"Bearer {NEW}")])
        assert not secret.is_among(None)

    def test_rotation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is replaced counts; while it cannot be used the last one does."""
        monkeypatch.setattr(module, "_READ_AGAIN_S", 0.0)
        path = tmp_path / "secret"
        path.write_text(OLD)
        secret = EnvoySecret(path)
        path.write_text("")
        while_empty = secret.is_shown(f"Bearer {OLD}")
        path.write_text(NEW)

        assert while_empty
        assert secret.is_shown(f"Bearer {NEW}")
        assert not secret.is_shown(f"Bearer {OLD}")

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("", "must hold 1 to 8 secrets, one a line, got 0"),
            (f"{OLD}\n" * 9, "must hold 1 to 8 secrets, one a line, got 9"),
            ("short", "must hold 16 to 1024 visible ASCII characters, got 5 characters"),
            ("é" * 20, "must hold 16 to 1024 visible ASCII characters"),
            ("100%-known-to-envoy", "must hold only letters, digits and -._~[+]/=, got 19"),
        ],
    )
    def test_unusable(self, tmp_path: Path, text: str, rule: str) -> None:
        """What cannot be used is said, without saying it."""
        path = tmp_path / "secret"
        path.write_text(text)

        with pytest.raises(ValueError, match=rule) as caught:
            EnvoySecret(path)
        assert not text or text.split(maxsplit=1)[0] not in str(caught.value)
