"""Prometheus metrics of the state outside the process, and of the election."""

from collections.abc import Iterator
from typing import final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowcontrol_server.state.book import BookCounts
from flowcontrol_server.state.election import ElectionCounts


@final
class StateCollector(Collector):
    """Turns the state of the lease book and of the election into metric families.

    Args:
        recovered: leases of other processes that hold a slot.
        is_deciding: whether this replica decides.
        book: of the lease book; None: no store.
        election: of the election; None: no election.
    """

    def __init__(
        self,
        recovered: int,
        *,
        is_deciding: bool,
        book: BookCounts | None,
        election: ElectionCounts | None,
    ) -> None:
        self._recovered = recovered
        self._is_deciding = is_deciding
        self._book = book
        self._election = election

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield GaugeMetricFamily(
            "flowcontrol_recovered_leases",
            "Requests that hold a slot and were dispatched by another process.",
            self._recovered,
        )
        yield GaugeMetricFamily(
            "flowcontrol_deciding",
            "1 while this replica decides, 0 on a standby and during start and drain.",
            float(self._is_deciding),
        )
        if self._election is not None:
            yield from _of_election(self._election)
        book = self._book
        if book is None:
            return
        for name, text, value in (
            ("leases", "Requests in flight that the store should hold.", book.live),
            ("unwritten_changes", "Changes not yet written to the store.", book.unwritten),
            ("lag_seconds", "Age of the oldest change not yet written to the store.", book.lag_s),
            ("store_up", "0 while the store cannot be written.", book.is_up),
        ):
            yield GaugeMetricFamily(f"flowcontrol_state_{name}", text, float(value))
        for name, text, count in (
            ("writes", "Batches written to the store.", book.writes),
            ("written_records", "Records written to the store or removed.", book.records_written),
            ("write_failures", "Batches that could not be written.", book.failures),
        ):
            yield CounterMetricFamily(f"flowcontrol_state_{name}", text, count)


def _of_election(election: ElectionCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "flowcontrol_election_up",
        "0 while requests for the lease fail.",
        float(election.is_up),
    )
    yield CounterMetricFamily(
        "flowcontrol_election_failures",
        "Failed requests for the lease.",
        election.failures,
    )
    yield CounterMetricFamily(
        "flowcontrol_elections",
        "Times that this replica became the leader.",
        election.elections,
    )
