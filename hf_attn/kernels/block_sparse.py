"""Softmax attention over listed blocks of keys, with the log-sum-exp of every row: a Triton kernel.

    out_n = softmax_m(s <q_n, k_m>) . v over the keys m of the blocks that are listed for n's block

Shapes: query (B,H,N,D), key and value (B,H,M,D), table (T,R,K): row r lists the blocks of keys that block r of queries
sees, -1 for none, no block twice. T is 1, H or B*H: one list for all, one a head, or one a sample and head.

No N x M tensor exists: memory is that of the inputs, the result and one number a query. The backward pass computes the
weights again from the log-sum-exp; keys and values gather their gradients along the transposed lists, so nothing is
added atomically and a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn.kernels import tiles
from hf_attn.kernels.tiles import LOG2E, read, read_row, visible, write, write_row


@triton.jit
def _forward(
    query, key, value, real, table, out, lse, scale, heads, queries, keys, dim, lists, places, columns, offset,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, CAUSAL: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of queries against the blocks of its list, the maximum and the sums carried along."""
    place, problem = tl.program_id(0), tl.program_id(1)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    row = table + ((problem % lists) * places + place) * columns
    q = read(query + sample * qb + head * qh, qn, start, queries, dim, SIDE, WIDTH)
    top = tl.full((SIDE,), float("-inf"), tl.float32)
    mass = tl.zeros((SIDE,), tl.float32)
    total = tl.zeros((SIDE, WIDTH), tl.float32)
    for i in range(columns):
        block = tl.load(row + i)
        if block >= 0:
            k = read(key, kn, block * SIDE, keys, dim, SIDE, WIDTH)
            v = read(value, vn, block * SIDE, keys, dim, SIDE, WIDTH)
            seen = visible(real + sample * keys, start, block * SIDE, keys, offset, HAS_REAL, CAUSAL, SIDE, SIDE)
            logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            larger = tl.maximum(top, tl.max(logits, axis=1))
            base = tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(logits - base[:, None])
            keep = tl.exp2(top - base)
            mass = mass * keep + tl.sum(weight, axis=1)
            total = total * keep[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            top = larger
    alive = mass > 0
    safe = tl.where(alive, mass, 1.0)
    write(out + problem * queries * dim, start, queries, dim, total / safe[:, None], SIDE, WIDTH)
    logarithm = tl.where(alive, (top + tl.log2(safe)) / LOG2E, float("-inf"))
    write_row(lse + problem * queries, start, queries, logarithm, SIDE)


@triton.jit
def _to_queries(
    query, key, value, real, table, out_grad, lse, delta, query_grad, scale, factor, heads, queries, keys, dim, lists, places,
    columns, offset, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, CAUSAL: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries."""
    place, problem = tl.program_id(0), tl.program_id(1)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    row = table + ((problem % lists) * places + place) * columns
    q = read(query + sample * qb + head * qh, qn, start, queries, dim, SIDE, WIDTH)
    grad = read(out_grad + problem * queries * dim, dim, start, queries, dim, SIDE, WIDTH)
    # plus infinity turns the weights of rows without keys, and of rows beyond the end, into zeros
    log_mass = read_row(lse + problem * queries, start, queries, float("inf"), SIDE) * LOG2E
    log_mass = tl.where(log_mass == float("-inf"), float("inf"), log_mass)
    mean = read_row(delta + problem * queries, start, queries, 0.0, SIDE)
    total = tl.zeros((SIDE, WIDTH), tl.float32)
    for i in range(columns):
        block = tl.load(row + i)
        if block >= 0:
            k = read(key, kn, block * SIDE, keys, dim, SIDE, WIDTH)
            v = read(value, vn, block * SIDE, keys, dim, SIDE, WIDTH)
            seen = visible(real + sample * keys, start, block * SIDE, keys, offset, HAS_REAL, CAUSAL, SIDE, SIDE)
            logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            weight = tl.exp2(logits - log_mass[:, None])
            logit_grad = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - mean[:, None])
            total += tl.dot(logit_grad.to(k.dtype), k, input_precision="ieee")
    write(query_grad + problem * queries * dim, start, queries, dim, total * factor, SIDE, WIDTH)


@triton.jit
def _to_keys(
    query, key, value, real, first, entries, out_grad, lse, delta, key_grad, value_grad, scale, factor, heads, queries, keys,
    dim, lists, places, length, offset, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, CAUSAL: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, from the blocks of queries that list it."""
    place, problem = tl.program_id(0), tl.program_id(1)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    query += sample * qb + head * qh
    k = read(key + sample * kb + head * kh, kn, start, keys, dim, SIDE, WIDTH)
    v = read(value + sample * vb + head * vh, vn, start, keys, dim, SIDE, WIDTH)
    which = problem % lists
    begin = tl.load(first + which * (places + 1) + place)
    end = tl.load(first + which * (places + 1) + place + 1)
    to_key = tl.zeros((SIDE, WIDTH), tl.float32)
    to_value = tl.zeros((SIDE, WIDTH), tl.float32)
    for i in range(begin, end):
        block = tl.load(entries + which * length + i)
        q = read(query, qn, block * SIDE, queries, dim, SIDE, WIDTH)
        grad = read(out_grad + problem * queries * dim, dim, block * SIDE, queries, dim, SIDE, WIDTH)
        log_mass = read_row(lse + problem * queries, block * SIDE, queries, float("inf"), SIDE) * LOG2E
        log_mass = tl.where(log_mass == float("-inf"), float("inf"), log_mass)
        mean = read_row(delta + problem * queries, block * SIDE, queries, 0.0, SIDE)
        seen = visible(real + sample * keys, block * SIDE, start, keys, offset, HAS_REAL, CAUSAL, SIDE, SIDE)
        logits = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        weight = tl.exp2(logits - log_mass[:, None])
        to_value += tl.dot(tl.trans(weight).to(grad.dtype), grad, input_precision="ieee")
        logit_grad = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - mean[:, None])
        to_key += tl.dot(tl.trans(logit_grad).to(q.dtype), q, input_precision="ieee")
    write(key_grad + problem * keys * dim, start, keys, dim, to_key * factor, SIDE, WIDTH)
    write(value_grad + problem * keys * dim, start, keys, dim, to_value, SIDE, WIDTH)


_KEYS = ("SIDE", "WIDTH", "CAUSAL")
_tuned_forward, _tuned_to_queries, _tuned_to_keys = (tiles.tuned(k, _KEYS) for k in (_forward, _to_queries, _to_keys))


@torch.library.custom_op("hf_attn::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, real: Tensor | None, scaling: float, side: int, is_causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over listed blocks of `side` keys.

    Args:
        query: (B,H,N,D), float32, float16 or bfloat16.
        key, value: (B,H,M,D).
        table: int32 (T,R,K), T = 1, H or B*H and R = ceil(N / side); -1 lists nothing.
        real: bool (B,M), True for a real token.
        scaling: factor of the logits.
        side: tokens a block, a power of 2 from 16 to 128.
        is_causal: query n sees keys m <= n + (M - N) of its blocks.

    Returns:
        (B,H,N,D) in the dtype of the inputs, and the log-sum-exp (B,H,N) in float32. A query that sees no key gives
        zeros and minus infinity.
    """
    q, k, v = (tiles.rows_of(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    sizes, mask, strides, meta = _arguments(q, k, v, table, real, side, is_causal)
    grid = (table.shape[1], query.shape[0] * query.shape[1])
    lists, places, columns = table.shape
    _tuned_forward[grid](
        q, k, v, mask, table.contiguous(), out, lse, scaling * LOG2E.value, *sizes, lists, places, columns,
        key.shape[2] - query.shape[2], *strides, **meta,
    )  # fmt: skip
    return out, lse


@block_sparse_attention.register_fake
def _(query, key, value, table, real, scaling, side, is_causal):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_attn::block_sparse_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, real: Tensor | None, out_grad: Tensor, lse: Tensor,
    delta: Tensor, scaling: float, side: int, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value. `delta` (B,H,N): <out, its gradient> minus the gradient of the log-sum-exp."""
    q, k, v = (tiles.rows_of(x) for x in (query, key, value))
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    sizes, mask, strides, meta = _arguments(q, k, v, table, real, side, is_causal)
    shared = (q, k, v, mask)
    flow = (out_grad.contiguous(), lse, delta)
    problems, offset = query.shape[0] * query.shape[1], key.shape[2] - query.shape[2]
    lists, places, columns = table.shape
    _tuned_to_queries[(places, problems)](
        *shared, table.contiguous(), *flow, grads[0], scaling * LOG2E.value, scaling, *sizes, lists, places, columns, offset, *strides,
        **meta,
    )  # fmt: skip
    blocks = triton.cdiv(key.shape[2], side)
    first, entries = transposed(table, blocks)
    _tuned_to_keys[(blocks, problems)](
        *shared, first, entries, *flow, grads[1], grads[2], scaling * LOG2E.value, scaling, *sizes, lists, blocks, entries.shape[1],
        offset, *strides, **meta,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(query, key, value, table, real, out_grad, lse, delta, scaling, side, is_causal):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, real: Tensor | None, side: int, is_causal: bool
) -> tuple[tuple[int, ...], Tensor, tuple[int, ...], dict[str, Any]]:
    """Sizes, the mask as numbers, strides, and what a kernel is compiled for."""
    heads, queries, dim = query.shape[1:]
    mask = table if real is None else real.to(torch.uint8).contiguous()
    strides = tuple(stride for x in (query, key, value) for stride in x.stride()[:3])
    meta = {"HAS_REAL": real is not None, "CAUSAL": is_causal, "SIDE": side, "WIDTH": tiles.width(dim)}
    return (heads, queries, key.shape[2], dim), mask, strides, meta


def transposed(table: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The blocks of queries that list each block of keys: entries (T,R*K), of block c from first[c] to first[c + 1]."""
    flat = table.flatten(1).long()
    sorted_blocks, order = flat.sort(dim=1, stable=True)
    bounds = torch.arange(blocks + 1, device=table.device).expand(len(flat), -1).contiguous()
    first = torch.searchsorted(sorted_blocks, bounds)
    return first.int(), (order // table.shape[2]).int()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, table, real, ctx.scaling, ctx.side, ctx.is_causal = inputs
    ctx.save_for_backward(query, key, value, table, real, *output)


def _gradients(ctx: Any, out_grad: Tensor, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, table, real, out, lse = ctx.saved_tensors
    delta = (out.float() * out_grad.float()).sum(dim=-1)
    if lse_grad is not None:
        delta = delta - lse_grad
    grads = _backward(query, key, value, table, real, out_grad, lse, delta, ctx.scaling, ctx.side, ctx.is_causal)
    return *grads, None, None, None, None, None


block_sparse_attention.register_autograd(_gradients, setup_context=_keep)
