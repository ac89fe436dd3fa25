"""Weights of the package FLASH-pytorch as gau models and units.

    theirs = flash_pytorch.FLASHTransformer(num_tokens=..., dim=512, depth=12, causal=True)
    model = from_flash_pytorch(theirs.state_dict(), causal=True)

The two differ in names and in these things, which the functions here take care of:

    order of the copies      their offset and scale: local query, linear query, local key, linear key
    first projection         values before the gate; queries and keys by a projection of their own
    rotation                 of the first 32 channels at most, in neighbouring pairs: the channels are put in our order
    bias by distance         32 T5 buckets times sqrt(s) (units with full attention: sqrt(d)): a bias for every distance
    linear part              sums are divided by the chunk size in causal order ("chunk"), else by the number of tokens
    ScaleNorm                the root of the mean square is at least 1e-5, where ours adds to the mean square

Bidirectional models count padded tokens in the linear part; the converted ones do not, so batches with padding differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.gau import FlashGatedAttentionUnit, GatedAttentionUnit, GauPreTrainedModel
from hf_attn.models.gau_config import GauConfig
from hf_attn.models.gau_heads import GauForCausalLM, GauForMaskedLM

ROTATED = 32
"""Channels that rotate, at most."""
BUCKETS, FARTHEST = 32, 128
"""Of the T5 bias: number of buckets, and the distance from which all share one."""
SCALE_NORM_EPS = 1e-16
"""So small beside any mean square that ours and theirs agree."""


def from_flash_pytorch(
    state_dict: Mapping[str, Tensor],
    *,
    causal: bool = False,
    group_size: int = 256,
    shift_tokens: bool = True,
    laplace_attn_fn: bool = False,
    reduce_group_non_causal_attn: bool = True,
    **fields: Any,
) -> GauPreTrainedModel:
    """The gau model that computes what a `flash_pytorch.FLASHTransformer` does.

    Args:
        state_dict: of the FLASHTransformer.
        causal, group_size, shift_tokens, laplace_attn_fn, reduce_group_non_causal_attn: as it was made with; the state
            dict does not hold them. The defaults are theirs.
        fields: more fields of `GauConfig`, such as eos_token_id.

    Returns:
        A GauForCausalLM or GauForMaskedLM in evaluation mode, in the dtype of the weights.

    Raises:
        Unsupported: a linear part within groups only, or rotations that were learned.
        InvalidInput: weights are missing or left over.
    """
    if not reduce_group_non_causal_attn and not causal:
        raise Unsupported(
            "from_flash_pytorch",
            "reduce_group_non_causal_attn=False: its linear part does not leave the group",
            "Convert a model made with reduce_group_non_causal_attn=True",
        )
    weights = dict(state_dict)
    depth = 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("layers.")), default=-1)
    if not depth or "token_emb.weight" not in weights:
        raise InvalidInput(
            "from_flash_pytorch: these are not the weights of a FLASHTransformer. Pass its state_dict()."
        )
    vocabulary, dim = weights["token_emb.weight"].shape
    out = {
        "gau.embeddings.word_embeddings.weight": weights.pop("token_emb.weight"),
        "gau.embeddings.position_scale": weights.pop("abs_pos_emb.scale"),
        "gau.norm.weight": weights.pop("to_logits.0.weight"),
        "gau.norm.bias": weights.pop("to_logits.0.bias"),
        "lm_head.weight": weights.pop("to_logits.1.weight"),
        "lm_head.bias": weights.pop("to_logits.1.bias"),
    }
    # computed from the width
    weights.pop("abs_pos_emb.inv_freq", None)
    options: dict[str, Any] = {}
    for index in range(depth):
        prefix = f"layers.{index}."
        layer = {n.removeprefix(prefix): weights.pop(n) for n in list(weights) if n.startswith(prefix)}
        unit, options = flash_weights(layer, causal, group_size)
        out |= {f"gau.layers.{index}.{name}": tensor for name, tensor in unit.items()}
    if weights:
        raise InvalidInput(f"from_flash_pytorch: {len(weights)} weights are left over, such as {min(weights)!r}.")
    config = GauConfig(
        **{
            **options,
            "vocab_size": vocabulary,
            "hidden_size": dim,
            "num_hidden_layers": depth,
            "attention": "mixed_chunk",
            "attention_fn": "laplace" if laplace_attn_fn else "relu2",
            "token_shift": shift_tokens,
            "final_norm_type": "layer_norm",
            "final_norm_eps": 1e-5,
            "head_bias": True,
            "tie_word_embeddings": False,
            "is_decoder": causal,
            **fields,
        }
    )
    model = (GauForCausalLM if causal else GauForMaskedLM)(config)
    model.to(out["lm_head.weight"].dtype).load_state_dict(out)
    return model.eval()


def flash_unit(
    state_dict: Mapping[str, Tensor],
    *,
    causal: bool = False,
    group_size: int = 256,
    shift_tokens: bool = False,
    laplace_attn_fn: bool = False,
) -> FlashGatedAttentionUnit:
    """The unit that computes what one `flash_pytorch.FLASH` does; arguments as it was made with."""
    weights, options = flash_weights(dict(state_dict), causal, group_size)
    function = "laplace" if laplace_attn_fn else "relu2"
    unit = FlashGatedAttentionUnit(**options, attention_fn=function, token_shift=shift_tokens)
    unit.to(weights["gamma"].dtype).load_state_dict(weights)
    return unit.eval()


def gau_unit(
    state_dict: Mapping[str, Tensor], length: int, *, causal: bool = False, laplace_attn_fn: bool = False
) -> GatedAttentionUnit:
    """The unit that computes what one `flash_pytorch.GAU` does at one length.

    Theirs divides scores and bias by the length of the input. Ours divides by n_ref = `length` whatever the input, so
    that both agree at that length, and ours keeps its meaning at others.

    Args:
        state_dict: of the GAU.
        length: the length it was trained with; also the longest input of the unit.
        causal, laplace_attn_fn: as it was made with.
    """
    weights = dict(state_dict)
    dim = _input_dim(weights)
    query_key_dim = weights["to_qk.0.weight"].shape[0]
    out = _shared(weights, "to_out.0.", slice(None))
    out["gamma"], out["beta"] = weights.pop("offsetscale.gamma"), weights.pop("offsetscale.beta")
    table = weights.pop("rel_pos_bias.relative_attention_bias.weight")
    out["rel_bias"] = by_distance(table, length, causal) * dim**0.5 / length
    norm_type, eps = _norm(weights, out)
    _nothing_left(weights)
    unit = GatedAttentionUnit(
        dim,
        expansion=out["out_proj.weight"].shape[1] // dim,
        query_key_dim=query_key_dim,
        attention_fn="laplace" if laplace_attn_fn else "relu2",
        n_ref=length,
        max_position_embeddings=length,
        use_rope=False,
        norm_type=norm_type,
        norm_eps=eps,
    )
    unit.to(out["gamma"].dtype).load_state_dict(out)
    return unit.eval()


def flash_weights(layer: dict[str, Tensor], causal: bool, group_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of one FLASH under our names and in our order, and the options they need."""
    dim, query_key_dim = _input_dim(layer), layer["to_qk.0.weight"].shape[0]
    frequencies = layer.pop("rotary_pos_emb.freqs", None)
    rotated = 2 * frequencies.numel() if frequencies is not None else 0
    if frequencies is not None:
        expected = 10000 ** (-torch.arange(0, rotated, 2, device=frequencies.device) / rotated)
        if not torch.allclose(frequencies.float(), expected, rtol=1e-5):
            raise Unsupported(
                "from_flash_pytorch",
                "rotary_pos_emb.freqs are not powers of 10000",
                "Convert a model with fixed rotations",
            )
    # pairs (0, 1), (2, 3), ... become channels 0, 1, ... and rotated / 2, ...
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, query_key_dim)]
    out = _shared(layer, "to_out.", order)
    for name in ("gamma", "beta"):
        out[name] = layer.pop(f"qk_offset_scale.{name}")[[0, 2, 1, 3]][:, order]
    table = layer.pop("rel_pos_bias.relative_attention_bias.weight")
    out["rel_bias"] = by_distance(table, group_size, causal) * query_key_dim**0.5
    norm_type, eps = _norm(layer, out)
    _nothing_left(layer)
    options = {
        "hidden_size": dim,
        "expansion": out["out_proj.weight"].shape[1] // dim,
        "query_key_dim": query_key_dim,
        "chunk_size": group_size,
        "linear_norm": "chunk" if causal else "mean",
        "rel_pos_bias": "toeplitz",
        "use_rope": bool(rotated),
        "rope_dim": rotated or None,
        "norm_type": norm_type,
        "norm_eps": eps,
    }
    return out, options


