"""The self-check behind `hf-attn doctor`: is this environment one in which every mechanism computes what it should?

Every mechanism runs on tiny inputs, forward and backward, on the CPU and on the accelerator where there is one. Its
efficient form there, in each precision, is compared with its definition on the CPU in float64, on the same rounded
numbers. An error is the largest difference over the largest number of the reference.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn import get_mechanism, kernels, list_mechanisms
from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput
from hf_attn.kernels.random_features import missing_triton
from hf_attn.module import AttentionModule
from hf_attn.samples import GRID, example_inputs, example_module, seeded

LIMITS = {"float64": (1e-10, 1e-8), "float32": (1e-5, 1e-4), "bfloat16": (0.02, 0.04), "float16": (0.004, 0.008)}
"""Precision -> the largest error of the result and of the gradients that passes."""
_PRECISIONS = {"cpu": ("float64", "float32"), "cuda": ("float64", "float32", "bfloat16"), "mps": ("float32", "float16")}
_OTHER_DEVICES = ("float32", "bfloat16")
TRITON: dict[str, tuple[str, dict[str, Any], str]] = {
    "block_sparse_attention": ("hypercube", {"block_size": 16}, "causal"),
    "causal_linear_attention": ("rfa", {"redraw": "fixed"}, "causal"),
    "chunk_local_attention": ("mixed_chunk", {"chunk_size": 20, "local_attention": "relu2"}, "causal"),
    "key_bias_attention": ("lara", {"num_landmarks": 16, "noise_std": "none"}, "padding"),
    "ring_window_sums": ("ripple", {"r_cap": 3}, "grid"),
    "toeplitz_sums": ("topological", {"mask_type": "toeplitz"}, "causal"),
}
"""Triton kernel -> a mechanism that runs on it, its options, and the mode of the call."""
TRITON_GRID = (6, 8)
EXTRAS = ("", "flash", "triton", "examples")
"""Extras of the installation whose packages are looked at; "" is what everybody needs."""


@dataclass(frozen=True)
class Package:
    """A package that hf_attn uses: the version found (None: not installed) and the versions it was made for."""

    name: str
    version: str | None
    needs: str
    optional: bool

    @property
    def passed(self) -> bool:
        from packaging.specifiers import SpecifierSet

        if self.version is None:
            return self.optional
        return SpecifierSet(self.needs).contains(self.version, prereleases=True)

    def __str__(self) -> str:
        return f"{self.name} {self.version or 'is not installed'}, needed: {self.needs}"


@dataclass(frozen=True)
class Kernel:
    """One backend of an operation. `reason` says why it cannot run on this machine, None where it can.

    `automatic` tells whether "auto" may take it; if not, it runs only when asked for by name.
    """

    operation: str
    backend: str
    reason: str | None
    automatic: bool

    @property
    def active(self) -> bool:
        """Whether "auto" takes it where it can compute the call, and none before it can."""
        return self.reason is None and self.automatic


@dataclass(frozen=True)
class Check:
    """One mechanism on one device, in one precision and mode: its errors, or the `problem` that kept it from running."""

    mechanism: str
    device: str
    precision: str
    mode: str
    forward_error: float | None = None
    gradient_error: float | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        if self.forward_error is None or self.gradient_error is None:
            return False
        forward, gradient = LIMITS[self.precision]
        return self.forward_error <= forward and self.gradient_error <= gradient

    def __str__(self) -> str:
        where = f"{self.mechanism} on {self.device}, {self.precision}, {self.mode}"
        if self.forward_error is None or self.gradient_error is None:
            return f"{where}: {self.problem}"
        forward, gradient = LIMITS[self.precision]
        return f"{where}: error {self.forward_error:.1e} (limit {forward:g}), of gradients {self.gradient_error:.1e} (limit {gradient:g})"


def packages() -> list[Package]:
    """Python, hf_attn, and what it requires, from the metadata of the installation; test and dev tools left out."""
    from packaging.requirements import Requirement

    import hf_attn

    found = [
        Package("python", platform.python_version(), ">=3.10", optional=False),
        Package("hf_attn", hf_attn.__version__, "", optional=False),
    ]
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("hf_attn") or ()]
    except importlib.metadata.PackageNotFoundError:
        # a checkout that was not installed has no metadata to compare with
        requirements = [Requirement("torch"), Requirement("transformers")]
    for requirement in requirements:
        extras = [e for e in EXTRAS if requirement.marker is None or requirement.marker.evaluate({"extra": e})]
        if not extras:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        needs = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        found.append(Package(requirement.name, version, needs, optional="" not in extras))
    return found


def devices(wanted: str | None = None) -> list[torch.device]:
    """The devices to check: the CPU and the first accelerator, if there is one, or the `wanted` one alone.

    Raises:
        InvalidInput: `wanted` is no device of this machine.
    """
    here = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        here += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    if wanted is None:
        return here[:2]
    for device in here:
        if wanted in (str(device), device.type):
            return [device]
    raise InvalidInput(f"device={wanted!r} is not a device of this machine. It has: {', '.join(map(str, here))}.")


def describe_device(device: torch.device) -> str:
    """What `device` is, in words."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu":
        return f"{platform.machine()}, threads: {torch.get_num_threads()}"
    return device.type


