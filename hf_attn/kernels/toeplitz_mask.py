"""Kernel attention under a Toeplitz or block Toeplitz mask, tile by tile: a Triton kernel.

    out_n  = sum_m mask_nm <q_n, k_m> v_m        mask_nm = f(row_n - row_m, column_n - column_m)
    mass_n = sum_m mask_nm <q_n, k_m>

Shapes: q (B,H,N,F) and k (B,H,M,F) features, v (B,H,M,D), f (H, rows + rows' - 1, columns + columns' - 1), from the first
query to the last key on. Sequences are grids of one column. Leading tokens may be outside the grid; their mask is 1.

The work is quadratic and the memory linear: entries of the mask are read where a tile needs them. Up to long sequences this
costs less than the product with the mask by FFT, which expands every token to F x D numbers. The gradient of f comes from
pairs of lines (rows of the grid, or pieces of a sequence): all pairs of lines at one distance share their offsets, so one
program adds them up, and nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from hf_attn.kernels import tiles
from hf_attn.kernels.tiles import read, read_row, visible, write, write_row

_SIDE = 64
LONGEST_LINE = 128
"""Columns of a grid at most, for the gradient of the mask."""


@triton.jit
def _mask(table, query, key, queries, columns, stride, shift, prefix, seen, SIDE: tl.constexpr):
    """(SIDE,SIDE) entries of the mask from query number `query` and key number `key` on; zeros where it is not seen."""
    n, m = query + tl.arange(0, SIDE)[:, None] - prefix, key + tl.arange(0, SIDE)[None, :] - prefix
    inner = seen & (n >= 0) & (m >= 0) & (n < queries - prefix)
    place = n // columns * stride + n % columns - (m // columns * stride + m % columns) + shift
    entries = tl.load(table + place, mask=inner, other=0.0).to(tl.float32)
    return tl.where(seen & ((n < 0) | (m < 0)), 1.0, entries)


@triton.jit
def _forward(
    query, key, value, table, out, mass, heads, queries, keys, features, dim, columns, stride, shift, prefix, entries,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    CAUSAL: tl.constexpr, SIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    start, problem = tl.program_id(0) * SIDE, tl.program_id(1)
    sample, head, offset = problem // heads, problem % heads, keys - queries
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    q = read(query + sample * qb + head * qh, qn, start, queries, features, SIDE, FEATURES)
    total = tl.zeros((SIDE, WIDTH), tl.float32)
    sums = tl.zeros((SIDE,), tl.float32)
    last = tl.minimum(start + SIDE + offset, keys) if CAUSAL else keys
    for at in range(0, last, SIDE):
        k = read(key, kn, at, keys, features, SIDE, FEATURES)
        v = read(value, vn, at, keys, dim, SIDE, WIDTH)
        seen = visible(key, start, at, keys, offset, False, CAUSAL, SIDE, SIDE)
        mask = _mask(table + head * entries, start, at, queries, columns, stride, shift, prefix, seen, SIDE)
        weight = mask * tl.dot(q, tl.trans(k), input_precision="ieee")
        total += tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        sums += tl.sum(weight, axis=1)
    write(out + problem * queries * dim, start, queries, dim, total, SIDE, WIDTH)
    write_row(mass + problem * queries, start, queries, sums, SIDE)


@triton.jit
def _to_queries(
    query, key, value, table, out_grad, mass_grad, query_grad, heads, queries, keys, features, dim, columns, stride, shift,
    prefix, entries, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    CAUSAL: tl.constexpr, SIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    start, problem = tl.program_id(0) * SIDE, tl.program_id(1)
    sample, head, offset = problem // heads, problem % heads, keys - queries
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    grad = read(out_grad + problem * queries * dim, dim, start, queries, dim, SIDE, WIDTH)
    to_mass = read_row(mass_grad + problem * queries, start, queries, 0.0, SIDE)
    total = tl.zeros((SIDE, FEATURES), tl.float32)
    last = tl.minimum(start + SIDE + offset, keys) if CAUSAL else keys
    for at in range(0, last, SIDE):
        k = read(key, kn, at, keys, features, SIDE, FEATURES)
        v = read(value, vn, at, keys, dim, SIDE, WIDTH)
        seen = visible(key, start, at, keys, offset, False, CAUSAL, SIDE, SIDE)
        mask = _mask(table + head * entries, start, at, queries, columns, stride, shift, prefix, seen, SIDE)
        gain = mask * (tl.dot(grad, tl.trans(v), input_precision="ieee") + to_mass[:, None])
        total += tl.dot(gain.to(k.dtype), k, input_precision="ieee")
    write(query_grad + problem * queries * features, start, queries, features, total, SIDE, FEATURES)


@triton.jit
def _to_keys(
    query, key, value, table, out_grad, mass_grad, key_grad, value_grad, heads, queries, keys, features, dim, columns, stride,
    shift, prefix, entries, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    CAUSAL: tl.constexpr, SIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    start, problem = tl.program_id(0) * SIDE, tl.program_id(1)
    sample, head, offset = problem // heads, problem % heads, keys - queries
    query += sample * qb + head * qh
    k = read(key + sample * kb + head * kh, kn, start, keys, features, SIDE, FEATURES)
    v = read(value + sample * vb + head * vh, vn, start, keys, dim, SIDE, WIDTH)
    to_key = tl.zeros((SIDE, FEATURES), tl.float32)
    to_value = tl.zeros((SIDE, WIDTH), tl.float32)
    first = tl.maximum(start - offset, 0) // SIDE * SIDE if CAUSAL else 0
    for at in range(first, queries, SIDE):
        q = read(query, qn, at, queries, features, SIDE, FEATURES)
        grad = read(out_grad + problem * queries * dim, dim, at, queries, dim, SIDE, WIDTH)
        to_mass = read_row(mass_grad + problem * queries, at, queries, 0.0, SIDE)
        seen = visible(key, at, start, keys, offset, False, CAUSAL, SIDE, SIDE)
        mask = _mask(table + head * entries, at, start, queries, columns, stride, shift, prefix, seen, SIDE)
        weight = mask * tl.dot(q, tl.trans(k), input_precision="ieee")
        to_value += tl.dot(tl.trans(weight).to(grad.dtype), grad, input_precision="ieee")
        gain = mask * (tl.dot(grad, tl.trans(v), input_precision="ieee") + to_mass[:, None])
        to_key += tl.dot(tl.trans(gain).to(q.dtype), q, input_precision="ieee")
    write(key_grad + problem * keys * features, start, keys, features, to_key, SIDE, FEATURES)
    write(value_grad + problem * keys * dim, start, keys, dim, to_value, SIDE, WIDTH)


@triton.jit
def _to_lines(
    query, key, value, out_grad, mass_grad, line_grad, samples, heads, queries, keys, features, dim, prefix, line,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    CAUSAL: tl.constexpr, SIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the mask between lines at one distance, line_grad (H,distances,SIDE,SIDE), over all samples."""
    head, query_lines, key_lines = tl.program_id(1), tl.cdiv(queries - prefix, line), tl.cdiv(keys - prefix, line)
    distance, offset = tl.program_id(0) - (key_lines - 1), keys - queries
    first, last = tl.maximum(distance, 0), tl.minimum(query_lines, key_lines + distance)
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in range(0, samples * (last - first)):
        sample, i = step // (last - first), first + step % (last - first)
        at, start, problem = prefix + i * line, prefix + (i - distance) * line, sample * heads + head
        end, key_end = tl.minimum(at + line, queries), tl.minimum(start + line, keys)
        q = read(query + sample * qb + head * qh, qn, at, end, features, SIDE, FEATURES)
        k = read(key + sample * kb + head * kh, kn, start, key_end, features, SIDE, FEATURES)
        v = read(value + sample * vb + head * vh, vn, start, key_end, dim, SIDE, WIDTH)
        grad = read(out_grad + problem * queries * dim, dim, at, end, dim, SIDE, WIDTH)
        to_mass = read_row(mass_grad + problem * queries, at, end, 0.0, SIDE)
        gain = tl.dot(grad, tl.trans(v), input_precision="ieee") + to_mass[:, None]
        gain *= tl.dot(q, tl.trans(k), input_precision="ieee")
        total += tl.where(start + column <= at + offset + row, gain, 0.0) if CAUSAL else gain
    write(line_grad + (head * tl.num_programs(0) + tl.program_id(0)) * SIDE * SIDE, 0, SIDE, SIDE, total, SIDE, SIDE)


