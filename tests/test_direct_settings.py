"""The direct door's settings: every limit of the core, by a name of its own, and TLS that works."""

from dataclasses import fields

import pytest
from pydantic import ValidationError

from server.direct_settings import Direct, DirectLimits
from server.http2.limits import Http2Limits, Rate
from server.settings import problems_of


def problems(content: dict[str, object]) -> list[str]:
    """What is wrong with a section `direct`."""
    with pytest.raises(ValidationError) as error:
        Direct.model_validate(content)
    return problems_of(error.value)


class TestLimits:
    """`direct.limits`."""

    def test_defaults(self) -> None:
        """What the file leaves out is what the core has by itself."""
        assert Direct().http2_limits() == Http2Limits()

    def test_every_limit_can_be_set(self) -> None:
        """Each has a name, a meaning and a default as one writes it, which means what it says."""
        settings = DirectLimits.model_fields

        assert [*settings] == [field.name for field in fields(Http2Limits)]
        assert all(setting.description for setting in settings.values())
        written = {setting.alias: setting.default for setting in settings.values()}
        assert Direct.model_validate({"limits": written}).http2_limits() == Http2Limits()

    def test_values(self) -> None:
        """Sizes, durations and rates are written as elsewhere."""
        limits = {"maxStreams": "20k", "keepalive": "1m30s", "pings": "5", "resets": "9+2/s"}
        limits |= {"emptyData": "100 + 10/s + 2/stream", "maxQueuedBytes": "1Mi"}

        assert Direct.model_validate({"limits": limits}).http2_limits() == Http2Limits(
            streams_max=20_000,
            keepalive_ns=90_000_000_000,
            pings=Rate(5, 0),
            resets=Rate(9, 2),
            empty_data=Rate(100, 10, 2),
            queued_bytes_max=2**20,
        )

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            (
                "maxStreams",
                0,
                "must be a whole number from 1 to 2147483647, such as 500, 20k or 4Mi",
            ),
            ("maxConnections", "x", "must be a whole number from 1, such as 500, 20k or 4Mi"),
            ("maxConnections", True, "must be a whole number from 1, such as 500, 20k or 4Mi"),
            (
                *("streamWindowBytes", 65_534),
                "must be a whole number from 65535 to 2147483647, such as 500, 20k or 4Mi",
            ),
            ("handshake", "0s", "must be a duration above zero such as 500ms, 60s or 5m"),
            (
                *("pings", "0 + 1/s"),
                "must be a burst and what is earned after it, as in 100 + 10/s + 2/stream",
            ),
            (
                *("pings", "often"),
                "must be a burst and what is earned after it, as in 100 + 10/s + 2/stream",
            ),
        ],
    )
    def test_mistakes(self, name: str, value: object, words: str) -> None:
        """A number out of its range, and what is no number, are named with the rule."""
        assert problems({"limits": {name: value}}) == [f"limits.{name} {words}, got {value!r}"]

    def test_unknown(self) -> None:
        """There are no others."""
        assert problems({"limits": {"frames": 1}}) == ["limits.frames is not a known setting"]
