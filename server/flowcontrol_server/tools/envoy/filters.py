"""Envoy's filters that read bodies, and its access logs, as typed messages.

Import it through `config`, which reports missing packages.
"""

from collections.abc import Mapping
from datetime import timedelta
from importlib.resources import files
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.data.accesslog import v3 as log_data
from envoy_data_plane.envoy.extensions.access_loggers.grpc import v3 as grpc_log
from envoy_data_plane.envoy.extensions.access_loggers.stream import v3 as stream
from envoy_data_plane.envoy.extensions.common.matching import v3 as matching
from envoy_data_plane.envoy.extensions.filters.common.matcher.action import v3 as actions
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata import v3 as json_metadata
from envoy_data_plane.envoy.extensions.filters.http.lua import v3 as lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.envoy.type.tracing import v3 as tracing
from envoy_data_plane.google import protobuf
from envoy_data_plane.xds.core import v3 as xds_core
from envoy_data_plane.xds.type.matcher import v3 as xds

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.doors.envoy_secret import METADATA_KEY
from flowcontrol_server.requests.classify import SUBSET_NAMESPACE
from flowcontrol_server.requests.codec import METADATA_NAMESPACE, TICKET
from flowcontrol_server.requests.log_codec import REPORT_FORMAT, REPORT_TAG
from flowcontrol_server.requests.rules import (
    ANSWER_FIELDS,
    BODY_FIELDS,
    BODY_NAMESPACE,
    BODY_UNREAD,
    JSON_TYPES,
)
from flowcontrol_server.requests.usage import EARLY_EVENTS, ERROR_WORDS, FIELDS, WRAPPERS
from flowcontrol_server.sources import orca

LOG_CLUSTER: Final = "access_log"
_PREVIOUS_HOSTS: Final = "envoy.retry_host_predicates.previous_hosts"
_ACCESS_LOG: Final = {
    "start": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ:PATH)%",
    "code": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "duration_ms": "%DURATION%",
    "upstream": "%UPSTREAM_HOST%",
    "request_id": "%REQ(X-REQUEST-ID)%",
}
_RESPONSE_HEADERS: Final = {
    "queue-duration": ("x-llm-d-flow-queue-duration-ms", "queue_ms"),
    "position": ("x-llm-d-flow-position", "position"),
    "headroom": ("x-llm-d-flow-headroom", "headroom"),
}
"""Response headers, by their words in the settings: name, and the key of our metadata shown."""
_JSON: Final = matcher.RegexMatcher(regex=JSON_TYPES)
"""By default Envoy does not read a body whose media type has a charset beside it."""
_LOG_BUFFER_BYTES: Final = 65_536
_USAGE_READER: Final = files("flowcontrol_server.tools.envoy").joinpath("usage.lua")
"""What Envoy runs for each response. Its own filters are worse: json_to_metadata makes a response
above the buffer limit a 500, and sse_to_metadata crashes Envoy at the first event that is a bare 1,
"x", true or null (1.40)."""


def _usage_script() -> str:
    """Return the script, preceded by the tables of `requests/usage` in Lua."""
    usage = {path[-1]: name for name, path in FIELDS if path[:-1] == ("usage",)}
    details = {path[1]: "" for _, path in FIELDS if path[2:]}
    ollama = {path[-1]: name for name, path in FIELDS if not path[:-1]}
    words = ", ".join(f'{{"{word}", {status}}}' for word, status in ERROR_WORDS)
    return "\n".join(
        (
            f"local usage = {_lua_table(usage)}",
            f"local ollama = {_lua_table(ollama)}",
            f"local details = {_lua_table(details)}",
            f"local wrappers = {_lua_table(dict.fromkeys(WRAPPERS, ''))}",
            "-- Events that a server sends before it has a token.",
            f"local early = {_lua_table(dict.fromkeys(EARLY_EVENTS, ''))}",
            f"local error_words = {{ {words} }}",
            _USAGE_READER.read_text(),
        )
    )


