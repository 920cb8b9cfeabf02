"""The part of the Kubernetes API that is needed: list, watch and patch, with plain dictionaries.

kubernetes-asyncio handles the credentials: in-cluster tokens that are renewed, kubeconfigs with
certificates, contexts and credential plugins. It reads a kubeconfig and the CA certificates once;
this module loads them again, including plugin and token file, when the API server answers 401 or
has a certificate of another CA. Its models are not used: they are hundreds of classes for three
fields. Its watch is not used, because it decides by itself when to list again.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import aiohttp
import structlog
from aiohttp.http_exceptions import LineTooLong

from flowcontrol.errors import ConfigError, FlowControlError
from flowcontrol_server.common.extras import missing
from flowcontrol_server.common.yamlfile import read_documents
from flowcontrol_server.config.sources import Kubernetes

Object = Mapping[str, Any]
"""An object of the API, as parsed from JSON."""
ANSWER_S = 30.0
"""Timeout of a call other than a watch."""
CONNECT_S = 10.0
CREDENTIALS_S = 30.0
"""Timeout for loading a kubeconfig, including its credential plugin."""
RENEWAL_PAUSE_S = 5.0
"""Least time between two loads of credentials that do not work."""
PAGE_OBJECTS = 100
"""Objects in one page of a list. A pod has 10 to 20 KiB, and parsing a page blocks the loop."""
PAGE_BYTES_MAX = 32 << 20
"""Size of one page of a list; a larger one is not read."""
LIST_BYTES_MAX = 256 << 20
"""Size of a list that is read without pages: 13,000 pods of 20 KiB."""
MANAGER = "flowcontrol"
"""The field manager, which `managedFields` and conflicts show."""
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_log = structlog.get_logger()


class ApiError(Exception):
    """The API server has refused a call."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.retry_after_s = retry_after_s


class NoJsonError(Exception):
    """The answer of the API server is not JSON, or too large."""


UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)
"""Errors of a call when the API server is unreachable or breaks off."""


class _Call(NamedTuple):
    """A request to the API server; after new credentials it is sent once more."""

    method: str
    path: str
    query: Mapping[str, str]
    timeout: aiohttp.ClientTimeout
    body: Object | None = None
    kind: str = "application/merge-patch+json"
    """Content type of the body."""


