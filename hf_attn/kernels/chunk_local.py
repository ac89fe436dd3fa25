"""Mixed chunk attention, given what the other chunks come to, and its gate: a Triton kernel.

    out_i = gate_i * ( sum_{j in chunk(i)} fn(s <q_i, k_j> + b_{j-i}) v_j  +  q'_i . state_chunk(i) )
            fn(x) = max(x, 0)^2   or   (1 + erf((x - sqrt(1/2)) sqrt(2 pi))) / 2

Shapes: q, k, q' (B,H,N,S), v and gate (B,H,N,E), b (H, 2C - 1), state (B,H,G,S,E) for G chunks of C tokens. The state is
a sum of k' v^T over other chunks, which torch multiplies and adds up; it may be one tensor, expanded over the chunks.

Values are wide (E is 12 times S in a gated attention unit), so programs share the columns of v among them. No weight
reaches memory in the forward pass. The backward pass writes the gradients of the scores, C numbers a token, which is less
than a row of v; all that is left are products of whole chunks. Nothing is added atomically: a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from hf_attn.kernels import tiles
from hf_attn.kernels.tiles import read, visible, write_part

FUNCTIONS = ("relu2", "laplace")
_SIDE, _COLUMNS = 64, 64
_SHIFT, _SLOPE = tl.constexpr(0.7071067811865476), tl.constexpr(1.4142135623730951)
_RATE = tl.constexpr(2.5066282746310002)


@triton.jit
def _scores(q, k, bias, scale, row, column, size, seen, HAS_BIAS: tl.constexpr, SIDE: tl.constexpr):
    """(SIDE,SIDE) scores of the queries from place `row` of a chunk on, and the keys from place `column` on."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_BIAS:
        i, j = row + tl.arange(0, SIDE)[:, None], column + tl.arange(0, SIDE)[None, :]
        inside = seen & (i < size)
        scores += tl.load(bias + j - i + size - 1, mask=inside, other=0.0).to(tl.float32)
    return scores


@triton.jit
def _weights(scores, seen, LAPLACE: tl.constexpr):
    if LAPLACE:
        return tl.where(seen, 0.5 * (1 + tl.erf((scores - _SHIFT) * _RATE)), 0.0)
    else:
        positive = tl.where(seen, tl.maximum(scores, 0.0), 0.0)
        return positive * positive


@triton.jit
def _slopes(scores, LAPLACE: tl.constexpr):
    if LAPLACE:
        x = (scores - _SHIFT) * _RATE
        return _SLOPE * tl.exp(-x * x)
    else:
        return 2 * tl.maximum(scores, 0.0)


