"""Mixed chunk attention by the kernel that can run a call: our Triton kernel, or plain torch.

    out_i = gate_i * ( sum_{j in chunk(i)} fn(s <q_i, k_j> + b_{j-i}) v_j  +  1/c_i sum_{j in past(i)} <q'_i, k'_j> v_j )
            past(i): every real token; in causal order those of earlier chunks. c_i: their number, or C

Shapes: q, k, q', k' (B,H,N,S), v and gate (B,H,N,E), b (H, 2C - 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Numbers of a key that the Triton kernel takes at most."""


class Request(NamedTuple):
    """The arguments of one call of `mixed_chunk_attention`.

    Attributes:
        query, key, linear_query, linear_key: (B,H,N,S).
        value: (B,H,N,E).
        gate: (B,H,N,E), or None.
        bias: (H, 2C - 1), or None.
        key_padding_mask: bool (B,N), True for a real token, or None.
        is_causal: whether a query sees no later token.
        chunk_size: C.
        function: "relu2" or "laplace"; another name is for torch.
        scaling: s.
        mean: c_i is the number of keys, otherwise C.
        dropout: probability of dropping a weight.
        plain: computes the call in torch.
    """

    query: Tensor
    key: Tensor
    linear_query: Tensor
    linear_key: Tensor
    value: Tensor
    gate: Tensor | None
    bias: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool
    chunk_size: int
    function: str
    scaling: float
    mean: bool
    dropout: float
    plain: Callable[[], Tensor]


def mixed_chunk_attention(request: Request, backend: str = "auto") -> Tensor:
    """Mixed chunk attention of a whole sequence.

    Args:
        request: the call.
        backend: "auto", "triton" or "torch".

    Returns:
        (B,H,N,E).

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("mixed_chunk_attention", backend, BACKENDS, request).run(request)


def _accepts(request: Request) -> str | None:
    query, key = request.query, request.key
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if request.function not in ("relu2", "laplace"):
        return f"its weights within chunks are relu2 and laplace, not {request.function!r}"
    if query.shape[2] != key.shape[2]:
        return f"it needs as many queries as keys, and there are {query.shape[2]} and {key.shape[2]}"
    if query.shape[3] > WIDEST:
        return f"it takes up to {WIDEST} numbers a key, and there are {query.shape[3]}"
    return f"it has no dropout, and dropout={request.dropout}" if request.dropout else None


def _triton(request: Request) -> Tensor:
    query, key, linear_query, _, value, gate, bias, real, is_causal, size, function, scaling, *_ = request
    from hf_attn.kernels.chunk_local import chunk_local_attention

    across = _across(request).to(value.dtype)
    return chunk_local_attention(
        query, key, value, linear_query, across, gate, bias, real, scaling, size, function, is_causal
    )


def _across(request: Request) -> Tensor:
    """(B,H,G,S,E): for every chunk the sum of k' v^T over what its queries see of the others, divided."""
    key, value, real, size = request.linear_key, request.value, request.key_padding_mask, request.chunk_size
    chunks, exact = -(-key.shape[2] // size), torch.promote_types(key.dtype, torch.float32)
    if real is not None:
        key = key.masked_fill(~real[:, None, :, None], 0)
    count: Any
    if not request.is_causal:
        count = key.shape[2] if real is None else real.sum(dim=1).clamp(min=1).to(exact)[:, None, None, None]
        total = (key.mT @ value).to(exact) / (count if request.mean else size)
        return total[:, :, None].expand(-1, -1, chunks, -1, -1)
    finished = (chunks - 1) * size
    parts = [x[:, :, :finished].unflatten(2, (chunks - 1, size)) for x in (key, value)]
    # shift, then accumulate: subtracting the own chunk would leak its rounding into its past
    sums = pad((parts[0].mT @ parts[1]).to(exact), (0, 0, 0, 0, 1, 0)).cumsum(dim=2)
    if not request.mean:
        return sums / size
    if real is None:
        count = torch.arange(0, chunks * size, size, device=key.device)
    else:
        count = pad(real[:, :finished].unflatten(1, (chunks - 1, size)).sum(dim=2), (1, 0)).cumsum(dim=1)[:, None]
    return sums / count.clamp(min=1).to(exact)[..., None, None]


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("torch", always, always, lambda request: request.plain(), builtin=True),
)

probe("mixed_chunk_attention", BACKENDS)
