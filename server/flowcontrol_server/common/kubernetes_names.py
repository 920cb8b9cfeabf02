"""Pure. Which names Kubernetes allows: exactly the rules of its API server."""

import re
from typing import Final

_LENGTH_MAX: Final = 253
_PART_LENGTH_MAX: Final = 63
"""Limit for a namespace, a Service, and the name and the value of a label."""
_PART: Final = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_NAMESPACE: Final = re.compile(_PART)
_NAME: Final = re.compile(rf"{_PART}(?:\.{_PART})*")
_SERVICE: Final = re.compile("[a-z](?:[a-z0-9-]*[a-z0-9])?")
_LABEL: Final = re.compile("[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")


def is_namespace(text: str) -> bool:
    """Whether a text is a valid name of a namespace."""
    return len(text) <= _PART_LENGTH_MAX and _NAMESPACE.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a text is a valid name of an object such as an InferencePool or a Lease."""
    return len(text) <= _LENGTH_MAX and _NAME.fullmatch(text) is not None


def is_service(text: str) -> bool:
    """Whether a text is a valid name of a Service."""
    return len(text) <= _PART_LENGTH_MAX and _SERVICE.fullmatch(text) is not None


def is_label(key: str, value: str) -> bool:
    """Whether an object can have this label."""
    prefix, slash, name = key.rpartition("/")
    return (
        (not slash or is_name(prefix))
        and _is_label_text(name)
        and (not value or _is_label_text(value))
    )


def _is_label_text(text: str) -> bool:
    return len(text) <= _PART_LENGTH_MAX and _LABEL.fullmatch(text) is not None
