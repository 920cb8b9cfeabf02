"""The Kubernetes API, as much of it as is needed: list, watch and patch, of plain dictionaries.

kubernetes-asyncio brings what is hard about it: in-cluster tokens that are renewed, kubeconfigs
with certificates, contexts and credential plugins. Its models and its watch are not used: the ones
are hundreds of classes for three fields, the other decides by itself when to list again.
"""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, final

import aiohttp
import yaml

from flowcontrol.errors import FlowControlError
from server.settings_sources import Kubernetes

Object = Mapping[str, Any]
"""An object of the API, as JSON has it."""
ANSWER_S = 30.0
"""How long one answer may take that is no watch."""
CONNECT_S = 10.0
PAGE_OBJECTS = 100
"""Listed at once: a pod has 10 to 20 KiB, and reading them holds up the loop."""
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiError(Exception):
    """The API server has refused."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.retry_after_s = retry_after_s


class NoJsonError(Exception):
    """The API server has answered, but not in JSON, or in lines that are too long."""


UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)
"""What a call raises when the API server is out of reach or breaks off."""


@final
class KubeApi:
    """Connections to one API server.

    Args:
        client: kubernetes-asyncio's ApiClient.
        namespace: where the pool is.
    """

    def __init__(self, client: Any, namespace: str) -> None:
        self.namespace = namespace
        self._client = client

    @classmethod
    async def connect(cls, settings: Kubernetes) -> Self:
        """Read the credentials; nothing is sent yet.

        Raises:
            FlowControlError: there are none, or kubernetes-asyncio is missing.
        """
        try:
            from kubernetes_asyncio import client, config  # noqa: PLC0415 - an extra, and slow
        except ModuleNotFoundError as error:
            message = f"{error.name} is missing: pip install 'flowcontrol[kubernetes]'"
            raise FlowControlError(message) from error
        configuration = client.Configuration()
        namespace = settings.namespace
        own_namespace = None if settings.kubeconfig else _own_namespace()
        try:
            if own_namespace is not None:
                config.load_incluster_config(client_configuration=configuration)
                namespace = namespace or own_namespace
            else:
                loader = await config.load_kube_config(
                    config_file=settings.kubeconfig and str(settings.kubeconfig),
                    context=settings.context,
                    client_configuration=configuration,
                    persist_config=False,
                )
                current: Any = loader.current_context
                namespace = namespace or current["context"].get("namespace")
        except (config.ConfigException, yaml.YAMLError, OSError, TypeError, KeyError) as error:
            message = f"kubernetes: no usable credentials: {error}"
            raise FlowControlError(message) from error
        return cls(client.ApiClient(configuration), namespace or "default")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def list_page(self, path: str, parameters: Mapping[str, str]) -> Object:
        """Return one page of a list.

        Raises:
            ApiError: refused.
            UNREACHABLE: one of these.
            NoJsonError: likewise.
        """
        query = {**parameters, "limit": str(PAGE_OBJECTS)}
        async with await self._send("GET", path, query, _timeout(total_s=ANSWER_S)) as response:
            with _in_json():
                page: Object = json.loads(await response.read())
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
            as `list_page` does.
        """
        timeout = _timeout(read_s=silence_s)
        async with await self._send("GET", path, {**parameters, "watch": "1"}, timeout) as response:
            while True:
                with _in_json():
                    line = await response.content.readline()
                    if not line.endswith(b"\n"):
                        return  # the end, or cut off in the middle: the rest comes again
                    event: Object = json.loads(line)
                yield event

    async def merge(self, path: str, patch: Object) -> None:
        """Merge a patch into an object.

        Raises:
            ApiError, UNREACHABLE: as `list_page` does.
        """
        timeout = _timeout(total_s=ANSWER_S)
        async with await self._send("PATCH", path, {}, timeout, patch) as response:
            await response.read()

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own kind, handed on
        body: Object | None = None,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json"
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        response: aiohttp.ClientResponse = await self._client.request(
            method,
            self._client.configuration.host + path,
            query_params=dict(query),
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=timeout,
        )
        if response.status >= 400:  # noqa: PLR2004 - where errors begin
            async with response:
                raise _error(response.status, await response.content.read(65536), response.headers)
        return response


@contextmanager
def _in_json() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise NoJsonError(str(error)) from error


def _own_namespace() -> str | None:
    """Return the namespace of the pod this runs in; None where this is no pod."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _timeout(total_s: float | None = None, read_s: float | None = None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_S, sock_read=read_s)


def _error(status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    try:
        said = json.loads(body)
        message = str(said["message"])
    except (ValueError, TypeError, KeyError):
        message = body[:200].decode(errors="replace")
    wait = headers.get("Retry-After", "")
    return ApiError(status, message, float(wait) if wait.isdecimal() else None)
