"""Pure. Fields of a request's JSON body, read from its first bytes.

If Envoy's own filters read bodies, they find more, and this module is not used. Behind a gateway
that streams bodies through this service, the fields are searched in the part of the body that has
come when the request is parked, which is a few milliseconds after its headers at most. The service
does not wait for more, because a client may put the fields behind a long prompt. They serve
estimates and accounting, not authorisation: if a key is repeated, the model server may use the
value that is not read here.

Only strings, numbers and booleans directly inside the outermost object count; all else is skipped,
not parsed.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from flowcontrol_server.requests.rules import BODY_FIELDS

READ_BYTES_MAX: Final = 65_536
"""Bytes read from the beginning of a body. No more of it is held while its request is parked."""
_TOKENS_MAX: Final = 4_096
"""JSON tokens read: some ms of work for a prompt that is a list of numbers."""
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+|"', re.DOTALL)
_OPENING, _CLOSING = (b"{", b"["), (b"}", b"]")
_PAIR: Final = 3
"""Tokens of a field whose value is neither a list nor an object."""
_FIELDS: Final = frozenset(BODY_FIELDS)


def body_facts(body: bytes) -> Mapping[str, Any]:
    """Return the fields found, as Envoy's filters write them: flags as 0 or 1, else floats."""
    found: dict[str, Any] = {}
    pair: list[bytes] = []
    depth = 0
    begin = len(BOM_UTF8) if body.startswith(BOM_UTF8) else 0  # Envoy skips it, too
    for match in islice(_TOKEN.finditer(body, begin, READ_BYTES_MAX), _TOKENS_MAX):
        token = match.group()
        if token == b'"' or (depth == 0 and token != b"{"):
            break  # cut off, or not an object
        if depth == 1 and token in {b",", b"}"}:  # only now is a number known to be complete
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
    """Note a field, if the tokens are a name, a colon and a value and the field is wanted."""
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
            value.encode()  # raises for a lone surrogate, which JSON can hold
        return float(value) if isinstance(value, int) else value
    except (ValueError, OverflowError):
        return None
