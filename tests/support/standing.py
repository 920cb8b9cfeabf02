"""A status with given problems, for tests."""

from collections.abc import Iterable
from functools import partial

from flowcontrol_server.common.status import About, ServiceStatus

ABOUT = About(
    "1.2.3", "abcdef0123456789", 1_700_000_000.0, ("picker: off -> least-loaded",), is_deciding=True
)


def standing(*problems: tuple[str, str, str]) -> ServiceStatus:
    """Return a status with these problems: kind, subject and description."""
    kinds = dict.fromkeys(kind for kind, _about, _text in problems)
    finders = {kind: partial(_of_kind, problems, kind) for kind in kinds}
    return ServiceStatus(finders, lambda: ABOUT, lambda: 1_700_000_100.0)


def _of_kind(problems: Iterable[tuple[str, str, str]], wanted: str) -> list[tuple[str, str]]:
    return [(about, text) for kind, about, text in problems if kind == wanted]
