"""The config of attention-augmented ResNets, and its entry in the Auto classes. Imports no torch, like AutoConfig."""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

from transformers.models.resnet.configuration_resnet import ResNetConfig

from hf_attn.errors import InvalidOption
from hf_attn.models.configuration import StoredConfigMixin

DEPTHS = {
    34: ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    50: ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    101: ("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
    152: ("bottleneck", (3, 8, 36, 3), (256, 512, 1024, 2048)),
}
"""Depth -> layer type, blocks a stage, channels a stage."""


class AAResNetConfig(StoredConfigMixin, ResNetConfig):
    """`transformers.ResNetConfig` with augmented convolutions; the defaults are AA-ResNet-50 for 224 pixels.

    The first 3 x 3 convolution of every block in `attention_stages` is an `AugmentedConv2d`, unless `upsilon` is 0.

    Args:
        image_size: side of the square images; the relative tables are made for it.
        kappa: key channels over output channels of an augmented convolution.
        upsilon: value channels over output channels; 0 is a ResNet, 1 leaves no convolution.
        num_attention_heads: heads of each augmented convolution.
        min_head_key_dim: least key channels a head.
        attention_stages: stages, counted from 1, with augmented convolutions.
        pooled_stages: those of them whose attention runs on maps of half the side.
        relative: attention has relative positions.
        first_shortcut: the first block projects its input also where the sizes fit (basic blocks only; others need it).
        layer_type: "bottleneck", "basic", or "wide" (pre-activation blocks after a 3 x 3 stem, shortcuts without
            parameters).
        kwargs: everything ResNetConfig takes.

    Raises:
        InvalidOption: a value outside its rule.
    """

    model_type = "aa_resnet"
    layer_types: ClassVar[list[str]] = ["basic", "bottleneck", "wide"]

    image_size: int = 224
    kappa: float = 0.25
    upsilon: float = 0.25
    num_attention_heads: int = 8
    min_head_key_dim: int = 20
    attention_stages: list[int] | tuple[int, ...] = (2, 3, 4)
    pooled_stages: list[int] | tuple[int, ...] = (2,)
    relative: bool = True
    first_shortcut: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.depths, self.hidden_sizes = list(self.depths or ()), list(self.hidden_sizes or ())
        self.attention_stages, self.pooled_stages = list(self.attention_stages), list(self.pooled_stages)
        self.check()
        register_aa_resnet()

    def check(self) -> None:
        """Raise `InvalidOption` for a value outside its rule."""
        if self.layer_type not in self.layer_types:
            raise InvalidOption(f"AAResNetConfig: layer_type={self.layer_type!r} must be one of {self.layer_types}.")
        if len(self.depths) != len(self.hidden_sizes):
            raise InvalidOption(
                f"AAResNetConfig: depths={self.depths} and hidden_sizes={self.hidden_sizes} must name as many stages."
            )
        if self.kappa < 0 or not 0 <= self.upsilon <= 1:
            raise InvalidOption(
                f"AAResNetConfig: kappa={self.kappa} must be at least 0 and upsilon={self.upsilon} from 0 to 1."
            )
        for name, least in (("image_size", 1), ("num_attention_heads", 1), ("min_head_key_dim", 1)):
            if getattr(self, name) < least:
                raise InvalidOption(f"AAResNetConfig: {name}={getattr(self, name)} must be at least {least}.")
        stages = range(1, len(self.depths) + 1)
        for name in ("attention_stages", "pooled_stages"):
            if wrong := [stage for stage in getattr(self, name) if stage not in stages]:
                raise InvalidOption(
                    f"AAResNetConfig: {name} names stage {wrong[0]}; there are 1 to {len(self.depths)}."
                )
        if wrong := [stage for stage in self.pooled_stages if stage not in self.attention_stages]:
            raise InvalidOption(
                f"AAResNetConfig: pooled_stages names stage {wrong[0]}, which is not in "
                f"attention_stages={self.attention_stages}. Leave it out."
            )

    @classmethod
    def of_depth(cls, depth: int, kappa: float = 0.25, upsilon: float = 0.25, **fields: Any) -> AAResNetConfig:
        """AA-ResNet-34, 50, 101 or 152; `fields` as in the class."""
        if depth not in DEPTHS:
            raise InvalidOption(f"AAResNetConfig: depth={depth!r} must be one of {', '.join(map(str, DEPTHS))}.")
        layer_type, depths, sizes = DEPTHS[depth]
        values = {"layer_type": layer_type, "depths": depths, "hidden_sizes": sizes, **fields}
        return cls(kappa=kappa, upsilon=upsilon, **values)

    @classmethod
    def wide(
        cls,
        depth: int = 28,
        width: int = 10,
        kappa: float = 0.2,
        upsilon: float = 0.1,
        image_size: int = 32,
        **fields: Any,
    ) -> AAResNetConfig:
        """AA-Wide-ResNet for small images: three stages of (depth - 4) / 6 blocks, 16 * width channels in the first."""
        if depth < 10 or (depth - 4) % 6:
            raise InvalidOption(f"AAResNetConfig: depth={depth} must be 6 n + 4, n >= 1, as 10, 16, 22, 28.")
        values = {
            "layer_type": "wide",
            "embedding_size": 16,
            "depths": [(depth - 4) // 6] * 3,
            "hidden_sizes": [16 * width, 32 * width, 64 * width],
            "attention_stages": (1, 2, 3),
            "pooled_stages": (),
            **fields,
        }
        return cls(kappa=kappa, upsilon=upsilon, image_size=image_size, **values)


@functools.cache
def register_aa_resnet() -> type[AAResNetConfig]:
    """Let the Auto classes of models know AA-ResNets; their config class. AutoConfig knows it by `announce_own`."""
    from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

    image_processing_auto = importlib.import_module("transformers.models.auto.image_processing_auto")
    models = importlib.import_module("hf_attn.models.aa_resnet")
    for auto, model in (
        (AutoModel, models.AAResNetModel),
        (AutoModelForImageClassification, models.AAResNetForImageClassification),
        (AutoBackbone, models.AAResNetBackbone),
    ):
        auto.register(AAResNetConfig, model, exist_ok=True)
    mapping = image_processing_auto.IMAGE_PROCESSOR_MAPPING
    if ResNetConfig in mapping:
        mapping.register(AAResNetConfig, mapping[ResNetConfig], exist_ok=True)
    return AAResNetConfig
