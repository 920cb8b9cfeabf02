"""Names that Kubernetes can have, as its API server sees them."""

import pytest

from flowcontrol_server.common.kubernetes_names import (
    is_label,
    is_name,
    is_namespace,
    is_service,
)


@pytest.mark.parametrize("text", ["a", "0", "a-b", "models-2", "a" * 63])
def test_namespace(text: str) -> None:
    """A DNS label; such a name every object can have."""
    assert is_namespace(text)
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a_b", "a b", "a/b", "é", "a\n", "a" * 254])
def test_no_name(text: str) -> None:
    """What no object is called."""
    assert not is_namespace(text)
    assert not is_name(text)


@pytest.mark.parametrize("text", ["llama-3.1", "a" * 253])
def test_name(text: str) -> None:
    """Objects have DNS subdomains as names, whose parts may be long; namespaces do not."""
    assert is_name(text)
    assert not is_namespace(text)


@pytest.mark.parametrize("text", [".a", "a.", "a..b", "a.-b"])
def test_dots(text: str) -> None:
    """Each part is one of its own."""
    assert not is_name(text)


@pytest.mark.parametrize("text", ["a", "a-0", "a" * 63])
def test_service(text: str) -> None:
    """A DNS label that begins with a letter."""
    assert is_service(text)


@pytest.mark.parametrize("text", ["", "0", "0a", "a-", "a.b", "a" * 64])
def test_no_service(text: str) -> None:
    """What no Service is called."""
    assert not is_service(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("app", "vllm"),
        ("app", ""),
        ("App_1.x", "V_1.x"),
        ("app.kubernetes.io/name", "a" * 63),
        (f"{'a' * 253}/{'a' * 63}", "0"),
    ],
)
def test_label(key: str, value: str) -> None:
    """A name, behind a domain or not; the value may be empty."""
    assert is_label(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "a"),
        ("/a", "a"),
        ("a/", "a"),
        ("a/b/c", "a"),
        ("A.example/a", "a"),
        ("-a", "a"),
        ("a" * 64, "a"),
        (f"{'a' * 254}/a", "a"),
        ("a", "a" * 64),
        ("a", "a/b"),
        ("a", ".a"),
        ("a", "a\n"),
    ],
)
def test_no_label(key: str, value: str) -> None:
    """What the API server refuses."""
    assert not is_label(key, value)
