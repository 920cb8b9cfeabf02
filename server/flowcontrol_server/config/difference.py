"""Pure. Differences of two configurations, and whether a running service can apply them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, final

from flowcontrol_server.config.settings import Settings

FIXED = (
    *("apiVersion", "kind", "pool", "listen", "tls", "admin", "traces"),
    *("ledger", "recentDecisions", "state", "availability"),
)
"""Settings, with all below them, that cannot change while the process runs: Envoy and the kernel
depend on them, or ports are opened with them. The files named by tls and admin are reloaded
nevertheless. `kubernetes` cannot change either, while the leader is elected there."""
IN_ENVOY = (
    *("pool", "listen.extProc", "listen.grpc", "listen.secretFile", "tls", "traces.exporter"),
    *("availability.election", "picker", "pickerFallbacks", "endpoints.static", "endpoints.dns"),
    *("flowControl.maxRequests", "flowControl.requestTTL", "flowControl.noEndpointTTL"),
    *("flowControl.bands.requestTTL", "requests.exemptPaths", "requests.exemptWithoutGate"),
    *("requests.onFault", "requests.rules", "requests.trustEngineHeaders", "requests.websockets"),
    *("requests.inputTokensFrom", "requests.readBodies", "requests.readBodiesUpTo"),
    *("requests.responseHeaders", "requests.conformance"),
    *("settlement.accessLog", "settlement.tokenUsage"),
)
"""Settings, with all below them, that `envoy-config` writes into Envoy's configuration. Until it is
loaded there, Envoy uses the old values: it gives up on a request that waits longer than those
allow."""
HASH_HEX = 12
_INDEX = re.compile(r"\[[0-9]+\]")


@final
class Change(NamedTuple):
    """One setting that differs."""

    where: str
    before: str
    after: str
    """New value, as JSON like the one before; `unset`: there is none."""
    is_live: bool
    """Whether a running service can apply it."""

    def __str__(self) -> str:
        notes = [] if self.is_live else ["needs a restart"]
        if _is_among(self.where, IN_ENVOY):
            notes.append("generate Envoy's configuration again")
        note = f" ({', '.join(notes)})" if notes else ""
        return f"{self.where}: {self.before} -> {self.after}{note}"


def differences(before: Settings, after: Settings) -> list[Change]:
    """Return the settings that differ, in the order of the file."""
    old, new = dict(_leaves(_plain(before), "")), dict(_leaves(_plain(after), ""))
    names = [*old, *(name for name in new if name not in old)]
    pairs = ((name, old.get(name, "unset"), new.get(name, "unset")) for name in names)
    fixed = [*FIXED, "kubernetes"] if before.availability.election == "kubernetes" else FIXED
    return [
        Change(*each, is_live=not _is_among(each[0], fixed)) for each in pairs if each[1] != each[2]
    ]


def _is_among(where: str, names: Iterable[str]) -> bool:
    """Whether a setting is one of these, or below one of them."""
    place = f"{_INDEX.sub('', where)}."
    return any(place.startswith(f"{name}.") for name in names)


def settings_hash(settings: Settings) -> str:
    """Return 12 hexadecimal digits that are equal for equal settings.

    The hash is of the settings with their defaults, not of the file: its order, its comments, and
    the folder of the file and of the files that it names make no difference.
    """
    text = json.dumps(_beside(_plain(settings), f"{settings.folder}/"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_HEX]


def _plain(settings: Settings) -> dict[str, Any]:
    plain = settings.model_dump(mode="json", by_alias=True)
    bytes_max = settings.requests.body_bytes_max(by_default=True)
    # whether it is set makes a difference, and its default depends on the rules
    plain["requests"]["readBodiesUpTo"] = "unlimited" if bytes_max is None else bytes_max
    return plain


def _beside(node: Any, folder: str) -> Any:
    """Return a copy in which paths below the file's folder are relative to it."""
    if isinstance(node, dict):
        return {key: _beside(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [_beside(value, folder) for value in node]
    return f"{node}/".removeprefix(folder).removesuffix("/") if isinstance(node, str) else node


def _leaves(node: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list) and any(isinstance(each, dict) for each in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{where}[{index}]")
    elif node is not None:
        yield where, json.dumps(node)
