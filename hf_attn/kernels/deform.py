"""Deformable convolution of maps: torchvision's operator where it is installed, or torch alone.

    out[o, p] = bias[o] + sum over channels c of o's group and taps t of weight[o,c,t] mask[t,p] value_c(p s - padding + t d + offset[t,p])
    value_c(y, x) = sum_ab max(0, 1 - |y - a|) max(0, 1 - |x - b|) x[c,a,b]      bilinear, 0 outside the map

Shapes: see `Request`; T = kh * kw taps, G offset groups. The parts in torch serve sequences, too, with one axis.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.kernels import Backend, always, choose, probe


class Request(NamedTuple):
    """The checked arguments of one call.

    Attributes:
        hidden_states: (B,C,H,W).
        offset: (B, 2 G T, Ho, Wo), channel 2 (g T + t) is dy and the next dx.
        weight: (O, C/groups, kh, kw). bias: (O), or None.
        mask: (B, G T, Ho, Wo), channel g T + t, or None.
        stride, padding, dilation: rows, columns.
    """

    hidden_states: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def deformable_convolution(request: Request, backend: str = "auto") -> Tensor:
    """(B,O,Ho,Wo) by `backend`: "auto", "torchvision" or "torch".

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("deform_conv2d", backend, BACKENDS, request).run(request)


def tap_positions(
    offset: Tensor,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """Where the taps sample: (B,N,T,G) for each axis, in pixels of the sampled map.

    Args:
        offset: (B,N,T,axes,G), N = product of `sizes`, T = product of `kernel`.
        sizes: the map of the result; one number an axis, like all that follow.
    """
    places = torch.unravel_index(torch.arange(offset.shape[1], device=offset.device), tuple(sizes))
    steps = torch.unravel_index(torch.arange(offset.shape[2], device=offset.device), tuple(kernel))
    positions = []
    for axis, (place, step) in enumerate(zip(places, steps, strict=True)):
        tap = place[:, None] * stride[axis] - padding[axis] + step * dilation[axis]
        positions.append(tap[:, :, None] + offset[:, :, :, axis])
    return positions


def sample(value: Tensor, positions: list[Tensor], factor: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """(B,N,T,G,c) linear interpolation of `value` (B,M,G,c) at `positions` (B,N,T,G), 0 outside; times `factor`.

    Args:
        sizes: the map of `value`, M = their product, one axis for each of `positions`.
    """
    corner = torch.zeros_like(positions[0], dtype=torch.long)[..., None]
    weight = (torch.ones_like(positions[0]) if factor is None else factor)[..., None]
    for position, size in zip(positions, sizes, strict=True):
        low = position.detach().floor()
        ends = torch.stack((low, low + 1), dim=-1)
        share = torch.stack((1 - (position - low), position - low), dim=-1).where((ends >= 0) & (ends < size), 0)
        # clamped as integers: a position that is not a number must not become a place in memory
        corner = (corner[..., None] * size + ends.long().clamp(0, size - 1)[..., None, :]).flatten(-2)
        weight = (weight[..., None] * share[..., None, :]).flatten(-2)
    batch, tokens, groups = value.shape[:3]
    first = torch.arange(batch, device=value.device)[:, None, None, None, None] * tokens
    rows = (first + corner) * groups + torch.arange(groups, device=value.device)[:, None]
    sampled = functional.embedding_bag(
        rows.flatten(0, 3), value.flatten(0, 2), per_sample_weights=weight.flatten(0, 3), mode="sum"
    )
    return sampled.view(*positions[0].shape, -1)


def tap_products(sampled: Tensor, weight: Tensor) -> Tensor:
    """(B,N,O): the samples (B,N,T,G,c) times the kernel (O, C/groups, ...), one product a group of the convolution."""
    batch, tokens = sampled.shape[:2]
    groups = sampled.shape[3] * sampled.shape[4] // weight.shape[1]
    rows = sampled.reshape(batch * tokens, -1, groups, weight.shape[1]).permute(2, 0, 1, 3).flatten(2)
    kernel = weight.to(sampled.dtype).flatten(2).unflatten(0, (groups, -1)).transpose(2, 3).flatten(2)
    return (rows @ kernel.transpose(1, 2)).transpose(0, 1).reshape(batch, tokens, -1)


def _torch(request: Request) -> Tensor:
    """Weighted sums of the corners' rows in one pass, then one product a group."""
    x, offset, weight, bias, mask, stride, padding, dilation = request
    kernel, size = weight.shape[2:], offset.shape[2:]
    taps, low = kernel[0] * kernel[1], x.dtype in (torch.float16, torch.bfloat16)
    # places beyond 256 lose their fractions in half precision
    dtype = torch.float32 if low else x.dtype
    moved = offset.to(dtype).flatten(2).unflatten(1, (-1, taps, 2)).transpose(1, 4)
    positions = tap_positions(moved, size, kernel, stride, padding, dilation)
    factor = None if mask is None else mask.to(dtype).flatten(2).unflatten(1, (-1, taps)).transpose(1, 3)
    value = x.to(dtype).flatten(2).transpose(1, 2).unflatten(2, (moved.shape[4], -1))
    sampled = sample(value, positions, factor, x.shape[2:])
    result = tap_products(sampled, weight)
    if bias is not None:
        result = result + bias.to(dtype)
    return result.transpose(1, 2).unflatten(2, size).to(x.dtype)


def _torchvision(request: Request) -> Tensor:
    return importlib.import_module("torchvision.ops").deform_conv2d(*request[:4], *request[5:], mask=request.mask)


def missing_torchvision() -> str | None:
    try:
        importlib.import_module("torchvision.ops")
    except Exception as error:  # a build for another torch fails in many ways, all of them a reason
        return f"torchvision.ops cannot be imported: {type(error).__name__}: {error}"
    return None


def _for_torchvision(request: Request) -> str | None:
    tensors = [t for t in request[:5] if t is not None]
    if any(t.dtype != request.hidden_states.dtype for t in tensors):
        return "it needs one dtype for all tensors"
    if request.hidden_states.dtype in (torch.float16, torch.bfloat16):
        return "half precision is accumulated in float32 here"
    return None


BACKENDS = (
    Backend("torchvision", missing_torchvision, _for_torchvision, _torchvision),
    Backend("torch", always, always, _torch, builtin=True),
)
probe("deform_conv2d", BACKENDS)
