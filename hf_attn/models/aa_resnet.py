"""Attention-augmented ResNets: 34, 50, 101, 152, and the wide ones for small images.

Paper: Bello, Zoph, Vaswani, Shlens, Le, "Attention Augmented Convolutional Networks", ICCV 2019 (arXiv 1904.09925).

A ResNet of transformers whose first 3 x 3 convolution of every block, in the chosen stages, is an `AugmentedConv2d`.
Parameters have the names of transformers' ResNet; the augmented ones have `convolution.conv`, `.qkv`, `.out_proj`,
`.rel_height` and `.rel_width` in place of `convolution`.

Shapes: pixel_values (B,3,S,S), S = config.image_size; feature maps (B,C,h,w).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, ResNetForImageClassification, ResNetModel
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.models.resnet.modeling_resnet import (
    ResNetBackbone,
    ResNetConvLayer,
    ResNetEmbeddings,
    ResNetPreTrainedModel,
    ResNetShortCut,
)

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.aa_resnet_config import AAResNetConfig
from hf_attn.models.aa_resnet_stats import aa_resnet_stats, config_stats
from hf_attn.models.augmented_conv import AugmentedConv2d
from hf_attn.models.saving import SavedModelMixin

__all__ = [
    "AAResNetBackbone", "AAResNetConfig", "AAResNetForImageClassification", "AAResNetModel", "AAResNetPreTrainedModel",
    "AugmentedConv2d", "aa_resnet_from_resnet", "aa_resnet_stats", "attention_maps", "config_stats",
]  # fmt: skip


class _Block(nn.Module):
    """A residual block: basic (3 x 3, 3 x 3) or bottleneck (1 x 1, 3 x 3, 1 x 1), the activation after the sum."""

    def __init__(self, config: AAResNetConfig, stage: int, channels: tuple[int, int], size: int, first: bool):
        super().__init__()
        (in_channels, out_channels), act = channels, config.hidden_act
        stride, basic = 2 if first and stage > 1 else 1, config.layer_type == "basic"
        project = in_channels != out_channels or stride != 1 or (first and config.first_shortcut)
        self.shortcut = ResNetShortCut(in_channels, out_channels, stride=stride) if project else nn.Identity()
        inner = out_channels if basic else out_channels // 4
        spatial: Any = ResNetConvLayer(in_channels if basic else inner, inner, stride=stride, activation=act)
        spatial.convolution = _spatial(config, stage, (in_channels if basic else inner, inner), size, stride)
        if basic:
            layers = [spatial, ResNetConvLayer(inner, out_channels, activation=None)]
        else:
            reduce = ResNetConvLayer(in_channels, inner, kernel_size=1, activation=act)
            layers = [reduce, spatial, ResNetConvLayer(inner, out_channels, kernel_size=1, activation=None)]
        self.layer = nn.Sequential(*layers)
        self.activation = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x) + self.shortcut(x))


class _WideBlock(nn.Module):
    """A pre-activation block; the shortcut averages and adds channels of zeros, so it has no parameters."""

    def __init__(self, config: AAResNetConfig, stage: int, channels: tuple[int, int], size: int, first: bool):
        super().__init__()
        self.stride, self.more = 2 if first and stage > 1 else 1, channels[1] - channels[0]
        self.normalization1, self.normalization2 = (nn.BatchNorm2d(n) for n in channels)
        self.convolution1 = _spatial(config, stage, channels, size, self.stride)
        self.convolution2 = nn.Conv2d(channels[1], channels[1], 3, padding=1, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out = self.convolution1(self.activation(self.normalization1(x)))
        out = self.convolution2(self.activation(self.normalization2(out)))
        if self.stride == 2:
            x = functional.avg_pool2d(x, 2, ceil_mode=True)
        return out + functional.pad(x, (0, 0, 0, 0, 0, self.more))


def _spatial(config: AAResNetConfig, stage: int, channels: tuple[int, int], size: int, stride: int) -> nn.Module:
    """The first 3 x 3 convolution of a block, augmented where the config says so. `size` is the side of its input."""
    if stage not in config.attention_stages or config.upsilon == 0:
        return nn.Conv2d(*channels, 3, stride, 1, bias=False)
    return AugmentedConv2d(
        *channels,
        kappa=config.kappa,
        upsilon=config.upsilon,
        num_heads=config.num_attention_heads,
        feature_size=size,
        stride=stride,
        pool=2 if stage in config.pooled_stages else 1,
        relative=config.relative,
        min_head_key_dim=config.min_head_key_dim,
    )


class _Stage(nn.Module):
    def __init__(self, config: AAResNetConfig, stage: int, size: int):
        super().__init__()
        in_channels = config.embedding_size if stage == 1 else config.hidden_sizes[stage - 2]
        out_channels, block = config.hidden_sizes[stage - 1], _WideBlock if config.layer_type == "wide" else _Block
        later = -(-size // 2) if stage > 1 else size
        layers = [block(config, stage, (in_channels, out_channels), size, True)]
        layers += [
            block(config, stage, (out_channels, out_channels), later, False)
            for _ in range(config.depths[stage - 1] - 1)
        ]
        self.layers = nn.Sequential(*layers)


class _Encoder(nn.Module):
    """The stages. Checkpointed blocks leave the running statistics alone when they are computed again."""

    _gradient_checkpointing_func: Any

    def __init__(self, config: AAResNetConfig):
        super().__init__()
        self.gradient_checkpointing = False
        size = config.image_size if config.layer_type == "wide" else -(-config.image_size // 4)
        stages = []
        for stage in range(1, len(config.depths) + 1):
            stages.append(_Stage(config, stage, size))
            size = -(-size // 2) if stage > 1 else size
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input and the result of every stage."""
        states = [x]
        stage: Any
        for stage in self.stages:
            for block in stage.layers:
                if self.gradient_checkpointing and self.training:
                    contexts = _checkpoint_contexts(block)
                    x = self._gradient_checkpointing_func(block.__call__, x, context_fn=contexts)
                else:
                    x = block(x)
            states.append(x)
        return tuple(states)


