"""One formula for Transformer attention, regular, deformable and dynamic convolution.

Paper: Zhu, Cheng, Zhang, Lin, Dai, "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", ICCV 2019,
equation 1. Written out pair by pair, to compare and to read; the mechanisms compute the same without N x N weights.

    y_q = sum_m W_m sum_k A_m(q, k) W'_m x_k        m heads, k the keys that q may see

| setting | heads m | A_m(q, k) | reads |
|---|---|---|---|
| Transformer attention | heads | softmax over k of E1 + E2 + E3 + E4: `attention_weights` of `generalized` | all |
| regular convolution | taps | 1 where k = q + p_m: `tap_weights` | position |
| deformable convolution | taps | bilinear weight of k at q + p_m + offset: `tap_weights` with `offset` | query, position |
| dynamic convolution | heads | kernel[q, k - q + left]: `band_weights` | query, position |

Shapes: x (B,K,C), A (B,M,N,K), W' (M,Dv,C), W (M,O,Dv), y (B,N,O). A map is flattened row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput


def unified_attention(
    content: Tensor, weights: Tensor, value_proj: Tensor | None = None, out_proj: Tensor | None = None
) -> Tensor:
    """y_q = sum_m W_m sum_k A_m(q, k) W'_m x_k, equation 1.

    Args:
        content: x (B,K,C), the keys' content.
        weights: A (B|1,M,N,K).
        value_proj: W' (M,Dv,C); None for the identity, Dv = C.
        out_proj: W (M,O,Dv); None for the identity.

    Returns:
        y (B,N,O).

    Raises:
        InvalidInput: shapes that do not fit.
    """
    if content.dim() != 3 or weights.dim() != 4 or weights.shape[3] != content.shape[1]:
        raise _misfit("content (B,K,C) and weights (B,M,N,K)", content, weights)
    if weights.shape[0] not in (1, content.shape[0]):
        raise _misfit("content (B,K,C) and weights (B|1,M,N,K)", content, weights)
    heads, width = weights.shape[1], content.shape[2]
    if value_proj is not None and (value_proj.dim() != 3 or value_proj.shape[::2] != (heads, width)):
        raise _misfit(f"value_proj (M,Dv,C) with M={heads}, C={width}", value_proj)
    width = width if value_proj is None else value_proj.shape[1]
    if out_proj is not None and (out_proj.dim() != 3 or out_proj.shape[::2] != (heads, width)):
        raise _misfit(f"out_proj (M,O,Dv) with M={heads}, Dv={width}", out_proj)
    values = content[:, None] if value_proj is None else content[:, None] @ value_proj.transpose(1, 2)
    gathered = weights @ values
    return (gathered if out_proj is None else gathered @ out_proj.transpose(1, 2)).sum(dim=1)


def tap_weights(
    sizes: tuple[int, ...],
    kernel_size: int,
    dilation: int = 1,
    offset: Tensor | None = None,
    factor: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A of a convolution of stride 1 whose output is as large as its input: a head for each tap.

    Args:
        sizes: (rows, columns) of the map, or (length,).
        kernel_size: k, odd; k taps on each axis, the last axis fastest.
        dilation: distance of neighbouring taps.
        offset: (B,T,N,axes), rows before columns, moves the sample of a tap (deformable); None moves nothing (regular).
        factor: (B,T,N), the modulation of v2; None is 1.
        dtype: of the result, without an offset.

    Returns:
        (B|1,T,N,N), T = k ** axes: prod over axes of max(0, 1 - |place of the sample - place of the key|).
    """
    if kernel_size < 1 or kernel_size % 2 == 0 or dilation < 1 or not sizes or min(sizes) < 1:
        raise InvalidInput(
            f"tap_weights: sizes={tuple(sizes)}, kernel_size={kernel_size}, dilation={dilation} must be positive, kernel_size odd."
        )
    dtype, device = (dtype, None) if offset is None else (offset.dtype, offset.device)
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes)).view(-1, len(sizes)).to(dtype)
    reach = torch.arange(kernel_size, device=device) - (kernel_size - 1) // 2
    taps = dilation * torch.cartesian_prod(*[reach] * len(sizes)).view(-1, len(sizes))
    samples = (places + taps[:, None].to(dtype))[None]
    if offset is not None:
        if offset.dim() != 4 or offset.shape[1:] != samples.shape[1:]:
            raise _misfit(f"offset (B,T,N,axes) = (B,{', '.join(map(str, samples.shape[1:]))})", offset)
        samples = samples + offset
    weights = (1 - (samples[:, :, :, None] - places).abs()).clamp(min=0).prod(dim=-1)
    if factor is not None and factor.shape[1:] != samples.shape[1:3]:
        raise _misfit(f"factor (B,T,N) = (B,{samples.shape[1]},{samples.shape[2]})", factor)
    return weights if factor is None else weights * factor[..., None]


def band_weights(kernel: Tensor, left: int) -> Tensor:
    """A of a dynamic or lightweight convolution: (B,H,N,N), kernel[q, t] where the key is q + t - left.

    Args:
        kernel: (B,H,N,K), of every query.
        left: taps before the token itself, K - 1 in causal order.

    The taps of a head share W and W', so their A add up and H heads suffice.
    """
    if kernel.dim() != 4 or not 0 <= left < kernel.shape[3]:
        raise _misfit(f"kernel (B,H,N,K) with left={left} from 0 to K - 1", kernel)
    index = torch.arange(kernel.shape[2], device=kernel.device)
    tap = index - index[:, None] + left
    visible = (tap >= 0) & (tap < kernel.shape[3])
    tap = tap.clamp(0, kernel.shape[3] - 1).expand(*kernel.shape[:3], -1)
    return kernel.gather(-1, tap).masked_fill(~visible, 0)


def _misfit(wanted: str, *found: Tensor) -> InvalidInput:
    return InvalidInput(f"unified: shapes must be {wanted}; got {', '.join(str(tuple(x.shape)) for x in found)}.")
