"""Pure. Saves what an engine has learnt, and restores it into another."""

from collections.abc import Iterator
from heapq import nlargest
from operator import itemgetter
from typing import final

from flowcontrol.adaptive import AdaptiveDetector
from flowcontrol.auto import AutoDetector
from flowcontrol.bands import Bands
from flowcontrol.config import Role
from flowcontrol.estimates import TokenEstimator
from flowcontrol.memory import KEPT_MAX, BandMemory, EngineMemory, StageMemory
from flowcontrol.pool import Detector, Pool
from flowcontrol.reserve import Reserve
from flowcontrol.retry import DrainRate


@final
class Learned:
    """The parts of an engine that learn. O(accounts and estimates).

    Args:
        bands: with their accounts and drain rates.
        pool: with its detectors.
        estimator: of tokens.
        drain_rate: of all bands together.
        reserve: None: nothing is kept free.
    """

    def __init__(
        self,
        bands: Bands,
        pool: Pool,
        estimator: TokenEstimator,
        drain_rate: DrainRate,
        reserve: Reserve | None,
    ) -> None:
        self._bands = bands
        self._pool = pool
        self._estimator = estimator
        self._drain_rate = drain_rate
        self._reserve = reserve

    def memory(self, now_ns: int) -> EngineMemory:
        """Return what is worth saving."""
        limits: dict[str, float] = {}
        stages: list[StageMemory] = []
        for role, detector in self._detectors():
            if isinstance(detector, AdaptiveDetector):
                limits.update(detector.remember())
            elif isinstance(detector, AutoDetector):
                stages.append(detector.remember(role))
        bands = tuple(
            BandMemory(
                band.priority,
                dict(nlargest(KEPT_MAX, band.fairness.accounts().items(), key=itemgetter(1))),
                band.drain_rate.remember(now_ns),
            )
            for band in self._bands
        )
        estimates = self._estimator.remember()
        drain = self._drain_rate.remember(now_ns)
        reserve = None if self._reserve is None else self._reserve.remember(now_ns)
        return EngineMemory(bands, estimates, limits, drain, tuple(stages), reserve)

    def restore(self, memory: EngineMemory, now_ns: int) -> None:
        """Restore what another engine had learnt, for bands that exist.

        Limits are kept until there are endpoints.
        """
        if not self._pool.detectors:
            self._pool.set_endpoints((), now_ns)  # makes detectors, which keep the limits
        self._restore_bands(memory, now_ns)
        self._estimator.restore(memory.estimates)
        stages = {stage.role: stage for stage in memory.stages}
        for role, detector in self._detectors():
            if isinstance(detector, AdaptiveDetector):
                detector.restore(memory.limits, now_ns)
            elif isinstance(detector, AutoDetector) and role in stages:
                detector.restore(stages[role], now_ns)
        self._pool.limits_changed()
        if memory.drain is not None:
            self._drain_rate.restore(memory.drain, now_ns)
        if memory.reserve is not None and self._reserve is not None:
            self._reserve.restore(memory.reserve, now_ns)

    def _restore_bands(self, memory: EngineMemory, now_ns: int) -> None:
        for each in memory.bands:
            band = self._bands.by_priority.get(each.priority)
            if band is None:
                continue
            for flow_id, cost in each.accounts.items():
                band.fairness.correct(flow_id, cost, now_ns)
            if each.drain is not None:
                band.drain_rate.restore(each.drain, now_ns)

    def _detectors(self) -> Iterator[tuple[Role, Detector]]:
        for role, detectors in self._pool.detectors.items():
            for detector in detectors:
                yield role, detector
