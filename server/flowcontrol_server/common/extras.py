"""What an installation without one of the extras says: the one place that knows how to install."""


def install(extra: str) -> str:
    """Return how to install an extra.

    Never by name from a package index: there, this project is not published yet, and anyone who
    registers the name decides what such a command would run.
    """
    return f"run pip install '.[{extra}]' in a checkout of flowcontrol"


def missing(error: ModuleNotFoundError, extra: str) -> str:
    """Return what is missing, and how to get it."""
    return f"{error.name} is missing: {install(extra)}"
