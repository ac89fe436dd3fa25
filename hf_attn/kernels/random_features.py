"""Linear attention by random features, by the fastest kernel that can run a call: Triton, or plain torch.

    out_n = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>        log phi_f(x) = sqrt(s) <z_f, x> - s |x|^2 / 2

Without causal order this is attention in two stages: the directions z ask the tokens, with the bias - s |k|^2 / 2, then
the tokens ask the directions, with the log-sum-exp of the first stage as bias; what depends on the query alone cancels.
"""

from __future__ import annotations

import importlib
import os
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.functional import causal_linear_attention, linear_attention, log_positive
from hf_attn.kernels import Backend, always, choose, missing_cuda, on_cuda, probe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run in its interpreter, on CPU tensors, for tests."""


class Request(NamedTuple):
    """The arguments of one call of `random_feature_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    directions: Tensor
    key_padding_mask: Tensor | None
    is_causal: bool
    scaling: float


def random_feature_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    directions: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scaling: float,
    backend: str = "auto",
) -> Tensor:
    """Attention by positive random features.

    Args:
        query: (B,H,N,D).
        key, value: (B,H,M,D).
        directions: z (H,F,D).
        key_padding_mask: bool (B,M), True for a real token.
        is_causal: query n sees keys m <= n + (M - N).
        scaling: s.
        backend: "auto", "triton" or "torch".

    Returns:
        (B,H,N,D). A query that sees no key gives zeros.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    request = Request(query, key, value, directions, key_padding_mask, is_causal, scaling)
    return choose("random_feature_attention", backend, BACKENDS, request).run(request)


def missing_triton() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if not INTERPRETED and (reason := missing_cuda()) is not None:
        return reason
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton is not installed ({error})"
    return None


def _accepts(request: Request) -> str | None:
    query, key, directions = request.query, request.key, request.directions
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if directions.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for the directions, and they require one"
    if request.is_causal and query.shape[2] != key.shape[2]:
        return f"its causal order is for as many queries as keys, and there are {query.shape[2]} and {key.shape[2]}"
    most = 128
    if max(query.shape[3], directions.shape[1] if request.is_causal else 1) > most:
        return f"it takes up to {most} features and numbers a head, and there are {directions.shape[1]} and {query.shape[3]}"
    return None


def _triton(request: Request) -> Tensor:
    query, key, value, directions, real, is_causal, scaling = request
    if is_causal:
        from hf_attn.kernels.causal_linear import causal_linear_attention as kernel

        return kernel(query, key, value, directions, None, real, scaling)[0]
    from hf_attn.kernels.key_bias import key_bias_attention

    asking = directions.to(query.dtype).expand(query.shape[0], -1, -1, -1)
    found, log_mass = key_bias_attention(asking, key, value, None, real, scaling**0.5, scaling / 2)
    if real is not None:
        # without a real key every direction found zeros; asked alike, they give zeros
        log_mass = log_mass.masked_fill(~real.any(dim=1)[:, None, None], 0)
    return key_bias_attention(query, asking, found, log_mass, None, scaling**0.5, 0.0)[0]


def _torch(request: Request) -> Tensor:
    directions = request.directions.to(request.query.dtype)
    # what depends on the query alone cancels, and is not computed
    log_query = request.query @ (request.scaling**0.5 * directions).transpose(-1, -2)
    log_key = log_positive(request.key, directions, request.scaling)
    if request.is_causal:
        return causal_linear_attention(log_query, log_key, request.value, request.key_padding_mask)[0]
    return linear_attention(log_query, log_key, request.value, request.key_padding_mask)


BACKENDS = (
    # only when asked for by name, until its speed has been measured on a GPU
    Backend("triton", missing_triton, _accepts, _triton, automatic=False),
    Backend("torch", always, always, _torch, builtin=True),
)

probe("random_feature_attention", BACKENDS)
