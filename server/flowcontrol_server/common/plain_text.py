r"""Pure. Text that clients chose, as people are shown it.

A tenant, a model or a request id may hold what a terminal obeys (ESC, or U+009B alone, which passes
Envoy in a header), what reverses the text after it, or the end of the line. Logs are JSON in ASCII
and need nothing; whatever else shows such text shows it through `plain`, with each of those
characters as an escape: `\x9b`, `\u202e`.
"""

import unicodedata
from typing import Final

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode: control, format (directions, joiners), surrogate, private, unassigned,
and separators of lines and paragraphs."""


def plain(text: str) -> str:
    """Return the text with every character that is not shown as itself written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character
