"""What the Triton kernels share: tiles of (tokens, dim) matrices, visibility, precision, tuning.

Triton kernels are written for whole tiles; the last one of a sequence is read with zeros and written in part. Under
TRITON_INTERPRET=1 (set before triton is imported) they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter."""
LOG2E = tl.constexpr(1.4426950408889634)
"""Kernels work with powers of 2."""


@triton.jit
def read(pointer, stride, start, tokens, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS,WIDTH) rows from `start` on of a (tokens, dim) matrix whose rows are `stride` apart; zeros outside."""
    row, column = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row[:, None] < tokens) & (column[None, :] < dim)
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def write(pointer, start, tokens, dim, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tile into rows from `start` on of a contiguous (tokens, dim) matrix, in its dtype."""
    write_part(pointer, dim, start, tokens, dim, tile, ROWS, WIDTH)


@triton.jit
def write_part(pointer, stride, start, tokens, dim, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`write` into a matrix whose rows are `stride` apart."""
    row, column = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row[:, None] < tokens) & (column[None, :] < dim)
    tl.store(pointer + row[:, None] * stride + column[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def read_row(pointer, start, tokens, outside, ROWS: tl.constexpr):
    """(ROWS,) numbers from `start` on of a vector; `outside` beyond its end."""
    row = start + tl.arange(0, ROWS)
    return tl.load(pointer + row, mask=row < tokens, other=outside)


@triton.jit
def write_row(pointer, start, tokens, values, ROWS: tl.constexpr):
    """Write numbers from `start` on into a vector."""
    row = start + tl.arange(0, ROWS)
    tl.store(pointer + row, values, mask=row < tokens)


@triton.jit
def visible(real, query, key, keys, offset, HAS_REAL: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """(ROWS,COLUMNS) bool: query number `query` + i sees key number `key` + j."""
    column = key + tl.arange(0, COLUMNS)
    inside = column < keys
    if HAS_REAL:
        inside = inside & (tl.load(real + column, mask=inside, other=0) != 0)
    seen = inside[None, :] & (tl.arange(0, ROWS) >= 0)[:, None]
    if CAUSAL:
        seen = seen & (column[None, :] <= query + offset + tl.arange(0, ROWS)[:, None])
    return seen


def width(dim: int) -> int:
    """The smallest tile width for `dim` numbers: a power of 2, and 16 at least, as tensor cores need."""
    return max(16, triton.next_power_of_2(dim))


def rows_of(tensor: Tensor) -> Tensor:
    """`tensor` (B,H,N,D) with the numbers of a row side by side; other strides are free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def diagonal_sums(table: Tensor) -> Tensor:
    """(...,T,T) -> (...,2T-1): sums along the diagonals, from the one of the lower left corner on."""
    side = table.shape[-1]
    # rows from the last on, each moved a place further than the one before
    rows = torch.nn.functional.pad(table.flip(-2), (0, side)).flatten(-2)[..., : side * (2 * side - 1)]
    return rows.unflatten(-1, (side, 2 * side - 1)).sum(dim=-2)


def tuned(kernel: Any, keys: Sequence[str], warps: Sequence[int] = (4, 8), stages: Sequence[int] = (2, 3)) -> Any:
    """`kernel`, which tries numbers of warps and stages once for every new value of `keys`; itself when interpreted."""
    if INTERPRETED:
        return kernel
    configs = [triton.Config({}, num_warps=w, num_stages=s) for w in warps for s in stages]
    return triton.autotune(configs=configs, key=list(keys))(kernel)


def missing_triton(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot take `tensor`, or None."""
    if tensor.device.type == "cuda" or INTERPRETED:
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        return None if tensor.dtype in dtypes else f"it needs float32, float16 or bfloat16, and there is {tensor.dtype}"
    return f"it needs a CUDA tensor, and there is one on {tensor.device.type}"
