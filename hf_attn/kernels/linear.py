"""A linear layer by the fastest float32 product that torch has on the CPU.

torch multiplies matrices with MKL, and convolves with oneDNN. MKL leaves the wide registers of CPUs of other makers
unused, where oneDNN does not: a linear layer of many rows is then twice as fast as a convolution of 1 x 1. Elsewhere
the layer is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 512
"""Rows from which the other kernel is worth its call."""
IMAGES = 16
"""On one thread, torch gives convolutions of 1 x 1 to oneDNN from that many images on."""


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` for x (B,N,d), to within rounding.

    Args:
        layer: an `nn.Linear`, or whatever stands in its place (an adapter, a quantised layer), which is called.
        x: its input.
    """
    rows = x.shape[0] * x.shape[1]
    if torch.compiler.is_compiling() or rows < ROWS or rows % IMAGES:
        return layer(x)
    if not isinstance(layer, nn.Linear) or not _plain(layer, x):
        return layer(x)
    images = x.reshape(IMAGES, rows // IMAGES, 1, x.shape[2]).permute(0, 3, 1, 2)
    out = functional.conv2d(images, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:2], -1)


def _plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether nothing but a product of float32 matrices on the CPU happens in `layer`."""
    return (
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 for t in (x, layer.weight))
        and x.device.type == layer.weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
