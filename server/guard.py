"""Who may ask and who may change: the rule for our own API, on gRPC and on HTTP.

              from this machine    with the token, or a client certificate    anybody else
    asking    yes                  yes                                        no
    changing  no                   yes                                        no

Changing always takes proof: whatever else runs on this machine (a sidecar, a web page in a browser)
can reach its loopback, too. Envoy's streams, its access log, health and reflection are not our API:
who may connect at all is for mutual TLS and the network to say (docs/threat-model.md).
"""

import base64
import binascii
import hmac
import os
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, final
from urllib.parse import unquote, urlsplit

import grpc
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from server.sections import PathBeside, Section

TOKEN_VARIABLE = "FLOWCONTROL_ADMIN_TOKEN"  # noqa: S105 - a name, no secret
_TOKEN_LENGTH = range(16, 1025)
_READING = ("Get", "Watch", "List", "Explain")
"""How the names of calls begin that change nothing; any other call is taken to change something."""
_PUBLIC_PATHS = frozenset({"/metrics", "/healthz", "/readyz"})
_SAFE_METHODS = frozenset({"GET", "HEAD"})
_HOW = f"with the admin token ({TOKEN_VARIABLE} or admin.tokenFile) as authorization: Bearer"


class Admin(Section):
    """Who may use our own API: flowcontrol.v1, and the pages beside /metrics."""

    token_file: PathBeside | None = None
    """File with the secret that calls show as `authorization: Bearer`; read anew at each call.
    Without it the environment's FLOWCONTROL_ADMIN_TOKEN counts. With neither, and without client
    certificates, this machine alone may ask and nobody may change anything."""

    def complaint(self) -> str | None:
        """Return what is wrong with the token, without showing it; None if nothing is."""
        where = TOKEN_VARIABLE if self.token_file is None else "admin.tokenFile"
        try:
            self.secret().token()
        except UnicodeDecodeError:
            return f"{where} must hold visible ASCII characters alone"
        except OSError as error:
            return f"{where} must be a file to read, got '{self.token_file}': {error.strerror}"
        except ValueError as error:
            return f"{where} {error}"
        return None

    def secret(self) -> "Secret":
        """Return where the token is."""
        return Secret(self.token_file)


@final
class Secret:
    """The admin token, wherever it is. It is never logged and never shown.

    Args:
        path: its file; None: the environment.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def token(self) -> str | None:
        """Return it as it is now; None if there is none.

        Raises:
            OSError: its file cannot be read.
            ValueError: it is too short, too long, or has characters that a header cannot carry.
        """
        if self._path is None:
            text = os.environ.get(TOKEN_VARIABLE, "").strip()
            if not text:  # as Compose writes a variable that is not set
                return None
        else:
            text = self._path.read_text(encoding="ascii").strip()
        if len(text) not in _TOKEN_LENGTH or not all("!" <= letter <= "~" for letter in text):
            message = f"must hold 16 to 1024 visible ASCII characters, got {len(text)} characters"
            raise ValueError(message)
        return text

    def matches(self, authorization: str) -> bool:
        """Whether the header shows the token: Bearer, or as Basic's password, as browsers do."""
        shown = _shown(authorization)
        try:
            token = self.token()
        except (OSError, ValueError):  # gone since the start: then nothing matches
            return False
        return token is not None and shown is not None and hmac.compare_digest(token, shown)


@final
class Guard:
    """Applies the rule above."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret

    def complaint(
        self, *, changes: bool, is_local: bool, is_certified: bool, authorization: str
    ) -> str | None:
        """Return why a call must not be; None if it may.

        Args:
            changes: whether it changes anything.
            is_local: whether it comes from this machine.
            is_certified: whether TLS has checked the caller's certificate.
            authorization: what it shows, empty if nothing.
        """
        if is_certified or (authorization and self._secret.matches(authorization)):
            return None
        if authorization:
            return "the admin token is another one"
        if is_local and not changes:
            return None
        what = "changing anything" if changes else "asking from another machine"
        return f"{what} must be {_HOW}, or over mutual TLS"

    # gRPC

    def handler(
        self, service: ServiceDescriptor, servicer: object
    ) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return a service of our API as a grpc.aio server takes it up, each call guarded.

        An interceptor could do the same, but would stand in the way of every ext_proc stream.
        """
        methods = {
            method.name: self._method(method, getattr(servicer, method.name))
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _method(
        self, method: MethodDescriptor, serve: Callable[..., Any]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        assert not method.client_streaming, "our API has no such call"
        read = GetMessageClass(method.input_type).FromString
        write = GetMessageClass(method.output_type).SerializeToString
        changes = not method.name.startswith(_READING)

        async def stream(request: Any, context: Any) -> Any:
            """Answer with many messages, if the caller may ask."""
            await self._check(context, changes=changes)
            async for response in serve(request, context):
                yield response

        async def answer(request: Any, context: Any) -> Any:
            """Answer with one message, if the caller may ask."""
            await self._check(context, changes=changes)
            return await serve(request, context)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, read, write)
        return grpc.unary_unary_rpc_method_handler(answer, read, write)

    async def _check(self, context: Any, *, changes: bool) -> None:
        metadata: Iterable[tuple[str, str]] = context.invocation_metadata()
        complaint = self.complaint(
            changes=changes,
            is_local=_is_this_machine(context.peer()),
            is_certified=bool(context.auth_context().get("x509_pem_cert")),
            authorization=next((text for name, text in metadata if name == "authorization"), ""),
        )
        if complaint is not None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, complaint)

    # HTTP

    @property
    def middleware(self) -> Middleware:
        """What aiohttp puts before its pages: all but metrics and health are guarded."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Serve a request that may be."""
            if request.path not in _PUBLIC_PATHS:
                self._check_page(request)
            return await handler(request)

        return guarded

    def _check_page(self, request: web.Request) -> None:
        changes = request.method not in _SAFE_METHODS
        origin = request.headers.get("origin")
        if changes and origin is not None and _origin_host(origin) != request.host:
            # A browser shows a password it knows to whatever page sends it here.
            raise web.HTTPForbidden(text="another site must not change anything here\n")
        complaint = self.complaint(
            changes=changes,
            # A name for 127.0.0.1 in someone else's DNS makes a page of theirs ours to a browser.
            is_local=_is_loopback(request.remote or "") and _is_loopback(_host(request.host)),
            is_certified=False,
            authorization=request.headers.get("authorization", ""),
        )
        if complaint is not None:
            ask = {"www-authenticate": 'Basic realm="flowcontrol", charset="UTF-8"'}
            raise web.HTTPUnauthorized(text=f"{complaint}\n", headers=ask)


def _origin_host(origin: str) -> str | None:
    """Return host and port of an origin; None if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _shown(authorization: str) -> str | None:
    """Return the token a header shows; None if it is no header of ours, or not ASCII."""
    scheme, _, text = authorization.partition(" ")
    text = text.strip()
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(text, validate=True).decode("ascii").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    elif scheme.lower() != "bearer":
        return None
    return text if text.isascii() else None


def _is_this_machine(peer: str) -> bool:
    """Whether a peer is, as grpc writes it: ipv4:127.0.0.1:5 or ipv6:%5B::1%5D:5."""
    kind, _, address = unquote(peer).partition(":")
    return kind == "unix" or (kind.startswith("ipv") and _is_loopback(_host(address)))


def _host(address: str) -> str:
    """Return the host of host, host:port or [host]:port."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] or address


def _is_loopback(host: str) -> bool:
    name = host.lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
