"""The reference's metric names, line by line."""

from dataclasses import replace

from prometheus_client import generate_latest

from flowcontrol.config import Limits
from flowcontrol.request import Outcome
from flowcontrol.views.snapshot import WAIT_BOUNDS_S, BandSnapshot, FlowSnapshot, Snapshot, Totals
from flowcontrol_server.telemetry.metrics import registry_of
from flowcontrol_server.telemetry.reference_metrics import (
    FLOWS_MAX,
    OUTCOMES,
    PREFIX,
    ReferenceCollector,
)

SECOND = 1_000_000_000


def flow(name: str, waiting: int) -> FlowSnapshot:
    """A flow with requests of 100 bytes waiting."""
    return FlowSnapshot(name, waiting, 100 * waiting, 0, None)


def band(priority: int, waiting: int, flows: tuple[FlowSnapshot, ...]) -> BandSnapshot:
    """A band in which 50 may wait."""
    return BandSnapshot(
        priority=priority,
        is_declared=True,
        waiting=waiting,
        waiting_bytes=100 * waiting,
        in_flight=0,
        oldest_wait_ns=None,
        ceiling=1.0,
        limits=Limits(requests_max=50),
        flow_count=len(flows),
        flows=flows,
    )


def snapshot(*bands: BandSnapshot, totals: dict[int, Totals] | None = None) -> Snapshot:
    """An engine with these bands."""
    return Snapshot(
        saturation=0.5,
        waiting=sum(band.waiting for band in bands),
        waiting_bytes=sum(band.waiting_bytes for band in bands),
        in_flight=0,
        is_draining=False,
        bands=bands,
        totals=totals or {},
        endpoints=(),
        objectives={},
        unknown_objectives=0,
    )


def lines(shown: Snapshot) -> list[str]:
    """The samples, without the prefix."""
    collector = ReferenceCollector(shown, "llama")
    text = generate_latest(registry_of([collector])).decode()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.startswith(PREFIX) for line in samples)
    return [line.removeprefix(PREFIX) for line in samples]


class TestReferenceCollector:
    """From a snapshot to the reference's text."""

    def test_queues(self) -> None:
        """Each flow by name and band, with limits where there are any."""
        shown = snapshot(band(10, 5, (flow("a", 3), flow("b", 2))))

        got = lines(replace(shown, limits=Limits(requests_max=100, bytes_max=1000)))

        rest = 'inference_pool="llama",model_name="",priority="10",target_model_name=""'
        assert got == [
            f'queue_size{{fairness_id="a",{rest}}} 3.0',
            f'queue_size{{fairness_id="b",{rest}}} 2.0',
            f'queue_bytes{{fairness_id="a",{rest}}} 300.0',
            f'queue_bytes{{fairness_id="b",{rest}}} 200.0',
            'capacity_utilization_requests{inference_pool="llama",priority="10"} 0.1',
            'global_capacity_utilization_requests{inference_pool="llama"} 0.05',
            'global_capacity_utilization_bytes{inference_pool="llama"} 0.5',
            'pool_saturation{inference_pool="llama",stage="effective"} 0.5',
        ]

    def test_bounded(self) -> None:
        """Over all bands at most a thousand flows are named; what all of them hold is the whole."""
        many = tuple(flow(f"tenant-{number}", 1) for number in range(FLOWS_MAX - 1))
        few = (flow("x", 7), flow("y", 5), flow("z", 3))
        shown = snapshot(band(10, len(many), many), band(0, 20, few))

        sizes = [line for line in lines(shown) if line.startswith("queue_size")]

        assert len(sizes) == FLOWS_MAX + 1
        low = {line.split('"')[1]: float(line.split()[1]) for line in sizes if 'ty="0"' in line}
        assert low == {"x": 7.0, "other": 13.0}

    def test_more_than_can_be_named(self) -> None:
        """A band that comes when all names are used up is `other` as a whole."""
        many = tuple(flow(f"tenant-{number}", 1) for number in range(FLOWS_MAX + 5))
        shown = snapshot(band(10, len(many), many), band(0, 2, (flow("x", 2),)))

        sizes = [line for line in lines(shown) if line.startswith("queue_size")]

        others = [line for line in sizes if "other" in line]
        assert [line.rpartition(" ")[2] for line in others] == ["5.0", "2.0"]
        assert ['ty="10"' in line for line in others] == [True, False]

    def test_flow_ids_are_cut(self) -> None:
        """A label is at most 128 characters; flows that look alike then are one series."""
        shown = snapshot(band(0, 5, (flow("f" * 128 + "1", 3), flow("f" * 128 + "2", 2))))

        (size,) = [line for line in lines(shown) if line.startswith("queue_size")]

        assert size.startswith(f'queue_size{{fairness_id="{"f" * 128}",')
        assert size.endswith(" 5.0")

    def test_totals(self) -> None:
        """Two outcomes of ours with one word of the reference's are counted as one."""
        counts = [0] * (len(WAIT_BOUNDS_S) + 1)
        first, last = [1, *counts[1:]], [*counts[:-1], 2]
        totals = Totals(
            outcomes={Outcome.EVICTED_DISPLACED: 1, Outcome.EVICTED_DRAINED: 2},
            completed=0,
            wait_counts={
                Outcome.EVICTED_DISPLACED: tuple(first),
                Outcome.EVICTED_DRAINED: tuple(last),
            },
            wait_sum_ns={
                Outcome.EVICTED_DISPLACED: 1_000_000,
                Outcome.EVICTED_DRAINED: 1400 * SECOND,
            },
        )

        got = lines(snapshot(totals={-1: totals}))

        assert (
            'requests_total{inference_pool="llama",outcome="EvictedOther",priority="-1"} 3.0' in got
        )
        waits = [line for line in got if line.startswith("request_queue_duration_seconds")]
        assert len(waits) == len(WAIT_BOUNDS_S) + 3
        labels = (
            'fairness_id="",inference_pool="llama",model_name="",outcome="EvictedOther",'
            'priority="-1",target_model_name=""'
        )
        assert waits[-2:] == [
            f"request_queue_duration_seconds_count{{{labels}}} 3.0",
            f"request_queue_duration_seconds_sum{{{labels}}} 1400.001",
        ]
        assert [line.rpartition(" ")[2] for line in waits[:-2]] == ["1.0"] * 17 + ["3.0"]

    def test_every_outcome_has_a_word(self) -> None:
        """None is forgotten."""
        assert set(OUTCOMES) == set(Outcome)

    def test_nothing_limited(self) -> None:
        """Without limits there is no utilization to tell."""
        idle = replace(snapshot(), saturation=0.0)

        assert lines(idle) == ['pool_saturation{inference_pool="llama",stage="effective"} 0.0']
