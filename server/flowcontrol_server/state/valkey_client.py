"""Connections to Valkey or Redis with valkey-py: plain, TLS, through Sentinel, or to a cluster."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from flowcontrol.errors import FlowControlError
from flowcontrol_server.common.extras import missing
from flowcontrol_server.config.state import TLS_SCHEMES, Valkey
from flowcontrol_server.state.store import FencedError, StateError

_PORT = 6379
_SENTINEL_PORT = 26_379
_FENCED = "FENCED"
_READ_ONLY = "READONLY"
"""In errors of scripts before Redis 7, which have no class of their own."""


@final
class ValkeyClient:
    """Runs scripts on a server.

    Args:
        settings: of the server.
        pool: of the service; its keys are in one slot of a cluster.

    Raises:
        FlowControlError: valkey-py is missing.
    """

    def __init__(self, settings: Valkey, pool: str) -> None:
        try:
            import valkey.asyncio as valkey  # noqa: PLC0415 - an extra
            from valkey.exceptions import (  # noqa: PLC0415 - likewise
                ReadOnlyError,
                ValkeyClusterException,
                ValkeyError,
            )
        except ModuleNotFoundError as error:
            raise FlowControlError(missing(error, "valkey")) from error
        self._errors = (ValkeyError, ValkeyClusterException, OSError, TimeoutError)
        self._prefix = f"flowcontrol:{{{pool}}}:"
        self._read_only = ReadOnlyError
        self._is_cluster = settings.is_cluster
        self._client, self._sentinels = _connect(valkey, settings)

    def key(self, name: str) -> str:
        """Return the name of a key of this pool."""
        return self._prefix + name

    async def run(self, script: str, keys: list[str], *arguments: object) -> Any:
        """Run a script; return its answer.

        Raises:
            FencedError: the script has returned FENCED.
            StateError: any other failure.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        cancelled_before = task.cancelling()
        try:
            answer = await self._client.eval(script, len(keys), *map(self.key, keys), *arguments)
        except self._errors as error:
            _heed_cancellation(task, cancelled_before)
            if isinstance(error, self._read_only) or _READ_ONLY in str(error):
                await self._close_idle()
            if _FENCED in str(error):
                message = "state.valkey: a later leader has taken over"
                raise FencedError(message) from error
            message = f"state.valkey: {error!r}"
            raise StateError(message) from error
        _heed_cancellation(task, cancelled_before)
        return answer

    async def _close_idle(self) -> None:
        """Close idle connections, because the name may lead to another server, the new primary.

        A demoted server keeps its connections open and refuses every write. A cluster reports its
        primary itself.
        """
        if not self._is_cluster:
            with suppress(*self._errors):
                await self._client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close the connections."""
        for each in (self._client, *self._sentinels):
            with suppress(*self._errors):  # it is not used again
                await each.aclose()


def _heed_cancellation(task: "asyncio.Task[Any]", before: int) -> None:
    """Raise the cancellation that valkey-py has lost.

    It sends with `asyncio.wait_for`, which in Python 3.11 returns normally if the task is cancelled
    in the same turn of the loop in which the sending ends.
    """
    if task.cancelling() > before:
        raise asyncio.CancelledError


def _connect(valkey: Any, settings: Valkey) -> tuple[Any, tuple[Any, ...]]:
    """Return the connections to the server, and those to sentinels."""
    url = urlsplit(settings.url)
    timeout_s = settings.timeout / 1e9
    common: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "decode_responses": True,
        "encoding_errors": "replace",  # one damaged record must not hide the others
    }
    if settings.user or settings.password_file:
        common["credential_provider"] = _Credentials(settings.user, settings.password_file)
    if url.scheme == "unix":
        return valkey.Valkey(unix_socket_path=url.path, **common), ()
    tls: dict[str, Any] = {}
    if url.scheme in TLS_SCHEMES:
        tls = {
            "ssl": True,
            "ssl_ca_certs": settings.ca and str(settings.ca),
            "ssl_certfile": settings.certificate and str(settings.certificate),
            "ssl_keyfile": settings.key and str(settings.key),
        }
    common |= tls
    if settings.is_cluster:
        return valkey.ValkeyCluster(host=url.hostname, port=url.port or _PORT, **common), ()
    common["db"] = settings.database
    if settings.sentinel is None:
        one = common | _with_its_name(tls)
        return valkey.Valkey(host=url.hostname, port=url.port or _PORT, **one), ()
    sentinel = valkey.Sentinel(
        [(url.hostname, url.port or _SENTINEL_PORT)],
        sentinel_kwargs={
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            **_with_its_name(tls),
        },
        **common,
    )
    return sentinel.master_for(settings.sentinel), tuple(sentinel.sentinels)


def _with_its_name(tls: dict[str, Any]) -> dict[str, Any]:
    """Return TLS options for a host in the settings, whose certificate must have its name.

    valkey-py does not check names by default. The nodes that a sentinel or a cluster reports are
    known by addresses, which are seldom in their certificates.
    """
    return {**tls, "ssl_check_hostname": True} if tls else {}


@final
class _Credentials:
    """User and password, the latter read from its file at every connection."""

    def __init__(self, user: str | None, password_file: Path | None) -> None:
        self._user = user
        self._password_file = password_file

    def get_credentials(self) -> tuple[str, ...]:
        """Return the arguments of AUTH."""
        password = self._password_file.read_text().strip() if self._password_file else ""
        return (self._user, password) if self._user else (password,)
