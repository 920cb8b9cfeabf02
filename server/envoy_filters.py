"""What Envoy reads from bodies, tells us, and reports of finished requests, as typed messages.

For `envoy_config` alone, which imports it late and says what is missing.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.access_loggers.grpc import v3 as grpc_log
from envoy_data_plane.envoy.extensions.access_loggers.stream import v3 as stream
from envoy_data_plane.envoy.extensions.common.matching import v3 as matching
from envoy_data_plane.envoy.extensions.filters.common.matcher.action import v3 as actions
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata import v3 as json_metadata
from envoy_data_plane.envoy.extensions.filters.http.lua import v3 as lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.envoy.type.tracing import v3 as tracing
from envoy_data_plane.google import protobuf
from envoy_data_plane.xds.core import v3 as xds_core
from envoy_data_plane.xds.type.matcher import v3 as xds

from server.classify import SUBSET_NAMESPACE
from server.codec import METADATA_NAMESPACE, TICKET
from server.log_codec import REPORT_FORMAT, REPORT_TAG, USAGE_NAMESPACE
from server.rules import BODY_FIELDS, BODY_NAMESPACE
from server.settings import Settings
from server.sources import orca

LOG_CLUSTER: Final = "access_log"
_ACCESS_LOG: Final = {
    "start": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(:PATH)%",
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
"""Name and the key of our metadata that it shows, by the word in the settings."""
_JSON: Final = matcher.RegexMatcher(regex="(?i)application/json( *;.*)?")
"""Without it a charset beside the media type makes a body one that is not read."""
_LOG_BUFFER_BYTES: Final = 65_536
_NUMBERS: Final = ("max_tokens", "max_completion_tokens")
_USAGE: Final = (
    # OpenAI's completions, then its responses and Anthropic's messages.
    ("input_tokens", ("usage", "prompt_tokens")),
    ("output_tokens", ("usage", "completion_tokens")),
    ("cached_tokens", ("usage", "prompt_tokens_details", "cached_tokens")),
    ("input_tokens", ("usage", "input_tokens")),
    ("output_tokens", ("usage", "output_tokens")),
    ("cached_tokens", ("usage", "input_tokens_details", "cached_tokens")),
)
_STREAMED_USAGE: Final = r"""
local keys = {
  prompt_tokens = "input_tokens", input_tokens = "input_tokens",
  completion_tokens = "output_tokens", output_tokens = "output_tokens",
  cached_tokens = "cached_tokens",
}

local function note(handle, line)
  local at = line:find('"usage"%s*:%s*{')
  if not at then return end
  -- Anthropic's first event counts no answer yet, and may be the last that comes.
  local begins = line:find('"message_start"', 1, true)
  for name, count in line:gmatch('"([a-z_]+)"%s*:%s*(%d+)%s*[,}]', at) do
    local key = keys[name]
    if key and not (begins and key == "output_tokens") then
      handle:streamInfo():dynamicMetadata():set("flowcontrol.usage", key, tonumber(count))
    end
  end
end

function envoy_on_response(handle)
  local kind = handle:headers():get("content-type")
  if not kind or not kind:find("^text/event%-stream") then return end
  local begun = ""
  for chunk in handle:bodyChunks() do
    local text = begun .. chunk:getBytes(0, chunk:length())
    local whole, rest = text:match("^(.*\n)(.*)$")
    begun = rest or text
    if #begun > 65536 then begun = "" end
    if whole and whole:find('"usage"', 1, true) then
      for line in whole:gmatch("[^\n]+") do note(handle, line) end
    end
  end
  note(handle, begun)
end
""".lstrip()
"""A script for Envoy. Envoy's own filter for it, sse_to_metadata, takes Envoy down with the first
event that is a bare 1, "x", true or null (1.40)."""


def with_readers(
    settings: Settings, processor: hcm.HttpFilter, last: hcm.HttpFilter
) -> list[hcm.HttpFilter]:
    """Return the chain of filters, with those that read bodies where the settings want them."""
    reads_requests = settings.requests.read_bodies
    reads_usage = settings.settlement.access_log and settings.settlement.token_usage
    filters = [processor, _stream_reader(), last] if reads_usage else [processor, last]
    # Before ext_proc, which is to know what the body says.
    bytes_max = settings.requests.read_bodies_up_to
    if reads_requests and bytes_max is not None:
        if reads_usage:
            filters.insert(0, _body_reader(reads_requests=False, reads_usage=True))
        reader = _body_reader(reads_requests=True, reads_usage=False)
        filters.insert(0, _skipped_beyond(bytes_max, reader))
    elif reads_requests or reads_usage:
        filters.insert(0, _body_reader(reads_requests=reads_requests, reads_usage=reads_usage))
    return filters


def access_logs(settings: Settings) -> list[accesslog.AccessLog]:
    """Return the log for people, and the one that settles accounts."""
    log_format = core.SubstitutionFormatString(json_format=protobuf.Struct.from_dict(_ACCESS_LOG))
    stdout = accesslog.AccessLog(
        name="envoy.access_loggers.stdout",
        typed_config=protobuf.Any.pack(stream.StdoutAccessLog(log_format=log_format)),
    )
    return [stdout, _settlement_log()] if settings.settlement.access_log else [stdout]


def metadata_options(settings: Settings) -> ext_proc.MetadataOptions:
    """Return which metadata of a request ext_proc is told, and which it may write."""
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
    """Return the headers that Envoy makes of our metadata, at no message's cost."""
    return [_response_header(name) for name in settings.requests.response_headers]


