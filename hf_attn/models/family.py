"""Model families: for every stock class of transformers, the same class with mechanisms.

`attn_class(BertForMaskedLM)` is `AttnBertForMaskedLM`: same parameters under the same names, plus the mechanisms',
whose choice is stored in the config (`attention`, see `hf_attn.models.configuration`) and restored at load.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import output_capturing

from hf_attn.errors import Unsupported
from hf_attn.models.configuration import STATIC, AttnConfigMixin, attn_config, attn_config_class, register_family
from hf_attn.models.saving import SavedModelMixin
from hf_attn.models.spec import Spec, canonical, warn_switch
from hf_attn.models.wrapping import attach, token_grid
from hf_attn.module import AttentionModule


class AttnModelMixin(SavedModelMixin):
    """The part of a model that carries mechanisms; the stock class stands behind it in the method resolution order."""

    stock_class: type[PreTrainedModel]

    def __init__(
        self, config: PreTrainedConfig, *args: Any, attention_options: dict[str, Any] | None = None, **kwargs: Any
    ):
        if not isinstance(config, AttnConfigMixin) and isinstance(config, PreTrainedConfig):
            config = attn_config(config)
        if attention_options is not None:
            config.attention_options = attention_options
        # transformers falls back to sdpa where a config names nothing, and writes it into the config
        config._attn_implementation_internal = config.attention["default"]["name"]
        super().__init__(config, *args, **kwargs)
        adopt(self)
        config.attention = attach(self, config.attention)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionModule):
            # transformers calls this for parameters that a checkpoint lacks
            module.reset_beside_pretrained()
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.save_pretrained`, by default under the names the parameters have in the model.

        Trainer resumes, and takes its best checkpoint back, by these names; under a stock ViT's older names on disk it
        would load nothing and say so in a log line only.
        """
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def set_attn_implementation(
        self,
        attn_implementation: str | dict[str, Any],
        allow_all_kernels: bool = False,
        attention_options: dict[str, Any] | None = None,
    ) -> None:
        """Switch the mechanisms in place; the model's own weights stay, the mechanisms' start anew.

        Args:
            attn_implementation: a mechanism's name, or the per-layer form of `hf_attn.convert`.
            allow_all_kernels: accepted for compatibility with transformers; mechanisms load no Hub kernels.
            attention_options: options of the default mechanism.
        """
        spec = attach(self, canonical(attn_implementation, attention_options), pretrained=True)
        warn_switch(self.config.attention, spec)
        self.config.attention = spec
        self.config._attn_implementation_internal = spec["default"]["name"]


