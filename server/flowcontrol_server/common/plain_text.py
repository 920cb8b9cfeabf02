r"""Pure. Makes text that clients chose safe to show.

A tenant, a model or a request id may hold terminal control characters (ESC, or U+009B alone, which
Envoy accepts in a header), characters that reverse the text after them, or line ends. Logs are JSON
in ASCII and need no treatment. All other output passes such text through `plain`, which writes each
of those characters as an escape: `\x9b`, `\u202e`.
"""

import unicodedata
from typing import Final

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: control, format (directions, joiners), surrogate, private use, unassigned,
line separator and paragraph separator."""


def plain(text: str) -> str:
    """Return the text with an escape for every character that is invisible or has side effects."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character