def _checkpoint_contexts(block: nn.Module) -> Any:
    return lambda: (contextlib.nullcontext(), _frozen_statistics(block))


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorm by the statistics of the batch, without a second update of the running ones."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # the same operations as the first time, which checkpointing asks for, with the new statistics times zero
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, tracked in before:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


class _WideEmbeddings(nn.Module):
    """A 3 x 3 convolution; the blocks bring their own normalization."""

    def __init__(self, config: AAResNetConfig):
        super().__init__()
        self.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, padding=1, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.convolution(pixel_values)


def _embeddings(config: AAResNetConfig) -> nn.Module:
    return _WideEmbeddings(config) if config.layer_type == "wide" else ResNetEmbeddings(config)


class AAResNetPreTrainedModel(SavedModelMixin, ResNetPreTrainedModel):
    """Loading, saving and initialisation of AA-ResNets."""

    config_class = AAResNetConfig
    config: AAResNetConfig
    base_model_prefix = "resnet"
    supports_gradient_checkpointing = True
    _no_split_modules = ["_Block", "_WideBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AugmentedConv2d):
            module.reset_tables()

    def _check_pixels(self, pixel_values: Tensor) -> None:
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise InvalidInput(
                f"{type(self).__name__}: pixel_values must be (B, {', '.join(map(str, expected))}), the sizes of the "
                f"config; got {tuple(pixel_values.shape)}. Resize the images, or set image_size in the config."
            )


class AAResNetModel(AAResNetPreTrainedModel):
    """Features of an image: the map of the last stage, and its mean.

    Args:
        config: an AAResNetConfig.
    """

    def __init__(self, config: AAResNetConfig):
        super().__init__(config)
        self.embedder = _embeddings(config)
        self.encoder = _Encoder(config)
        if config.layer_type == "wide":
            self.normalization = nn.BatchNorm2d(config.hidden_sizes[-1])
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> Any:
        """(B, channels, S, S) -> last_hidden_state (B,C,h,w), pooler_output (B,C,1,1), hidden_states: stem and stages."""
        self._check_pixels(pixel_values)
        states = self.encoder(self.embedder(pixel_values))
        last = states[-1]
        if self.config.layer_type == "wide":
            last = functional.relu(self.normalization(last))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        out = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last, pooler_output=self.pooler(last), hidden_states=states if wanted else None
        )
        return out if _as_dict(self.config, return_dict) else out.to_tuple()


