"""The limit of open files: enough for every port, so that no port can starve another."""

import resource
from typing import Final

import structlog

_OWN: Final = 256
"""Descriptors for all else than connections of ports: files, sources, scrapes of 200 endpoints."""
_log = structlog.get_logger()


def reserve_descriptors(connections: int) -> float:
    """Raise the process's limit of open files to the hard limit.

    Each endpoint that is scraped needs one, too, so the whole limit is used.

    Returns:
        The part of that number of connections that it allows, from 0 to 1; below 1 a warning is
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
