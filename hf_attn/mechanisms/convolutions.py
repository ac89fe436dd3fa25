"""Deformable convolution of feature maps: the operator and the layer, for any stride, padding and channel counts.

Papers: Dai et al., "Deformable Convolutional Networks", ICCV 2017 (arXiv 1703.06211, v1); Zhu et al., "Deformable
ConvNets v2", CVPR 2019 (arXiv 1811.11168, v2). The same operator mixes tokens in `hf_attn.mechanisms.deformable`.

    out[o, p] = bias[o] + sum over channels c of o's group and taps t of weight[o,c,t] mask[t,p] value_c(p s - padding + t d + offset[t,p])
    value_c(y, x) = sum_ab max(0, 1 - |y - a|) max(0, 1 - |x - b|) x[c,a,b]      bilinear, 0 outside the map

Shapes: hidden_states (B,C,H,W), weight (O, C/groups, kh, kw), T = kh * kw taps, G offset groups;
offset (B, 2 G T, Ho, Wo), channel 2 (g T + t) is dy and the next dx; mask (B, G T, Ho, Wo), channel g T + t.
When to use: in place of a 3 x 3 convolution whose shape should follow the content.
When not: maps without smooth structure; an offset learns from the values beside a sample only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.kernels.deform import Request, deformable_convolution

Pair = int | tuple[int, int] | list[int]


def deform_conv2d(
    hidden_states: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    backend: str = "auto",
) -> Tensor:
    """Deformable convolution; groups and offset groups follow from the shapes.

    Args:
        hidden_states: (B,C,H,W).
        offset: (B, 2 G T, Ho, Wo) in pixels, dy before dx.
        weight: (O, C/groups, kh, kw).
        bias: (O), or None.
        mask: (B, G T, Ho, Wo) factors of the taps in their final form (v2), or None (v1).
        stride, padding, dilation: one integer, or (rows, columns).
        backend: "auto", "torchvision" or "torch".

    Returns:
        (B, O, Ho, Wo), Ho = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1.

    Raises:
        InvalidInput: shapes that do not fit together. KernelUnavailable: the backend asked for cannot run this call.
    """
    request = Request(
        hidden_states, offset, weight, bias, mask,
        _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1),
    )  # fmt: skip
    _check(request)
    return deformable_convolution(request, backend)


def _pair(name: str, value: Pair, minimum: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < minimum for n in pair):
        raise InvalidInput(f"deform_conv2d: {name}={value!r} must be one integer of at least {minimum}, or two.")
    return pair


def _check(request: Request) -> None:
    x, offset, weight, bias, mask = request[:5]
    if x.dim() != 4 or weight.dim() != 4:
        raise InvalidInput(
            "deform_conv2d: hidden_states must be (B,C,H,W) and weight (O,C/groups,kh,kw); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    channels, (out, per_group, *kernel) = x.shape[1], weight.shape
    if channels % per_group or out % (channels // per_group):
        raise InvalidInput(
            f"deform_conv2d: weight {tuple(weight.shape)} makes no whole number of groups of the {channels} channels "
            f"of hidden_states and of its own {out}; weight.shape[1] must be C / groups."
        )
    taps, size = kernel[0] * kernel[1], output_size(x.shape[2:], kernel, *request[5:])
    if min(size) < 1:
        raise InvalidInput(
            f"deform_conv2d: a map of {tuple(x.shape[2:])} is smaller than the kernel {tuple(kernel)} with "
            f"padding={request.padding} and dilation={request.dilation}. Set a larger padding."
        )
    groups = offset.shape[1] // (2 * taps) if offset.dim() == 4 else 0
    if not groups or channels % groups or offset.shape != (x.shape[0], 2 * groups * taps, *size):
        raise InvalidInput(
            f"deform_conv2d: offset must be (B, 2 G T, Ho, Wo) = ({x.shape[0]}, 2 G {taps}, {size[0]}, {size[1]}) with "
            f"G dividing the {channels} channels; got {tuple(offset.shape)}."
        )
    for name, tensor, shape in (("mask", mask, (x.shape[0], groups * taps, *size)), ("bias", bias, (out,))):
        if tensor is not None and tensor.shape != shape:
            raise InvalidInput(f"deform_conv2d: {name} must be {shape}; got {tuple(tensor.shape)}.")


def output_size(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int]:
    """Rows and columns of the result of a convolution."""
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return rows, columns


class DeformableConv2d(nn.Module):
    """A convolution that predicts where its taps sample, and in v2 how much each counts, from its own input.

    Offsets start at 0 and factors at 0.5: a plain convolution (v1), or half of one (v2).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.
        offset_groups: G, that many blocks of channels have offsets of their own.
        modulated: each tap has a factor in (0, 1) (v2); False is v1.

    Raises:
        InvalidOption: an argument outside its rule.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        numbers = {
            "in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride,
            "dilation": dilation, "groups": groups, "offset_groups": offset_groups,
        }  # fmt: skip
        for name, number, least in (*((n, v, 1) for n, v in numbers.items()), ("padding", padding, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InvalidOption(f"DeformableConv2d: {name}={number!r} must be an integer of at least {least}.")
        for name, number, whole in (
            ("groups", groups, "in_channels"),
            ("groups", groups, "out_channels"),
            ("offset_groups", offset_groups, "in_channels"),
        ):
            if numbers[whole] % number:
                raise InvalidOption(f"DeformableConv2d: {name}={number} must divide {whole}={numbers[whole]}.")
        self.stride, self.padding, self.dilation, self.modulated = stride, padding, dilation, modulated
        self.offset_channels = 2 * offset_groups * kernel_size**2
        predicted = self.offset_channels // 2 * (3 if modulated else 2)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.conv_offset = nn.Conv2d(in_channels, predicted, kernel_size, stride, padding, dilation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets at 0; v2: uniform in +- (in k k) ** -0.5; v1: Kaiming uniform for relu."""
        if self.modulated:
            bound = self.conv_offset.weight[0].numel() ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        if self.conv_offset.bias is not None:
            nn.init.zeros_(self.conv_offset.bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, Ho, Wo)."""
        conv = self.conv_offset
        predicted = functional.conv2d(hidden_states, conv.weight, conv.bias, self.stride, self.padding, self.dilation)
        mask = predicted[:, self.offset_channels :].sigmoid() if self.modulated else None
        offset = predicted[:, : self.offset_channels]
        return deform_conv2d(
            hidden_states, offset, self.weight, self.bias, mask, self.stride, self.padding, self.dilation
        )
