"""Durations as Go writes them, quantities as Kubernetes writes them."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowcontrol_server.common.units import format_duration, parse_duration, parse_quantity

NS, US, MS, S, M, H = 1, 10**3, 10**6, 10**9, 60 * 10**9, 3600 * 10**9
DAYS_100 = 100 * 24 * H


class TestParseDuration:
    """Text to nanoseconds."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1h2m3s", H + 2 * M + 3 * S),
            ("1.5s", 1500 * MS),
            ("300ms", 300 * MS),
            ("1m30s", 90 * S),
            ("1.5h", 90 * M),
            (".5s", 500 * MS),
            ("0.1s", 100 * MS),
            ("1us", US),
            ("1µs", US),
            ("1ns", NS),
            ("0s", 0),
            ("0.4ns", 0),
            ("1m0.5s", M + 500 * MS),
            ("1.001s", 1001 * MS),
            ("2562047h47m16.854775807s", 9223372036854775807),
        ],
    )
    def test_go_durations(self, text: str, expected: int) -> None:
        """What Go's Duration.String writes is read."""
        parsed = parse_duration(text)

        assert parsed is not None
        assert parsed == pytest.approx(expected, rel=1e-15, abs=0)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "5", "s", ".s", "-1s", "+1s", "1 s", " 1s", "1s ", "1s\n", "1S", "1d", "1.s"),
            *("1..5s", "1,5s", "1e3s", "infs", "nans", "0x1s", "1s2", "sixty", "1m-1s", "1_0s"),
            "\N{ARABIC-INDIC DIGIT THREE}s",
            "9" * 64 + "s",
            "1" * 100_000 + "h",
            "1s" * 50_000,
        ],
        ids=lambda text: repr(text[:12]),
    )
    def test_everything_else(self, text: str) -> None:
        """What is no duration is None; so is what is negative, bare or absurdly long."""
        assert parse_duration(text) is None

    @given(st.text())
    def test_any_text(self, text: str) -> None:
        """No text raises, no duration is negative."""
        assert (parse_duration(text) or 0) >= 0

    @given(st.text(alphabet="0123456789.nuµmsh", max_size=70))
    def test_nearly_durations(self, text: str) -> None:
        """Neither does text that looks like a duration."""
        assert (parse_duration(text) or 0) >= 0

    @given(st.integers(0, 1000), st.integers(0, 59), st.integers(0, 59), st.integers(0, S - 1))
    def test_composed(self, hours: int, minutes: int, seconds: int, rest: int) -> None:
        """Parts add up, to the nanosecond."""
        expected = hours * H + minutes * M + seconds * S + rest

        assert expected == parse_duration(f"{hours}h{minutes}m{seconds}.{rest:09d}s")


class TestFormatDuration:
    """Nanoseconds to text."""

    @pytest.mark.parametrize(
        ("duration_ns", "expected"),
        [
            (0, "0s"),
            (300 * S, "300s"),
            (1500 * MS, "1500ms"),
            (1500 * US, "1500us"),
            (1500, "1500ns"),
            (1, "1ns"),
            (H, "3600s"),
        ],
    )
    def test_largest_whole_unit(self, duration_ns: int, expected: str) -> None:
        """The largest unit is used that keeps the number whole."""
        assert expected == format_duration(duration_ns)

    @given(st.integers(0, DAYS_100))
    @example(3_569_999_999_999)
    def test_round_trip(self, duration_ns: int) -> None:
        """What is written is read back to the nanosecond, up to a hundred days."""
        assert duration_ns == parse_duration(format_duration(duration_ns))


class TestParseQuantity:
    """Text to a whole number."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0", 0),
            ("500", 500),
            ("20k", 20_000),
            ("20Ki", 20 * 1024),
            ("3M", 3 * 10**6),
            ("32Mi", 32 * 1024**2),
            ("2G", 2 * 10**9),
            ("4Gi", 4 * 1024**3),
            ("1T", 10**12),
            ("1Ti", 1024**4),
            ("1P", 10**15),
            ("1Pi", 1024**5),
            ("1E", 10**18),
            ("1Ei", 1024**6),
        ],
    )
    def test_kubernetes_quantities(self, text: str, expected: int) -> None:
        """Decimal and binary suffixes multiply."""
        assert expected == parse_quantity(text)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "k", "-1", "+1", "1.5Gi", "1e3", "20K", "20ki", "4GB", "4 Gi", " 4", "4\n"),
            *("9" * 65, "\N{ARABIC-INDIC DIGIT THREE}k"),
        ],
    )
    def test_everything_else(self, text: str) -> None:
        """What is no whole quantity is None."""
        assert parse_quantity(text) is None

    @given(st.text())
    def test_any_text(self, text: str) -> None:
        """No text raises, no quantity is negative."""
        assert (parse_quantity(text) or 0) >= 0
