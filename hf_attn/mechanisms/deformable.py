"""Deformable convolution: every tap of a convolution samples the values at a place that the token chooses.

Papers: Dai et al., "Deformable Convolutional Networks", ICCV 2017 (arXiv 1703.06211, v1); Zhu et al., "Deformable
ConvNets v2", CVPR 2019 (arXiv 1811.11168, v2: each tap has a factor too). CLS tokens and the 1-D form are additions.

    out_n = bias + sum_t weight_t m_nt value(n + tap_t + offset_nt)       t = 1..T, T = k * k taps; 1-D: k
    value(y, x) = sum_ab max(0, 1 - |y - a|) max(0, 1 - |x - b|) value_ab      bilinear, 0 outside the map
    offset, m = conv_offset(map of the queries)                           m through a sigmoid, 1 in v1

Shapes: query, key and value (B,H,N,D), N = prefix tokens + rows * columns, C = H*D channels, weight_t (C, C/groups);
G groups of channels have offsets of their own, offset (B,N,T,G,2), rows before columns.
When to use: local mixing on a token grid whose shape follows the content; beside layers of global attention.
When not: text (the 1-D form is derived, not published), and causal models. Offsets learn from the values beside a
sample only, so values without smooth structure give them no direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.functional import masked_softmax
from hf_attn.kernels.deform import Request, deformable_convolution, sample, tap_positions, tap_products
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register


@dataclass(frozen=True)
class DeformableOptions(Options):
    """Options of `deformable`.

    Attributes:
        kernel_size: k, odd; k x k taps, k in 1-D.
        dilation: distance of neighbouring taps; the padding keeps the size of the map.
        groups: groups of the convolution; None = one a head.
        offset_groups: G, that many blocks of channels have offsets of their own.
        modulated: each tap has a factor in (0, 1) (v2); False is v1.
        bias: the convolution has a bias.
        predict_from: the map that predicts the offsets, "query", "value" or "layer_input".
        position_2d: a grid is needed; False is the 1-D form for sequences.
        prefix_mode: a prefix token pools all tokens by their keys ("key_only"), keeps its value ("identity"), or is
            refused ("none").
    """

    mechanism: ClassVar[str] = "deformable"

    kernel_size: int = 3
    dilation: int = 1
    groups: int | None = None
    offset_groups: int = 1
    modulated: bool = True
    bias: bool = False
    predict_from: str = "query"
    position_2d: bool = True
    prefix_mode: str = "key_only"

    def check(self) -> None:
        self.integer("kernel_size", 1)
        if self.kernel_size % 2 == 0:
            raise self.refuse("kernel_size", "must be odd, so that the middle tap falls on the token")
        self.integer("dilation", 1)
        if self.groups is not None:
            self.integer("groups", 1)
        self.integer("offset_groups", 1)
        self.boolean("modulated", "bias", "position_2d")
        self.one_of("predict_from", "query", "value", "layer_input")
        self.one_of("prefix_mode", "key_only", "identity", "none")
        if not self.position_2d and self.prefix_mode != "key_only":
            rule = "belongs to token grids, and position_2d=False: there prefix tokens are ordinary tokens"
            raise self.refuse("prefix_mode", rule, "Leave prefix_mode out.")


class DeformableConvolution(AttentionModule):
    """Convolution of the value map whose taps sample at offsets predicted from each token (v1 and v2)."""

    name = "deformable"
    options_class = DeformableOptions

    def __init__(self, num_heads: int, head_dim: int, options: DeformableOptions):
        super().__init__(num_heads, head_dim, options)
        channels, k, self.axes = num_heads * head_dim, options.kernel_size, 2 if options.position_2d else 1
        self.groups = num_heads if options.groups is None else options.groups
        for option, number in (("groups", self.groups), ("offset_groups", options.offset_groups)):
            if channels % number:
                raise InvalidOption(
                    f"{self.name}: option {option}={number} must divide the {channels} channels (num_heads * head_dim)."
                )
        self.taps = k**self.axes
        self.padding = options.dilation * (k - 1) // 2
        predicted = (self.axes + options.modulated) * options.offset_groups * self.taps
        self.weight = nn.Parameter(torch.empty(channels, channels // self.groups, *(k,) * self.axes))
        if options.bias:
            self.bias = nn.Parameter(torch.empty(channels))
        convolution = nn.Conv2d if options.position_2d else nn.Conv1d
        self.conv_offset: Any = convolution(channels, predicted, k, padding=self.padding, dilation=options.dilation)
        if options.position_2d and options.prefix_mode == "key_only":
            self.prefix_bias = nn.Parameter(torch.empty(num_heads, head_dim))

    @classmethod
    def describe(cls, options: DeformableOptions) -> Capabilities:
        prefix = options.position_2d and options.prefix_mode != "none"
        derived = (("1-D sequences", not options.position_2d), ("CLS token", prefix))
        return Capabilities(
            packed=not options.position_2d,
            sequence=not options.position_2d,
            grid="used" if options.position_2d else "ignored",
            prefix_tokens=prefix,
            learned=True,
            needs_layer_input=options.predict_from == "layer_input",
            derived=tuple(mode for mode, defined in derived if defined),
            pays_from="1024 (2-core CPU, float32, D = 64, 3 x 3 taps)",
        )

    def reset_parameters(self) -> None:
        """Offsets start at zero and factors at 0.5: a plain convolution (v1), or half of one (v2)."""
        bound = (self.weight.shape[1] * self.taps) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)
        if self.options.bias:
            nn.init.zeros_(self.bias)
        if hasattr(self, "prefix_bias"):
            bound = (2 * self.head_dim) ** -0.5
            nn.init.uniform_(self.prefix_bias, -bound, bound)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        grid = arguments.get("grid")
        if self.options.position_2d and grid is not None and min(grid) < 1:
            raise InvalidInput(f"{self.name}: grid={tuple(grid)} must be two numbers of at least 1.")
        call = super()._call(query, key, value, **arguments)
        if self.capabilities.needs_layer_input:
            call.require_layer_input(self.name, "predict_from='layer_input'", "use predict_from='query'")
        return call

    # -- what both forms share -------------------------------------------------------------------------------------

    def sizes(self, call: Call) -> tuple[int, ...]:
        """Rows and columns of the map, or its length."""
        return (call.queries,) if call.grid is None or not self.options.position_2d else call.grid

    def tokens(self, call: Call, source: str) -> Tensor:
        """(B,N,C) `source` without the prefix, heads side by side, zero at padding."""
        x = getattr(call, source)
        x = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x
        if call.key_padding_mask is not None:
            x = x.masked_fill(~call.key_padding_mask[..., None], 0)
        return x[:, self.prefix(call) :]

    def prefix(self, call: Call) -> int:
        return call.num_prefix_tokens if self.options.position_2d else 0

    def predictions(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Offsets (B, G T axes, ...) and factors (B, G T, ...) on the map; the last dimensions are those of `sizes`."""
        options, sizes = self.options, self.sizes(call)
        source = self.tokens(call, options.predict_from).transpose(1, 2).unflatten(2, sizes)
        weight, bias = self.conv_offset.weight.to(source.dtype), self.conv_offset.bias.to(source.dtype)
        convolve = functional.conv2d if options.position_2d else functional.conv1d
        predicted = convolve(source, weight, bias, padding=self.padding, dilation=options.dilation)
        moves = options.offset_groups * self.taps * self.axes
        return predicted[:, :moves], predicted[:, moves:].sigmoid() if options.modulated else None

    def samples(self, call: Call) -> tuple[list[Tensor], Tensor | None]:
        """Where the taps sample, (B,N,T,G) for each axis, and their factors (B,N,T,G)."""
        options, axes, (offset, factor) = self.options, self.axes, self.predictions(call)
        shape = (options.offset_groups, self.taps)
        positions = tap_positions(
            offset.flatten(2).unflatten(1, (*shape, axes)).transpose(1, 4), self.sizes(call), (options.kernel_size,) * axes,
            (1,) * axes, (self.padding,) * axes, (options.dilation,) * axes,
        )  # fmt: skip
        return positions, None if factor is None else factor.flatten(2).unflatten(1, shape).transpose(1, 3)

    def finish(self, call: Call, patches: Tensor) -> Tensor:
        """(B,H,N,D) from the convolved map (B,N,C): bias, heads, prefix tokens."""
        if self.options.bias:
            patches = patches + self.bias.to(patches.dtype)
        patches = patches.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        prefix, mask = self.prefix(call), call.key_padding_mask
        if not prefix:
            return patches
        value = call.value if mask is None else call.value.masked_fill(~mask[:, None, :, None], 0)
        first = value[:, :, :prefix]
        if self.options.prefix_mode == "key_only":
            logits = call.scale * (self.prefix_bias.to(value.dtype)[:, None] @ call.key.transpose(-1, -2))
            pooled = masked_softmax(logits, None if mask is None else mask[:, None, None]) @ value
            first = pooled.expand(-1, -1, prefix, -1)
        return torch.cat((first, patches), dim=2)

    # -- the definition --------------------------------------------------------------------------------------------

    def define(self, call: Call) -> Tensor:
        """Each tap as an attention over the whole map, its weights the bilinear ones; the kernel as a full matrix."""
        positions, factor = self.samples(call)
        attention = torch.ones_like(positions[0])[..., None]
        for position, size in zip(positions, self.sizes(call), strict=True):
            near = _hat(position[..., None] - torch.arange(size, device=position.device))
            attention = (attention[..., None] * near[..., None, :]).flatten(-2)
        if factor is not None:
            attention = attention * factor[..., None]
        value = self.tokens(call, "value").unflatten(2, (self.options.offset_groups, -1))
        sampled = torch.einsum("bntgm,bmgc->bntgc", attention, value).flatten(3)
        kernel = self.weight.to(sampled.dtype).flatten(2)
        full = torch.stack([torch.block_diag(*tap.chunk(self.groups)) for tap in kernel.unbind(2)])
        return self.finish(call, torch.einsum("bntc,toc->bno", sampled, full))

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """Weighted sums of the corners' rows in one pass, then one product a group; on a grid the operator for maps."""
        value = self.tokens(call, "value")
        if not self.options.position_2d:
            positions, factor = self.samples(call)
            groups = value.unflatten(2, (self.options.offset_groups, -1))
            return self.finish(call, tap_products(sample(groups, positions, factor, self.sizes(call)), self.weight))
        offset, factor = self.predictions(call)
        request = Request(
            value.transpose(1, 2).unflatten(2, self.sizes(call)), offset, self.weight.to(value.dtype), None, factor,
            (1, 1), (self.padding,) * 2, (self.options.dilation,) * 2,
        )  # fmt: skip
        return self.finish(call, deformable_convolution(request).flatten(2).transpose(1, 2))


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 - |distance|), with the derivative from the right at its kinks: offsets start there."""
    falling = torch.where((distance >= 0) & (distance < 1), 1 - distance, 0)
    return torch.where((distance >= -1) & (distance < 0), 1 + distance, falling)


register(
    Mechanism(
        name="deformable",
        title="Deformable convolution",
        paper="Dai et al., ICCV 2017 (arXiv 1703.06211); Zhu et al., CVPR 2019 (arXiv 1811.11168)",
        equation="out_n = bias + sum_t weight_t m_nt value(n + tap_t + offset_nt), bilinear; offset and m predicted by a convolution",
        module_class=DeformableConvolution,
        example={},
    )
)
