"""A stage of attention through landmarks: our Triton kernel, or plain torch.

    out_n = softmax_m(s <q_n, k_m> - c |k_m|^2 + bias_m) . v        and the log of the softmax's sum

Shapes: q (B,H,N,D), k and v (B,H,M,D), bias (B,H,M). Landmarks ask the tokens, then tokens ask the landmarks; no table of
tokens and landmarks reaches memory in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Numbers a head that the Triton kernel takes at most."""


class Request(NamedTuple):
    """The arguments of one call of `landmark_stage`.

    Attributes:
        query: (B,H,N,D). key, value: (B,H,M,D).
        bias: (B,H,M), or None.
        key_padding_mask: bool (B,M), True for a real token, or None. Every sample has one.
        scaling: s. norm: c.
        plain: computes the call in torch: the result, and the log-sum-exp or None where the caller needs none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    key_padding_mask: Tensor | None
    scaling: float
    norm: float
    plain: Callable[[], tuple[Tensor, Any]]


def landmark_stage(request: Request, backend: str = "auto") -> tuple[Tensor, Any]:
    """One stage.

    Args:
        request: the call.
        backend: "auto", "triton" or "torch".

    Returns:
        (B,H,N,D), and the log-sum-exp (B,H,N); it may be None where `request.plain` gives none.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("landmark_stage", backend, BACKENDS, request).run(request)


def _accepts(request: Request) -> str | None:
    query = request.query
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    return (
        None if query.shape[3] <= WIDEST else f"it takes up to {WIDEST} numbers a head, and there are {query.shape[3]}"
    )


def _triton(request: Request) -> tuple[Tensor, Any]:
    from hf_attn.kernels.key_bias import key_bias_attention

    query, key, value, bias, real, scaling, norm, _ = request
    out, log_mass = key_bias_attention(query, key, value, bias, real, scaling, norm)
    return out, log_mass.to(query.dtype)


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("torch", always, always, lambda request: request.plain(), builtin=True),
)

probe("landmark_stage", BACKENDS)
