"""A Kubernetes API server for tests, over real HTTP, with every verb and every kind of failure.

It has no schema and no kinds: a collection exists once `serve` has been called with its path.
Versions, pages, selectors, bookmarks, 410 Gone, conflicts and Status objects follow the API
conventions.
"""

import asyncio
import copy
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

TOKEN = "secret"
Json = dict[str, Any]


class Asked(NamedTuple):
    """A received request."""

    method: str
    path: str
    query: Mapping[str, str]
    agent: str


class _Event(NamedTuple):
    version: int
    kind: str
    item: Json


@final
class FakeApiServer:
    """One API server and its objects."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        """Every request, in order."""
        self.forbidden: set[tuple[str, str]] = set()
        """Verbs (list, watch, patch) and paths that are refused."""
        self.refusal = 403
        """The status of such refusals."""
        self.unwritable: dict[str, int] = {}
        """Statuses that refuse to update the status of objects, by the objects' names."""
        self.watches_are_gone = False
        """Whether every watch gets 410."""
        self.is_mute = False
        """Whether requests get no answer."""
        self.pages_expire = False
        """Whether every page of a list except the first gets 410."""
        self.token = TOKEN
        """The token that requests must have."""
        self.failing: int | None = None
        """A status that all requests get; None: none."""
        self.failures_left: int | None = None
        """How many requests still get it; None: all."""
        self.page_max = 500
        """Most objects on a page."""
        self.retry_after: str | None = None
        self.list_count = 0
        """Lists read to their last page."""
        self._version = 100
        self._oldest = 0
        self._collections: dict[str, dict[str, Json]] = {}
        self._events: dict[str, list[_Event]] = {}
        self._watchers: dict[
            web.StreamResponse, tuple[web.Request, asyncio.Queue[bytes | None]]
        ] = {}
        self._has_asked = asyncio.Event()

    # What tests do to it

    def serve(self, path: str) -> None:
        """Add a collection, as if its CRD were installed."""
        self._collections.setdefault(path, {})
        self._events.setdefault(path, [])

    def unserve(self, path: str) -> None:
        """Remove a collection."""
        del self._collections[path]

    def put(self, path: str, item: Json) -> Json:
        """Create or replace an object, and notify watchers."""
        self.serve(path)
        name = item["metadata"]["name"]
        old = self._collections[path].get(name)
        new = copy.deepcopy(item)
        new["metadata"]["generation"] = 1 if old is None else old["metadata"]["generation"] + 1
        return self._store(path, new, "ADDED" if old is None else "MODIFIED", old)

    def delete(self, path: str, name: str) -> None:
        """Delete an object, and notify watchers."""
        item = copy.deepcopy(self._collections[path].pop(name))
        self._log(path, "DELETED", item)

    def get(self, path: str, name: str) -> Json:
        """Return the current object."""
        return copy.deepcopy(self._collections[path][name])

    def bookmark(self) -> None:
        """Send every watcher only the current version."""
        self._version += 1
        item = {"metadata": {"resourceVersion": str(self._version)}}
        for _request, queue in self._watchers.values():
            queue.put_nowait(_line("BOOKMARK", item))

    def forget_history(self) -> None:
        """Compact: from now on, watches from earlier versions get 410 Gone."""
        self._version += 1
        self._oldest = self._version

    def restore(self) -> None:
        """Break all connections, and be as etcd is from an old backup: empty, with old versions."""
        self.cut()
        self._version = 1
        self._collections = {path: {} for path in self._collections}
        self._events = {path: [] for path in self._events}

    def say(self, line: bytes) -> None:
        """Send every watcher a line."""
        for _request, queue in self._watchers.values():
            queue.put_nowait(line)

    def cut(self) -> None:
        """Break every watch without an end."""
        for request, _queue in list(self._watchers.values()):
            if request.transport is not None:
                request.transport.abort()

    def end_watches(self) -> None:
        """End every watch gracefully, as at its timeout."""
        for _request, queue in self._watchers.values():
            queue.put_nowait(None)

    async def until_asked(self, method: str, path: str, count: int = 1, **query: str) -> Asked:
        """Wait until so many requests like this have arrived; return the last one."""
        async with asyncio.timeout(5):
            while True:
                found = [
                    each
                    for each in self.asked
                    if each.method == method
                    and each.path == path
                    and query.items() <= dict(each.query).items()
                ]
                if len(found) >= count:
                    return found[count - 1]
                self._has_asked.clear()
                await self._has_asked.wait()

    # HTTP

    def application(self) -> web.Application:
        """Return the application that serves it."""
        application = web.Application()
        application.router.add_get("/{path:.*}", self._get)
        application.router.add_patch("/{path:.*}", self._patch)
        application.router.add_post("/{path:.*}", self._create)
        application.router.add_put("/{path:.*}", self._replace)
        return application

    def _note(self, request: web.Request, verb: str, path: str) -> web.Response | None:
        self.asked.append(
            Asked(request.method, request.path, dict(request.query), request.headers["User-Agent"])
        )
        self._has_asked.set()
        if self.failing is not None and self.failures_left != 0:
            self.failures_left = self.failures_left and self.failures_left - 1
            return self._status(self.failing, "told to fail")
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._status(401, "Unauthorized")
        if (verb, path) in self.forbidden:
            return self._status(self.refusal, f'cannot {verb} resource at "{path}"')
        return None

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if self.is_mute:
            await asyncio.Event().wait()
        verb = "watch" if request.query.get("watch") == "1" else "list"
        refusal = self._note(request, verb, request.path)
        if refusal is not None:
            return refusal
        path, _, name = request.path.rpartition("/")
        if name in self._collections.get(path, {}):
            return web.json_response(self._collections[path][name])
        if request.path not in self._collections:
            return self._status(404, "the server could not find the requested resource")
        return await (self._watch(request) if verb == "watch" else self._list(request))

    async def _list(self, request: web.Request) -> web.Response:
        items = [i for i in self._collections[request.path].values() if _matches(i, request.query)]
        first = int(request.query.get("continue", "0"))
        if first and self.pages_expire:
            return self._status(410, "The provided continue parameter is too old")
        size = min(int(request.query["limit"]), self.page_max) if "limit" in request.query else None
        if size is None:
            size = len(items)
        metadata: Json = {"resourceVersion": str(self._version)}
        if len(items) > first + size:
            metadata["continue"] = str(first + size)
        else:
            self.list_count += 1
        return web.json_response({"metadata": metadata, "items": items[first : first + size]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if version < self._oldest or self.watches_are_gone:
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            await response.write(_line("ERROR", gone))
            return response
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        for event in self._events[request.path]:
            if event.version > version and _matches(event.item, request.query):
                queue.put_nowait(_line(event.kind, event.item))
        self._watchers[response] = (request, queue)
        try:
            while (line := await queue.get()) is not None:
                await response.write(line)
        finally:
            del self._watchers[response]
        return response

    async def _create(self, request: web.Request) -> web.Response:
        refusal = self._note(request, "create", request.path)
        if refusal is not None:
            return refusal
        item = await request.json()
        if item["metadata"]["name"] in self._collections[request.path]:
            return self._status(409, "already exists")
        return web.json_response(self.put(request.path, item), status=201)

    async def _replace(self, request: web.Request) -> web.Response:
        path, _, name = request.path.rpartition("/")
        refusal = self._note(request, "update", path)
        if refusal is not None:
            return refusal
        old = self._collections.get(path, {}).get(name)
        item = await request.json()
        if old is None:
            return self._status(404, name)
        if item["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
            return self._status(409, "the object has been modified")
        return web.json_response(self.put(path, item))

    async def _patch(self, request: web.Request) -> web.Response:
        path, _, name = request.path.removesuffix("/status").rpartition("/")
        refusal = self._note(request, "patch", path)
        if refusal is not None:
            return refusal
        if name in self.unwritable:
            return self._status(self.unwritable[name], f'status of "{name}" is invalid')
        item = self._collections.get(path, {}).get(name)
        if item is None or request.content_type != "application/merge-patch+json":
            return self._status(404 if item is None else 415, name)
        patch = await request.json()
        asked_version = patch.get("metadata", {}).get("resourceVersion")
        if asked_version not in {None, item["metadata"]["resourceVersion"]}:
            return self._status(409, "the object has been modified")
        new = {**item, "status": {**item.get("status", {}), **patch["status"]}}
        return web.json_response(self._store(path, copy.deepcopy(new), "MODIFIED"))

    def _status(self, code: int, message: str) -> web.Response:
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        body = {"kind": "Status", "status": "Failure", "code": code, "message": message}
        return web.json_response(body, status=code, headers=headers)

    def _store(self, path: str, item: Json, kind: str, old: Json | None = None) -> Json:
        self._log(path, kind, item, old)
        self._collections[path][item["metadata"]["name"]] = item
        return copy.deepcopy(item)

    def _log(self, path: str, kind: str, item: Json, old: Json | None = None) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        event = _Event(self._version, kind, copy.deepcopy(item))
        self._events[path].append(event)
        for request, queue in self._watchers.values():
            if self._version <= int(request.query["resourceVersion"]):
                continue
            if request.path == path and _matches(item, request.query):
                queue.put_nowait(_line(kind, event.item))
            elif request.path == path and old is not None and _matches(old, request.query):
                queue.put_nowait(_line("DELETED", event.item))  # the selector no longer matches


def _line(kind: str, item: Mapping[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


def _matches(item: Json, query: Mapping[str, str]) -> bool:
    """Whether a selector selects an object."""
    labels = item["metadata"].get("labels", {})
    wanted = dict(each.split("=") for each in query.get("labelSelector", "").split(",") if each)
    field = query.get("fieldSelector", "")
    is_named = not field or field == f"metadata.name={item['metadata']['name']}"
    return is_named and wanted.items() <= labels.items()


@asynccontextmanager
async def api_server(
    directory: Path,
    user: Mapping[str, Any] | None = None,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[FakeApiServer, Path]]:
    """A server on a real port, and a kubeconfig for it with those credentials.

    With a context it serves TLS, and the kubeconfig trusts the file ca.crt beside it.
    """
    fake = FakeApiServer()
    server = TestServer(fake.application())
    await server.start_server(ssl=context)
    url = str(server.make_url("")).rstrip("/")
    authority = None if context is None else directory / "ca.crt"
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(kubeconfig_for(url, user=user, authority=authority))
    try:
        yield fake, kubeconfig
    finally:
        fake.end_watches()
        await server.close()


def kubeconfig_for(
    url: str,
    namespace: str = "models",
    user: Mapping[str, Any] | None = None,
    authority: Path | None = None,
) -> str:
    """A kubeconfig with a token, or other credentials of the user."""
    trusted = {} if authority is None else {"certificate-authority": str(authority)}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url, **trusted}}],
            "users": [{"name": "test", "user": dict(user or {"token": TOKEN})}],
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "test", "user": "test", "namespace": namespace},
                }
            ],
        }
    )
