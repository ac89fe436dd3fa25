"""Checkpoints of transformers' `mra` model (uw-madison/mra-base-512-4 and its kin) as attn_bert models.

    stock = transformers.MraForMaskedLM.from_pretrained("uw-madison/mra-base-512-4")
    model = from_mra(stock.config, stock.state_dict())

transformers computes this attention in a CUDA kernel only: without it, every attention layer returns zeros. Apart from
that the two models differ in names and in four things, which `from_mra` takes care of:

    positions              start at row 2 of the table; rows 0 and 1 are never read, and are dropped
    budget                 (max_position_embeddings // 32) * block_per_row blocks, whatever the length of the input
    head dimension < 32    is filled up to 32 before scaling by 32 ** -0.5; the queries' projection takes the factor
    attention dropout      is in the config and never applied: 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MraConfig, PreTrainedModel

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.bert import AttnBertConfig, AttnBertForMaskedLM, AttnBertModel

BLOCK = 32
"""Side of a block, and smallest head dimension, of transformers' kernel."""
FIRST_POSITION = 2
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "chunk_size_feed_forward",
)  # fmt: skip


def from_mra(config: MraConfig, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    """The attn_bert model with mechanism `mra` that computes what a transformers MRA model does with its kernel.

    Args:
        config: of the MRA model.
        state_dict: of an MraForMaskedLM (makes an AttnBertForMaskedLM) or an MraModel (an AttnBertModel without pooler).

    Returns:
        The model in evaluation mode, in the dtype of the weights.

    Raises:
        Unsupported: another head, or positions that do not start at 2.
        InvalidInput: weights are missing, left over, or do not fit the config.
    """
    weights = bert_state_dict(config, state_dict)
    if any(name.startswith("bert.") for name in weights):
        model: PreTrainedModel = AttnBertForMaskedLM(bert_config(config))
    else:
        model = AttnBertModel(bert_config(config), add_pooling_layer=False)
    expected = model.state_dict()
    for what, names in (
        ("missing", expected.keys() - weights.keys()),
        ("left over", weights.keys() - expected.keys()),
        ("of another shape", {n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape}),
    ):
        if names:
            raise InvalidInput(
                f"from_mra: {len(names)} weights are {what}, such as {min(names)!r}. "
                "Pass the config and the state dict of the same MRA model."
            )
    model.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return model.eval()


def mra_options(config: MraConfig) -> dict[str, Any]:
    """The options of mechanism `mra` for an MRA model."""
    rows = config.max_position_embeddings // BLOCK
    return {
        "block_size": BLOCK,
        "num_blocks": min(rows * config.block_per_row, rows * rows),
        "mode": config.approx_mode,
        "prior_first": config.initial_prior_first_n_blocks,
        "prior_diag": config.initial_prior_diagonal_n_blocks,
    }


def bert_config(config: MraConfig) -> AttnBertConfig:
    """The attn_bert config of an MRA model."""
    return AttnBertConfig(
        **{name: getattr(config, name) for name in _SHARED},
        attention_probs_dropout_prob=0.0,
        attn_implementation="mra",
        attention_options=mra_options(config),
    )


def bert_state_dict(config: MraConfig, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an MRA model under the names and in the form of BERT's, with tied ones that the file left out.

    Raises:
        Unsupported: another head, or positions that do not start at 2.
    """
    body = "bert." if any(name.startswith("mra.") for name in state_dict) else ""
    weights = {f"bert.{n[4:]}" if n.startswith("mra.") else n: tensor for n, tensor in state_dict.items()}
    for name in weights:
        if body and not name.startswith((body, "cls.predictions.")):
            raise Unsupported(
                "from_mra",
                f"the head with the weight {name!r} is not one of BERT's",
                "Convert its encoder, model.mra.state_dict(), and train a head of an AttnBert class on it",
            )
    positions = weights.pop(f"{body}embeddings.position_ids", None)
    if positions is not None and (positions.cpu().flatten() - torch.arange(positions.numel()) != FIRST_POSITION).any():
        raise Unsupported("from_mra", "position_ids do not count up from 2", "Reorder the position embeddings first")

    table, words = f"{body}embeddings.position_embeddings.weight", f"{body}embeddings.word_embeddings.weight"
    if table in weights:
        weights[table] = weights[table][FIRST_POSITION:]
    if config.tie_word_embeddings and body:
        for tied, source in (
            ("decoder.weight", words),
            ("decoder.bias", "cls.predictions.bias"),
            ("bias", "cls.predictions.decoder.bias"),
        ):
            if source in weights:
                weights.setdefault(f"cls.predictions.{tied}", weights[source])
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim < BLOCK:
        for name in weights:
            if ".attention.self.query." in name:
                weights[name] = weights[name] * (head_dim / BLOCK) ** 0.5
    return weights