@final
class KubeApi:
    """Connections to one API server. Owner: the loop.

    Args:
        client: kubernetes-asyncio's ApiClient.
        namespace: the pool's.
        load: makes another client with the current credentials.
    """

    def __init__(self, client: Any, namespace: str, load: Callable[[], Awaitable[Any]]) -> None:
        self.namespace = namespace
        self._client = client
        self._load = load
        self._previous: Any = None
        """The client before the last renewal; watches opened with it go on."""
        self._renewal = asyncio.Lock()
        self._renews_from_s = 0.0

    @classmethod
    async def connect(cls, settings: Kubernetes) -> Self:
        """Read the credentials; nothing is sent yet.

        Raises:
            FlowControlError: no usable credentials, or kubernetes-asyncio is missing.
        """
        try:
            import kubernetes_asyncio  # noqa: F401, PLC0415 - an extra, and slow
        except ModuleNotFoundError as error:
            raise FlowControlError(missing(error, "kubernetes")) from error
        own_namespace = None if settings.kubeconfig else _own_namespace()

        async def load() -> tuple[Any, str | None]:
            """Read the credentials."""
            if own_namespace is None:
                return await _load_kubeconfig(settings)
            return _load_service_account(), own_namespace

        async def load_again() -> Any:
            """Read them as they now are; the namespace stays."""
            return (await load())[0]

        loaded, namespace = await load()
        return cls(loaded, settings.namespace or namespace or "default", load_again)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        if self._previous is not None:
            await self._previous.close()

    async def list_page(self, path: str, parameters: Mapping[str, str]) -> Object:
        """Return one page of a list.

        Raises:
            ApiError: refused.
            UNREACHABLE: no answer; one of these errors.
            NoJsonError: the answer is not JSON, or too large.
        """
        return await self._list(
            path, {**parameters, "limit": str(PAGE_OBJECTS)}, "a page must be", PAGE_BYTES_MAX
        )

    async def list_whole(self, path: str, parameters: Mapping[str, str]) -> Object:
        """Return a list without pages, for use when pages expire before all have been read.

        Raises:
            ApiError, UNREACHABLE, NoJsonError: as `list_page` does.
        """
        return await self._list(path, parameters, "a list must be", LIST_BYTES_MAX)

    async def _list(self, path: str, query: Mapping[str, str], rule: str, bytes_max: int) -> Object:
        call = _Call("GET", path, query, _timeout(total_s=ANSWER_S))
        async with await self._send(call) as response:
            with _in_json():
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > bytes_max:
                        message = f"{rule} at most {bytes_max} bytes"
                        raise NoJsonError(message)
                page: Object = json.loads(body)
            return page

    async def watch(
        self, path: str, parameters: Mapping[str, str], silence_s: float
    ) -> AsyncGenerator[Object, None]:
        """Yield the events of a watch until the server ends it; close the iterator when done.

        Args:
            path: of the collection.
            parameters: of the query.
            silence_s: seconds without a byte after which the connection counts as dead.

        Raises:
            ApiError, UNREACHABLE, NoJsonError: as `list_page` does.
        """
        query = {**parameters, "watch": "1"}
        call = _Call("GET", path, query, _timeout(read_s=silence_s))
        async with await self._send(call) as response:
            while True:
                with _in_json():
                    line = await response.content.readline()
                    if not line.endswith(b"\n"):
                        return  # the end, or cut off in a line: the next watch repeats it
                    event: Object = json.loads(line)
                yield event

    async def merge(self, path: str, patch: Object) -> None:
        """Merge a patch into an object.

        Raises:
            ApiError, UNREACHABLE: as `list_page` does.
        """
        query = {"fieldManager": MANAGER}
        call = _Call("PATCH", path, query, _timeout(total_s=ANSWER_S), patch)
        async with await self._send(call) as response:
            await response.read()

    async def exchange(self, method: str, path: str, body: Object | None) -> Object:
        """Read, create or replace one object; return its new state.

        Raises:
            ApiError, UNREACHABLE, NoJsonError: as `list_page` does.
        """
        timeout = _timeout(total_s=ANSWER_S)
        call = _Call(method, path, {}, timeout, body, kind="application/json")
        async with await self._send(call) as response:
            with _in_json():
                answer: Object = json.loads(await response.read())
            return answer

    async def _send(self, call: _Call) -> aiohttp.ClientResponse:
        client = self._client
        try:
            response = await _request(client, call)
        except aiohttp.ClientConnectorCertificateError:
            if not await self._renew(client):
                raise
            response = await _request(self._client, call)
        if response.status == HTTPStatus.UNAUTHORIZED and await self._renew(client):
            response.close()
            response = await _request(self._client, call)
        if response.status >= HTTPStatus.BAD_REQUEST:
            async with response:
                raise _error(response.status, await response.content.read(65536), response.headers)
        return response

    async def _renew(self, refused: Any) -> bool:
        """Load the credentials again; return whether the client is another than the refused one.

        They are loaded on 401 only, and not at `expirationTimestamp`, too: a token file states no
        time, and a refused request is sent again at once.
        """
        async with self._renewal:
            if self._client is not refused:
                return True  # another request that was refused has renewed them
            if time.monotonic() < self._renews_from_s:
                return False
            self._renews_from_s = time.monotonic() + RENEWAL_PAUSE_S
            try:
                client = await self._load()
            except FlowControlError as error:
                _log.warning("kubernetes_credentials_not_renewed", problem=str(error))
                return False
            if self._previous is not None:
                await self._previous.close()
            self._previous, self._client = self._client, client
            _log.info("kubernetes_credentials_renewed")
            return True


def _load_service_account() -> Any:
    """Return a client with the credentials of the pod.

    Raises:
        FlowControlError: there are none.
    """
    from kubernetes_asyncio import client, config  # noqa: PLC0415 - an extra, and slow

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        message = f"kubernetes: no usable credentials: {error}"
        raise FlowControlError(message) from error
    return _client(configuration)


