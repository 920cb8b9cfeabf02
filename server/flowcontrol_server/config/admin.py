"""Settings of the service's own API: the admin token, and the names of clients."""

import base64
import hmac
import os
from pathlib import Path
from typing import Annotated, final

from pydantic import Field

from flowcontrol_server.common.secret_file import OWN_LENGTHS, checked, read_secret
from flowcontrol_server.common.sections import PathBeside, Section

TOKEN_VARIABLE = "FLOWCONTROL_ADMIN_TOKEN"  # noqa: S105 - a name, no secret
NO_TOKEN = (
    "no admin token is set: only this machine may read, and all write calls are refused; "
    f"set {TOKEN_VARIABLE} or admin.tokenFile"
)
"""Logged at the start of a service without a token."""
ClientName = Annotated[str, Field(min_length=1)]


class Admin(Section):
    """Access to the service's own API: flowcontrol.v1, and the pages beside /metrics."""

    token_file: PathBeside | None = None
    """File with the admin token, which calls send as `authorization: Bearer`; read again at each
    call. If unset, the environment variable FLOWCONTROL_ADMIN_TOKEN is used. With neither of them,
    and without `clients`, only this machine may read, and all write calls are refused."""
    clients: tuple[ClientName, ...] = ()
    """Names in client certificates (`tls.clientCa`) whose holders may read and write: a whole DNS
    name, URI, e-mail or IP address, or the common name of a certificate that has none of these. Any
    other certificate, such as Envoy's, allows nothing here."""
    trust_loopback: bool = Field(default=True, strict=True)
    """Whether a caller at 127.0.0.1 or ::1 may read without a token. Must be false where a proxy or
    a sidecar on this machine forwards requests from elsewhere."""

    def problem(self) -> str | None:
        """Return what is wrong with the token, without showing it; None: nothing is."""
        where = TOKEN_VARIABLE if self.token_file is None else "admin.tokenFile"
        try:
            self.secret().token()
        except OSError as error:
            return f"{where} must be a readable file, got '{self.token_file}': {error.strerror}"
        except ValueError as error:
            return f"{where} {error}"
        return None

    def is_read_only(self) -> bool:
        """Whether all write calls are refused."""
        return self.token_file is None and not self.clients and self.secret().token() is None

    def secret(self) -> "Secret":
        """Return the token's source."""
        return Secret(self.token_file)


@final
class Secret:
    """The admin token from its source. It is never logged and never shown.

    Args:
        path: its file; None: the environment variable.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def token(self) -> str | None:
        """Return the current token; None: there is none.

        Raises:
            OSError: its file cannot be read.
            ValueError: it is too short, too long, or has characters that a header cannot carry.
        """
        if self._path is None:
            text = os.environ.get(TOKEN_VARIABLE, "").strip()
            # Compose sets a variable without a value to the empty string
            return checked(text, OWN_LENGTHS) if text else None
        return read_secret(self._path, OWN_LENGTHS)

    def is_set(self) -> bool:
        """Whether there is a token, or should be one."""
        return self._path is not None or bool(os.environ.get(TOKEN_VARIABLE, "").strip())

    def matches(self, authorization: str) -> bool:
        """Whether the header has the token: as Bearer, or as Basic's password, as browsers do."""
        shown = _shown(authorization)
        try:
            token = self.token()
        except (OSError, ValueError):  # it has become invalid since the start; nothing matches
            return False
        return token is not None and shown is not None and hmac.compare_digest(token, shown)


def _shown(authorization: str) -> str | None:
    """Return the token in a header; None: the header is of another form, or not ASCII."""
    scheme, _, text = authorization.partition(" ")
    text = text.strip()
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(text, validate=True).decode("ascii").partition(":")[2]
        except ValueError:  # not base64, or not ASCII before or after decoding
            return None
    elif scheme.lower() != "bearer":
        return None
    return text if text.isascii() else None