def _lua_table(fields: Mapping[str, str]) -> str:
    """Return a Lua table of texts; an empty text becomes true."""
    pairs = [f'["{key}"] = ' + (f'"{value}"' if value else "true") for key, value in fields.items()]
    return f"{{ {', '.join(pairs)} }}"


def with_readers(
    settings: Settings,
    gate: list[hcm.HttpFilter],
    last: hcm.HttpFilter,
    bytes_max: int | None,
    buffer_limit_bytes: int | None = None,
) -> list[hcm.HttpFilter]:
    """Return the chain of filters, including those that read bodies if the settings need them.

    Args:
        settings: settings of the service.
        gate: ext_proc and the filters directly behind it.
        last: the last filter of the chain.
        bytes_max: size of the largest request body that is read; None: all are read.
        buffer_limit_bytes: bytes of a body that Envoy holds; a larger body does not skip the
            reader, so that it is refused with 413.
    """
    reads_usage = settings.is_reported and settings.settlement.token_usage
    filters = [*gate, _usage_reader(), last] if reads_usage else [*gate, last]
    if settings.requests.read_bodies:
        passes_by = _passes_by(settings, bytes_max, buffer_limit_bytes)
        # Before ext_proc, which needs the fields of the body.
        filters.insert(0, _skipped_by_any(passes_by, _request_reader()))
    return filters


def access_logs(settings: Settings) -> list[accesslog.AccessLog]:
    """Return the access log on stdout, and the one that settles accounts."""
    log_format = core.SubstitutionFormatString(json_format=protobuf.Struct.from_dict(_ACCESS_LOG))
    stdout = accesslog.AccessLog(
        name="envoy.access_loggers.stdout",
        typed_config=protobuf.Any.pack(stream.StdoutAccessLog(log_format=log_format)),
    )
    return [stdout, _settlement_log(settings)] if settings.is_reported else [stdout]


def secret_metadata(settings: Settings) -> list[core.HeaderValue]:
    """Return the initial metadata that authenticates Envoy to this service; empty: no secret."""
    secret = settings.listen.secret()
    if secret is None:
        return []
    return [core.HeaderValue(key=METADATA_KEY, value=secret.metadata())]


def fail_over(settings: Settings) -> core.RetryPolicy:
    """Return the retries of a stream; with an election sooner, and until a lease has expired."""
    tries, base_s, longest_s = 8, 0.5, 5.0
    if settings.availability.election != "off":
        tries, base_s, longest_s = 60, 0.05, 0.5
    return core.RetryPolicy(
        retry_on="unavailable,connect-failure,refused-stream,reset",
        num_retries=tries,
        retry_back_off=core.BackoffStrategy(
            base_interval=timedelta(seconds=base_s), max_interval=timedelta(seconds=longest_s)
        ),
        retry_host_predicate=[
            core.RetryPolicyRetryHostPredicate(name=_PREVIOUS_HOSTS, typed_config=_previous_hosts())
        ],
        host_selection_retry_max_attempts=5,
    )


def previous_hosts_predicate() -> route.RetryPolicyRetryHostPredicate:
    """Return the predicate that keeps a retry away from hosts where earlier attempts failed."""
    return route.RetryPolicyRetryHostPredicate(name=_PREVIOUS_HOSTS, typed_config=_previous_hosts())


def _previous_hosts() -> protobuf.Any:
    return protobuf.Any.pack(previous_hosts.PreviousHostsPredicate())


def metadata_options(settings: Settings) -> ext_proc.MetadataOptions:
    """Return the metadata of a request that ext_proc receives, and that it may write."""
    namespaces = ext_proc.MetadataOptionsMetadataNamespaces
    forwarded = settings.requests.namespaces()
    if settings.picker != "off":
        forwarded.append(SUBSET_NAMESPACE)
    if settings.requests.read_bodies:
        forwarded.append(BODY_NAMESPACE)
    return ext_proc.MetadataOptions(
        forwarding_namespaces=namespaces(untyped=sorted(set(forwarded))) if forwarded else None,
        receiving_namespaces=namespaces(untyped=["envoy.lb", METADATA_NAMESPACE]),
    )


