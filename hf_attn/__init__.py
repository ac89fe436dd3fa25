"""hf_attn: published attention mechanisms for Hugging Face models.

    import hf_attn
    model = hf_attn.AttnViTForImageClassification.from_pretrained("google/vit-base-patch16-224", attn_implementation="ripple")
    model = hf_attn.convert(any_transformers_model, {"default": "softmax", "2-9": "rfa"})

Importing the package registers every mechanism as an `attn_implementation` of transformers and every family with the
Auto classes. Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_attn import hooks

__version__ = "0.1.0"

_HOMES = {
    "hf_attn.errors": ("HfAttnError", "InvalidInput", "InvalidOption", "KernelUnavailable", "UnknownMechanism", "Unsupported"),
    "hf_attn.capabilities": ("Capabilities", "Host"),
    "hf_attn.module": ("AttentionModule", "Call"),
    "hf_attn.options": ("Options",),
    "hf_attn.registry": ("Mechanism", "build", "get_mechanism", "list_mechanisms", "register"),
    "hf_attn.models.configuration": ("register_family",),
    "hf_attn.models.family": ("convert",),
    "hf_attn.models.wrapping": ("layer_names",),
    "hf_attn.models.bert": (
        "AttnBertConfig", "AttnBertForMaskedLM", "AttnBertForMultipleChoice", "AttnBertForNextSentencePrediction",
        "AttnBertForPreTraining", "AttnBertForQuestionAnswering", "AttnBertForSequenceClassification",
        "AttnBertForTokenClassification", "AttnBertLMHeadModel", "AttnBertModel",
    ),
    "hf_attn.models.vit": ("AttnViTConfig", "AttnViTForImageClassification", "AttnViTForMaskedImageModeling", "AttnViTModel"),
    "hf_attn.models.gpt2": (
        "AttnGPT2Config", "AttnGPT2DoubleHeadsModel", "AttnGPT2ForQuestionAnswering", "AttnGPT2ForSequenceClassification",
        "AttnGPT2ForTokenClassification", "AttnGPT2LMHeadModel", "AttnGPT2Model",
    ),
    "hf_attn.models.gau": (
        "GauConfig", "GauForCausalLM", "GauForImageClassification", "GauForMaskedLM", "GauForSequenceClassification",
        "GauForTokenClassification", "GauModel",
    ),
    "hf_attn.models.dual_encoder": ("DualEncoderConfig", "DualEncoderModel"),
    "hf_attn.mechanisms.convolutions": ("DeformableConv2d", "deform_conv2d"),
    "hf_attn.models.aa_resnet": (
        "AAResNetBackbone", "AAResNetConfig", "AAResNetForImageClassification", "AAResNetModel", "AugmentedConv2d",
        "aa_resnet_from_resnet", "aa_resnet_stats",
    ),
    "hf_attn.models.world_model": ("SlotAttentionModel", "WorldModel", "WorldModelConfig"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_attn' has no attribute {name!r}")
    importlib.import_module("hf_attn.mechanisms")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hooks.install()
