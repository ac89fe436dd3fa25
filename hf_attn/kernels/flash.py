"""Exact softmax attention by the fastest kernel that can run a call: flash-attn packages, torch's SDPA, plain torch.

    out_n = softmax_m(s <q_n, k_m> + mask_nm) . v        lse_n = log sum_m exp(s <q_n, k_m> + mask_nm)

Shapes: query (B,H,N,D), key and value (B,H,M,D). A query that sees no key gives zeros (lse: minus infinity), whatever
the backend: torch's kernels (2.5 and later) do so for rows that are False or minus infinity throughout. An additive
mask hides a key by any value at or below half the most negative number of its dtype.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attn.errors import KernelUnavailable
from hf_attn.kernels import Backend, always, choose, missing_cuda, missing_package, needs_half, on_cuda, probe
from hf_attn.masks import causal_order

_NEGATIVE_INFINITY = float("-inf")


class Request(NamedTuple):
    """The arguments of one call of `attention` or `attention_with_lse`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attention_mask: Tensor | None
    is_causal: bool
    scaling: float
    dropout: float

    @property
    def dense(self) -> bool:
        """Whether torch's kernels need a mask tensor; causal order over as many keys as queries needs none."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        order = self.is_causal and queries != 1 and queries != keys
        return self.key_padding_mask is not None or self.attention_mask is not None or order


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    scaling: float,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, exact.

    Args:
        query: (B,H,N,D).
        key, value: (B,H,M,D).
        key_padding_mask: bool (B,M), True for a real token.
        attention_mask: (B,1|H,N,M), bool (True = visible) or additive.
        is_causal: query n sees keys m <= n + (M - N).
        scaling: factor of the logits.
        dropout: probability of dropping an attention weight.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        (B,H,N,D). A query that sees no key gives zeros.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    request = Request(query, key, value, key_padding_mask, attention_mask, is_causal, scaling, dropout)
    return choose("attention", backend, _ATTENTION, request).run(request)


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    scaling: float,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of each row's sum of exponentials. Arguments of `attention`.

    Returns:
        (B,H,N,D), and (B,H,N) in float32 at least, minus infinity for a query that sees no key. Both are
        differentiable; dropout does not touch the second. `backend` is "auto", "sdpa-flash" or "math".
    """
    request = Request(query, key, value, key_padding_mask, attention_mask, is_causal, scaling, dropout)
    return choose("attention_with_lse", backend, _WITH_LSE, request).run(request)


def _mask(request: Request) -> tuple[Tensor | None, bool]:
    """The mask for torch's kernels, as small as it can be, and whether they may apply causal order themselves.

    The mask is bool, or additive with minus infinity for every hidden key, and broadcasts to (B,H,N,M).
    """
    query, key, padding, dense = request.query, request.key, request.key_padding_mask, request.attention_mask
    queries, keys = query.shape[2], key.shape[2]
    is_causal = request.is_causal
    if queries == 1:  # a branch, for SDPA takes no comparison of symbolic lengths in compiled code
        is_causal = False
    if not request.dense:
        return None, is_causal
    visible = None if padding is None else padding[:, None, None]
    if is_causal:
        order = causal_order(queries, keys, query.device)[None, None]
        visible = order if visible is None else visible & order
    if dense is None:
        return visible, False
    if dense.dtype == torch.bool:
        return dense if visible is None else visible & dense, False
    # finite hidden values would spread a row without keys over all of them, where minus infinity gives zeros
    hidden = dense <= torch.finfo(dense.dtype).min / 2
    hidden = hidden if visible is None else hidden | ~visible
    return dense.masked_fill(hidden, _NEGATIVE_INFINITY), False


def _alive(mask: Tensor) -> Tensor:
    """(...,N,1) bool: the query sees a key."""
    return (mask if mask.dtype == torch.bool else mask > _NEGATIVE_INFINITY).any(dim=-1, keepdim=True)


def _sdpa(request: Request) -> Tensor:
    mask, is_causal = _mask(request)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(request.query.dtype)
    return F.scaled_dot_product_attention(*request[:3], mask, request.dropout, is_causal, scale=request.scaling)


def _sdpa_backend(name: str, kernel: SDPBackend, probe_kernel: Any, accepts: Any) -> Backend:
    """SDPA held to one of torch's kernels."""

    def run(request: Request) -> Tensor:
        try:
            with sdpa_kernel(kernel):
                return _sdpa(request)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reason = f"attention: backend {name!r} cannot run: torch refused the call, and its warnings say why"
            raise KernelUnavailable(f"{reason}. Works here: auto, sdpa, math.") from error

    return Backend(name, probe_kernel, accepts, run, builtin=True, automatic=False)


def _math_with_lse(request: Request) -> tuple[Tensor, Tensor]:
    out, logits, alive = _math(request)
    lse = logits.logsumexp(dim=-1)
    return out, lse if alive is None else lse.masked_fill(~alive.squeeze(-1), _NEGATIVE_INFINITY)


