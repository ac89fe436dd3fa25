"""Times of two steps, taken in turns, and their spread.

Baseline and candidate run alternately, in an order that swaps from pair to pair, so that a machine which slows down
slows down both. What is reported of their ratio is the median over the pairs, not the ratio of two medians.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]
Clock = Callable[[Step], float]
"""Runs a step once and returns the seconds it took."""

MAX_PAIRS = 1000


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The quartiles of `values`, which may be a single one."""
        values = list(values)
        return cls(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3))


@dataclass(frozen=True)
class Comparison:
    """Seconds of baseline and candidate, and the ratio candidate / baseline of each pair."""

    baseline: Spread
    candidate: Spread
    ratio: Spread
    pairs: int


class TooSlow(Exception):
    """The pairs asked for do not fit the budget; `seconds` is what they would take."""

    def __init__(self, seconds: float, budget: float):
        super().__init__(f"it would take about {seconds:.1f} s, and the budget of a cell is {budget:g} s")
        self.seconds = seconds


def host_clock(step: Step) -> float:
    """Wall time of a step on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_clock(step: Step) -> float:
    """Time between two CUDA events around a step, from an idle device: short steps show what their launches cost."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def clock_of(device: str) -> Clock:
    """The clock for steps on `device`."""
    return cuda_clock if torch.device(device).type == "cuda" else host_clock


def compare(
    baseline: Step, candidate: Step, clock: Clock, *, repeats: int, min_seconds: float, budget: float
) -> Comparison:
    """Time both steps in pairs, after a warm-up of each.

    Args:
        baseline, candidate: what to run.
        clock: how to time one run.
        repeats: pairs at least.
        min_seconds: go on until this much was timed, too.
        budget: seconds for `repeats` pairs at most.

    Raises:
        TooSlow: the warm-up says that `repeats` pairs do not fit the budget.
    """
    first = clock(baseline) + clock(candidate)
    if first * repeats > budget:
        # a first call may build what later calls reuse
        first = min(first, clock(baseline) + clock(candidate))
    if first * repeats > budget:
        raise TooSlow(first * repeats, budget)
    pairs: list[tuple[float, float]] = []
    spent = 0.0
    collects = gc.isenabled()
    gc.disable()
    try:
        while len(pairs) < repeats or (spent < min_seconds and len(pairs) < MAX_PAIRS):
            if len(pairs) % 2:
                second, one = clock(candidate), clock(baseline)
            else:
                one, second = clock(baseline), clock(candidate)
            pairs.append((one, second))
            spent += one + second
    finally:
        if collects:
            gc.enable()
    return Comparison(
        Spread.of(one for one, _ in pairs),
        Spread.of(second for _, second in pairs),
        Spread.of(second / one for one, second in pairs),
        len(pairs),
    )
