"""Attention augmented convolution: some output channels of a convolution come from attention over the whole map.

Paper: Bello, Zoph, Vaswani, Shlens, Le, "Attention Augmented Convolutional Networks", ICCV 2019 (arXiv 1904.09925).

    out = concat(conv(x), out_proj(attention(qkv(z))))        on channels; z = x, average-pooled log2(stride * pool) times
    logit_nm = d ** -0.5 (<q_n, k_m> + <q_n, rel_width[jx - ix + columns - 1]> + <q_n, rel_height[jy - iy + rows - 1]>)

Shapes: x (B, in, h, w); key_dim and value_dim channels in num_heads heads, d = key_dim / num_heads; the tables, shared
by the heads, (2 rows - 1, d) and (2 columns - 1, d), for the map of the attention (rows, columns).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.functional import masked_softmax
from hf_attn.mechanisms.relative_2d import relative_attention, relative_bias

SUBJECT = "AugmentedConv2d"


class AugmentedConv2d(nn.Module):
    """Convolution whose last `value_dim` output channels are attention over the map.

    Args:
        in_channels, out_channels: channels; the convolution makes out_channels - value_dim of them.
        kernel_size: odd.
        kappa, upsilon: key_dim and value_dim over out_channels, rounded down to a multiple of num_heads; used where
            the widths are not given.
        key_dim, value_dim: channels of the keys and of the values. value_dim = 0 is a plain convolution.
        num_heads: heads.
        feature_size: side, or (rows, columns), of the input map; needed for relative positions.
        stride: 1 or 2.
        pool: 2 runs attention on a map of half the side, and enlarges its result.
        relative: relative positions.
        min_head_key_dim: least key channels a head, where key_dim comes from kappa.

    Raises:
        InvalidOption: an argument outside its rule.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        kappa: float | None = None,
        upsilon: float | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        num_heads: int = 8,
        feature_size: int | tuple[int, int] | list[int] | None = None,
        stride: int = 1,
        pool: int = 1,
        relative: bool = True,
        min_head_key_dim: int = 20,
    ):
        super().__init__()
        for name, number in (("stride", stride), ("pool", pool)):
            if number not in (1, 2):
                raise InvalidOption(f"{SUBJECT}: {name}={number!r} must be 1 or 2.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InvalidOption(f"{SUBJECT}: kernel_size={kernel_size!r} must be odd.")
        self.num_heads, self.stride, self.pool = num_heads, stride, pool
        self.value_dim = _width("value_dim", value_dim, "upsilon", upsilon, out_channels, num_heads)
        if self.value_dim > out_channels:
            raise InvalidOption(f"{SUBJECT}: value_dim={self.value_dim} must be at most out_channels={out_channels}.")
        if self.value_dim < out_channels:
            convolved = out_channels - self.value_dim
            self.conv = nn.Conv2d(in_channels, convolved, kernel_size, stride, kernel_size // 2, bias=False)
        self.relative = relative and self.value_dim > 0
        if self.value_dim:
            self.key_dim = _width("key_dim", key_dim, "kappa", kappa, out_channels, num_heads)
            if key_dim is None:
                self.key_dim = max(self.key_dim, min_head_key_dim * num_heads)
            if self.key_dim == 0:
                raise InvalidOption(f"{SUBJECT}: key_dim=0 leaves nothing to compare. Set at least num_heads.")
            self.qkv = nn.Conv2d(in_channels, 2 * self.key_dim + self.value_dim, 1, bias=False)
            self.out_proj = nn.Conv2d(self.value_dim, self.value_dim, 1, bias=False)
        self.feature_size = None if feature_size is None else _size(feature_size)
        if self.relative:
            if self.feature_size is None:
                raise InvalidOption(
                    f"{SUBJECT}: relative=True needs feature_size, the rows and columns of the input map. "
                    "Set it, or relative=False."
                )
            rows, columns = self.attention_size(*self.feature_size)
            self.rel_height = nn.Parameter(torch.empty(2 * rows - 1, self.key_dim // num_heads))
            self.rel_width = nn.Parameter(torch.empty(2 * columns - 1, self.key_dim // num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal for convolutions, normal with std d ** -0.5 for the tables."""
        for convolution in self.children():
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.reset_tables()

    def reset_tables(self) -> None:
        """The relative tables only: normal with std d ** -0.5."""
        if self.relative:
            for table in (self.rel_height, self.rel_width):
                nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def attention_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the map of the attention for an input map."""
        for _ in range(self.poolings):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns

    @property
    def poolings(self) -> int:
        return (self.stride * self.pool).bit_length() - 1

    def forward(self, hidden_states: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(B, in, h, w) -> (B, out, h/stride, w/stride), sides rounded up.

        Args:
            hidden_states: the map.
            pixel_mask: bool (B,h,w), True = real; only with stride = pool = 1. Masked pixels of the result mean nothing.

        Raises:
            InvalidInput: a map of another size than feature_size. Unsupported: a mask with stride or pool 2.
        """
        x = self._checked(hidden_states, pixel_mask)
        if not self.value_dim:
            return self.conv(x)
        query, key, value, size = self.project(x)
        mask = None if pixel_mask is None else pixel_mask.flatten(1)
        tables = (self.rel_height, self.rel_width) if self.relative else None
        mixed = relative_attention(query, key, value, tables, self.scaling, key_padding_mask=mask)
        out = self.out_proj(mixed.transpose(2, 3).flatten(1, 2).unflatten(2, size))
        rows, columns = (-(-n // self.stride) for n in x.shape[2:])
        if (rows, columns) != size:
            out = functional.interpolate(out, (rows, columns), mode="bilinear", align_corners=False)
        return torch.cat((self.conv(x), out), dim=1) if hasattr(self, "conv") else out

    @property
    def scaling(self) -> float:
        return (self.key_dim // self.num_heads) ** -0.5

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Queries, keys and values (B,H,N,d) of the pooled map, and its rows and columns."""
        for _ in range(self.poolings):
            x = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        parts = self.qkv(x).flatten(2).split((self.key_dim, self.key_dim, self.value_dim), dim=1)
        query, key, value = (part.unflatten(1, (self.num_heads, -1)).transpose(2, 3) for part in parts)
        return query, key, value, (x.shape[2], x.shape[3])

    def attention_weights(self, hidden_states: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(B,H,N,N) weights over the map of the attention, in raster order; arguments of `forward`."""
        x = self._checked(hidden_states, pixel_mask)
        if not self.value_dim:
            raise Unsupported(SUBJECT, "value_dim=0 is a plain convolution without attention", "Set value_dim")
        query, key, _, _ = self.project(x)
        logits = query @ key.transpose(-1, -2)
        if self.relative:
            logits = logits + relative_bias(query, self.rel_height.to(query.dtype), self.rel_width.to(query.dtype))
        visible = None if pixel_mask is None else pixel_mask.flatten(1)[:, None, None]
        return masked_softmax(self.scaling * logits, visible)

    def _checked(self, x: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """The map, zero at masked pixels."""
        size = (x.shape[2], x.shape[3])
        if self.relative and size != self.feature_size:
            raise InvalidInput(
                f"{SUBJECT}: a map of {size}, and the relative tables are made for feature_size={self.feature_size}. "
                "Resize the images, or build the layer for this size."
            )
        if pixel_mask is None:
            return x
        if self.poolings:
            raise Unsupported(
                SUBJECT,
                f"pixel_mask with stride={self.stride} and pool={self.pool}: pooled pixels would be partly masked",
                "Leave the mask out, or use stride=1 and pool=1",
            )
        if pixel_mask.dtype != torch.bool or pixel_mask.shape != (x.shape[0], *size):
            raise InvalidInput(
                f"{SUBJECT}: pixel_mask must be bool {(x.shape[0], *size)}, True for a real pixel; "
                f"got {pixel_mask.dtype} {tuple(pixel_mask.shape)}."
            )
        return x.masked_fill(~pixel_mask[:, None], 0)


def _width(name: str, given: int | None, ratio_name: str, ratio: float | None, channels: int, heads: int) -> int:
    """The given width, or that of the ratio, rounded down to a multiple of the heads."""
    if given is None and ratio is None:
        raise InvalidOption(f"{SUBJECT}: neither {name} nor {ratio_name} is given. Set one of them.")
    if given is None:
        whole = int((ratio or 0.0) * channels)
        return whole - whole % heads
    if given < 0 or given % heads:
        raise InvalidOption(f"{SUBJECT}: {name}={given} must be a multiple of num_heads={heads}.")
    return given


def _size(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise InvalidOption(f"{SUBJECT}: feature_size={size!r} must be a side, or (rows, columns).")
    return pair
