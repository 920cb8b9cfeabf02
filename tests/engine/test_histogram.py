"""Histograms of durations."""

from flowcontrol.histogram import Histogram, HistogramSnapshot


class TestHistogram:
    """Observing and looking."""

    def test_bounds_belong_to_their_bucket(self) -> None:
        """A duration of exactly a bound is within it, one more nanosecond is not."""
        histogram = Histogram((0.001, 1.0))
        for duration_ns in (0, 1_000_000, 1_000_001, 1_000_000_000, 1_000_000_001):
            histogram.observe(duration_ns)

        assert histogram.snapshot() == HistogramSnapshot((0.001, 1.0), (2, 2, 1), 2_002_000_002)

    def test_snapshot_is_frozen(self) -> None:
        """What was taken does not change with what comes."""
        histogram = Histogram((1.0,))
        before = histogram.snapshot()
        histogram.observe(5)

        assert before == HistogramSnapshot((1.0,), (0, 0), 0)
