"""The engine's configuration: what it accepts, and what it refuses."""

from dataclasses import FrozenInstanceError

import pytest

from flowcontrol.config import (
    Auto,
    BandSettings,
    BandTemplate,
    Ceilings,
    Concurrency,
    ControllerConfig,
    Fairness,
    Limits,
    Ordering,
    Picker,
)
from flowcontrol.errors import ConfigError, FlowControlError


def band(ttl_ns: int | None = None, requests_max: int | None = None) -> BandSettings:
    """Return settings that differ from the defaults."""
    return BandSettings(limits=Limits(requests_max=requests_max), ttl_ns=ttl_ns)


class TestControllerConfig:
    """Everything the flow controller is configured by."""

    def test_defaults(self) -> None:
        """Nothing is limited, nothing expires, Envoy picks."""
        config = ControllerConfig()

        assert config.limits == Limits(requests_max=None, bytes_max=None)
        assert config.default_settings == BandSettings(
            limits=Limits(),
            ttl_ns=None,
            fairness=Fairness.WEIGHTED_TOKENS,
            ordering=Ordering.FCFS,
        )
        assert config.templates == ()
        assert config.no_endpoint_ttl_ns is None
        assert config.detectors == (Auto(),)
        assert config.ceilings.policy is Ceilings.RESERVE
        assert config.picker is Picker.OFF

    def test_zero_is_a_value(self) -> None:
        """None may wait, or none for any time: both are valid."""
        config = ControllerConfig(
            limits=Limits(requests_max=0, bytes_max=0),
            default_settings=band(ttl_ns=0, requests_max=0),
            no_endpoint_ttl_ns=0,
            detectors=(Concurrency(requests_max=1),),
        )

        assert config.limits.requests_max == 0

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {"detectors": (Concurrency(requests_max=0),)},
                "detectors[0].requests_max must be >= 1, got 0",
            ),
            ({"no_endpoint_ttl_ns": -1}, "no_endpoint_ttl_ns must be >= 0, got -1"),
            (
                {"limits": Limits(requests_max=-1)},
                "limits.requests_max must be >= 0 or unlimited, got -1",
            ),
            (
                {"limits": Limits(bytes_max=-2)},
                "limits.bytes_max must be >= 0 or unlimited, got -2",
            ),
            (
                {"default_settings": band(ttl_ns=-3)},
                "default_settings.ttl_ns must be >= 0 or unlimited, got -3",
            ),
            (
                {"default_settings": band(requests_max=-4)},
                "default_settings.limits.requests_max must be >= 0 or unlimited, got -4",
            ),
            (
                {"templates": (BandTemplate(settings=band()), BandTemplate(settings=band(-5)))},
                "templates[1].settings.ttl_ns must be >= 0 or unlimited, got -5",
            ),
            (
                {"templates": (BandTemplate(settings=band(requests_max=-6)),)},
                "templates[0].settings.limits.requests_max must be >= 0 or unlimited, got -6",
            ),
        ],
    )
    def test_every_problem_is_named(self, settings: dict[str, object], expected: str) -> None:
        """A value out of its range is refused by name, rule and value."""
        with pytest.raises(ConfigError) as raised:
            ControllerConfig(**settings)  # type: ignore[arg-type]  # the table is of all types

        assert raised.value.problems == [expected]
        assert str(raised.value) == expected

    def test_all_problems_are_named_at_once(self) -> None:
        """An operator repairs a file once, not once for each error."""
        with pytest.raises(ConfigError) as raised:
            ControllerConfig(no_endpoint_ttl_ns=-1, limits=Limits(requests_max=-1, bytes_max=-1))

        assert str(raised.value).splitlines() == [
            "no_endpoint_ttl_ns must be >= 0, got -1",
            "limits.requests_max must be >= 0 or unlimited, got -1",
            "limits.bytes_max must be >= 0 or unlimited, got -1",
        ]
        assert isinstance(raised.value, FlowControlError)

    def test_cannot_be_changed(self) -> None:
        """A configuration is a value; another one is another value."""
        with pytest.raises(FrozenInstanceError):
            ControllerConfig().picker = Picker.OFF  # type: ignore[misc]  # what mypy says, too


class TestSettingsFor:
    """Which settings a band takes."""

    def test_first_match_wins(self) -> None:
        """Templates are asked in their order, the default last."""
        config = ControllerConfig(
            templates=(
                BandTemplate(priority_min=10, settings=band(1)),
                BandTemplate(priority_min=5, settings=band(2)),
                BandTemplate(priority_max=-1, settings=band(3)),
            ),
            default_settings=band(4),
        )

        ttls = [config.settings_for(priority).ttl_ns for priority in (20, 10, 9, 5, 4, 0, -1, -9)]

        assert ttls == [1, 1, 2, 2, 4, 4, 3, 3]


class TestBandTemplate:
    """A range of priorities."""

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (None, None, [-2, -1, 0, 1, 2]),
            (0, None, [0, 1, 2]),
            (None, 0, [-2, -1, 0]),
            (-1, 1, [-1, 0, 1]),
            (1, 1, [1]),
            (1, 0, []),
        ],
    )
    def test_both_ends_are_included(
        self, low: int | None, high: int | None, expected: list[int]
    ) -> None:
        """An end that is not given is open."""
        template = BandTemplate(priority_min=low, priority_max=high, settings=band())

        assert [each for each in range(-2, 3) if template.matches(each)] == expected