def all_kernels() -> list[Kernel]:
    """Every backend of every operation, in order of preference."""
    setting, found = kernels.setting(), []
    for operation in kernels.operations():
        for backend, reason in kernels.backends_of(operation):
            found.append(Kernel(operation, backend.name, reason, kernels.allowed(backend, setting)))
    return found


@dataclass(frozen=True)
class Report:
    """What the self-check found."""

    packages: list[Package]
    devices: dict[str, str]
    kernels: list[Kernel]
    checks: list[Check]

    @property
    def failures(self) -> list[Package | Check]:
        """What is not as it should be."""
        entries: list[Package | Check] = [*self.packages, *self.checks]
        return [entry for entry in entries if not entry.passed]

    def as_json(self) -> dict[str, Any]:
        """The report in plain JSON values."""
        return {
            "passed": not self.failures,
            "failures": [str(entry) for entry in self.failures],
            "packages": [{**asdict(package), "passed": package.passed} for package in self.packages],
            "devices": self.devices,
            "kernel_setting": kernels.setting(),
            "kernels": [{**asdict(kernel), "active": kernel.active} for kernel in self.kernels],
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
        }


def examine(wanted: str | None = None, progress: Callable[[str], None] = lambda name: None) -> Report:
    """Look at the environment and check every mechanism, and on a GPU every Triton kernel.

    Args:
        wanted: the one device to check; the CPU and the first accelerator by default.
        progress: called with the name of each mechanism before its checks.
    """
    on = devices(wanted)
    found: list[Check] = []
    for name in list_mechanisms():
        progress(name)
        found.extend(checks(name, on))
    for device in on:
        if device.type == "cuda":
            progress("Triton kernels")
            found.extend(kernel_checks(device))
    return Report(packages(), {str(d): describe_device(d) for d in on}, all_kernels(), found)


def checks(name: str, on: list[torch.device]) -> Iterator[Check]:
    """Check one mechanism on these devices, in every precision and mode that its record defines."""
    capabilities = get_mechanism(name).capabilities
    for device in on:
        for precision in _PRECISIONS.get(device.type, _OTHER_DEVICES):
            if precision in capabilities.dtypes:
                for mode in modes(capabilities):
                    yield check(name, device, precision, mode)


def modes(capabilities: Capabilities) -> list[str]:
    """The modes to check, of "bidirectional", "causal", "padding", "cross" and "grid"."""
    defined = {
        "bidirectional": capabilities.bidirectional,
        "causal": capabilities.causal,
        "padding": capabilities.padding,
        "cross": capabilities.cross,
        # where calls without a grid are refused, every mode has one
        "grid": capabilities.grid == "used" and capabilities.sequence and capabilities.bidirectional,
    }
    return [mode for mode, is_defined in defined.items() if is_defined]


