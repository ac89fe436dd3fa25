"""Sums of kernel attention over the rings around each place of a grid, ring by ring with its own weight: a Triton kernel.

    out_n  = sum_m a_{n,ring(n,m)} <q_n, k_m> v_m        over the keys m with ring(n,m) < R
    mass_n = sum_m a_{n,ring(n,m)} <q_n, k_m>            ring(n,m) = max(|row_m - row_n|, |column_m - column_n|)

Shapes: q, k features (B,H,N,F), v (B,H,N,D), a (B,H,N,R), N = rows * columns in raster order.

Ripple attention gives all keys beyond its last ring one weight a_R. Its sums are these, of a_r - a_R, and a_R times the
sums over all keys, which are linear attention: a window of a few rings and one state instead of tables over the grid. A
program takes a patch of queries and the window around it; neither reaches memory as an N x N table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn.kernels import tiles

_PATCH = 64


@triton.jit
def _gather(pointer, stride, token, there, dim, WIDTH: tl.constexpr):
    """(TOKENS,WIDTH) rows of a (tokens, dim) matrix; zeros where there is none."""
    column = tl.arange(0, WIDTH)
    inside = there[:, None] & (column[None, :] < dim)
    return tl.load(pointer + token[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _scatter(pointer, token, there, dim, tile, WIDTH: tl.constexpr):
    """Write rows of a contiguous (tokens, dim) matrix, in its dtype."""
    column = tl.arange(0, WIDTH)
    inside = there[:, None] & (column[None, :] < dim)
    tl.store(pointer + token[:, None] * dim + column[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _patch(columns, TALL: tl.constexpr, WIDE: tl.constexpr):
    """First row and column of the program's patch."""
    across = tl.cdiv(columns, WIDE)
    return tl.program_id(0) // across * TALL, tl.program_id(0) % across * WIDE


@triton.jit
def _within(top, left, rows, columns, TALL: tl.constexpr, WIDE: tl.constexpr):
    """(TALL*WIDE,) rows and columns of the places of a patch, and whether the grid has them."""
    place = tl.arange(0, TALL * WIDE)
    row, column = top + place // WIDE, left + place % WIDE
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _window(at, top, left, rows, columns, rings, TALL: tl.constexpr, WIDE: tl.constexpr):
    """(TALL*WIDE,) rows and columns of the places from number `at` on of the window around a patch, and whether they are."""
    first, low = tl.maximum(top - rings + 1, 0), tl.maximum(left - rings + 1, 0)
    tall = tl.minimum(top + TALL + rings - 1, rows) - first
    wide = tl.minimum(left + WIDE + rings - 1, columns) - low
    place = at + tl.arange(0, TALL * WIDE)
    return first + place // wide, low + place % wide, place < tall * wide


@triton.jit
def _window_size(top, left, rows, columns, rings, TALL: tl.constexpr, WIDE: tl.constexpr):
    tall = tl.minimum(top + TALL + rings - 1, rows) - tl.maximum(top - rings + 1, 0)
    wide = tl.minimum(left + WIDE + rings - 1, columns) - tl.maximum(left - rings + 1, 0)
    return tall * wide


@triton.jit
def _ring(query_row, query_column, query_there, key_row, key_column, key_there, rings):
    """(QUERIES,KEYS) ring of the key around the query, and whether it has a weight."""
    down = tl.abs(query_row[:, None] - key_row[None, :])
    right = tl.abs(query_column[:, None] - key_column[None, :])
    ring = tl.maximum(down, right)
    return ring, query_there[:, None] & key_there[None, :] & (ring < rings)


