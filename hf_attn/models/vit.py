"""The attn_vit family: every ViT head of transformers with a mechanism in every layer."""

import sys

from transformers.models.vit import modeling_vit as stock
from transformers.models.vit.configuration_vit import ViTConfig

from hf_attn.models.family import define_family

__all__ = define_family(
    sys.modules[__name__],
    ViTConfig,
    (stock.ViTModel, stock.ViTForImageClassification, stock.ViTForMaskedImageModeling),
)
