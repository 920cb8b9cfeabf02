"""Envoy's filters that refuse requests while this service is down, as typed messages.

ext_proc fails open, so that responses which have begun complete. A filter behind it admits only
requests that this service has marked. Import it through `config`, which reports missing packages.
"""

import re
from typing import Final

from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.rbac import v3 as rules
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel import v3 as cel
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.rbac import v3 as rbac
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.codec import ADMITTED, METADATA_NAMESPACE
from flowcontrol_server.requests.dialects import (
    GEMINI_METHODS,
    Dialect,
    content_type_of,
    error_body,
)
from flowcontrol_server.requests.replies import (
    PUSHBACK_HEADER,
    REASON_HEADER,
    UNREACHABLE,
    UNREACHABLE_RETRY_S,
)
from flowcontrol_server.tools.envoy.filters import fail_over, secret_metadata

EXT_PROC: Final = "envoy.filters.http.ext_proc"
RBAC: Final = "envoy.filters.http.rbac"
SERVICE_CLUSTER: Final = "ext_proc"
_POLICY: Final = "flowcontrol"
_DENIED: Final = f"response.code_details == 'rbac_access_denied_matched_policy[{_POLICY}]'"
"""Distinguishes the denial of our filter from those of other RBAC filters."""
_TOO_LARGE: Final = "response.code_details == 'header_mutation_result_exceeds_limit'"
"""Envoy accepted the headers of a request, but its limit counts again what is sent on, with headers
that Envoy and this service add. By default 500, which clients try again, though it cannot pass."""
_TOO_LARGE_STATUS: Final = 431
_TOO_LARGE_MESSAGE: Final = (
    "too many headers: at most 100, of 60 KiB together, with some 5 that Envoy adds"
)
_DIALECTS: Final = {
    Dialect.GRPC: ("content-type", "application/grpc.*"),
    Dialect.ANTHROPIC: (":path", r"[^?]*/v1/messages([/?].*)?"),
    Dialect.GEMINI: (":path", rf"[^?]*:({'|'.join(GEMINI_METHODS)})([?].*)?"),
    Dialect.PLAIN: (":path", r"/(v2([/?].*)?|api/[^/?]*([?].*)?)"),
    Dialect.OPENAI: None,
}
"""Header and regex by which Envoy recognizes the dialect of a client, in the order of `dialect_of`.
The last one covers all other clients."""


def grpc_service(settings: Settings, *, retries: bool) -> core.GrpcService:
    """Return Envoy's configuration of calls to this service."""
    return core.GrpcService(
        envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=SERVICE_CLUSTER),
        retry_policy=fail_over(settings) if retries else None,
        initial_metadata=secret_metadata(settings),
    )


def admission(settings: Settings) -> list[hcm.HttpFilter]:
    """Return the filter behind ext_proc that denies unmarked requests; none with `continue`."""
    if settings.requests.on_fault == "continue":
        return []
    marked = matcher.MetadataMatcher(
        filter=METADATA_NAMESPACE,
        path=[matcher.MetadataMatcherPathSegment(key=ADMITTED)],
        value=matcher.ValueMatcher(bool_match=True),
    )
    is_marked = rules.Principal(
        sourced_metadata=rules.SourcedMetadata(
            metadata_matcher=marked, metadata_source=rules.MetadataSource.DYNAMIC
        )
    )
    exempt = [
        rules.Permission(and_rules=rules.PermissionSet(rules=_permissions(methods, paths)))
        for methods, paths in _exempt_paths(settings).items()
    ]
    is_exempt = rules.Permission(or_rules=rules.PermissionSet(rules=exempt))
    policy = rules.Policy(
        permissions=[
            rules.Permission(not_rule=is_exempt) if exempt else rules.Permission(any=True)
        ],
        principals=[rules.Principal(not_id=is_marked)],
    )
    config = rbac.Rbac(rules=rules.Rbac(action=rules.RbacAction.DENY, policies={_POLICY: policy}))
    return [hcm.HttpFilter(name=RBAC, typed_config=protobuf.Any.pack(config))]


