"""Open files: as many as the ports may need, so that no port can take those of another."""

import resource
from typing import Final

import structlog

_OWN: Final = 256
"""For what is no connection of a port: files, sources, the metrics of some 200 endpoints."""
_log = structlog.get_logger()


def reserve_descriptors(connections: int) -> float:
    """Raise the process's limit of open files to what the system allows.

    All of it: each endpoint whose load is asked for takes one, too.

    Returns:
        The part of so many connections that there is room for, from 0 to 1; below 1 a warning is
        logged.
    """
    needed = connections + _OWN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        soft = max(soft, needed) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return 1.0
    _log.warning("descriptors_scarce", limit=soft, needed=needed)
    return soft / needed
