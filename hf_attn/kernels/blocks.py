"""Exact attention within chosen blocks of the table of weights: our Triton kernel, or blocks gathered in torch.

    out_n = sum_m w_nm v_m        w_nm = exp(<q_n, k_m>) over the keys m of the blocks that are chosen for n's block

Shapes: q (B,H,N,D), k and v (B,H,M,D), chosen (B,H,rows,columns) of blocks of `side` tokens. What comes back are sums
relative to their largest weight, so that they can be added to those of other blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.hypercube import SIDES
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Numbers a head that the Triton kernel takes at most."""

Sums = tuple[Tensor, Tensor, Tensor]
"""(B,H,N) a log weight, minus infinity where there is none; (B,H,N) the sum of the weights relative to it; (B,H,N,D)."""


class Request(NamedTuple):
    """The arguments of one call of `block_sums`.

    Attributes:
        query: (B,H,N,D), scaled. key, value: (B,H,M,D). N and M are whole blocks.
        chosen: bool (B,H,rows,columns).
        key_padding_mask: bool (B|1,M), True for a real token, or None.
        side: tokens a block. pooled: the caller's blocks are made of means over several tokens.
        plain: computes the call in torch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    chosen: Tensor
    key_padding_mask: Tensor | None
    side: int
    pooled: bool
    plain: Callable[[], Sums]


def block_sums(request: Request, backend: str = "auto") -> Sums:
    """Sums of weights and values over the chosen blocks.

    Args:
        request: the call.
        backend: "auto", "triton" or "gathered".

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("block_sums", backend, BACKENDS, request).run(request)


def _accepts(request: Request) -> str | None:
    query = request.query
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if request.pooled:
        return "its blocks hold single tokens, and the last side is larger than 1"
    if request.side not in SIDES:
        return f"it needs blocks of {', '.join(map(str, SIDES))} tokens, and they have {request.side}"
    return (
        None if query.shape[3] <= WIDEST else f"it takes up to {WIDEST} numbers a head, and there are {query.shape[3]}"
    )


def _triton(request: Request) -> Sums:
    from hf_attn.kernels.block_sparse import block_sparse_attention

    query, key, value, chosen, real, side, _, _ = request
    column = torch.arange(chosen.shape[3], dtype=torch.int32, device=chosen.device)
    table = torch.where(chosen, column, -1).flatten(0, 1)
    real = None if real is None else real.expand(query.shape[0], -1)
    out, log_mass = block_sparse_attention(query, key, value, table, real, 1.0, side, False)
    return log_mass.to(query.dtype), (log_mass > float("-inf")).to(query.dtype), out


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("gathered", always, always, lambda request: request.plain(), builtin=True),
)

probe("block_sums", BACKENDS)
