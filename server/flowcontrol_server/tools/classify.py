"""`flowcontrol classify`: how a configuration classifies a request, and why."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any

from flowcontrol.errors import ConfigError
from flowcontrol_server.admin.wording import duration
from flowcontrol_server.config.settings import Settings
from flowcontrol_server.requests.classify import (
    TTL_HEADER,
    classify_with_origin,
    is_body_unread,
    path_of,
)
from flowcontrol_server.requests.rules import (
    ANSWER_FIELDS,
    BODY_FIELDS,
    BODY_NAMESPACE,
    BODY_UNREAD,
    JSON_TYPES,
)
from flowcontrol_server.sources.folder import ObjectiveFolder

_DEFAULT_METHOD = "POST"
_DEFAULT_PATH = "/v1/chat/completions"
_DEPTH_MAX = 1000
"""Levels of nested objects and lists that Envoy accepts."""


def read_headers(given: Iterable[str]) -> dict[str, str]:
    """Return headers from NAME: VALUE or NAME=VALUE; for a repeated name, the first value counts.

    Raises:
        ConfigError: a header has neither form.
    """
    headers = {":path": _DEFAULT_PATH, "content-type": "application/json"}
    seen: set[str] = set()
    for each in given:
        at = min((i for i in (each.find(":", 1), each.find("=", 1)) if i > 0), default=0)
        name, value = each[:at].strip().lower(), each[at + 1 :].strip()
        if not name:
            raise ConfigError([f"--header must be NAME: VALUE, got {each!r}"])
        name = ":authority" if name == "host" else name
        if name not in seen:
            headers[name] = value
            seen.add(name)
    return headers


def read_metadata(given: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return metadata from NAMESPACE:KEY[:KEY...]=VALUE; a value that is not JSON is text.

    Raises:
        ConfigError: an item has another form.
    """
    metadata: dict[str, dict[str, Any]] = {}
    for each in given:
        name, is_there, text = each.partition("=")
        namespace, *path = name.split(":")
        if not is_there or not namespace or not path or not all(path):
            raise ConfigError([f"--metadata must be NAMESPACE:KEY=VALUE, got {each!r}"])
        node = metadata.setdefault(namespace, {})
        for key in path[:-1]:
            node = node.setdefault(key, {})
        try:
            node[path[-1]] = json.loads(text)
        except ValueError:
            node[path[-1]] = text
    return metadata


def body_metadata(body: str) -> dict[str, Any]:
    """Return the metadata that Envoy makes of a body: some of its fields, as texts and numbers."""
    try:
        content = json.loads(
            body.removeprefix("\ufeff"),
            parse_int=_whole,
            parse_float=_fraction,
            parse_constant=_fraction,
        )
        json.dumps(content, ensure_ascii=False).encode()  # fails for a lone surrogate
    except (ValueError, ArithmeticError, RecursionError):
        return {BODY_UNREAD: "1"}
    if _is_deeper_than(content, _DEPTH_MAX):
        return {BODY_UNREAD: "1"}
    found: dict[str, Any] = {}
    for name in BODY_FIELDS if isinstance(content, dict) else ():
        value = content.get(name)
        if isinstance(value, bool):
            value = str(int(value))
        if isinstance(value, str | int | float):
            with suppress(ValueError, OverflowError):  # a text that is not a number is omitted
                found[name] = float(value) if name in ANSWER_FIELDS else str(value)
    return found


def _whole(text: str) -> int | float:
    """Read an integer; Envoy reads one that does not fit into 64 bits as a fraction."""
    number = int(text)
    if 2**63 <= number < 2**64:
        message = "an unsigned number"
        raise ValueError(message)
    return number if -(2**63) <= number < 2**63 else float(number)


def _fraction(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        message = "not a number"
        raise ValueError(message)
    return number


def _is_deeper_than(content: Any, depth: int) -> bool:
    level = [content]
    for _ in range(depth):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def _passes_unread(settings: Settings, headers: Mapping[str, str]) -> str:
    """Return why Envoy does not read a body; empty: it does."""
    kind, length = headers.get("content-type", ""), headers["content-length"]
    if not settings.requests.read_bodies:
        return "requests.readBodies is false"
    if not re.fullmatch(JSON_TYPES, kind):
        return f"content-type is {kind!r}, not application/json"
    bytes_max = settings.requests.body_bytes_max(by_default=True)
    if bytes_max is not None and length.isdecimal() and int(length) > bytes_max:
        return f"content-length is {length}, above requests.readBodiesUpTo, {bytes_max}"
    return ""


def verdict(
    settings: Settings, headers: Mapping[str, str], metadata: dict[str, dict[str, Any]], body: str
) -> Iterator[str]:
    """Yield the classification of the request, line by line."""
    unread = ""
    if body:
        headers = {"content-length": str(len(body.encode())), **headers}
        unread = _passes_unread(settings, headers)
        if not unread:
            metadata = {**metadata, BODY_NAMESPACE: body_metadata(body)}
    intake = settings.requests.intake()
    facts, origin = classify_with_origin(headers, metadata, intake)
    method, path = headers.get(":method", _DEFAULT_METHOD), path_of(headers)
    if intake.exempt.passes(method, path):
        yield f"path: {method} {path}, exempt: passes without queueing (requests.exemptPaths)"
        return
    yield f"path: {path}"
    if is_body_unread(headers, metadata.get(BODY_NAMESPACE, {})):
        yield "body: Envoy cannot read it; no rule on the body matches"
    elif unread:
        yield f"body: Envoy does not read it, as {unread}; no rule on the body matches"
    yield f"objective: {facts.objective or 'none'} ({origin.objective})"
    priority, why = _priority(settings, facts.objective)
    yield f"priority: {why if priority is None else f'{priority} ({why})'}"
    yield f"flow id: {facts.flow_id} ({origin.flow_id})"
    yield f"may wait: {_may_wait(settings, priority, facts.ttl_ns)}"
    if facts.model:
        yield f"model: {facts.model}"
    if facts.output_tokens_max is not None:
        yield f"output tokens at most: {facts.output_tokens_max}"


def _may_wait(settings: Settings, priority: int | None, header_ns: int | None) -> str:
    """Return the longest wait and the setting that limits it; the header can only shorten it."""
    bands = [band.request_ttl for band in settings.flow_control.bands]
    ttl_ns, origin, unless = settings.flow_control.request_ttl, "flowControl.requestTTL", ""
    if priority is not None:
        templates = settings.controller_config().templates
        of_it = (n for n, each in enumerate(templates) if each.matches(priority))
        number = next(of_it, None)
        own_ns = None if number is None else bands[number]
        if own_ns is not None:
            ttl_ns, origin = own_ns, f"flowControl.bands[{number}].requestTTL"
    elif any(bands):
        unless = ", unless its band has another requestTTL"
    if header_ns is not None and header_ns < ttl_ns:
        ttl_ns, origin = header_ns, f"header {TTL_HEADER}"
    return f"{duration(ttl_ns)} ({origin}{unless})"


def _priority(settings: Settings, objective: str | None) -> tuple[int | None, str]:
    """Return the priority and its origin; None: unknown on this machine."""
    if objective is None:
        return 0, "no objective"
    directory = settings.objectives.directory
    if directory is None:
        return None, "that of its InferenceObjective, 0 if there is none"
    folder = ObjectiveFolder(directory, settings.pool)
    folder.survey()
    priority = folder.known.get(objective)
    if priority is None:
        return 0, f"no manifest in {directory} declares {objective!r}"
    return priority, f"declared in {directory}"
