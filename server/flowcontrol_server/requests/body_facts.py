"""Pure. What the JSON body of a request says of it, read from its first bytes.

Where Envoy's own filters read bodies, they find more and this is not asked. Behind a gateway that
streams the body through here, the fields that matter are looked for in what has come of it when the
request is parked, and never waited for: an engine's client may put them behind a long prompt. They
are good for estimates and accounts, not for authorisation: of a key that comes twice the model
server may take the one that is not read here.

Only strings, numbers and booleans right inside the outermost object count; what is around them is
skipped, not parsed.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from flowcontrol_server.requests.rules import BODY_FIELDS

READ_BYTES_MAX: Final = 65_536
"""Of a body, from its beginning: no more of it is here while its request is parked."""
_TOKENS_MAX: Final = 4_096
"""Of JSON: some ms of work for a prompt that is a list of numbers."""
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+|"', re.DOTALL)
_OPENING, _CLOSING = (b"{", b"["), (b"}", b"]")
_PAIR: Final = 3
"""Tokens of a field whose value is no list and no object."""
_FIELDS: Final = frozenset(BODY_FIELDS)


def body_facts(body: bytes) -> Mapping[str, Any]:
    """Return the fields found, as Envoy's filters write them: flags as 0 or 1, else floats."""
    found: dict[str, Any] = {}
    pair: list[bytes] = []
    depth = 0
    begin = len(BOM_UTF8) if body.startswith(BOM_UTF8) else 0  # Envoy, too, reads what is behind it
    for match in islice(_TOKEN.finditer(body, begin, READ_BYTES_MAX), _TOKENS_MAX):
        token = match.group()
        if token == b'"' or (depth == 0 and token != b"{"):
            break  # cut off, or no object
        if depth == 1 and token in {b",", b"}"}:  # only now is a number known to be whole
            _note(pair, found)
            pair = []
        elif depth == 1:
            pair.append(token)
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
            if depth == 0:
                break
    return found


def _note(pair: list[bytes], found: dict[str, Any]) -> None:
    """Take down a name, a colon and a value, if they are that and wanted."""
    if len(pair) != _PAIR or pair[1] != b":":
        return
    name, value = _scalar(pair[0]), _scalar(pair[2])
    if name in _FIELDS and value is not None:
        found[name] = value


def _scalar(token: bytes) -> Any:
    try:
        value = json.loads(token)
        if isinstance(value, bool):
            return "1" if value else "0"
        if isinstance(value, str):
            value.encode()  # JSON can hold half of a pair of surrogates, which is no text
        return float(value) if isinstance(value, int) else value
    except (ValueError, OverflowError):
        return None
