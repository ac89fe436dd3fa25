"""What must hold before a time is reported: the efficient form computes the definition, outputs and gradients.

`exact` compares the forms in float64. `rounding` compares both with the float64 definition in the dtype of the
benchmark, where the efficient form may err a few times as much as the definition itself.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.errors import HfAttnError
from hf_attn.module import AttentionModule

EXACT = 1e-9
"""Relative tolerance in float64."""
TIMES, ULPS = 4, 8
"""In a lower dtype: how often the definition's own error is allowed, plus how many units in the last place."""


class Mismatch(HfAttnError, RuntimeError):
    """What was about to be timed computes something else than it should."""


@dataclass(frozen=True)
class Place:
    """The call a mechanism is checked or timed in.

    Attributes:
        length: N = M, prefix tokens included.
        grid: rows and columns, where there is a grid.
    """

    length: int
    batch: int = 1
    causal: bool = False
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0


@dataclass(frozen=True)
class Sample:
    """Inputs of one call, and a weight for every output (the gradient that comes in from above)."""

    query: Tensor
    key: Tensor
    value: Tensor
    layer_input: Tensor | None
    cotangent: Tensor
    call: dict[str, Any]

    def cast(self, dtype: torch.dtype) -> Sample:
        """The sample in another dtype; the inputs are leaves that ask for gradients."""
        tensors: dict[str, Any] = {
            n: t.detach().to(dtype).requires_grad_(n != "cotangent")
            for n, t in vars(self).items()
            if isinstance(t, Tensor)
        }
        return replace(self, **tensors)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {n: t for n in ("query", "key", "value", "layer_input") if (t := getattr(self, n)) is not None}


def sample(module: AttentionModule, place: Place, dtype: torch.dtype, device: str) -> Sample:
    """Standard normal inputs for `module` at `place`, drawn in float64 so that every dtype sees the same numbers."""
    heads, dim = module.num_heads, module.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(place.batch, *shape, dtype=torch.float64, device=device)

    query, key, value, cotangent = (draw(heads, place.length, dim) for _ in range(4))
    layer_input = draw(place.length, heads * dim) if module.capabilities.needs_layer_input else None
    call: dict[str, Any] = {"is_causal": place.causal}
    if place.grid is not None:
        call.update(grid=place.grid, num_prefix_tokens=place.num_prefix_tokens)
    return Sample(query, key, value, layer_input, cotangent, call).cast(dtype)


def differentiate(form: Callable[..., Tensor], module: AttentionModule, given: Sample) -> dict[str, Tensor]:
    """The output of `form` and its gradients for inputs and parameters."""
    leaves = {**given.inputs, **dict(module.named_parameters())}
    output = form(**given.inputs, **given.call)
    gradients = torch.autograd.grad(output, list(leaves.values()), given.cotangent, allow_unused=True)
    named = {
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {"output": output.detach(), **named}


def exact(module: AttentionModule, place: Place, device: str, seed: int) -> None:
    """The forms agree in float64, and for mechanisms that draw in training, in training with equal draws as well.

    Raises:
        Mismatch: they do not.
    """
    module = scattered(module).double().to(device)
    given = sample(module, place, torch.float64, device)
    for training in (False, True) if module.capabilities.random else (False,):
        module.train(training)
        found = []
        for form in (module, module.naive):
            # not the seed the module was drawn with: a form that does not draw must show
            torch.manual_seed(seed + 1)
            found.append(differentiate(form, module, given))
        scale = max(largest(tensor) for tensor in found[1].values())
        for name, expected in found[1].items():
            # what is small beside everything else is held to the scale of the rest
            allowed = EXACT * max(largest(expected), 1e-3 * scale)
            within(found[0][name], expected, allowed, f"{name} in float64 at length {place.length}")


def rounding(module: AttentionModule, place: Place, dtype: torch.dtype, device: str) -> float:
    """The efficient form in `dtype` errs little more than the definition in `dtype`; seconds the definition took.

    Raises:
        Mismatch: it errs more.
    """
    low = scattered(module).to(device, dtype).eval()
    exact_module = copy.deepcopy(low).double()
    given = sample(low, place, dtype, device)
    start = time.perf_counter()
    expected = differentiate(exact_module.naive, exact_module, given.cast(torch.float64))
    scale = max(largest(tensor) for tensor in expected.values())
    seconds = time.perf_counter() - start
    definition = differentiate(low.naive, low, given)
    efficient = differentiate(low, low, given)
    parameters = {f"gradient of {name}" for name, _ in low.named_parameters()}
    for name, reference in expected.items():
        size = max(largest(reference), 1e-3 * scale)
        # a parameter's gradient is a sum over the tokens: terms cancel, and their rounding errors add up like a random walk
        units = ULPS + (place.length**0.5 if name in parameters else 0)
        floor = EXACT if dtype == torch.float64 else units * torch.finfo(dtype).eps
        allowed = TIMES * largest(definition[name].double() - reference) + floor * size
        what = f"{name} in {str(dtype).removeprefix('torch.')} at length {place.length}"
        within(efficient[name].double(), reference, allowed, what)
    return seconds


def agreement(
    low: nn.Module,
    naive: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    cotangent: Tensor,
    dtype: torch.dtype,
    terms: int,
    where: str,
) -> None:
    """A module of one input agrees with its definition in float64, and in `dtype` errs little more; gradients as well.

    Args:
        low: the module, in `dtype`.
        naive: its definition, called with a module and its input.
        x, cotangent: float64 input, and weight of every output.
        terms: how many terms the gradient of a parameter sums.
        where: for the message.

    Raises:
        Mismatch: it does not.
    """
    module = copy.deepcopy(low).double()
    rounded = x.to(dtype)
    reference = gradients(functools.partial(naive, module), module, rounded.double(), cotangent)
    found = gradients(module, module, rounded.double(), cotangent)
    definition = gradients(functools.partial(naive, low), low, rounded, cotangent)
    efficient = gradients(low, low, rounded, cotangent)
    scale = max(largest(tensor) for tensor in reference.values())
    name_of_dtype = str(dtype).removeprefix("torch.")
    for name, expected in reference.items():
        size = max(largest(expected), 1e-3 * scale)
        within(found[name], expected, EXACT * size, f"{name} in float64 {where}")
        # gradients of parameters are sums: rounding errors add up like a random walk
        units = ULPS + terms**0.5
        floor = EXACT if dtype == torch.float64 else units * torch.finfo(dtype).eps
        allowed = TIMES * largest(definition[name].double() - expected) + floor * size
        within(efficient[name].double(), expected, allowed, f"{name} in {name_of_dtype} {where}")


def gradients(form: Any, module: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """The output of `form`, and its gradients for x and the parameters of `module`."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    output = form(leaves["x"])
    found = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return {"output": output.detach(), **named}


def within(found: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    """Raise `Mismatch` unless `found` has the shape of `expected` and is nowhere further from it than `allowed`."""
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    finite([found], what)
    error = largest(found - expected)
    if not error <= allowed:
        raise Mismatch(f"{what}: off by {error:.2g}, allowed {allowed:.2g}")


def finite(tensors: Sequence[Tensor], what: str) -> None:
    """Raise `Mismatch` where a number is not finite."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise Mismatch(f"{what}: not finite")


def largest(tensor: Tensor) -> float:
    """The largest absolute value."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def scattered(module: AttentionModule) -> AttentionModule:
    """A float64 copy whose parameters are off their start, where parts of a mechanism cancel."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module