def check(
    name: str,
    device: torch.device,
    precision: str,
    mode: str,
    options: Mapping[str, Any] | None = None,
    grid: tuple[int, int] = GRID,
) -> Check:
    """Compare the efficient form of one mechanism with its definition.

    Whatever goes wrong is a result, not an exception: finding it is what a self-check is for.
    """
    result = Check(name, str(device), precision, mode)
    try:
        forward, gradient = compare(name, device, getattr(torch, precision), mode, options, grid)
    except Exception as error:
        return replace(result, problem=f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not (math.isfinite(forward) and math.isfinite(gradient)):
        return replace(result, problem="the result or a gradient holds numbers that are not finite")
    return replace(result, forward_error=forward, gradient_error=gradient)


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """Check every Triton kernel by a mechanism that runs on it, in the precisions that Triton has on this device."""
    if missing_triton() is not None:
        return
    # Triton's interpreter has no products of bfloat16
    precisions = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    for kernel, (name, options, mode) in TRITON.items():
        for precision in precisions:
            with kernels.using("triton"), _Calls() as calls:
                found = check(name, device, precision, mode, options, TRITON_GRID)
            if found.problem is None and kernel not in calls.names:
                found = replace(found, forward_error=None, problem=f"the kernel {kernel} was not called")
            yield replace(found, mode=f"{mode} by {kernel}")


class _Calls(TorchDispatchMode):
    """Collects the names of the operators of hf_attn that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "hf_attn":
            self.names.add(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


def compare(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    options: Mapping[str, Any] | None = None,
    grid: tuple[int, int] = GRID,
) -> tuple[float, float]:
    """Error of the result, and error of the gradients of inputs and parameters together."""
    with seeded(0):
        module = example_module(name, options=options).to(dtype)
        inputs = _inputs(module, dtype, mode, grid)
        cotangent = torch.randn_like(inputs["query"])
    mask = inputs.get("key_padding_mask")
    if mask is not None:
        # rows of padded queries may hold anything
        cotangent = cotangent * mask[:, None, :, None]
    exact = deepcopy(module).double()
    expected = _run(exact.naive, exact, inputs, cotangent, torch.device("cpu"), torch.float64)
    module.to(device)
    found = _run(module, module, inputs, cotangent, device, dtype)
    return _error(found[:1], expected[:1]), _error(found[1:], expected[1:])


def _inputs(module: AttentionModule, dtype: torch.dtype, mode: str, grid: tuple[int, int]) -> dict[str, Any]:
    """The arguments of a call in this mode."""
    keys = 9 if mode == "cross" else None
    (query, key, value), call = example_inputs(module, grid=grid, keys=keys, on_grid=mode == "grid", dtype=dtype)
    inputs = {"query": query, "key": key, "value": value, **call}
    if mode == "causal" or not module.capabilities.bidirectional:
        inputs["is_causal"] = True
    if mode == "padding":
        mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        mask[0, -4:] = False
        inputs["key_padding_mask"] = mask
    return inputs


def _run(
    form: Callable[..., Tensor],
    module: AttentionModule,
    inputs: dict[str, Any],
    cotangent: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The result where `cotangent` asks for it, and the gradients, in float64 on the CPU."""
    given = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            given[name] = value.to(device)
            if value.is_floating_point():
                given[name] = value.to(device, dtype).detach().requires_grad_()
    leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad] + list(module.parameters())
    out = form(**given)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(device, dtype), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)]
    return [t.detach().cpu().double() for t in (torch.where(cotangent.to(device) != 0, out, 0), *filled)]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number expected; not a number if one of them is not."""
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
    difference, scale = (a - b).abs().max(), b.abs().max()
    return float(difference / scale if scale > 0 else difference)
