"""Access control of our own API, on gRPC and on HTTP.

              from loopback          with the token, or a certificate    all others
              (admin.trustLoopback)  named in admin.clients
    reading   yes                    yes                                 no
    changing  no                     yes                                 no

Changes always need proof, because other programs on this machine (a sidecar, a web page in a
browser) can reach its loopback, too. Loopback means 127.0.0.1 and ::1, without forwarding: a
sidecar that connects from 127.0.0.6, or a proxy that names its client in a header, is not loopback.
Envoy's streams, health and reflection are not part of this API (docs/threat-model.md).
"""

from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import Any, final
from urllib.parse import unquote, urlsplit

import grpc
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from flowcontrol_server.config.admin import TOKEN_VARIABLE, Secret

_READING = ("Get", "Watch", "List", "Explain")
"""Prefixes of calls that change nothing; any other call counts as a change."""
_PUBLIC_PATHS = frozenset({"/metrics", "/healthz", "/readyz"})
_LOOPBACK = frozenset({ip_address("127.0.0.1"), ip_address("::1")})
_SAFE_METHODS = frozenset({"GET", "HEAD"})
_HOW = f"the admin token ({TOKEN_VARIABLE} or admin.tokenFile) as authorization: Bearer"
_FORWARDED = frozenset(
    ("forwarded", "via", "x-forwarded-for", "x-forwarded-client-cert", "x-envoy-external-address")
)
"""Headers of proxies: with one of them, the address is not that of the caller."""


@final
class Guard:
    """Applies the rule above.

    Args:
        secret: the admin token.
        clients: names in client certificates whose holders may do everything.
        trusts_loopback: whether callers on this machine may read without proof.
    """

    def __init__(
        self, secret: Secret, clients: Iterable[str] = (), *, trusts_loopback: bool = True
    ) -> None:
        self._secret = secret
        self._clients = frozenset(clients)
        self._trusts_loopback = trusts_loopback

    def refusal(
        self, *, changes: bool, is_local: bool, names: Iterable[str] = (), authorization: str = ""
    ) -> str | None:
        """Return why a call is refused; None: it is allowed.

        Args:
            changes: whether it changes anything.
            is_local: whether it comes from this machine's loopback.
            names: of the caller, in the certificate that TLS has checked.
            authorization: value of its authorization header; empty: none.
        """
        if not self._clients.isdisjoint(names):
            return None
        if authorization and not self._secret.is_set():
            return f"invalid admin token: none is set here by {TOKEN_VARIABLE} or admin.tokenFile"
        if authorization:
            return None if self._secret.matches(authorization) else "invalid admin token"
        if is_local and self._trusts_loopback and not changes:
            return None
        what = "a call that changes something" if changes else "this call"
        return f"{what} needs {_HOW}, or a client certificate named in admin.clients"

    # gRPC

    def handler(
        self, service: ServiceDescriptor, servicer: object
    ) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the handler of a service of our API for a grpc.aio server, each call guarded.

        An interceptor could do the same, but would slow down every ext_proc stream.
        """
        methods = {
            method.name: self._method(method, getattr(servicer, method.name))
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _method(
        self, method: MethodDescriptor, serve: Callable[..., Any]
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        assert not method.client_streaming, "the API has no such call"
        read = GetMessageClass(method.input_type).FromString
        write = GetMessageClass(method.output_type).SerializeToString
        changes = not method.name.startswith(_READING)

        async def stream(request: Any, context: Any) -> Any:
            """Answer with many messages, if the caller is authorized."""
            await self._check(context, changes=changes)
            async for response in serve(request, context):
                yield response

        async def answer(request: Any, context: Any) -> Any:
            """Answer with one message, if the caller is authorized."""
            await self._check(context, changes=changes)
            return await serve(request, context)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, read, write)
        return grpc.unary_unary_rpc_method_handler(answer, read, write)

    async def _check(self, context: Any, *, changes: bool) -> None:
        metadata: dict[str, str] = dict(reversed(context.invocation_metadata()))  # first is used
        refusal = self.refusal(
            changes=changes,
            is_local=_is_this_machine(context.peer()) and _FORWARDED.isdisjoint(metadata),
            names=_names(context.auth_context()),
            authorization=metadata.get("authorization", ""),
        )
        if refusal is not None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)

    # HTTP

    @property
    def middleware(self) -> Middleware:
        """The middleware for aiohttp that guards all pages but metrics and health."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Serve a request if it is authorized."""
            if request.path not in _PUBLIC_PATHS:
                self._check_page(request)
            return await handler(request)

        return guarded

    def _check_page(self, request: web.Request) -> None:
        changes = request.method not in _SAFE_METHODS
        origin = request.headers.get("origin")
        if changes and origin is not None and _origin_host(origin) != request.host:
            # A browser sends a stored password with requests from any page.
            raise web.HTTPForbidden(text="cross-origin request refused\n")
        refusal = self.refusal(
            changes=changes,
            is_local=_is_loopback(request.remote or "")
            # With a name for 127.0.0.1 in an attacker's DNS, a browser takes his page for ours.
            and _is_loopback_name(_host(request.host))
            and not any(name in request.headers for name in _FORWARDED),
            authorization=request.headers.get("authorization", ""),
        )
        if refusal is not None:
            ask = {"www-authenticate": 'Basic realm="flowcontrol", charset="UTF-8"'}
            raise web.HTTPUnauthorized(text=f"{refusal}\n", headers=ask)


def _origin_host(origin: str) -> str | None:
    """Return host and port of an origin; None: invalid."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_this_machine(peer: str) -> bool:
    """Return whether a peer, in gRPC's form, is local: ipv4:127.0.0.1:5 or ipv6:%5B::1%5D:5."""
    kind, _, address = unquote(peer).partition(":")
    return kind == "unix" or (kind.startswith("ipv") and _is_loopback(_host(address)))


def _host(address: str) -> str:
    """Return the host in host, host:port or [host]:port."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] or address


def _is_loopback_name(host: str) -> bool:
    name = host.lower()
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    """Return whether it is 127.0.0.1 or ::1; proxies connect from others of 127.0.0.0/8."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address) in _LOOPBACK


def _names(identity: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Return the names in a client's certificate; the common name only if it has no others."""
    if not identity.get("x509_pem_cert"):
        return []
    names = identity.get("x509_subject_alternative_name") or identity.get("x509_common_name")
    return [name.decode("utf-8", "replace") for name in names or ()]
