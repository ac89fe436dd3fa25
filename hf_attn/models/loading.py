"""Load a checkpoint with the head it was saved with, whatever its family and its attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_attn.errors import HfAttnError, InvalidInput
from hf_attn.models.configuration import AttnConfigMixin
from hf_attn.models.family import attn_class, auto_heads
from hf_attn.models.own import OWN


def load(source: str, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The model of a folder or a Hub id in evaluation mode.

    Args:
        source: a folder or a Hub id.
        dtype: "auto" keeps the dtype of the checkpoint.

    Raises:
        InvalidInput: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        name = (config.architectures or [""])[0]
        if config.model_type in OWN:
            own = {model.__name__: model for model in model_classes(config).values()}
            return own.get(name, AutoModel).from_pretrained(source, dtype=dtype, use_safetensors=True).eval()
        stock = getattr(transformers, name.removeprefix("Attn"), None)
        known = isinstance(stock, type) and issubclass(stock, PreTrainedModel)
        model_class = AutoModel if not known else attn_class(stock) if isinstance(config, AttnConfigMixin) else stock
        return model_class.from_pretrained(source, dtype=dtype, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, HfAttnError):
            raise
        raise InvalidInput(f"model={source!r} cannot be loaded: {error}. Give a folder or a Hub id.") from error


def model_classes(config: Any) -> dict[str, type]:
    """Auto class -> the model class of this package that it loads for a family."""
    from transformers.models.auto.modeling_auto import AutoBackbone

    kind: Any = type(config)
    if kind.model_type not in OWN:
        return {auto.__name__: attn_class(head) for auto, head in auto_heads(kind.stock_class)}
    found: dict[str, type] = {auto.__name__: head for auto, head in auto_heads(kind)}
    mapping: Any = AutoBackbone._model_mapping
    return found | ({"AutoBackbone": mapping[kind]} if kind in mapping else {})
