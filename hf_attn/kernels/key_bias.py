"""Softmax attention with a bias for every key, its log-sum-exp, and few queries or few keys: a Triton kernel.

    out_n = softmax_m(s <q_n, k_m> - c |k_m|^2 + bias_m) . v

Shapes: query (B,H,N,D), key and value (B,H,M,D), bias (B,H,M). The two stages of attention through L landmarks or random
features are both of this form: landmarks ask all tokens (N = L), then tokens ask the landmarks (M = L) with the
log-sum-exp of the first stage as their bias. The side with few rows is read by many programs, each of which takes a
share of the other side; what they found is merged by its log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn.kernels import tiles
from hf_attn.kernels.tiles import LOG2E, read, read_row, visible, write, write_row

SHARE = 512
"""Keys (or, in the backward pass, queries) that one program takes at most."""
_BLOCK = 64


@triton.jit
def _logits(q, k, bias, scale, norm, key, keys, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS,COLUMNS) logits, in units of log 2, from key number `key` on."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_NORM:
        wide = k.to(tl.float32)
        logits -= (norm * tl.sum(wide * wide, axis=1))[None, :]
    if HAS_BIAS:
        logits += (read_row(bias, key, keys, 0.0, COLUMNS) * LOG2E)[None, :]
    return logits


@triton.jit
def _forward(
    query, key, value, bias, real, out, lse, scale, norm, heads, queries, keys, dim, share,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of queries against one share of the keys. out (S,B,H,N,D) and lse (S,B,H,N) are those of the share."""
    place, part, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    bias += problem * keys
    q = read(query + sample * qb + head * qh, qn, start, queries, dim, SIDE, WIDTH)
    top = tl.full((SIDE,), float("-inf"), tl.float32)
    mass = tl.zeros((SIDE,), tl.float32)
    total = tl.zeros((SIDE, WIDTH), tl.float32)
    for at in range(part * share, tl.minimum((part + 1) * share, keys), SIDE):
        k = read(key, kn, at, keys, dim, SIDE, WIDTH)
        v = read(value, vn, at, keys, dim, SIDE, WIDTH)
        seen = visible(real + sample * keys, start, at, keys, 0, HAS_REAL, False, SIDE, SIDE)
        logits = _logits(q, k, bias, scale, norm, at, keys, HAS_BIAS, HAS_NORM, SIDE)
        logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(logits - base[:, None])
        keep = tl.exp2(top - base)
        mass = mass * keep + tl.sum(weight, axis=1)
        total = total * keep[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = larger
    alive = mass > 0
    safe = tl.where(alive, mass, 1.0)
    row = part * tl.num_programs(2) + problem
    write(out + row * queries * dim, start, queries, dim, total / safe[:, None], SIDE, WIDTH)
    write_row(lse + row * queries, start, queries, tl.where(alive, (top + tl.log2(safe)) / LOG2E, float("-inf")), SIDE)


@triton.jit
def _to_queries(
    query, key, value, bias, real, out_grad, lse, delta, query_grad, scale, norm, factor, heads, queries, keys, dim, share,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one share of the keys adds to the gradient of one block of queries: query_grad (S,B,H,N,D)."""
    place, part, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    key += sample * kb + head * kh
    value += sample * vb + head * vh
    bias += problem * keys
    q = read(query + sample * qb + head * qh, qn, start, queries, dim, SIDE, WIDTH)
    grad = read(out_grad + problem * queries * dim, dim, start, queries, dim, SIDE, WIDTH)
    log_mass = _log_mass(lse + problem * queries, start, queries, SIDE)
    mean = read_row(delta + problem * queries, start, queries, 0.0, SIDE)
    total = tl.zeros((SIDE, WIDTH), tl.float32)
    for at in range(part * share, tl.minimum((part + 1) * share, keys), SIDE):
        k = read(key, kn, at, keys, dim, SIDE, WIDTH)
        v = read(value, vn, at, keys, dim, SIDE, WIDTH)
        seen = visible(real + sample * keys, start, at, keys, 0, HAS_REAL, False, SIDE, SIDE)
        logits = _logits(q, k, bias, scale, norm, at, keys, HAS_BIAS, HAS_NORM, SIDE)
        weight = tl.exp2(tl.where(seen, logits, float("-inf")) - log_mass[:, None])
        logit_grad = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - mean[:, None])
        total += tl.dot(logit_grad.to(k.dtype), k, input_precision="ieee")
    row = part * tl.num_programs(2) + problem
    write(query_grad + row * queries * dim, start, queries, dim, total * factor, SIDE, WIDTH)


@triton.jit
def _to_keys(
    query, key, value, bias, real, out_grad, lse, delta, key_grad, value_grad, bias_grad, scale, norm, factor, heads, queries,
    keys, dim, share, qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one share of the queries adds to the gradients of one block of keys: (S,B,H,M,D), (S,B,H,M,D), (S,B,H,M)."""
    place, part, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample, head, start = problem // heads, problem % heads, place * SIDE
    query += sample * qb + head * qh
    bias += problem * keys
    k = read(key + sample * kb + head * kh, kn, start, keys, dim, SIDE, WIDTH)
    v = read(value + sample * vb + head * vh, vn, start, keys, dim, SIDE, WIDTH)
    to_key = tl.zeros((SIDE, WIDTH), tl.float32)
    to_value = tl.zeros((SIDE, WIDTH), tl.float32)
    to_bias = tl.zeros((SIDE,), tl.float32)
    for at in range(part * share, tl.minimum((part + 1) * share, queries), SIDE):
        q = read(query, qn, at, queries, dim, SIDE, WIDTH)
        grad = read(out_grad + problem * queries * dim, dim, at, queries, dim, SIDE, WIDTH)
        log_mass = _log_mass(lse + problem * queries, at, queries, SIDE)
        mean = read_row(delta + problem * queries, at, queries, 0.0, SIDE)
        seen = visible(real + sample * keys, at, start, keys, 0, HAS_REAL, False, SIDE, SIDE)
        logits = _logits(q, k, bias, scale, norm, start, keys, HAS_BIAS, HAS_NORM, SIDE)
        weight = tl.exp2(tl.where(seen, logits, float("-inf")) - log_mass[:, None])
        to_value += tl.dot(tl.trans(weight).to(grad.dtype), grad, input_precision="ieee")
        logit_grad = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - mean[:, None])
        to_key += tl.dot(tl.trans(logit_grad).to(q.dtype), q, input_precision="ieee")
        to_bias += tl.sum(logit_grad, axis=0)
    to_key *= factor
    if HAS_NORM:
        to_key -= (2 * norm / LOG2E) * to_bias[:, None] * k.to(tl.float32)
    row = part * tl.num_programs(2) + problem
    write(key_grad + row * keys * dim, start, keys, dim, to_key, SIDE, WIDTH)
    write(value_grad + row * keys * dim, start, keys, dim, to_value, SIDE, WIDTH)
    write_row(bias_grad + row * keys, start, keys, to_bias, SIDE)


@triton.jit
def _log_mass(lse, start, queries, ROWS: tl.constexpr):
    """The log-sum-exp in units of log 2; plus infinity, so that weights are zero, where there is no key or no query."""
    log_mass = read_row(lse, start, queries, float("inf"), ROWS) * LOG2E
    return tl.where(log_mass == float("-inf"), float("inf"), log_mass)


_KEYS = ("WIDTH", "HAS_NORM")
_tuned_forward, _tuned_to_queries, _tuned_to_keys = (tiles.tuned(k, _KEYS) for k in (_forward, _to_queries, _to_keys))


@torch.library.custom_op("hf_attn::key_bias_attention", mutates_args=())
def key_bias_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, real: Tensor | None, scaling: float, norm: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention with logits s <q_n, k_m> - norm |k_m|^2 + bias_m.

    Args:
        query: (B,H,N,D), float32, float16 or bfloat16; may be expanded over samples or heads.
        key, value: (B,H,M,D).
        bias: float32 (B,H,M), or None.
        real: bool (B,M), True for a real token, or None.
        scaling: s.
        norm: c >= 0; no gradient.

    Returns:
        (B,H,N,D) in the dtype of the inputs, and the log-sum-exp (B,H,N) in float32, both differentiable. Without a
        real key a query gives zeros and minus infinity.
    """
    q, k, v = (tiles.rows_of(x) for x in (query, key, value))
    shares = triton.cdiv(max(key.shape[2], 1), SHARE)
    # one share is the result; several are kept in float32 until they are merged
    dtype = query.dtype if shares == 1 else torch.float32
    out = torch.empty((shares, *query.shape), dtype=dtype, device=query.device)
    lse = torch.empty((shares, *query.shape[:3]), dtype=torch.float32, device=query.device)
    sizes, extras, strides, meta = _arguments(q, k, v, bias, real, norm)
    grid = (triton.cdiv(query.shape[2], _BLOCK), shares, query.shape[0] * query.shape[1])
    _tuned_forward[grid](
        q, k, v, *extras, out, lse, scaling * LOG2E.value, norm * LOG2E.value, *sizes, SHARE, *strides, **meta
    )
    if shares == 1:
        return out[0], lse[0]
    whole = lse.logsumexp(dim=0)
    weight = (lse - whole.masked_fill(whole == float("-inf"), 0)).exp()
    return torch.einsum("sbhn,sbhnd->bhnd", weight, out).to(query.dtype), whole


@key_bias_attention.register_fake
def _(query, key, value, bias, real, scaling, norm):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_attn::key_bias_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, real: Tensor | None, out_grad: Tensor, lse: Tensor,
    delta: Tensor, scaling: float, norm: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias. `delta` (B,H,N): <out, its gradient> minus the gradient of the log-sum-exp."""
    q, k, v = (tiles.rows_of(x) for x in (query, key, value))
    sizes, extras, strides, meta = _arguments(q, k, v, bias, real, norm)
    problems, (queries, keys) = query.shape[0] * query.shape[1], sizes[1:3]
    factors = (scaling * LOG2E.value, norm * LOG2E.value, scaling)
    flow = (out_grad.contiguous(), lse, delta)

    def empty(shares: int, like: Tensor) -> Tensor:
        return torch.empty((shares, *like.shape), dtype=torch.float32, device=like.device)

    shares = triton.cdiv(max(keys, 1), SHARE)
    to_query = empty(shares, query)
    grid = (triton.cdiv(queries, _BLOCK), shares, problems)
    _tuned_to_queries[grid](q, k, v, *extras, *flow, to_query, *factors, *sizes, SHARE, *strides, **meta)

    shares = triton.cdiv(max(queries, 1), SHARE)
    to_key, to_value, to_bias = empty(shares, key), empty(shares, value), empty(shares, key[..., 0])
    grid = (triton.cdiv(keys, _BLOCK), shares, problems)
    _tuned_to_keys[grid](q, k, v, *extras, *flow, to_key, to_value, to_bias, *factors, *sizes, SHARE, *strides, **meta)
    return (
        to_query.sum(dim=0).to(query.dtype), to_key.sum(dim=0).to(key.dtype), to_value.sum(dim=0).to(value.dtype),
        to_bias.sum(dim=0),
    )  # fmt: skip


@_backward.register_fake
def _(query, key, value, bias, real, out_grad, lse, delta, scaling, norm):
    return *(x.new_empty(x.shape) for x in (query, key, value)), key.new_empty(key.shape[:3], dtype=torch.float32)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, real: Tensor | None, norm: float
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor], tuple[int, ...], dict[str, Any]]:
    """Sizes, bias and mask (any tensor where there is none), strides, and what a kernel is compiled for."""
    heads, queries, dim = query.shape[1:]
    extras = (
        query if bias is None else bias.float().contiguous(),
        query if real is None else real.to(torch.uint8).contiguous(),
    )
    strides = tuple(stride for x in (query, key, value) for stride in x.stride()[:3])
    meta = {
        "HAS_REAL": real is not None, "HAS_BIAS": bias is not None, "HAS_NORM": norm != 0, "SIDE": _BLOCK,
        "WIDTH": tiles.width(dim),
    }  # fmt: skip
    return (heads, queries, key.shape[2], dim), extras, strides, meta


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, real, ctx.scaling, ctx.norm = inputs
    ctx.save_for_backward(query, key, value, bias, real, *output)


def _gradients(ctx: Any, out_grad: Tensor, lse_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, bias, real, out, lse = ctx.saved_tensors
    delta = (out.float() * out_grad.float()).sum(dim=-1)
    if lse_grad is not None:
        delta = delta - lse_grad
    *grads, to_bias = _backward(query, key, value, bias, real, out_grad, lse, delta, ctx.scaling, ctx.norm)
    return *grads, None if bias is None else to_bias.to(bias.dtype), None, None, None


key_bias_attention.register_autograd(_gradients, setup_context=_keep)