class AAResNetForImageClassification(AAResNetPreTrainedModel):
    """An AA-ResNet with a linear classifier.

    Args:
        config: an AAResNetConfig.
    """

    def __init__(self, config: AAResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.resnet = AAResNetModel(config)
        labels = config.num_labels or 0
        linear = nn.Linear(config.hidden_sizes[-1], labels) if labels > 0 else nn.Identity()
        self.classifier = nn.Sequential(nn.Flatten(), linear)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits (B, num_labels), and the loss where `labels` are given."""
        base = self.resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(base.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        out = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=base.hidden_states)
        return out if _as_dict(self.config, return_dict) else out.to_tuple()


class AAResNetBackbone(BackboneMixin, AAResNetPreTrainedModel):
    """Feature maps of the stages in `config.out_features`, for detection and segmentation heads.

    Args:
        config: an AAResNetConfig.
    """

    has_attentions = False

    def __init__(self, config: AAResNetConfig):
        super().__init__(config)
        self.num_features = [config.embedding_size, *config.hidden_sizes]
        self.embedder = _embeddings(config)
        self.encoder = _Encoder(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> Any:
        """(B, channels, S, S) -> feature_maps, one (B,C,h,w) for each of `out_features`."""
        self._check_pixels(pixel_values)
        states = self.encoder(self.embedder(pixel_values))
        maps = tuple(s for name, s in zip(self.stage_names, states, strict=True) if name in self.out_features)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        out = BackboneOutput(feature_maps=maps, hidden_states=states if wanted else None)
        return out if _as_dict(self.config, return_dict) else out.to_tuple()


def _as_dict(config: AAResNetConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def attention_maps(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """The weights (B,H,N,N) of every augmented convolution for these images, by the name of its module."""
    maps: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AugmentedConv2d) and m.value_dim}
    if not layers:
        raise Unsupported("attention_maps", f"a {type(model).__name__} without augmented convolutions", "Set upsilon")

    def keep(name: str, layer: AugmentedConv2d) -> Any:
        return layer.register_forward_pre_hook(lambda m, args: maps.update({name: m.attention_weights(*args)}))

    hooks = [keep(name, layer) for name, layer in layers.items()]
    try:
        model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


_HEADS: dict[type[PreTrainedModel], type[AAResNetPreTrainedModel]] = {
    ResNetModel: AAResNetModel,
    ResNetForImageClassification: AAResNetForImageClassification,
    ResNetBackbone: AAResNetBackbone,
}


def aa_resnet_from_resnet(model: PreTrainedModel, **fields: Any) -> tuple[AAResNetPreTrainedModel, list[str]]:
    """An AA-ResNet that shares the weights of a ResNet of transformers.

    Every convolution that stays has its weights; an augmented one keeps the first filters of the convolution that it
    replaces, with their normalization. The attention starts new.

    Args:
        model: a ResNetModel, ResNetForImageClassification or ResNetBackbone.
        fields: of AAResNetConfig, such as kappa, upsilon and image_size.

    Returns:
        The model, and the names of its parameters and buffers that the ResNet lacks, in whole or in part.

    Raises:
        Unsupported: another model, or a ResNet that takes its strides elsewhere.
    """
    stock: Any = model.config
    target = _HEADS.get(type(model))
    if target is None:
        names = ", ".join(cls.__name__ for cls in _HEADS)
        raise Unsupported("aa_resnet_from_resnet", f"a {type(model).__name__} is none of {names}", "Pass one of these")
    for flag in ("downsample_in_bottleneck", "downsample_in_first_stage"):
        if getattr(stock, flag):
            raise Unsupported(
                "aa_resnet_from_resnet", f"the ResNet has {flag}=True", "Take a ResNet v1.5, such as resnet-50"
            )
    values = {k: v for k, v in stock.to_dict().items() if k not in ("model_type", "architectures", "stage_names")}
    values["first_shortcut"] = any("stages.0.layers.0.shortcut." in name for name in model.state_dict())
    ours: Any = target(AAResNetConfig(**{**values, **fields}))
    given, new = model.state_dict(), []
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            source = given.get(name, given.get(name.replace(".convolution.conv.", ".convolution.")))
            kept = 0 if source is None else _shared(ours, name, tensor)
            if source is not None and tensor.dim():
                tensor[:kept].copy_(source[:kept])
            elif source is not None:
                tensor.copy_(source)
            if source is None or (tensor.dim() and kept < tensor.shape[0]):
                new.append(name)
    return ours.train(model.training), new


def _shared(model: nn.Module, name: str, tensor: Tensor) -> int:
    """How many of the first entries of `tensor` mean what they mean in the ResNet."""
    home, _, _ = name.rpartition(".normalization.")
    convolution = dict(model.named_modules()).get(f"{home}.convolution") if home else None
    channels = tensor.shape[0] if tensor.dim() else 0
    return channels - convolution.value_dim if isinstance(convolution, AugmentedConv2d) else channels