def local_replies(settings: Settings) -> hcm.LocalReplyConfig:
    """Return the replies to denied requests: 503 with the error body of the client's API.

    And 431 to a request that has too many headers to be sent on.
    """
    denies = settings.requests.on_fault != "continue"
    denials = [_local_reply(dialect) for dialect in _DIALECTS] if denies else []
    too_large = hcm.ResponseMapper(
        filter=_details(_TOO_LARGE),
        status_code=_TOO_LARGE_STATUS,
        body_format_override=_body(_TOO_LARGE_MESSAGE, "text/plain"),
    )
    return hcm.LocalReplyConfig(mappers=[*denials, too_large])


def exempt_routes(settings: Settings, action: route.RouteAction) -> list[route.Route]:
    """Return the routes of requests that Envoy does not hold while this service is down."""
    overrides = ext_proc.ExtProcOverrides(grpc_service=grpc_service(settings, retries=False))
    filters = {EXT_PROC: protobuf.Any.pack(ext_proc.ExtProcPerRoute(overrides=overrides))}
    return [
        route.Route(
            match=route.RouteMatch(safe_regex=paths, headers=_method(methods)),
            route=action,
            typed_per_filter_config=filters,
        )
        for methods, paths in _exempt_paths(settings).items()
    ]


def _exempt_paths(settings: Settings) -> dict[tuple[str, ...], matcher.RegexMatcher]:
    """Return the paths that pass while this service is down, by their methods (empty: all)."""
    requests = settings.requests
    regexes: dict[tuple[str, ...], list[str]] = {}
    if requests.exempt_without_gate:
        for methods, path in requests.intake().exempt.entries:
            plain = re.escape(path.removesuffix("*"))
            regexes.setdefault(methods, []).append(plain + ".*" * path.endswith("*"))
    return {
        methods: matcher.RegexMatcher(regex="|".join(each)) for methods, each in regexes.items()
    }


def _permissions(methods: tuple[str, ...], paths: matcher.RegexMatcher) -> list[rules.Permission]:
    path = matcher.PathMatcher(path=matcher.StringMatcher(safe_regex=paths))
    return [
        *(rules.Permission(header=header) for header in _method(methods)),
        rules.Permission(url_path=path),
    ]


def _method(methods: tuple[str, ...]) -> list[route.HeaderMatcher]:
    regex = matcher.RegexMatcher(regex="|".join(methods))
    header = route.HeaderMatcher(
        name=":method", string_match=matcher.StringMatcher(safe_regex=regex)
    )
    return [header] if methods else []


def _local_reply(dialect: Dialect) -> hcm.ResponseMapper:
    denied = _details(_DENIED)
    header = _DIALECTS[dialect]
    body = error_body(dialect, UNREACHABLE.status, UNREACHABLE.reason, UNREACHABLE.message)
    headers = {REASON_HEADER: UNREACHABLE.reason, "retry-after": str(UNREACHABLE_RETRY_S)}
    if dialect is Dialect.GRPC:
        headers[PUSHBACK_HEADER] = str(UNREACHABLE_RETRY_S * 1000)
    return hcm.ResponseMapper(
        filter=denied if header is None else _both(denied, *header),
        status_code=UNREACHABLE.status,
        headers_to_add=[_header(name, value) for name, value in headers.items()],
        body_format_override=_body(body.decode(), content_type_of(dialect)),
    )


def _details(expression: str) -> accesslog.AccessLogFilter:
    """Match replies by the details that Envoy gives of them."""
    extension = accesslog.ExtensionFilter(
        name="envoy.access_loggers.extension_filters.cel",
        typed_config=protobuf.Any.pack(cel.ExpressionFilter(expression=expression)),
    )
    return accesslog.AccessLogFilter(extension_filter=extension)


def _body(text: str, content_type: str) -> core.SubstitutionFormatString:
    return core.SubstitutionFormatString(
        text_format_source=core.DataSource(inline_string=text), content_type=content_type
    )


def _both(denied: accesslog.AccessLogFilter, name: str, regex: str) -> accesslog.AccessLogFilter:
    header = route.HeaderMatcher(
        name=name,
        string_match=matcher.StringMatcher(safe_regex=matcher.RegexMatcher(regex=regex)),
    )
    with_header = accesslog.AccessLogFilter(header_filter=accesslog.HeaderFilter(header=header))
    return accesslog.AccessLogFilter(and_filter=accesslog.AndFilter(filters=[denied, with_header]))


def _header(name: str, value: str) -> core.HeaderValueOption:
    return core.HeaderValueOption(
        header=core.HeaderValue(key=name, value=value),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
