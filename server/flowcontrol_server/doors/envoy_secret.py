"""The secret that authenticates Envoy on a port that asks for no client certificate.

Envoy sends it as initial metadata of its ext_proc and access-log streams. The file may hold several
secrets, one a line, and each is accepted. To rotate: add the new secret to the file, give it to
Envoy, then remove the old one.
"""

import hmac
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from flowcontrol_server.common.secret_file import read_secrets

METADATA_KEY: Final = "authorization"
NOT_SHOWN: Final = "authorization must contain a secret from listen.secretFile"
_SCHEME: Final = "Bearer "
_SECRET: Final = re.compile(r"[A-Za-z0-9\-._~+/=]+")
"""Characters that RFC 6750 allows after Bearer. A percent sign would have a special meaning in
Envoy's configuration of ext_proc, but not of the access log."""
_COUNT_MAX: Final = 8
_READ_AGAIN_S: Final = 1.0


@final
class EnvoySecret:
    """The secrets in a file, read again at most once a second.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no secret, too many, or an invalid one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._secrets = _read(path)
        self._read_s = time.monotonic()

    def metadata(self) -> str:
        """Return the value that Envoy sends: the first secret of the file."""
        return f"{_SCHEME}{self._secrets[0]}"

    def is_shown(self, value: str | bytes) -> bool:
        """Whether a value of the metadata is one of the secrets."""
        now_s = time.monotonic()
        if now_s - self._read_s >= _READ_AGAIN_S:
            self._read_s = now_s
            # While the file is being replaced, the previous secrets stay valid.
            with suppress(OSError, ValueError):
                self._secrets = _read(self._path)
        shown = value.encode() if isinstance(value, str) else value
        return any(hmac.compare_digest(f"{_SCHEME}{s}".encode(), shown) for s in self._secrets)

    def is_among(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        """Whether the metadata of a call has one of the secrets."""
        return any(key == METADATA_KEY and self.is_shown(value) for key, value in metadata or ())


def _read(path: Path) -> tuple[str, ...]:
    secrets = read_secrets(path, _COUNT_MAX)
    for each in secrets:
        if _SECRET.fullmatch(each) is None:
            message = f"must hold only letters, digits and -._~+/=, got {len(each)} characters"
            raise ValueError(message)
    return secrets
