"""One row for every workload, size and mode: verified and timed, or the reason why not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hf_attn.bench.checks import Mismatch, finite
from hf_attn.bench.memory import Memory, peak_memory
from hf_attn.bench.timing import Clock, Comparison, TooSlow, clock_of, compare
from hf_attn.bench.workload import Case, Contest, Workload, seeded
from hf_attn.errors import HfAttnError, InvalidInput


@dataclass(frozen=True)
class Limits:
    """How long to measure.

    Attributes:
        repeats: pairs of runs at least.
        min_seconds: time measured at least, in each cell.
        budget: seconds the pairs of a cell may take; a slower cell is skipped.
        total: seconds for everything; the cells that remain then are skipped. None: no limit.
        memory: measure memory.
    """

    repeats: int = 5
    min_seconds: float = 0.2
    budget: float = 15.0
    total: float | None = None
    memory: bool = True


USUAL = Limits()


@dataclass(frozen=True)
class Row:
    """One line of the result. It has a time only if it was verified.

    Attributes:
        case: what was measured; length 0 stands for every length.
        status: "measured", "skipped" (not defined, too slow, not installed) or "refused" (failed verification).
        note: what was verified, or why there is no time.
        memory: of baseline and candidate.
        pair_seconds: what one run of both takes, also where that was too slow.
    """

    label: str
    baseline: str
    case: Case
    status: str
    note: str
    options: str = ""
    time: Comparison | None = None
    memory: tuple[Memory, Memory] | None = None
    pair_seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.status == "measured") != (self.time is not None):
            raise InvalidInput(f"{self.label}: status={self.status!r} and a time do not go together.")


def measure(workload: Workload, case: Case, limits: Limits = USUAL, clock: Clock | None = None) -> Row:
    """Verify and time one cell.

    Args:
        workload: what runs.
        case: at which size.
        limits: how long.
        clock: how one run is timed; by default the device's clock.
    """
    # events and counters belong to the current device
    here = torch.cuda.device(case.device) if torch.device(case.device).type == "cuda" else contextlib.nullcontext()
    with here, seeded(case):
        return _measure(workload, case, limits, clock or clock_of(case.device))


def _measure(workload: Workload, case: Case, limits: Limits, clock: Clock) -> Row:
    row = Row(workload.label, workload.baseline(case), case, "skipped", "")
    try:
        contest = workload.setup(case)
        row = replace(row, options=contest.options)
        finite(contest.candidate(), f"a result at length {case.length}")
        checked = workload.verify(case)
        spent = compare(
            contest.baseline,
            contest.candidate,
            clock,
            repeats=limits.repeats,
            min_seconds=limits.min_seconds,
            budget=limits.budget,
        )
        memory = measure_memory(contest, case) if limits.memory else None
    except TooSlow as error:
        return replace(row, note=str(error), pair_seconds=error.seconds / limits.repeats)
    except Exception as error:  # one mechanism's defect must not end the sweep
        status, note = failure(error)
        return replace(row, status=status, note=note)
    pair = spent.baseline.median + spent.candidate.median
    return replace(row, status="measured", note=checked, time=spent, memory=memory, pair_seconds=pair)


def failure(error: Exception) -> tuple[str, str]:
    """Status and note of a cell that raised `error`."""
    if isinstance(error, Mismatch):
        return "refused", str(error)
    if isinstance(error, (HfAttnError, NotImplementedError)):
        return "skipped", str(error)
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "skipped", f"out of memory ({text})"
    return "refused", text


def measure_memory(contest: Contest, case: Case) -> tuple[Memory, Memory]:
    """Peak memory of baseline and candidate."""
    return peak_memory(contest.baseline, case.device), peak_memory(contest.candidate, case.device)


def cells(
    workloads: Sequence[Workload], lengths: Sequence[int], case: Case, causal: bool | None, backward: bool
) -> list[tuple[Workload, Case]]:
    """What a sweep measures: short lengths first, so that a limit on the total time cuts the long ones.

    A workload that is absent on this machine gets one cell, of length 0.
    """
    present = [workload for workload in workloads if workload.absent() is None]
    found = [
        (workload, replace(case, length=length, causal=mode, backward=passes))
        for length in sorted(set(lengths))
        for workload in present
        for mode in workload.modes(causal, replace(case, length=length))
        for passes in ((False, True) if backward else (False,))
    ]
    return [*found, *((workload, replace(case, length=0)) for workload in workloads if workload not in present)]


def sweep(
    planned: Sequence[tuple[Workload, Case]],
    limits: Limits = USUAL,
    clock: Clock | None = None,
    watch: Callable[[], float] = time.monotonic,
) -> Iterator[Row]:
    """Measure the cells one after another.

    Args:
        planned: from `cells`.
        limits: how long; `limits.total` counts from the first cell.
        clock, watch: how a run and the whole are timed.
    """
    start = watch()
    earlier: dict[tuple[Workload, Case], tuple[int, float]] = {}
    for workload, case in planned:
        line = workload, replace(case, length=0)
        reason = workload.absent()
        if reason is None and limits.total is not None and watch() - start > limits.total:
            reason = f"the {limits.total:g} s of the sweep were over"
        if reason is None and line in earlier:
            length, seconds = earlier[line]
            # attention grows with the length at least
            likely = seconds * case.length / length * limits.repeats
            reason = str(TooSlow(likely, limits.budget)) if likely > limits.budget else None
        if reason is not None:
            yield Row(workload.label, workload.baseline(case), case, "skipped", reason)
            continue
        row = measure(workload, case, limits, clock)
        if row.pair_seconds is not None:
            earlier[line] = case.length, row.pair_seconds
        yield row