def by_distance(table: Tensor, reach: int, causal: bool) -> Tensor:
    """(2 reach - 1) biases of the distances 1 - reach .. reach - 1 from a T5 table (buckets, 1)."""
    distance = torch.arange(1 - reach, reach, device=table.device)
    buckets, offset = BUCKETS, torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        offset = (distance > 0) * buckets
    back = (-distance).clamp(min=0) if causal else distance.abs()
    exact = buckets // 2
    # the float32 logarithm decides at the borders
    share = torch.log(back.float().clamp(min=1) / exact) / math.log(FARTHEST / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return table[:, 0][offset + torch.where(back < exact, back, far)]


def _input_dim(weights: dict[str, Tensor]) -> int:
    if "to_qk.0.weight" not in weights:
        raise InvalidInput("from_flash_pytorch: 'to_qk.0.weight' is missing. Pass the state dict of a GAU or FLASH.")
    return weights["to_qk.0.weight"].shape[1]


def _shared(weights: dict[str, Tensor], to_out: str, order: Any) -> dict[str, Tensor]:
    """Both projections: gate, value and z in our order, z's channels by `order`."""
    out = {}
    for kind in ("weight", "bias"):
        value, gate = weights.pop(f"to_hidden.0.{kind}").chunk(2)
        out[f"in_proj.{kind}"] = torch.cat((gate, value, weights.pop(f"to_qk.0.{kind}")[order]))
        out[f"out_proj.{kind}"] = weights.pop(f"{to_out}{kind}")
    return out


def _norm(weights: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[str, float]:
    """Move the norm's weights to `out`; its type and eps."""
    if "norm.g" in weights:
        out["norm.weight"] = weights.pop("norm.g")
        return "scale_norm", SCALE_NORM_EPS
    out["norm.weight"], out["norm.bias"] = weights.pop("norm.weight"), weights.pop("norm.bias")
    return "layer_norm", 1e-5


def _nothing_left(weights: dict[str, Tensor]) -> None:
    if weights:
        raise InvalidInput(f"from_flash_pytorch: {len(weights)} weights are left over, such as {min(weights)!r}.")