class VisionGridMixin:
    """Passes the token grid of the actual image to the mechanisms, also where positions are interpolated."""

    def forward(self, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if pixel_values is not None and pixel_values.dim() == 4:
            grid, prefix = token_grid(self)
            # a model whose patches are not found has been told so when its mechanisms were attached
            if grid is not None:
                rows, columns = _patch_size(self)
                kwargs.setdefault("grid", (pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns))
                kwargs.setdefault("num_prefix_tokens", prefix)
        return super().forward(pixel_values, *args, **kwargs)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = model.embeddings.patch_embeddings.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def adopt(model: nn.Module) -> None:
    """Turn the stock models inside `model` into their attn classes: the innermost one initialises missing parameters."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, AttnModelMixin):
            module.__class__ = attn_class(type(module))
            # transformers noted under the stock class what output_attentions and output_hidden_states record
            output_capturing._CAN_RECORD_REGISTRY[_registry_key(module)] = module._can_record_outputs


def _registry_key(module: PreTrainedModel) -> Any:
    """The key in transformers' registry of recorded outputs: the class's name, in newer releases the model itself."""
    return module if hasattr(output_capturing, "_CanRecordRegistry") else str(type(module))


@functools.cache
def attn_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of `stock` with mechanisms."""
    home = _home(stock.config_class.model_type)
    return vars(home).get(f"Attn{stock.__name__}") or make_model(stock, home)


def make_model(stock: type[PreTrainedModel], home: ModuleType) -> type[PreTrainedModel]:
    """Create `Attn<stock>` in the module `home`."""
    name = f"Attn{stock.__name__}"
    config_class = attn_config_class(stock.config_class)
    grid = (
        (VisionGridMixin,) if stock.main_input_name == "pixel_values" and not stock.__name__.partition("For")[2] else ()
    )
    body = {
        "__module__": home.__name__,
        "__qualname__": name,
        "__doc__": f"`transformers.{stock.__name__}` with a mechanism of hf_attn in every layer.\n\n"
        f"Args:\n    config: an {config_class.__name__}, or a {stock.config_class.__name__}.\n"
        "    attention_options: options of the mechanism that config.attention names.",
        "stock_class": stock,
        "config_class": config_class,
    }
    created = type(name, (AttnModelMixin, *grid, stock), body)
    setattr(home, name, created)
    inherit_renaming(stock.__name__, name)
    inherit_renaming(stock.config_class.model_type, config_class.model_type)
    return created


def inherit_renaming(stock: str, ours: str) -> None:
    """Let `ours` (a class name or model type) read and write checkpoints under the names that `stock` has on disk.

    transformers keeps the names of older checkpoints alive by class name and by model type: without this, a stock ViT
    would load without its encoder, and only a log line would say so.
    """
    mapping = get_checkpoint_conversion_mapping(stock)
    if mapping is not None:
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def _home(model_type: str) -> ModuleType:
    """The module the classes of a family live in: where pickle and a reader find them."""
    # beside this file, wherever that is: a checkpoint may carry a copy of both
    name = __name__.removesuffix("family") + STATIC.get(model_type, "generated")
    # a family's own file calls back here while it is being imported
    return sys.modules.get(name) or importlib.import_module(name)


def define_family(
    home: ModuleType, config: type[PreTrainedConfig], heads: tuple[type[PreTrainedModel], ...]
) -> list[str]:
    """Create a family's model classes in `home`, beside its config class; returns their names."""
    config_class = attn_config_class(config)
    setattr(home, config_class.__name__, config_class)
    return [config_class.__name__, *(make_model(head, home).__name__ for head in heads)]


def auto_heads(stock: type[PreTrainedConfig]) -> Iterator[tuple[Any, type[PreTrainedModel]]]:
    """Every Auto class that knows the stock family, with the class it loads."""
    from transformers.models.auto import modeling_auto

    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or stock not in mapping:
            continue
        known = mapping[stock]
        for head in known if isinstance(known, (tuple, list)) else (known,):
            if head.config_class is stock:
                yield auto, head
                break


@functools.cache
def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Register the classes of a family with every Auto class that knows the stock family."""
    from transformers.models.auto import tokenization_auto

    # transformers 5.17 hides this module from `from ... import` where torchvision is missing, and needs none itself
    image_processing_auto = importlib.import_module("transformers.models.auto.image_processing_auto")
    stock = config_class.stock_class
    for auto, head in auto_heads(stock):
        auto.register(config_class, attn_class(head), exist_ok=True)
    for mapping in (tokenization_auto.TOKENIZER_MAPPING, image_processing_auto.IMAGE_PROCESSOR_MAPPING):
        if stock in mapping:
            mapping.register(config_class, mapping[stock], exist_ok=True)


def convert(model: PreTrainedModel, attention: str | dict[str, Any], **options: Any) -> PreTrainedModel:
    """Give a loaded model other attention mechanisms, in place.

    The model's own weights stay; the mechanisms' parameters start at their documented values. A warning names those
    that are of no use to a model pretrained with softmax before they were trained with it. `save_pretrained` and
    `from_pretrained` (of the Auto classes, or `type(model)`) keep the choice.

    Args:
        model: any model of transformers whose attention goes through AttentionInterface.
        attention: a name, `{"name": ..., **options}`, or by layer: `{"default": "softmax", "2-9": "lara"}`.
        options: options of the default mechanism.

    Returns:
        The same object.

    Raises:
        Unsupported: a mechanism does not define what a layer asks for; the model is unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(
            "convert",
            f"a {type(model).__name__} is not a transformers PreTrainedModel",
            "Pass the model itself, not a wrapper",
        )
    if model.config.sub_configs:
        parts = ", ".join(model.config.sub_configs)
        raise Unsupported(
            f"convert, {type(model).__name__}",
            f"it is made of sub-models ({parts})",
            "Convert one of its sub-models instead",
        )
    spec = attach(model, canonical(attention, options), pretrained=True)
    warn_switch(model.config.attention if isinstance(model.config, AttnConfigMixin) else None, spec)
    adopt_model(model, spec)
    return model


def adopt_model(model: PreTrainedModel, spec: Spec) -> None:
    """Make `model`, whose mechanisms are attached, a member of its attn family."""
    config = model.config
    if not isinstance(config, AttnConfigMixin):
        config.__class__ = attn_config_class(type(config))
        register_models(type(config))
        register_family(type(config).stock_class.model_type)
    config.attention = spec
    config._attn_implementation_internal = spec["default"]["name"]
    adopt(model)
