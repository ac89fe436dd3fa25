"""Causal linear attention of log features, with or without decay: our Triton kernel, or chunks in torch.

    out_n = sum_{m <= n} a_nm v_m / sum_{m <= n} a_nm        a_nm = sum_f exp(log phi_f(q_n) + log phi_f(k_m) - rate (n - m))

Shapes: log features of queries (B,H,N,F) and keys (B,H,M,F), v (B,H,M,D), rate (H,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.functional import causal_linear_attention as in_chunks
from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

WIDEST = 128
"""Features and numbers of a value that the Triton kernel takes at most."""


class Request(NamedTuple):
    """The arguments of one call of `causal_feature_attention`.

    Attributes:
        log_query: (B,H,N,F). log_key: (B,H,M,F). value: (B,H,M,D).
        key_padding_mask: bool (B,M), True for a real token, or None.
        rate: (H,) not negative, or None.
        plain: computes the call in torch.
    """

    log_query: Tensor
    log_key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    rate: Tensor | None
    plain: Callable[[], Tensor]


def causal_feature_attention(
    log_query: Tensor,
    log_key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    rate: Tensor | None = None,
    plain: Callable[[], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal linear attention without a state.

    Args:
        log_query, log_key, value, key_padding_mask, rate: see `Request`.
        plain: the call in torch; that of `functional.causal_linear_attention` if None, which has no rate.
        backend: "auto", "triton" or "chunks".

    Returns:
        (B,H,N,D). A query that sees no key gives zeros.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """

    def chunks() -> Tensor:
        return in_chunks(log_query, log_key, value, key_padding_mask)[0]

    request = Request(log_query, log_key, value, key_padding_mask, rate, plain or chunks)
    return choose("causal_feature_attention", backend, BACKENDS, request).run(request)


def _accepts(request: Request) -> str | None:
    query, key, value = request.log_query, request.log_key, request.value
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and the queries are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if query.shape[2] != key.shape[2]:
        return f"it needs as many queries as keys, and there are {query.shape[2]} and {key.shape[2]}"
    if max(query.shape[3], value.shape[3]) > WIDEST:
        return (
            f"it takes up to {WIDEST} features and numbers a head, and there are {query.shape[3]} and {value.shape[3]}"
        )
    return None


def _triton(request: Request) -> Tensor:
    from hf_attn.kernels.causal_linear import causal_linear_attention

    decay = None if request.rate is None else -request.rate
    return causal_linear_attention(*request[:3], None, decay, request.key_padding_mask, 1.0)[0]


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("chunks", always, always, lambda request: request.plain(), builtin=True),
)

probe("causal_feature_attention", BACKENDS)
