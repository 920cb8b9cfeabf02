"""Prometheus metrics of the sources and of the configuration."""

from collections import Counter
from collections.abc import Iterator
from typing import final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowcontrol_server.common.status import ServiceStatus
from flowcontrol_server.config.reload import Configuration
from flowcontrol_server.sources.feed import FeedSnapshot
from flowcontrol_server.sources.scraper import ScrapeResult


@final
class SourceCollector(Collector):
    """Turns state and error counts of sources and configuration into metric families.

    Args:
        feed: the sources.
        configuration: of the service.
        now_s: the time, on the monotonic clock.
    """

    def __init__(self, feed: FeedSnapshot, configuration: Configuration, now_s: float) -> None:
        self._feed = feed
        self._configuration = configuration
        self._now_s = now_s

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from _errors(self._feed)
        yield from _load(self._feed, self._now_s)
        yield from _configuration(self._configuration)


@final
class StatusCollector(Collector):
    """Counts the current problems, by kind."""

    def __init__(self, status: ServiceStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield the family."""
        counts = Counter(problem.kind for problem in self._status.problems())
        family = GaugeMetricFamily(
            "flowcontrol_problems",
            "Current problems, by kind, as the dashboard and the API list them.",
            labels=["kind"],
        )
        for kind in self._status.kinds:
            family.add_metric([kind], counts[kind])
        yield family


def _errors(feed: FeedSnapshot) -> Iterator[Metric]:
    errors = CounterMetricFamily(
        "flowcontrol_source_errors", "Errors, by source.", labels=["source"]
    )
    for name, count in sorted(feed.errors.items()):
        errors.add_metric([name], count)
    yield errors
    problems = GaugeMetricFamily(
        "flowcontrol_source_problems", "Current problems, by source.", labels=["source"]
    )
    standing: dict[str, int] = dict.fromkeys(feed.errors, 0)
    for name, _about, _problem in feed.problems:
        standing[name] += 1
    for name, count in sorted(standing.items()):
        problems.add_metric([name], count)
    yield problems


def _load(feed: FeedSnapshot, now_s: float) -> Iterator[Metric]:
    down = GaugeMetricFamily(
        "flowcontrol_endpoints_down",
        "Known endpoints that are out of the pool because they are down.",
    )
    down.add_metric([], len(feed.down))
    yield down
    if feed.scrapes is None:
        return
    scrapes = CounterMetricFamily(
        "flowcontrol_scrapes", "Scrapes of endpoints, by result.", labels=["result"]
    )
    for result in ScrapeResult:
        scrapes.add_metric([result.value], feed.scrapes[result])
    yield scrapes
    age = GaugeMetricFamily(
        "flowcontrol_endpoint_load_age_seconds",
        "Time since the last successful scrape of an endpoint; absent if there was none.",
        labels=["endpoint"],
    )
    waiting = GaugeMetricFamily(
        "flowcontrol_endpoint_waiting_requests",
        "Requests queued inside an endpoint's engine, as its metrics report.",
        labels=["endpoint"],
    )
    usage = GaugeMetricFamily(
        "flowcontrol_endpoint_kv_cache_usage_ratio",
        "Share of the KV cache in use at an endpoint, as its metrics report.",
        labels=["endpoint"],
    )
    for address, seen in sorted(feed.seen.items()):
        if seen.load is not None and seen.reported_s is not None:
            age.add_metric([address], now_s - seen.reported_s)
            waiting.add_metric([address], seen.load.waiting)
            if seen.load.kv_usage is not None:
                usage.add_metric([address], seen.load.kv_usage)
    yield from (age, waiting, usage)


def _configuration(configuration: Configuration) -> Iterator[Metric]:
    for name, text, value in (
        (
            "hash",
            "Hash of the configuration in effect: that of check-config, as a number.",
            int(configuration.hash, 16),
        ),
        (
            "last_reload_successful",
            "0 while the file is rejected or cannot be followed, and an older one is in effect.",
            int(not configuration.problems),
        ),
        (
            "last_change_timestamp_seconds",
            "When the configuration in effect was applied.",
            configuration.changed_s,
        ),
    ):
        yield GaugeMetricFamily(f"flowcontrol_config_{name}", text, value)
    for name, text, value in (
        ("reloads", "Configurations applied while running.", configuration.reload_count),
        ("rejections", "Configurations rejected.", configuration.rejection_count),
    ):
        yield CounterMetricFamily(f"flowcontrol_config_{name}", text, value)
