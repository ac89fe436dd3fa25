"""Peak memory of one step: what it needs on top of its inputs and parameters.

On a CUDA device torch counts the bytes. On the CPU the step runs in a forked child, where the kernel's record of the
largest resident set (VmHWM of /proc/self/status) can be set back and read. The child computes with one thread: the
threads of its parent do not exist in it. Where the record cannot be set back, the step's first run counts, with the
code it loads.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from hf_attn.bench.timing import Step

MIB = 2**20
_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD; setting it also keeps it from growing."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """MiB of a step at its peak; None with the reason where it was not measured."""

    mib: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"not measured: {self.reason}" if self.mib is None else f"{self.mib:.1f}"


def peak_memory(step: Step, device: str = "cpu", timeout: float = 60.0) -> Memory:
    """The peak of one run of `step`, in MiB above what was held before it.

    Args:
        step: what to run; it is run twice where the first run can be left out of the count.
        device: where it runs.
        timeout: seconds the child may take.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak(step)
    return _resident_peak(step, timeout)


def _cuda_peak(step: Step) -> Memory:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return Memory((torch.cuda.max_memory_allocated() - before) / MIB)


def _resident_peak(step: Step, timeout: float) -> Memory:
    if resident("VmHWM") is None:
        return Memory(None, "this system has no VmHWM in /proc/self/status")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(step, sender), daemon=True)
    with warnings.catch_warnings():
        # Python warns of forking beside threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(timeout) else f"the child did not answer within {timeout:g} s"
    except EOFError:
        child.join()
        found = f"the child ended with exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
        receiver.close()
    return Memory(None, found) if isinstance(found, str) else Memory(found)


def _measure(step: Step, sender: Connection) -> None:
    """Runs in the child: send the growth of the resident set in MiB, or why there is none."""
    try:
        # more would wait for OpenMP threads that were not forked
        torch.set_num_threads(1)
        _give_back_what_is_freed()
        _return_free_memory()
        if _forget_peak():
            step()
            _return_free_memory()
            _forget_peak()
        before = resident("VmRSS") or 0.0
        kept = step()
        peak = resident("VmHWM") or 0.0
        del kept
        sender.send(max(0.0, peak - before))
    except Exception as error:  # whatever it is, the parent can only report it
        sender.send(f"{type(error).__name__}: {error}")


def resident(entry: str) -> float | None:
    """An entry of /proc/self/status in MiB, None where there is none."""
    try:
        found = re.search(rf"^{entry}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def _forget_peak() -> bool:
    """Set VmHWM back to the present size; False where the system does not allow it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _give_back_what_is_freed() -> None:
    """Keep large blocks out of the heap, whose holes depend on all that this process ever allocated."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_MMAP_THRESHOLD, 256 * 1024)


def _return_free_memory() -> None:
    """Give the allocator's free pages back, which the step would take without growing the resident set."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
