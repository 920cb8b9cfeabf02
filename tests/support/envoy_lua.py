"""The Lua of a generated Envoy configuration, run by Envoy's LuaJIT, without Envoy."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import lupa.luajit21 as lupa
import yaml

from flowcontrol_server.config.settings import Settings
from flowcontrol_server.tools.envoy.config import EnvoyOptions, bootstrap

_HANDLE = b"""
return function(kind, next_chunk, set, now)
  local metadata = {set = function(_, _namespace, key, value) set(key, value) end}
  return {
    headers = function()
      return {get = function(_, name) return name == "content-type" and kind or nil end}
    end,
    bodyChunks = function()
      return function()
        local text = next_chunk()
        if text == nil then return nil end
        return {length = function() return #text end, getBytes = function() return text end}
      end
    end,
    timestamp = function() return now() end,
    streamInfo = function()
      return {dynamicMetadata = function() return metadata end}
    end,
  }
end
"""


def read_of(
    *chunks: bytes, kind: bytes = b"text/event-stream", chunk_ms: int = 0
) -> dict[str, float]:
    """Return the values that the script reads from a response in these chunks.

    Args:
        chunks: chunks of the response's body.
        kind: content type of the response.
        chunk_ms: time between chunks.
    """
    found: dict[str, float] = {}
    rest = iter(chunks)
    now_ms = 1_700_000_000_000

    def next_chunk() -> bytes | None:
        """Advance the time, and return another chunk."""
        nonlocal now_ms
        now_ms += chunk_ms
        return next(rest, None)

    def add(key: bytes, value: float) -> None:
        """Record a value that the script sets."""
        found[key.decode()] = value

    runtime = lupa.LuaRuntime(encoding=None)
    runtime.execute(_script())
    handle = runtime.execute(_HANDLE)
    runtime.globals()[b"envoy_on_response"](handle(kind, next_chunk, add, lambda: now_ms))
    return found


@cache
def _script() -> bytes:
    settings = Settings.model_validate(
        {
            "apiVersion": "flowcontrol/v1alpha1",
            "kind": "FlowControlConfig",
            "pool": "llama",
            "objectives": {"directory": "."},
            "endpoints": {"static": ["10.0.0.5:8000"]},
        }
    )
    (script,) = _scripts(yaml.safe_load(bootstrap(settings, EnvoyOptions())))
    return script.encode()


def _scripts(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "default_source_code" in node:
            yield node["default_source_code"]["inline_string"]
        for value in node.values():
            yield from _scripts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _scripts(value)
