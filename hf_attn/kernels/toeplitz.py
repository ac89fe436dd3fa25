"""Kernel attention under a Toeplitz or block Toeplitz mask: our Triton kernel, or tiles in torch.

    out_n = sum_m mask_nm <q_n, k_m> (v_m, 1)        mask_nm = f(row_n - row_m, column_n - column_m)

Shapes: q (B,H,N,F) and k (B,H,M,F) features, v (B,H,M,D). Sequences are grids of one column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Features, numbers of a value, and columns of a grid that the Triton kernel takes at most."""


class Request(NamedTuple):
    """The arguments of one call of `toeplitz_attention`.

    Attributes:
        query, key: features (B,H,N,F) and (B,H,M,F). Padded keys are zeros.
        value: (B,H,M,D+1), the last column ones; zeros where padded.
        table: f (H, rows + rows' - 1, columns + columns' - 1), from the first query to the last key on.
        columns: of the grid.
        prefix: leading tokens outside the grid, which see and are seen by all.
        is_causal: query n sees keys m <= n + (M - N).
        plain: computes the call in torch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    columns: int
    prefix: int
    is_causal: bool
    plain: Callable[[], Tensor]


def toeplitz_attention(request: Request, backend: str = "auto") -> Tensor:
    """Masked sums of values, and of ones.

    Args:
        request: the call.
        backend: "auto", "triton" or "tiles".

    Returns:
        (B,H,N,D+1).

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("toeplitz_attention", backend, BACKENDS, request).run(request)


def _accepts(request: Request) -> str | None:
    query, value, columns = request.query, request.value, request.columns
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if max(query.shape[3], value.shape[3] - 1, columns) > WIDEST:
        sizes = f"there are {query.shape[3]}, {value.shape[3] - 1} and {columns}"
        return f"it takes up to {WIDEST} features, numbers a head and columns of a grid, and {sizes}"
    return None


def _triton(request: Request) -> Tensor:
    from hf_attn.kernels.toeplitz_mask import toeplitz_sums

    query, key, value, table, columns, prefix, is_causal, _ = request
    sums, mass = toeplitz_sums(query, key, value[..., :-1], table, columns, prefix, is_causal)
    return torch.cat((sums, mass[..., None].to(sums.dtype)), dim=-1)


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("tiles", always, always, lambda request: request.plain(), builtin=True),
)

probe("toeplitz_attention", BACKENDS)