_KEYS = ("FEATURES", "WIDTH", "CAUSAL")
_tuned_forward, _tuned_to_queries, _tuned_to_keys, _tuned_to_lines = (
    tiles.tuned(kernel, _KEYS) for kernel in (_forward, _to_queries, _to_keys, _to_lines)
)


@torch.library.custom_op("hf_attn::toeplitz_sums", mutates_args=())
def toeplitz_sums(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, columns: int, prefix: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Sums of kernel attention under a Toeplitz mask.

    Args:
        query: features (B,H,N,F), float32, float16 or bfloat16.
        key, value: features (B,H,M,F) and values (B,H,M,D), of the same dtype. Padded keys are zeros.
        table: f (H, rows + rows' - 1, columns + columns' - 1).
        columns: of the grid; 1 for a sequence, whose N and M may differ. The gradient takes up to `LONGEST_LINE`.
        prefix: leading tokens outside the grid, N = M = prefix + rows * columns.
        is_causal: query n sees keys m <= n + (M - N).

    Returns:
        The sums (B,H,N,D) in the dtype of `value`, and the sums of the weights (B,H,N) in float32, both differentiable.
    """
    inputs, sizes, places, strides, meta = _arguments(query, key, value, table, columns, prefix, is_causal)
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=value.dtype, device=value.device)
    mass = torch.empty(query.shape[:3], dtype=torch.float32, device=value.device)
    grid = (triton.cdiv(query.shape[2], _SIDE), query.shape[0] * query.shape[1])
    _tuned_forward[grid](*inputs, out, mass, *sizes, *places, *strides, **meta)
    return out, mass


@toeplitz_sums.register_fake
def _(query, key, value, table, columns, prefix, is_causal):
    return value.new_empty(*query.shape[:3], value.shape[3]), value.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_attn::toeplitz_sums_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, out_grad: Tensor, mass_grad: Tensor, columns: int, prefix: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, and of the mask between lines, (H,distances,T,T)."""
    inputs, sizes, places, strides, meta = _arguments(query, key, value, table, columns, prefix, is_causal)
    flow = (out_grad.contiguous(), mass_grad.contiguous())
    to_query, to_key, to_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    problems = query.shape[0] * query.shape[1]
    grid = (triton.cdiv(query.shape[2], _SIDE), problems)
    _tuned_to_queries[grid](*inputs, *flow, to_query, *sizes, *places, *strides, **meta)
    grid = (triton.cdiv(key.shape[2], _SIDE), problems)
    _tuned_to_keys[grid](*inputs, *flow, to_key, to_value, *sizes, *places, *strides, **meta)
    line, side, distances = _lines(query.shape[2], key.shape[2], columns, prefix)
    to_line = torch.empty(query.shape[1], distances, side, side, dtype=torch.float32, device=query.device)
    meta["SIDE"] = side
    _tuned_to_lines[(distances, query.shape[1])](
        *inputs[:3], *flow, to_line, query.shape[0], *sizes, prefix, line, *strides, **meta
    )
    return to_query, to_key, to_value, to_line


@_backward.register_fake
def _(query, key, value, table, out_grad, mass_grad, columns, prefix, is_causal):
    _, side, distances = _lines(query.shape[2], key.shape[2], columns, prefix)
    to_line = query.new_empty(query.shape[1], distances, side, side, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (query, key, value)), to_line


def _lines(queries: int, keys: int, columns: int, prefix: int) -> tuple[int, int, int]:
    """Tokens a line, the side of its tile, and how many distances there are between a line of queries and one of keys."""
    line = _SIDE if columns == 1 else columns
    return line, tiles.width(line), -(-(queries - prefix) // line) + -(-(keys - prefix) // line) - 1


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, columns: int, prefix: int, is_causal: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, sizes, what finds an entry of the mask, strides, and what a kernel is compiled for."""
    inputs = (*(tiles.rows_of(x) for x in (query, key, value)), table.contiguous())
    strides = tuple(stride for x in inputs[:3] for stride in x.stride()[:3])
    (heads, queries, features), keys, dim = query.shape[1:], key.shape[2], value.shape[3]
    stride = table.shape[2]
    shift = ((keys - prefix) // columns - 1) * stride + columns - 1
    places = (columns, stride, shift, prefix, table.shape[1] * stride)
    meta = {
        "CAUSAL": is_causal, "SIDE": _SIDE, "FEATURES": tiles.width(features), "WIDTH": tiles.width(dim),
    }  # fmt: skip
    return inputs, (heads, queries, keys, features, dim), places, strides, meta


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.columns, ctx.prefix, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, out_grad: Tensor | None, mass_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, table = ctx.saved_tensors
    if out_grad is None:
        out_grad = value.new_zeros(*query.shape[:3], value.shape[3])
    if mass_grad is None:
        mass_grad = value.new_zeros(query.shape[:3], dtype=torch.float32)
    rest = (ctx.columns, ctx.prefix, ctx.is_causal)
    *grads, to_line = _backward(query, key, value, table, out_grad, mass_grad, *rest)
    # (H,distances,2T-1), by the place of the query in its line less that of the key in its line
    along = tiles.diagonal_sums(to_line).flip(-1)
    side = to_line.shape[-1]
    if ctx.columns > 1:
        to_table = along[..., side - ctx.columns : side + ctx.columns - 1]
    else:
        # pieces of a sequence: the offsets of neighbouring distances overlap
        sums = pad(along[..., :side], (0, 0, 0, 1)) + pad(along[..., side:], (0, 1, 1, 0))
        keys = key.shape[2] - ctx.prefix
        first = -(-keys // side) * side - keys
        to_table = sums.flatten(-2)[:, first : first + table.shape[1], None]
    return *grads, to_table.to(table.dtype), None, None, None


toeplitz_sums.register_autograd(_gradients, setup_context=_keep)
