"""AA-ResNets against transformers' ResNet of the same depth, on the same random images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, ResNetConfig, ResNetModel

from hf_attn.bench.checks import agreement, finite
from hf_attn.bench.models import model_step
from hf_attn.bench.workload import DTYPES, Case, Contest, Workload, seeded, written
from hf_attn.errors import InvalidOption, near
from hf_attn.models.aa_resnet import AAResNetConfig, AugmentedConv2d, aa_resnet_from_resnet
from hf_attn.models.aa_resnet_config import DEPTHS

OPTIONS = ("depth", "kappa", "upsilon", "attention_stages", "pooled_stages", "relative")
"""What a row may set: the depth, 50 by default, and fields of AAResNetConfig."""


class ResNetWorkload(Workload):
    """An AA-ResNet against the ResNet it shares its weights with.

    The length of a case is the side of the images in pixels; its heads and head_dim are heads and least key channels a
    head of the augmented convolutions.

    Args:
        given: of `OPTIONS`.
    """

    def __init__(self, given: dict[str, Any] | None = None):
        self.given = dict(given or {})
        self.label = f"aa_resnet:{written(self.given)}" if self.given else "aa_resnet"
        for name in self.given:
            if name not in OPTIONS:
                known = ", ".join(OPTIONS)
                raise InvalidOption(f"aa_resnet: unknown option {name!r}{near(name, OPTIONS)}. Its options: {known}.")
        self.fields = {name: value for name, value in self.given.items() if name != "depth"}
        self.depth = self.given.get("depth", 50)
        AAResNetConfig.of_depth(self.depth, **self.fields)

    def modes(self, causal: bool | None, case: Case) -> Sequence[None]:
        return (None,)

    def baseline(self, case: Case) -> str:
        return f"stock ResNet-{self.depth}"

    def pair(self, case: Case) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The ResNet, and the AA-ResNet with its weights: float32, evaluation mode."""
        stock: Any
        ours: Any
        layer_type, depths, sizes = DEPTHS[self.depth]
        with seeded(case):
            stock = ResNetModel(ResNetConfig(layer_type=layer_type, depths=list(depths), hidden_sizes=list(sizes)))
            fields = {"num_attention_heads": case.heads, "min_head_key_dim": case.head_dim, **self.fields}
            ours, _ = aa_resnet_from_resnet(stock, image_size=case.length, **fields)
        return stock.to(case.device).eval(), ours.to(case.device).eval()

    def setup(self, case: Case) -> Contest:
        dtype = DTYPES[case.dtype]
        stock, candidate = self.pair(case)
        inputs = {"pixel_values": self._images(case, case.batch).to(dtype)}
        first, second = (model_step(model.to(dtype), inputs, case.backward) for model in (stock, candidate))
        config: Any = candidate.config
        return Contest(first, second, written({"depth": self.depth, "kappa": config.kappa, "upsilon": config.upsilon}))

    def _images(self, case: Case, batch: int) -> Tensor:
        with seeded(case):
            return torch.randn(batch, 3, case.length, case.length, device=case.device)

    def verify(self, case: Case) -> str:
        candidate: Any = self.pair(case)[1]
        with torch.no_grad():
            finite([candidate(self._images(case, 1))[0]], "output of the model")
        layers = {_shape(layer): layer for layer in candidate.modules() if isinstance(layer, AugmentedConv2d)}
        for layer in layers.values():
            with seeded(case):
                self._verify_layer(layer, case)
        return (
            f"model finite; {len(layers)} shapes of AugmentedConv2d equal their definition in float64 and {case.dtype}"
        )

    def _verify_layer(self, layer: AugmentedConv2d, case: Case) -> None:
        rows, columns = layer.feature_size or (0, 0)
        low = copy.deepcopy(layer).to(DTYPES[case.dtype])
        x = torch.randn(1, layer.qkv.in_channels, rows, columns, dtype=torch.float64, device=case.device)
        with torch.no_grad():
            cotangent = torch.randn_like(low(x.to(DTYPES[case.dtype])), dtype=torch.float64)
        agreement(low, definition, x, cotangent, DTYPES[case.dtype], rows * columns, f"for {rows} x {columns} pixels")


def definition(layer: AugmentedConv2d, x: Tensor) -> Tensor:
    """An augmented convolution by its formula: a vector of the tables for every pair of pixels."""
    query, key, value, (rows, columns) = layer.project(x)
    logits = query @ key.transpose(-1, -2)
    if layer.relative:
        pixel = torch.arange(rows * columns, device=x.device)
        row, column = pixel // columns, pixel % columns
        by_height = layer.rel_height[row - row[:, None] + rows - 1]
        by_width = layer.rel_width[column - column[:, None] + columns - 1]
        logits = logits + torch.einsum("bhnd,nmd->bhnm", query, by_height + by_width)
    mixed = (layer.scaling * logits).softmax(dim=-1) @ value
    out = layer.out_proj(mixed.transpose(2, 3).flatten(1, 2).unflatten(2, (rows, columns)))
    sides = tuple(-(-n // layer.stride) for n in x.shape[2:])
    if sides != (rows, columns):
        out = functional.interpolate(out, sides, mode="bilinear", align_corners=False)
    return torch.cat((layer.conv(x), out), dim=1) if hasattr(layer, "conv") else out


def _shape(layer: AugmentedConv2d) -> tuple[Any, ...]:
    """What decides how the layer computes."""
    return layer.feature_size, layer.stride, layer.pool, *(tuple(p.shape) for p in layer.parameters())