def response_headers(settings: Settings) -> list[core.HeaderValueOption]:
    """Return the headers that Envoy makes of our metadata, without a further message."""
    return [_response_header(name) for name in settings.requests.response_headers]


def _request_reader() -> hcm.HttpFilter:
    """Return the filter that reads fields of a request's JSON body."""
    fields = [_field(name) for name in BODY_FIELDS]
    fields[0].on_error = json_metadata.JsonToMetadataKeyValuePair(
        metadata_namespace=BODY_NAMESPACE,
        key=BODY_UNREAD,
        value=protobuf.Value(string_value="1"),
    )
    return hcm.HttpFilter(
        name="envoy.filters.http.json_to_metadata",
        typed_config=protobuf.Any.pack(
            json_metadata.JsonToMetadata(
                request_rules=json_metadata.JsonToMetadataMatchRules(
                    rules=fields, allow_content_types_regex=_JSON
                )
            )
        ),
    )


def _passes_by(
    settings: Settings, bytes_max: int | None, buffer_limit_bytes: int | None
) -> list[xds.MatcherMatcherListPredicate]:
    """Return predicates; if one holds, the body of a request is neither read nor held."""
    predicates = []
    if bytes_max is not None:
        predicates.append(_announces_between(bytes_max, buffer_limit_bytes))
    if settings.requests.websockets:
        # It has no body, and would be held until its connection closes.
        is_websocket = xds.StringMatcher(exact="websocket", ignore_case=True)
        upgrades = has_header("upgrade", is_websocket)
        # GET only, so that no POST evades the rules on its body.
        predicates.append(_all_of(upgrades, has_header(":method", xds.StringMatcher(exact="GET"))))
    return predicates


def _skipped_by_any(
    predicates: list[xds.MatcherMatcherListPredicate], reader: hcm.HttpFilter
) -> hcm.HttpFilter:
    if len(predicates) > 1:
        any_holds = xds.MatcherMatcherListPredicatePredicateList(predicate=predicates)
        predicates = [xds.MatcherMatcherListPredicate(or_matcher=any_holds)]
    return skipped(predicates[0], reader) if predicates else reader


def _announces_between(
    bytes_max: int, buffer_limit_bytes: int | None
) -> xds.MatcherMatcherListPredicate:
    """Return the predicate: an announced size above one bound, and at most what Envoy holds."""
    predicate = _announces_more_than(bytes_max)
    if buffer_limit_bytes is None:
        return predicate
    is_held = xds.MatcherMatcherListPredicate(not_matcher=_announces_more_than(buffer_limit_bytes))
    return _all_of(predicate, is_held)


def _all_of(*predicates: xds.MatcherMatcherListPredicate) -> xds.MatcherMatcherListPredicate:
    all_hold = xds.MatcherMatcherListPredicatePredicateList(predicate=[*predicates])
    return xds.MatcherMatcherListPredicate(and_matcher=all_hold)


def skipped(predicate: xds.MatcherMatcherListPredicate, skips: hcm.HttpFilter) -> hcm.HttpFilter:
    """Return the filter, wrapped so that requests for which the predicate holds skip it."""
    rule = xds.MatcherMatcherListFieldMatcher(
        predicate=predicate,
        on_match=xds.MatcherOnMatch(action=_extension("skip", actions.SkipFilter())),
    )
    both = matching.ExtensionWithMatcher(
        xds_matcher=xds.Matcher(matcher_list=xds.MatcherMatcherList(matchers=[rule])),
        extension_config=core.TypedExtensionConfig(
            name=skips.name, typed_config=skips.typed_config
        ),
    )
    return hcm.HttpFilter(
        name="envoy.filters.http.match_delegate", typed_config=protobuf.Any.pack(both)
    )


def _announces_more_than(size: int) -> xds.MatcherMatcherListPredicate:
    greater = xds.RegexMatcher(google_re2=xds.RegexMatcherGoogleRe2(), regex=greater_than(size))
    return has_header("content-length", xds.StringMatcher(safe_regex=greater))


