"""Load a checkpoint with the head it was saved with, whatever its family and its attention."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_attn.errors import HfAttnError, InvalidInput
from hf_attn.models.configuration import AttnConfigMixin
from hf_attn.models.family import attn_class


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
        stock = getattr(transformers, name.removeprefix("Attn"), None)
        known = isinstance(stock, type) and issubclass(stock, PreTrainedModel)
        model_class = AutoModel if not known else attn_class(stock) if isinstance(config, AttnConfigMixin) else stock
        return model_class.from_pretrained(source, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, HfAttnError):
            raise
        raise InvalidInput(f"model={source!r} cannot be loaded: {error}. Give a folder or a Hub id.") from error