@triton.jit
def _forward(
    query, key, value, linear, state, gate, bias, real, out, scale, heads, tokens, dim, width, size, places,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, lb, lh, ln, sb, sh, sg, sn, gb, gh, gn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, CAUSAL: tl.constexpr, LAPLACE: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SIDE queries of a chunk, and COLUMNS columns of the values."""
    chunk, row, problem = tl.program_id(0) // places, tl.program_id(0) % places * SIDE, tl.program_id(1)
    sample, head, at = problem // heads, problem % heads, tl.program_id(2) * COLUMNS
    first, end = chunk * size, tl.minimum((chunk + 1) * size, tokens)
    key += sample * kb + head * kh
    value += sample * vb + head * vh + at
    q = read(query + sample * qb + head * qh, qn, first + row, end, dim, SIDE, WIDTH)
    across = read(state + sample * sb + head * sh + chunk * sg + at, sn, 0, dim, width - at, WIDTH, COLUMNS)
    far = read(linear + sample * lb + head * lh, ln, first + row, end, dim, SIDE, WIDTH)
    total = tl.dot(far, across, input_precision="ieee")
    last = tl.minimum(first + row + SIDE, end) if CAUSAL else end
    for start in range(first, last, SIDE):
        k = read(key, kn, start, end, dim, SIDE, WIDTH)
        v = read(value, vn, start, end, width - at, SIDE, COLUMNS)
        seen = visible(real + sample * tokens, first + row, start, end, 0, HAS_REAL, CAUSAL, SIDE, SIDE)
        scores = _scores(q, k, bias + head * (2 * size - 1), scale, row, start - first, size, seen, HAS_BIAS, SIDE)
        total += tl.dot(_weights(scores, seen, LAPLACE).to(v.dtype), v, input_precision="ieee")
    if HAS_GATE:
        total *= read(gate + sample * gb + head * gh + at, gn, first + row, end, width - at, SIDE, COLUMNS).to(
            tl.float32
        )
    write_part(out + problem * tokens * width + at, width, first + row, end, width - at, total, SIDE, COLUMNS)


@triton.jit
def _to_values(
    query, key, bias, real, grad, value_grad, scale, heads, tokens, dim, width, size, places,
    qb, qh, qn, kb, kh, kn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, LAPLACE: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the gradient of SIDE values, from their chunk."""
    chunk, column, problem = tl.program_id(0) // places, tl.program_id(0) % places * SIDE, tl.program_id(1)
    sample, head, at = problem // heads, problem % heads, tl.program_id(2) * COLUMNS
    first, end = chunk * size, tl.minimum((chunk + 1) * size, tokens)
    query += sample * qb + head * qh
    grad += problem * tokens * width + at
    k = read(key + sample * kb + head * kh, kn, first + column, end, dim, SIDE, WIDTH)
    total = tl.zeros((SIDE, COLUMNS), tl.float32)
    for start in range(first + column if CAUSAL else first, end, SIDE):
        q = read(query, qn, start, end, dim, SIDE, WIDTH)
        g = read(grad, width, start, end, width - at, SIDE, COLUMNS)
        seen = visible(real + sample * tokens, start, first + column, end, 0, HAS_REAL, CAUSAL, SIDE, SIDE)
        scores = _scores(q, k, bias + head * (2 * size - 1), scale, start - first, column, size, seen, HAS_BIAS, SIDE)
        total += tl.dot(tl.trans(_weights(scores, seen, LAPLACE)).to(g.dtype), g, input_precision="ieee")
    write_part(value_grad + problem * tokens * width + at, width, first + column, end, width - at, total, SIDE, COLUMNS)


@triton.jit
def _to_scores(
    query, key, value, bias, real, grad, score_grad, scale, heads, tokens, dim, width, size, places, chunks,
    qb, qh, qn, kb, kh, kn, vb, vh, vn,
    HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, LAPLACE: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of (SIDE,SIDE) scores, score_grad (B,H,G,C,C)."""
    chunk, problem, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = pair // places * SIDE, pair % places * SIDE
    sample, head = problem // heads, problem % heads
    first, end = chunk * size, tl.minimum((chunk + 1) * size, tokens)
    value += sample * vb + head * vh
    grad += problem * tokens * width
    result = tl.zeros((SIDE, SIDE), tl.float32)
    if not CAUSAL or column <= row:
        q = read(query + sample * qb + head * qh, qn, first + row, end, dim, SIDE, WIDTH)
        k = read(key + sample * kb + head * kh, kn, first + column, end, dim, SIDE, WIDTH)
        for at in range(0, width, COLUMNS):
            v = read(value + at, vn, first + column, end, width - at, SIDE, COLUMNS)
            g = read(grad + at, width, first + row, end, width - at, SIDE, COLUMNS)
            result += tl.dot(g, tl.trans(v), input_precision="ieee")
        seen = visible(real + sample * tokens, first + row, first + column, end, 0, HAS_REAL, CAUSAL, SIDE, SIDE)
        scores = _scores(q, k, bias + head * (2 * size - 1), scale, row, column, size, seen, HAS_BIAS, SIDE)
        result = tl.where(seen, result * _slopes(scores, LAPLACE), 0.0)
    score_grad += (problem * chunks + chunk) * size * size + column
    write_part(score_grad, size, row, size, size - column, result, SIDE, SIDE)


_KEYS = ("SIDE", "WIDTH", "CAUSAL", "LAPLACE")
_tuned_forward, _tuned_to_values, _tuned_to_scores = (
    tiles.tuned(kernel, _KEYS) for kernel in (_forward, _to_values, _to_scores)
)


@torch.library.custom_op("hf_attn::chunk_local_attention", mutates_args=())
def chunk_local_attention(
    query: Tensor, key: Tensor, value: Tensor, linear: Tensor, state: Tensor, gate: Tensor | None, bias: Tensor | None,
    real: Tensor | None, scaling: float, size: int, function: str, is_causal: bool,
) -> Tensor:  # fmt: skip
    """Attention within chunks, plus the linear part that a state stands for, times a gate.

    Args:
        query, key: (B,H,N,S), float32, float16 or bfloat16, S up to 128.
        value: (B,H,N,E), of the same dtype.
        linear: q' (B,H,N,S), of the same dtype.
        state: (B,H,G,S,E), of the same dtype, G = ceil(N / size).
        gate: (B,H,N,E), or None. Its dtype is that of the result.
        bias: (H, 2 size - 1), or None; b_{j-i} is at j - i + size - 1.
        real: bool (B,N), True for a key that counts within its chunk, or None.
        scaling: s.
        size: C, tokens of a chunk.
        function: one of `FUNCTIONS`.
        is_causal: within its chunk a query sees itself and what is before it.

    Returns:
        (B,H,N,E).
    """
    like = value if gate is None else gate
    out = torch.empty(value.shape, dtype=like.dtype, device=value.device)
    _run(query, key, value, linear, state, gate, bias, real, out, scaling, size, function, is_causal)
    return out


@chunk_local_attention.register_fake
def _(query, key, value, linear, state, gate, bias, real, scaling, size, function, is_causal):
    return (value if gate is None else gate).new_empty(value.shape)


def _run(
    query: Tensor, key: Tensor, value: Tensor, linear: Tensor, state: Tensor, gate: Tensor | None, bias: Tensor | None,
    real: Tensor | None, out: Tensor, scaling: float, size: int, function: str, is_causal: bool,
) -> None:  # fmt: skip
    sizes, extras, meta, grid = _arguments(query, value, bias, real, size, function, is_causal)
    rows = [tiles.rows_of(x) for x in (query, key, value, linear, state, value if gate is None else gate)]
    strides = tuple(stride for x in rows for stride in x.stride()[:-1])
    _tuned_forward[grid](*rows, *extras, out, scaling, *sizes, *strides, HAS_GATE=gate is not None, **meta)


@torch.library.custom_op("hf_attn::chunk_local_attention_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, real: Tensor | None, grad: Tensor, scaling: float,
    size: int, function: str, is_causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the values (B,H,N,E) and of the scores (B,H,G,C,C). `grad` is that of the result, times the gate."""
    sizes, extras, meta, grid = _arguments(query, value, bias, real, size, function, is_causal)
    q, k, v = (tiles.rows_of(x) for x in (query, key, value))
    strides = tuple(stride for x in (q, k, v) for stride in x.stride()[:-1])
    chunks, places, grad = triton.cdiv(query.shape[2], size), sizes[-1], grad.contiguous()
    to_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    to_score = torch.empty(*query.shape[:2], chunks, size, size, dtype=value.dtype, device=value.device)
    _tuned_to_values[grid](q, k, *extras, grad, to_value, scaling, *sizes, *strides[:6], **meta)
    _tuned_to_scores[(chunks, grid[1], places**2)](
        q, k, v, *extras, grad, to_score, scaling, *sizes, chunks, *strides, **meta
    )
    return to_value, to_score


@_backward.register_fake
def _(query, key, value, bias, real, grad, scaling, size, function, is_causal):
    chunks = -(-query.shape[2] // size)
    return value.new_empty(value.shape), value.new_empty(*query.shape[:2], chunks, size, size)


def _arguments(
    query: Tensor, value: Tensor, bias: Tensor | None, real: Tensor | None, size: int, function: str, is_causal: bool
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor], dict[str, Any], tuple[int, int, int]]:
    """Sizes, bias and mask (any tensor where there is none), what a kernel is compiled for, and its grid."""
    (batch, heads, tokens, dim), width = query.shape, value.shape[3]
    side, columns = min(_SIDE, tiles.width(size)), min(_COLUMNS, tiles.width(width))
    places = triton.cdiv(size, side)
    extras = (
        query if bias is None else bias.contiguous(),
        query if real is None else real.to(torch.uint8).contiguous(),
    )
    meta = {
        "HAS_REAL": real is not None, "HAS_BIAS": bias is not None, "CAUSAL": is_causal, "LAPLACE": function == "laplace",
        "SIDE": side, "WIDTH": tiles.width(dim), "COLUMNS": columns,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, size) * places, batch * heads, triton.cdiv(width, columns))
    return (heads, tokens, dim, width, size, places), extras, meta, grid


def chunks_of(x: Tensor, size: int) -> Tensor:
    """(B,H,N,D) -> (B,H,G,size,D), zeros after the last token."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.size, ctx.function, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, linear, state, gate, bias, real = ctx.saved_tensors
    rest, tokens = (ctx.scaling, ctx.size, ctx.function, ctx.is_causal), query.shape[2]
    grad = (out_grad if gate is None else out_grad * gate).to(value.dtype)
    to_value, to_score = _backward(query, key, value, bias, real, grad, *rest)
    to_gate = None
    if gate is not None:
        # what the gate multiplies, times the gradient: the forward pass with another gate
        other = out_grad.to(gate.dtype)
        to_gate = chunk_local_attention(query, key, value, linear, state, other, bias, real, *rest)
    parts = [chunks_of(x, ctx.size) for x in (query, key, linear, grad)]

    def tokens_of(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :tokens]

    to_query, to_key = to_score @ parts[1] * ctx.scaling, to_score.mT @ parts[0] * ctx.scaling
    to_linear, to_state = parts[3] @ state.mT, parts[2].mT @ parts[3]
    to_bias = (
        None if bias is None else tiles.diagonal_sums(to_score.sum(dim=(0, 2), dtype=torch.float32)).to(bias.dtype)
    )
    return (
        tokens_of(to_query), tokens_of(to_key), to_value, tokens_of(to_linear), to_state, to_gate, to_bias,
        None, None, None, None, None,
    )  # fmt: skip


chunk_local_attention.register_autograd(_gradients, setup_context=_keep)
