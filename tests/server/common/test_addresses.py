"""Addresses as people write them."""

import pytest
from pydantic_core import PydanticCustomError

from flowcontrol_server.common.addresses import Address, is_loopback, parse_address


class TestAddress:
    """host:port, read and written."""

    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("10.0.0.5:8000", "10.0.0.5", 8000),
            ("localhost:1", "localhost", 1),
            ("model-0.llama.svc.cluster.local:65535", "model-0.llama.svc.cluster.local", 65535),
            ("[::1]:8000", "::1", 8000),
            ("[fe80::1%25]:80", "fe80::1%25", 80),
            ("[::ffff:10.0.0.5]:80", "::ffff:10.0.0.5", 80),
        ],
    )
    def test_round_trip(self, text: str, host: str, port: int) -> None:
        """An address is written as it was read."""
        address = parse_address(text)

        assert address == Address(host, port)
        assert str(address) == text

    @pytest.mark.parametrize(
        "host",
        [
            *("256.1.1.1", "300.1.1.1", "1.2.3", "1.2.3.4.5", "01.2.3.4", "10"),
            *("*", "a..b", ".a", "-a", "a-", "a%", "é", "user@host", "a" * 64, "a." * 127 + "a"),
        ],
    )
    def test_no_host(self, host: str) -> None:
        """What is neither an address nor a name that DNS could know is refused."""
        with pytest.raises(PydanticCustomError, match="must be host:port"):
            parse_address(f"{host}:80")

    def test_ascii_digits(self) -> None:
        """A port is written in ASCII."""
        with pytest.raises(PydanticCustomError, match="must be host:port"):
            parse_address("localhost:\N{ARABIC-INDIC DIGIT EIGHT}0")

    @pytest.mark.parametrize("host", ["model_1", "a.b.", "xn--9ca.example", "10.a", "0.0.0.0"])
    def test_host(self, host: str) -> None:
        """Names as DNS and Compose have them."""
        assert parse_address(f"{host}:80").host == host


class TestLoopback:
    """Hosts that only their own machine reaches."""

    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1", "127.0.0.9", "::1", "::1%lo", "localhost", "LocalHost.", "gate.localhost"],
    )
    def test_own_machine(self, host: str) -> None:
        """The two networks of loopback, and the names that stand for them."""
        assert is_loopback(host)

    @pytest.mark.parametrize(
        "host", ["0.0.0.0", "10.0.0.5", "::", "fe80::1%lo", "gate", "localhost.example", ""]
    )
    def test_others(self, host: str) -> None:
        """Every interface is more than loopback, and any other name may be another machine."""
        assert not is_loopback(host)
