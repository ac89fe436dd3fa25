"""Small modules and inputs of any mechanism, made from its record: for `doctor`, pictures, benchmarks and tests.

What a call needs is read from the capabilities and from options that every mechanism names alike (`grid_size`,
`window_size`), so a new mechanism needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_attn import build, get_mechanism
from hf_attn.module import AttentionModule
from hf_attn.options import Options

GRID = (3, 5)
HEADS, DIM = 2, 8


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from `seed`; afterwards the generator goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def example_options(name: str, options: Mapping[str, Any] | None = None) -> Options:
    """The example options of mechanism `name`, with `options` on top, checked."""
    mechanism = get_mechanism(name)
    return mechanism.options_class.parse(**{**mechanism.example, **(options or {})})


def example_module(
    name: str, *, num_heads: int = HEADS, head_dim: int = DIM, options: Mapping[str, Any] | None = None
) -> AttentionModule:
    """A module of mechanism `name` under `example_options`, float32, in evaluation mode.

    Its parameters are drawn around zero, not at their start, where parts of a mechanism cancel.
    """
    given = {**get_mechanism(name).example, **(options or {})}
    module = build(name, num_heads=num_heads, head_dim=head_dim, **given)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def grid_of(module: AttentionModule, grid: tuple[int, int] = GRID) -> tuple[int, int]:
    """The grid that fits the options of `module`: `grid_size`, or `grid` with sides that `window_size` divides."""
    rows, columns = getattr(module.options, "grid_size", None) or grid
    window = getattr(module.options, "window_size", None) or 1
    return -(-rows // window) * window, -(-columns // window) * window


def example_inputs(
    module: AttentionModule,
    *,
    batch: int = 2,
    grid: tuple[int, int] = GRID,
    on_grid: bool = False,
    keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Random query, key and value for `module`, and the arguments that every call of it needs.

    Args:
        batch: B.
        grid: N is its rows times its columns.
        on_grid: the tokens are those of a grid (`grid_of`), also where the mechanism takes sequences.
        keys: M, for cross-attention; N by default.
        dtype: of all floating-point tensors; they are on the CPU.
        requires_grad: of the same tensors.

    Returns:
        [query (B,H,N,D), key (B,H,M,D), value (B,H,M,D)], and a dict with `grid` where there is one and `layer_input`
        (B,N,H*D) where it is needed.
    """
    on_grid = on_grid or not module.capabilities.sequence
    rows, columns = grid_of(module, grid) if on_grid or getattr(module.options, "grid_size", None) else grid
    length, heads, dim = rows * columns, module.num_heads, module.head_dim
    tensors = [
        torch.randn(batch, heads, n, dim, dtype=dtype, requires_grad=requires_grad)
        for n in (length, keys or length, keys or length)
    ]
    call: dict[str, Any] = {"grid": (rows, columns)} if on_grid else {}
    if module.capabilities.needs_layer_input:
        call["layer_input"] = torch.randn(batch, length, heads * dim, dtype=dtype, requires_grad=requires_grad)
    return tensors, call
