"""The attn_gpt2 family: every GPT-2 head of transformers with a mechanism in every layer."""

import sys

from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from hf_attn.models.family import define_family

__all__ = define_family(
    sys.modules[__name__],
    GPT2Config,
    (
        stock.GPT2Model,
        stock.GPT2LMHeadModel,
        stock.GPT2DoubleHeadsModel,
        stock.GPT2ForSequenceClassification,
        stock.GPT2ForTokenClassification,
        stock.GPT2ForQuestionAnswering,
    ),
)