def _math(request: Request) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, the masked logits in float32 at least, and which rows see a key (None: all)."""
    query, key, value = request.query, request.key, request.value
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = request.scaling * (query.to(dtype) @ key.to(dtype).transpose(-1, -2)).to(dtype)
    mask, is_causal = _mask(request)
    if is_causal:
        mask = causal_order(query.shape[2], key.shape[2], query.device)
    alive = None
    if mask is not None:
        # rows without keys run unmasked and are cleared at the end: no infinity minus infinity, forward or backward
        alive = _alive(mask)
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask & alive, _NEGATIVE_INFINITY)
        else:
            logits = logits + mask.masked_fill(~alive, 0).to(dtype)
    weights = F.dropout(logits.softmax(dim=-1), request.dropout)
    out = weights.to(value.dtype) @ value
    return out if alive is None else out.masked_fill(~alive, 0), logits, alive


def _aten_with_lse(request: Request) -> tuple[Tensor, Tensor]:
    mask, is_causal = _mask(request)
    query, key, value, scale = request.query, request.key, request.value, request.scaling
    if on_cuda(query):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, _NEGATIVE_INFINITY)
    elif mask is not None:
        bias = mask.to(query.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    # torch reports 0 for a row without keys
    return out, lse if mask is None else lse.masked_fill(~_alive(mask).squeeze(-1), _NEGATIVE_INFINITY)


def _package_backend(
    module: str, package: str, name: str, majors: tuple[int, ...], head_dim: int, dropout: bool, automatic: bool = True
) -> Backend:
    """`flash_attn_func` of a flash-attn package, for these major compute capabilities."""
    found: list[Any] = []

    def probe_package() -> str | None:
        found.clear()
        reason = missing_package(module, package)
        if reason is None:
            found.append(getattr(sys.modules[module], "flash_attn_func", None))
            return None if found[0] else f"the package {package} is installed without {module}.flash_attn_func"
        return reason

    def accepts(request: Request) -> str | None:
        if (reason := _half_accepts(request, head_dim)) is not None:
            return reason
        if request.key_padding_mask is not None or request.attention_mask is not None:
            return "it takes no mask besides causal order"
        if request.dropout and not dropout:
            return f"it has no dropout, and dropout={request.dropout}"
        major = torch.cuda.get_device_capability(request.query.device)[0]
        return None if major in majors else f"it needs compute capability {majors} (major), and this device has {major}"

    def run(request: Request) -> Tensor:
        # the packages take (B,N,H,D) and align causal order to the last key
        query, key, value = (t.transpose(1, 2) for t in (request.query, request.key, request.value))
        drop = {"dropout_p": request.dropout} if request.dropout else {}
        out = found[0](query, key, value, softmax_scale=request.scaling, causal=request.is_causal, **drop)
        # versions differ on whether the log-sum-exp comes along
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Backend(name, probe_package, accepts, run, automatic=automatic)


def _half_accepts(request: Request, head_dim: int = 256) -> str | None:
    dim = request.query.shape[-1]
    wrong = f"it needs a head dimension that is a multiple of 8 up to {head_dim}, and it is {dim}"
    return needs_half(*request[:3]) or (wrong if dim % 8 or dim > head_dim else None)


def _flash_accepts(request: Request) -> str | None:
    if on_cuda(request.query):
        return _half_accepts(request) or ("it takes no mask besides causal order with N = M" if request.dense else None)
    if request.dropout:
        return f"it has no dropout on the CPU, and dropout={request.dropout}"
    mask = request.attention_mask
    return "it has no gradient for attention_mask on the CPU" if mask is not None and mask.requires_grad else None


def _lse_accepts(request: Request) -> str | None:
    tensors = (request.query, request.key, request.value, request.attention_mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "its log-sum-exp has no gradient, and an input requires one"
    if request.dropout:
        return f"it has no dropout here, and dropout={request.dropout}"
    if not request.key.shape[2]:
        return "there are no keys"
    if on_cuda(request.query):
        return _flash_accepts(request)
    device = request.query.device.type
    return None if device == "cpu" else f"it runs on CPU and CUDA, and query is on {device}"


def _efficient_accepts(request: Request) -> str | None:
    if not on_cuda(request.query):
        return f"it needs CUDA tensors, and query is on {request.query.device.type}"
    return "it has no float64" if request.query.dtype == torch.float64 else None


_ATTENTION = (
    _package_backend("flash_attn_interface", "flash-attn-3", "flash-attn-3", (9,), 256, dropout=False),
    _package_backend("flash_attn", "flash-attn", "flash-attn-2", (8, 9, 10, 12), 256, dropout=True),
    _package_backend("flash_attn.cute", "flash-attn-4", "flash-attn-4", (9, 10), 128, dropout=False, automatic=False),
    _sdpa_backend("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, missing_cuda, _half_accepts),
    _sdpa_backend("sdpa-flash", SDPBackend.FLASH_ATTENTION, always, _flash_accepts),
    _sdpa_backend("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, missing_cuda, _efficient_accepts),
    Backend("sdpa", always, always, _sdpa, builtin=True),
    Backend("math", always, always, lambda request: _math(request)[0], builtin=True),
)
_WITH_LSE = (
    Backend("sdpa-flash", always, _lse_accepts, _aten_with_lse, builtin=True),
    Backend("math", always, always, _math_with_lse, builtin=True),
)
BACKENDS = tuple(backend.name for backend in _ATTENTION)
"""Names of the backends of `attention`, in order of preference. "auto" tries flash-attn 3 and 2, sdpa, math."""

probe("attention", _ATTENTION)
probe("attention_with_lse", _WITH_LSE)
