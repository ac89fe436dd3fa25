"""Products with a banded matrix: targets in bands, each band with its own window of sources, no N x N matrix.

    out_i = sum_j R_ij x_j        R_ij = 0 beyond a distance

The windows of neighbouring bands overlap in memory and are read in place. The gradient of x is a product with a banded
matrix again, the transposed one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BAND = 32
"""Targets that share a window, measured on a 2-core CPU; a grid takes whole rows."""


class Bands(NamedTuple):
    """The m last of n tokens in T bands of c targets, and the window of s tokens each band may pool.

    A band is some lines: tokens of a sequence, rows of a grid. Windows start `before` tokens ahead of their band.
    """

    number: int
    """T"""
    size: int
    """c"""
    span: int
    """s"""
    before: int
    earlier: int
    """n - m: tokens that are sources only."""
    targets: int
    """m"""
    width: int
    """Tokens a line."""

    @classmethod
    def of(cls, targets: int, earlier: int, width: int, reach: int | None, is_causal: bool) -> Bands:
        size = min(max(1, BAND // width) * width, targets)
        before = earlier + targets if reach is None else reach * width
        span = before + size + (0 if is_causal else before)
        if span >= earlier + targets:
            return cls(1, targets, earlier + targets, earlier, earlier, targets, width)
        # so many bands that the last window of a sequence ends in the empty places before the next one
        count = -(-(-(-targets // size) * size + before) // size)
        return cls(count, size, span, before, earlier, targets, width)

    def sources(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(T,s) numbers of the tokens in each window, and whether there is one; where not, some other token's."""
        start = torch.arange(self.number, device=device)[:, None] * self.size
        token, tokens = (
            start + torch.arange(self.span, device=device) + self.earlier - self.before,
            self.earlier + self.targets,
        )
        return token.clamp(0, tokens - 1), (token >= 0) & (token < tokens)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(c,s) lines, and places in a line, from source to target; the same in every band."""
        target = torch.arange(self.size, device=device)[:, None]
        source = torch.arange(self.span, device=device) - self.before
        return target // self.width - source // self.width, target % self.width - source % self.width

    def split(self, x: Tensor) -> Tensor:
        """(...,m) -> (...,T,c), the last target repeated."""
        target = torch.arange(self.number * self.size, device=x.device).clamp(max=self.targets - 1)
        return x.index_select(-1, target).unflatten(-1, (self.number, self.size))

    def join(self, x: Tensor) -> Tensor:
        """(...,T,c) -> (...,m)"""
        return x.flatten(-2)[..., : self.targets]

    def product(self, weight: Tensor, x: Tensor) -> Tensor:
        """(G,T,c,s) weights times the windows of x (G,n,...), of any strides: (G,m,...)."""
        return _BandProduct.apply(weight, x, self)

    def windows(self, x: Tensor) -> Tensor:
        """(G,n,...) -> (G*T,s,F), the last dimensions as one; the windows overlap in memory."""
        if self.number == 1:
            return x.flatten(2)
        groups, length, features = x.shape[0], self.number * self.size, x.shape[2:].numel()
        buffer = x.new_empty(groups * length + self.span - self.size, features)
        first, last = max(0, self.before - self.earlier), self.before + self.targets
        places = buffer[: groups * length].unflatten(0, (groups, length))
        # written once: the tokens, and zeros where there is none
        places[:, first:last].unflatten(2, x.shape[2:]).copy_(x[:, max(0, self.earlier - self.before) :])
        places[:, :first] = 0
        places[:, last:] = 0
        buffer[groups * length :] = 0
        return buffer.as_strided((groups * self.number, self.span, features), (self.size * features, features, 1))

    def adjoint(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The transposed product, (G,T,c,s) weights and (G,m,F): (G,n,F).

        Sources are cut into bands as well, each with its window of targets. Written out diagonal by diagonal, one buffer
        holds the weights of both cuts: neither is copied, and nothing is added up.
        """
        groups, features = grad.shape[0], grad.shape[2]
        if self.number == 1:
            return torch.bmm(weight.flatten(0, 1).transpose(1, 2), grad)
        size, span, row = self.size, self.span, self.span + self.size - 1
        ahead = min(self.before, self.earlier)
        lead = -(-ahead // size) * size
        first, covered = lead + span - self.before - size, -(-self.targets // size) * size
        bands = -(-(covered + (lead if groups == 1 else max(self.before, first))) // size)
        places = groups * bands * size + span - size
        # place of a target: `first` after that of the first source
        targets = grad.new_zeros(places, features)
        stride = bands * size
        targets.as_strided(grad.shape, (stride * features, features, 1), first * features).copy_(grad)
        diagonals = weight.new_zeros(places, row)
        strides = (stride * row, size * row, row - 1, 1)
        kept = covered // size
        diagonals.as_strided((groups, kept, size, span), strides, first * row + size - 1).copy_(weight[:, :kept])
        transposed = diagonals.as_strided((groups * bands, size, span), (size * row, 1, row - 1), span - 1)
        windows = targets.as_strided((groups * bands, span, features), (size * features, features, 1))
        out = torch.bmm(transposed, windows).view(groups, -1, features)
        return functional.pad(out[:, lead - ahead : lead + self.targets], (0, 0, self.earlier - ahead, 0))


class _BandProduct(torch.autograd.Function):
    """`Bands.product`, with a backward pass that keeps no windows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, bands: Bands) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.bands = bands
        out = torch.bmm(weight.flatten(0, 1), bands.windows(x))
        return out.view(x.shape[0], -1, *x.shape[2:])[:, : bands.targets]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, x), bands = ctx.saved_tensors, ctx.bands
        shape, grad = x.shape, grad.flatten(2)
        padded = functional.pad(grad, (0, 0, 0, bands.number * bands.size - bands.targets))
        padded = padded.reshape(-1, bands.size, grad.shape[2])
        to_weight = torch.bmm(padded, bands.windows(x).transpose(1, 2)).view_as(weight)
        return to_weight, bands.adjoint(weight, grad).view(shape), None