def _body_reader(*, reads_requests: bool, reads_usage: bool) -> hcm.HttpFilter:
    fields = [_rule((n,), BODY_NAMESPACE, n, is_number=n in _NUMBERS) for n in BODY_FIELDS]
    return hcm.HttpFilter(
        name="envoy.filters.http.json_to_metadata",
        typed_config=protobuf.Any.pack(
            json_metadata.JsonToMetadata(
                request_rules=_rules(fields) if reads_requests else None,
                response_rules=_rules(_usage_rules(_USAGE)) if reads_usage else None,
            )
        ),
    )


def _skipped_beyond(bytes_max: int, reader: hcm.HttpFilter) -> hcm.HttpFilter:
    """Return a filter that requests of a greater announced size pass by."""
    size = matcher.HttpRequestHeaderMatchInput(header_name="content-length")
    greater = xds.StringMatcher(
        safe_regex=xds.RegexMatcher(
            google_re2=xds.RegexMatcherGoogleRe2(), regex=greater_than(bytes_max)
        )
    )
    rule = xds.MatcherMatcherListFieldMatcher(
        predicate=xds.MatcherMatcherListPredicate(
            single_predicate=xds.MatcherMatcherListPredicateSinglePredicate(
                input=_extension("envoy.matching.inputs.request_headers", size),
                value_match=greater,
            )
        ),
        on_match=xds.MatcherOnMatch(action=_extension("skip", actions.SkipFilter())),
    )
    both = matching.ExtensionWithMatcher(
        xds_matcher=xds.Matcher(matcher_list=xds.MatcherMatcherList(matchers=[rule])),
        extension_config=core.TypedExtensionConfig(
            name=reader.name, typed_config=reader.typed_config
        ),
    )
    return hcm.HttpFilter(
        name="envoy.filters.http.match_delegate", typed_config=protobuf.Any.pack(both)
    )


def _extension(name: str, message: Message) -> xds_core.TypedExtensionConfig:
    return xds_core.TypedExtensionConfig(name=name, typed_config=protobuf.Any.pack(message))


def greater_than(number: int) -> str:
    """Return a regex for the whole numbers above this one: longer, or greater from some digit on.

    Envoy compares text, not numbers.
    """
    digits = str(number)
    greater = [
        f"{digits[:at]}[{int(digit) + 1}-9][0-9]{{{len(digits) - at - 1}}}"
        for at, digit in enumerate(digits)
        if digit != "9"
    ]
    return "|".join((f"[0-9]{{{len(digits) + 1},}}", *greater))


def _stream_reader() -> hcm.HttpFilter:
    """Return the filter that reads streams of events as they pass."""
    script = lua.Lua(default_source_code=core.DataSource(inline_string=_STREAMED_USAGE))
    return hcm.HttpFilter(name="envoy.filters.http.lua", typed_config=protobuf.Any.pack(script))


def _settlement_log() -> accesslog.AccessLog:
    has_ticket = accesslog.MetadataFilter(
        matcher=matcher.MetadataMatcher(
            filter=METADATA_NAMESPACE,
            path=[matcher.MetadataMatcherPathSegment(key=TICKET)],
            value=matcher.ValueMatcher(present_match=True),
        ),
        match_if_key_not_found=False,
    )
    return accesslog.AccessLog(
        name="envoy.access_loggers.http_grpc",
        filter=accesslog.AccessLogFilter(metadata_filter=has_ticket),
        typed_config=protobuf.Any.pack(
            grpc_log.HttpGrpcAccessLogConfig(
                common_config=grpc_log.CommonGrpcAccessLogConfig(
                    log_name=METADATA_NAMESPACE,
                    transport_api_version=core.ApiVersion.V3,
                    grpc_service=core.GrpcService(
                        envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=LOG_CLUSTER)
                    ),
                    buffer_flush_interval=timedelta(seconds=0.2),
                    buffer_size_bytes=_LOG_BUFFER_BYTES,
                    custom_tags=[tracing.CustomTag(tag=REPORT_TAG, value=REPORT_FORMAT)],
                ),
                additional_response_headers_to_log=list(orca.HEADERS),
            )
        ),
    )


def _rules(rules: list[json_metadata.JsonToMetadataRule]) -> json_metadata.JsonToMetadataMatchRules:
    return json_metadata.JsonToMetadataMatchRules(rules=rules, allow_content_types_regex=_JSON)


def _usage_rules(
    usage: Iterable[tuple[str, tuple[str, ...]]],
) -> list[json_metadata.JsonToMetadataRule]:
    return [_rule(path, USAGE_NAMESPACE, name, is_number=True) for name, path in usage]


def _rule(
    path: tuple[str, ...], namespace: str, name: str, *, is_number: bool
) -> json_metadata.JsonToMetadataRule:
    kinds = json_metadata.JsonToMetadataValueType
    return json_metadata.JsonToMetadataRule(
        selectors=[json_metadata.JsonToMetadataSelector(key=key) for key in path],
        on_present=json_metadata.JsonToMetadataKeyValuePair(
            metadata_namespace=namespace, key=name, type=kinds.NUMBER if is_number else kinds.STRING
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
