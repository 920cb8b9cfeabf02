"""The error text of an installation that lacks an extra, with the command to install it."""


def install(extra: str) -> str:
    """Return the command that installs an extra.

    It never installs by name from a package index: this project is not published there yet, so
    anyone could register the name, and decide what the command runs.
    """
    return f"run pip install '.[{extra}]' in a checkout of flowcontrol"


def missing(error: ModuleNotFoundError, extra: str) -> str:
    """Return which module is missing, and how to install it."""
    return f"{error.name} is missing: {install(extra)}"
