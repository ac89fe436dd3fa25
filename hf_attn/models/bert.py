"""The attn_bert family: every BERT head of transformers with a mechanism in every layer."""

import sys

from transformers.models.bert import modeling_bert as stock
from transformers.models.bert.configuration_bert import BertConfig

from hf_attn.models.family import define_family

__all__ = define_family(
    sys.modules[__name__],
    BertConfig,
    (
        stock.BertModel,
        stock.BertForMaskedLM,
        stock.BertForPreTraining,
        stock.BertForNextSentencePrediction,
        stock.BertForSequenceClassification,
        stock.BertForTokenClassification,
        stock.BertForQuestionAnswering,
        stock.BertForMultipleChoice,
        stock.BertLMHeadModel,
    ),
)