def has_header(name: str, value: xds.StringMatcher) -> xds.MatcherMatcherListPredicate:
    """Return the predicate: the request has such a header."""
    header = matcher.HttpRequestHeaderMatchInput(header_name=name)
    return xds.MatcherMatcherListPredicate(
        single_predicate=xds.MatcherMatcherListPredicateSinglePredicate(
            input=_extension("envoy.matching.inputs.request_headers", header), value_match=value
        )
    )


def _extension(name: str, message: Message) -> xds_core.TypedExtensionConfig:
    return xds_core.TypedExtensionConfig(name=name, typed_config=protobuf.Any.pack(message))


def greater_than(number: int) -> str:
    """Return a regex for the integers above this one: longer, or greater from some digit on.

    Envoy compares text, not numbers.
    """
    digits = str(number)
    greater = [
        f"{digits[:at]}[{int(digit) + 1}-9][0-9]{{{len(digits) - at - 1}}}"
        for at, digit in enumerate(digits)
        if digit != "9"
    ]
    return "|".join((f"[0-9]{{{len(digits) + 1},}}", *greater))


def _usage_reader() -> hcm.HttpFilter:
    """Return the filter that reads responses as they pass."""
    script = lua.Lua(default_source_code=core.DataSource(inline_string=_usage_script()))
    return hcm.HttpFilter(name="envoy.filters.http.lua", typed_config=protobuf.Any.pack(script))


def _settlement_log(settings: Settings) -> accesslog.AccessLog:
    retry_policy = None if settings.availability.election == "off" else fail_over(settings)
    has_ticket = accesslog.MetadataFilter(
        matcher=matcher.MetadataMatcher(
            filter=METADATA_NAMESPACE,
            path=[matcher.MetadataMatcherPathSegment(key=TICKET)],
            value=matcher.ValueMatcher(present_match=True),
        ),
        match_if_key_not_found=False,
    )
    is_over = accesslog.LogTypeFilter(types=[log_data.AccessLogType.DownstreamEnd])
    both = accesslog.AndFilter(
        filters=[
            accesslog.AccessLogFilter(metadata_filter=has_ticket),
            accesslog.AccessLogFilter(log_type_filter=is_over),
        ]
    )
    return accesslog.AccessLog(
        name="envoy.access_loggers.http_grpc",
        filter=accesslog.AccessLogFilter(and_filter=both),
        typed_config=protobuf.Any.pack(
            grpc_log.HttpGrpcAccessLogConfig(
                common_config=grpc_log.CommonGrpcAccessLogConfig(
                    log_name=METADATA_NAMESPACE,
                    transport_api_version=core.ApiVersion.V3,
                    grpc_service=core.GrpcService(
                        envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=LOG_CLUSTER),
                        initial_metadata=secret_metadata(settings),
                    ),
                    grpc_stream_retry_policy=retry_policy,
                    buffer_flush_interval=timedelta(seconds=0.2),
                    buffer_size_bytes=_LOG_BUFFER_BYTES,
                    custom_tags=[tracing.CustomTag(tag=REPORT_TAG, value=REPORT_FORMAT)],
                ),
                additional_response_headers_to_log=list(orca.HEADERS),
            )
        ),
    )


def _field(name: str) -> json_metadata.JsonToMetadataRule:
    """Return the rule that reads one field."""
    kinds = json_metadata.JsonToMetadataValueType
    return json_metadata.JsonToMetadataRule(
        selectors=[json_metadata.JsonToMetadataSelector(key=name)],
        on_present=json_metadata.JsonToMetadataKeyValuePair(
            metadata_namespace=BODY_NAMESPACE,
            key=name,
            type=kinds.NUMBER if name in ANSWER_FIELDS else kinds.STRING,
        ),
    )


def _response_header(name: str) -> core.HeaderValueOption:
    header, key = _RESPONSE_HEADERS[name]
    return core.HeaderValueOption(
        header=core.HeaderValue(
            key=header, value=f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{key})%"
        ),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
