"""Kernels behind one door: an explicit choice fails loudly, an automatic one falls back and keeps its reasons.

An operation (say, exact attention) has an ordered table of `Backend`s, registered once at import with `probe`. Every
call then goes through `choose`, which reads what the probes found and asks nothing of the machine, so that it can be
traced by `torch.compile`.

The environment variable HF_ATTN_KERNELS=torch leaves every backend that is not torch's own out of automatic choice;
HF_ATTN_KERNELS=triton lets it take our Triton kernels wherever they can run, those included that otherwise run only when
asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn.errors import InvalidOption, KernelUnavailable, near


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    Attributes:
        name: what a user asks for.
        probe: why it cannot run on this machine, or None. Executed once, at import.
        accepts: why it cannot run this request, or None.
        run: computes the request.
        builtin: part of torch, so HF_ATTN_KERNELS=torch keeps it.
        automatic: whether "auto" may take it; if not, it runs only when asked for by name.
    """

    name: str
    probe: Callable[[], str | None]
    accepts: Callable[[Any], str | None]
    run: Callable[[Any], Any]
    builtin: bool = False
    automatic: bool = True


def setting(environment: Any = os.environ) -> str:
    """HF_ATTN_KERNELS: "auto" (the default), "torch" or "triton"."""
    value = environment.get("HF_ATTN_KERNELS") or "auto"
    if value not in ("auto", "torch", "triton"):
        rule = "it must be 'auto', 'torch' or 'triton'"
        raise InvalidOption(f"the environment variable HF_ATTN_KERNELS is {value!r}; {rule}.")
    return value


_setting = setting()
_tables: dict[str, tuple[Backend, ...]] = {}
_absent: dict[str, dict[str, str]] = {}
_refused: dict[str, dict[str, str]] = {}


@contextmanager
def using(value: str) -> Iterator[None]:
    """Automatic choice as under this value of HF_ATTN_KERNELS, for as long as the block runs."""
    global _setting
    before, _setting = _setting, setting({"HF_ATTN_KERNELS": value})
    try:
        yield
    finally:
        _setting = before


def probe(operation: str, backends: Sequence[Backend]) -> None:
    """Run the probes of `backends`, once, and keep what they say. Called where the table is defined."""
    found = {backend.name: backend.probe() for backend in backends}
    _tables[operation] = tuple(backends)
    _absent[operation] = {name: reason for name, reason in found.items() if reason is not None}
    _refused[operation] = {}


def choose(operation: str, requested: str, backends: Sequence[Backend], request: Any) -> Backend:
    """The backend that computes `request`.

    Args:
        operation: the name the table was probed under.
        requested: "auto" for the first that can, or the name of a backend.
        backends: the table, in order of preference.
        request: whatever the `accepts` of this operation understand.

    Raises:
        KernelUnavailable: the requested backend cannot run here, or none can.
    """
    absent = _absent[operation]
    if requested != "auto":
        backend = next((b for b in backends if b.name == requested), None)
        if backend is None:
            names = [b.name for b in backends]
            reason: str | None = f"it has no backend of this name{near(requested, names)}"
        else:
            reason = absent.get(requested) or backend.accepts(request)
            if reason is None:
                return backend
        raise KernelUnavailable(
            f"{operation}: backend {requested!r} cannot run: {reason}. "
            f"Works here: {', '.join(['auto', *_able(absent, backends, request)])}."
        )
    for backend in backends:
        if not allowed(backend, _setting) or backend.name in absent:
            continue
        reason = backend.accepts(request)
        if reason is None:
            return backend
        if not torch.compiler.is_compiling():
            _refused[operation][backend.name] = reason
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons(operation).items())
    raise KernelUnavailable(f"{operation}: no backend can run this call ({why}).")


def allowed(backend: Backend, setting: str) -> bool:
    """Whether "auto" may take `backend` under this value of HF_ATTN_KERNELS."""
    if setting == "torch":
        return backend.automatic and backend.builtin
    return backend.automatic or backend.name == setting


def reasons(operation: str) -> dict[str, str]:
    """Why backends of `operation` were passed over: what their probes said, and the last call each one refused."""
    return {**_refused.get(operation, {}), **_absent.get(operation, {})}


def operations() -> list[str]:
    """Names of the operations that have been probed."""
    return list(_absent)


def backends_of(operation: str) -> list[tuple[Backend, str | None]]:
    """The backends of `operation` in order of preference, each with the reason why it cannot run on this machine."""
    return [(backend, _absent[operation].get(backend.name)) for backend in _tables[operation]]


def missing_package(module: str, package: str) -> str | None:
    """Why `module` of the distribution `package` cannot be used on a CUDA device; None if it can, and is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        return f"the package {package} is not installed ({error})"
    if spec is None:
        return f"the package {package} is not installed (no module named {module!r})"
    if (reason := missing_cuda()) is not None:
        return reason
    try:
        importlib.import_module(module)
    except Exception as error:  # a wheel built for another torch or CUDA fails in many ways, all of them a reason
        return f"the package {package} is installed and importing {module} fails: {type(error).__name__}: {error}"
    return None


def missing_cuda() -> str | None:
    """Why there is no CUDA device, or None."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    # device_count asks NVML first; is_available would start the driver and break processes forked later
    return None if torch.cuda.device_count() else "there is no CUDA device"


def always(request: Any = None) -> None:
    """The probe and the `accepts` of what runs everywhere: no reason against it."""


def on_cuda(tensor: Tensor) -> bool:
    """Whether `tensor` is on a CUDA device."""
    return tensor.device.type == "cuda"


def needs_half(*tensors: Tensor) -> str | None:
    """Why these are not all CUDA tensors of one half-precision dtype, or None."""
    first = tensors[0]
    for tensor in tensors:
        if not on_cuda(tensor):
            return f"it needs CUDA tensors, and there is one on {tensor.device.type}"
        if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.dtype != first.dtype:
            return f"it needs one dtype, float16 or bfloat16, and there is {tensor.dtype}"
    return None


def _able(absent: dict[str, str], backends: Sequence[Backend], request: Any) -> list[str]:
    return [b.name for b in backends if b.name not in absent and b.accepts(request) is None]
