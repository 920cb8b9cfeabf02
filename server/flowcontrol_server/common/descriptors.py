"""Open files: as many as the ports may need, so that no port can take those of another."""

import resource
from typing import Final

import structlog

_OWN: Final = 256
"""For what is no connection of a port: files, sources, endpoints' metrics, the Kubernetes API."""
_log = structlog.get_logger()


def reserve_descriptors(connections: int) -> float:
    """Raise the process's limit of open files to what so many connections need.

    Returns:
        The part of it that the system allows, from 0 to 1; below 1 a warning is logged.
    """
    needed = connections + _OWN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return 1.0
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        _log.warning("descriptors_scarce", limit=limit, needed=needed)
    return limit / needed