async def _load_kubeconfig(settings: Kubernetes) -> tuple[Any, str | None]:
    """Return a client with the credentials of the kubeconfig, and the namespace that it names.

    Raises:
        FlowControlError: no usable credentials.
    """
    from kubernetes_asyncio import client, config  # noqa: PLC0415 - an extra, and slow
    from kubernetes_asyncio.config.kube_config import (  # noqa: PLC0415 - likewise
        KUBE_CONFIG_DEFAULT_LOCATION,
    )

    configuration = client.Configuration()
    where = str(settings.kubeconfig or KUBE_CONFIG_DEFAULT_LOCATION)
    try:
        _expect_bounds(where)
        async with asyncio.timeout(CREDENTIALS_S):
            loader = await config.load_kube_config(
                config_file=settings.kubeconfig and str(settings.kubeconfig),
                context=settings.context,
                client_configuration=configuration,
                persist_config=False,
            )
        current: Any = loader.current_context
        namespace = current["context"].get("namespace")
    except TimeoutError as error:
        message = f"kubernetes: no usable credentials: {where}: none within {CREDENTIALS_S:g} s"
        raise FlowControlError(message) from error
    except (
        config.ConfigException,
        ConfigError,
        AssertionError,
        OSError,
        TypeError,
        ValueError,
        LookupError,
    ) as error:
        # other errors have messages about the library, not about the file
        is_plain = isinstance(error, config.ConfigException | ConfigError | OSError | ValueError)
        reason = (is_plain and str(error)) or "a value in it is missing, or has the wrong type"
        if where not in reason:
            reason = f"{where}: {reason}"
        message = f"kubernetes: no usable credentials: {reason}"
        raise FlowControlError(message) from error
    return _client(configuration), namespace


def _client(configuration: Any) -> Any:
    """Return a client.

    Raises:
        FlowControlError: its certificates cannot be used.
    """
    from kubernetes_asyncio import client  # noqa: PLC0415 - an extra, and slow

    try:
        made = client.ApiClient(configuration)
    except OSError as error:
        message = f"kubernetes: no usable credentials: certificates: {error}"
        raise FlowControlError(message) from error
    made.user_agent = f"{MANAGER}/{version('flowcontrol')}"
    return made


async def _request(client: Any, call: _Call) -> aiohttp.ClientResponse:
    headers = {"Accept": "application/json", "User-Agent": client.user_agent}
    if call.body is not None:
        headers["Content-Type"] = call.kind
    await client.update_params_for_auth(headers, [], ["BearerToken"])
    response: aiohttp.ClientResponse = await client.request(
        call.method,
        client.configuration.host + call.path,
        query_params=dict(call.query),
        headers=headers,
        body=call.body,
        _preload_content=False,
        _request_timeout=call.timeout,
    )
    return response


def _expect_bounds(where: str) -> None:
    """Read the files that kubernetes-asyncio is about to read, because it has no bounds.

    Raises:
        FlowControlError: there is no file.
        ConfigError: a file is beyond a bound, or is not YAML.
    """
    paths = [Path(each).expanduser() for each in where.split(os.pathsep) if each]
    files = [path for path in paths if path.exists()]
    if not files:
        message = (
            "kubernetes: no usable credentials: no service account in "
            f"{_NAMESPACE_FILE.parent}, and no kubeconfig {where}; set kubernetes.kubeconfig"
        )
        raise FlowControlError(message)
    for path in files:
        read_documents(path)


@contextmanager
def _in_json() -> Iterator[None]:
    try:
        yield
    except LineTooLong as error:
        message = "a watch line must be at most 4 MiB"
        raise NoJsonError(message) from error
    except (ValueError, RecursionError) as error:
        raise NoJsonError(str(error)) from error


def _own_namespace() -> str | None:
    """Return the namespace of the pod that this process runs in; None: not in a pod."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _timeout(total_s: float | None = None, read_s: float | None = None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_S, sock_read=read_s)


def _error(status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    try:
        answer = json.loads(body)
        message = str(answer["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        message = body[:200].decode(errors="replace")
    wait = headers.get("Retry-After", "")
    return ApiError(status, message, float(wait) if wait.isdecimal() else None)
