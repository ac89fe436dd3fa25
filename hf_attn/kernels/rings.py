"""Kernel attention on a grid with a weight for every ring around the query: our Triton kernel, or tables in torch.

    out_n = sum_m a_{n,ring(n,m)} <q_n, k_m> (v_m, 1)        a_{n,r} = a_{n,R} for all rings r >= R

The tables hold sums over squares of places. The kernel needs none: as all rings from R on share a weight,

    out_n = sum_{ring(n,m) < R} (a_{n,ring(n,m)} - a_{n,R}) <q_n, k_m> (v_m, 1)  +  a_{n,R} <q_n, sum_m k_m (v_m, 1)>

a window around the query and one state for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Features and numbers of a value that the Triton kernel takes at most."""


class Request(NamedTuple):
    """The arguments of one call of `ring_sums`.

    Attributes:
        query, key: features (B,H,N,F), N = rows * columns. Padded keys are zeros.
        value: (B,H,N,D).
        alpha: (B|1,H,N|1,R+1) weights of rings 0 to R; the last is that of all rings beyond.
        rows, columns: of the grid.
        plain: computes the call in torch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    rows: int
    columns: int
    plain: Callable[[], Tensor]


def ring_sums(request: Request, backend: str = "auto") -> Tensor:
    """Weighted sums of values, and of ones, over a grid.

    Args:
        request: the call.
        backend: "auto", "triton" or "tables".

    Returns:
        (B,H,N,D+1), the last column that of the ones.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("ring_sums", backend, BACKENDS, request).run(request)


def local(query: Tensor, features: int) -> bool:
    """Whether automatic choice takes the kernel for queries (B,H,N,D) that become that many features."""
    nothing = query.new_empty(1, 1, 0, features)
    request = Request(nothing, nothing, query[:, :, :0], nothing, 0, 0, query.clone)
    return choose("ring_sums", "auto", BACKENDS, request).name == "triton"


def _accepts(request: Request) -> str | None:
    query, value = request.query, request.value
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if max(query.shape[3], value.shape[3]) > WIDEST:
        return (
            f"it takes up to {WIDEST} features and numbers a head, and there are {query.shape[3]} and {value.shape[3]}"
        )
    return None


def _triton(request: Request) -> Tensor:
    from hf_attn.kernels.ring_window import ring_window_sums

    query, key, value, alpha, rows, columns, _ = request
    beyond = alpha[..., -1:]
    mass = key.sum(dim=2)[..., None]
    far = beyond * torch.cat((query @ (key.mT @ value), query @ mass), dim=-1)
    if alpha.shape[-1] == 1:
        return far
    near = (alpha[..., :-1] - beyond).expand(*query.shape[:3], -1)
    sums, masses = ring_window_sums(query, key, value, near, rows, columns)
    return far + torch.cat((sums, masses[..., None].to(sums.dtype)), dim=-1)


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("tables", always, always, lambda request: request.plain(), builtin=True),
)

probe("ring_sums", BACKENDS)