@triton.jit
def _forward(
    query, key, value, alpha, out, mass, heads, rows, columns, features, dim, rings,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    TALL: tl.constexpr, WIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    problem, tokens = tl.program_id(1), rows * columns
    sample, head = problem // heads, problem % heads
    top, left = _patch(columns, TALL, WIDE)
    row, column, there = _within(top, left, rows, columns, TALL, WIDE)
    token = row * columns + column
    q = _gather(query + sample * qb + head * qh, qn, token, there, features, FEATURES)
    total = tl.zeros((TALL * WIDE, WIDTH), tl.float32)
    sums = tl.zeros((TALL * WIDE,), tl.float32)
    for at in range(0, _window_size(top, left, rows, columns, rings, TALL, WIDE), TALL * WIDE):
        key_row, key_column, key_there = _window(at, top, left, rows, columns, rings, TALL, WIDE)
        other = key_row * columns + key_column
        k = _gather(key + sample * kb + head * kh, kn, other, key_there, features, FEATURES)
        v = _gather(value + sample * vb + head * vh, vn, other, key_there, dim, WIDTH)
        ring, seen = _ring(row, column, there, key_row, key_column, key_there, rings)
        a = tl.load(alpha + (problem * tokens + token[:, None]) * rings + ring, mask=seen, other=0.0).to(tl.float32)
        weight = a * tl.dot(q, tl.trans(k), input_precision="ieee")
        total += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        sums += tl.sum(weight, axis=1)
    _scatter(out + problem * tokens * dim, token, there, dim, total, WIDTH)
    tl.store(mass + problem * tokens + token, sums, mask=there)


@triton.jit
def _to_queries(
    query, key, value, alpha, out_grad, mass_grad, query_grad, alpha_grad, heads, rows, columns, features, dim, rings,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    TALL: tl.constexpr, WIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """Gradients of a patch of queries and of their ring weights."""
    problem, tokens = tl.program_id(1), rows * columns
    sample, head = problem // heads, problem % heads
    top, left = _patch(columns, TALL, WIDE)
    row, column, there = _within(top, left, rows, columns, TALL, WIDE)
    token = row * columns + column
    q = _gather(query + sample * qb + head * qh, qn, token, there, features, FEATURES)
    grad = _gather(out_grad + problem * tokens * dim, dim, token, there, dim, WIDTH)
    to_mass = tl.load(mass_grad + problem * tokens + token, mask=there, other=0.0)
    to_query = tl.zeros((TALL * WIDE, FEATURES), tl.float32)
    to_alpha = tl.zeros((TALL * WIDE, RINGS), tl.float32)
    for at in range(0, _window_size(top, left, rows, columns, rings, TALL, WIDE), TALL * WIDE):
        key_row, key_column, key_there = _window(at, top, left, rows, columns, rings, TALL, WIDE)
        other = key_row * columns + key_column
        k = _gather(key + sample * kb + head * kh, kn, other, key_there, features, FEATURES)
        v = _gather(value + sample * vb + head * vh, vn, other, key_there, dim, WIDTH)
        ring, seen = _ring(row, column, there, key_row, key_column, key_there, rings)
        a = tl.load(alpha + (problem * tokens + token[:, None]) * rings + ring, mask=seen, other=0.0).to(tl.float32)
        gain = tl.dot(grad, tl.trans(v), input_precision="ieee") + to_mass[:, None]
        to_query += tl.dot((a * gain).to(k.dtype), k, input_precision="ieee")
        share = tl.where(seen, gain * tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        for r in range(rings):
            of_ring = tl.sum(tl.where(ring == r, share, 0.0), axis=1)
            to_alpha += tl.where(tl.arange(0, RINGS)[None, :] == r, of_ring[:, None], 0.0)
    _scatter(query_grad + problem * tokens * features, token, there, features, to_query, FEATURES)
    _scatter(alpha_grad + problem * tokens * rings, token, there, rings, to_alpha, RINGS)


@triton.jit
def _to_keys(
    query, key, value, alpha, out_grad, mass_grad, key_grad, value_grad, heads, rows, columns, features, dim, rings,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    TALL: tl.constexpr, WIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a patch of keys and values, from the window of queries that have it in theirs."""
    problem, tokens = tl.program_id(1), rows * columns
    sample, head = problem // heads, problem % heads
    top, left = _patch(columns, TALL, WIDE)
    row, column, there = _within(top, left, rows, columns, TALL, WIDE)
    token = row * columns + column
    k = _gather(key + sample * kb + head * kh, kn, token, there, features, FEATURES)
    v = _gather(value + sample * vb + head * vh, vn, token, there, dim, WIDTH)
    to_key = tl.zeros((TALL * WIDE, FEATURES), tl.float32)
    to_value = tl.zeros((TALL * WIDE, WIDTH), tl.float32)
    for at in range(0, _window_size(top, left, rows, columns, rings, TALL, WIDE), TALL * WIDE):
        query_row, query_column, query_there = _window(at, top, left, rows, columns, rings, TALL, WIDE)
        other = query_row * columns + query_column
        q = _gather(query + sample * qb + head * qh, qn, other, query_there, features, FEATURES)
        grad = _gather(out_grad + problem * tokens * dim, dim, other, query_there, dim, WIDTH)
        to_mass = tl.load(mass_grad + problem * tokens + other, mask=query_there, other=0.0)
        ring, seen = _ring(query_row, query_column, query_there, row, column, there, rings)
        a = tl.load(alpha + (problem * tokens + other[:, None]) * rings + ring, mask=seen, other=0.0).to(tl.float32)
        weight = a * tl.dot(q, tl.trans(k), input_precision="ieee")
        to_value += tl.dot(tl.trans(weight).to(grad.dtype), grad, input_precision="ieee")
        gain = a * (tl.dot(grad, tl.trans(v), input_precision="ieee") + to_mass[:, None])
        to_key += tl.dot(tl.trans(gain).to(q.dtype), q, input_precision="ieee")
    _scatter(key_grad + problem * tokens * features, token, there, features, to_key, FEATURES)
    _scatter(value_grad + problem * tokens * dim, token, there, dim, to_value, WIDTH)


_KEYS = ("FEATURES", "WIDTH", "TALL", "rings")
_tuned_forward, _tuned_to_queries, _tuned_to_keys = (tiles.tuned(k, _KEYS) for k in (_forward, _to_queries, _to_keys))


@torch.library.custom_op("hf_attn::ring_window_sums", mutates_args=())
def ring_window_sums(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Weighted sums over the rings around every place of a grid.

    Args:
        query, key: features (B,H,N,F), N = rows * columns; float32, float16 or bfloat16. Padded keys are zeros.
        value: (B,H,N,D), of the same dtype.
        alpha: (B,H,N,R) weight of rings 0 to R - 1; R is at least 1.
        rows, columns: of the grid. A sequence is one row.

    Returns:
        The sums (B,H,N,D) in the dtype of `value`, and the sums of the weights (B,H,N) in float32, both differentiable.
    """
    inputs, strides, sizes, meta, grid = _arguments(query, key, value, alpha, rows, columns)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    mass = torch.empty(value.shape[:3], dtype=torch.float32, device=value.device)
    _tuned_forward[grid](*inputs, out, mass, *sizes, *strides, **meta)
    return out, mass


@ring_window_sums.register_fake
def _(query, key, value, alpha, rows, columns):
    return value.new_empty(value.shape), value.new_empty(value.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_attn::ring_window_sums_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    out_grad: Tensor,
    mass_grad: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and alpha."""
    inputs, strides, sizes, meta, grid = _arguments(query, key, value, alpha, rows, columns)
    flow = (out_grad.contiguous(), mass_grad.contiguous())
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, alpha))
    rings = tiles.width(alpha.shape[-1])
    _tuned_to_queries[grid](*inputs, *flow, grads[0], grads[3], *sizes, *strides, RINGS=rings, **meta)
    _tuned_to_keys[grid](*inputs, *flow, grads[1], grads[2], *sizes, *strides, **meta)
    return grads[0], grads[1], grads[2], grads[3]


@_backward.register_fake
def _(query, key, value, alpha, out_grad, mass_grad, rows, columns):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, alpha))


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, rows: int, columns: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...], dict[str, int], tuple[int, int]]:
    """Tensors, strides, sizes, what a kernel is compiled for, and its grid."""
    inputs = (*(tiles.rows_of(x) for x in (query, key, value)), alpha.contiguous())
    strides = tuple(stride for x in inputs[:3] for stride in x.stride()[:3])
    # the squarer a patch, the smaller its window
    tall = min(8, triton.next_power_of_2(rows))
    wide = min(_PATCH // tall, tiles.width(columns)) if tall < 8 else max(_PATCH // tall, 16 // tall)
    features, dim = query.shape[3], value.shape[3]
    sizes = (query.shape[1], rows, columns, features, dim, alpha.shape[-1])
    meta = {"TALL": tall, "WIDE": wide, "FEATURES": tiles.width(features), "WIDTH": tiles.width(dim)}
    grid = (triton.cdiv(rows, tall) * triton.cdiv(columns, wide), query.shape[0] * query.shape[1])
    return inputs, strides, sizes, meta, grid


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, out_grad: Tensor | None, mass_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, alpha = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(value)
    if mass_grad is None:
        mass_grad = value.new_zeros(value.shape[:3], dtype=torch.float32)
    grads = _backward(query, key, value, alpha, out_grad, mass_grad, ctx.rows, ctx.columns)
    return *grads, None, None


ring_window_sums.register_autograd(_gradients, setup_context=_keep)
