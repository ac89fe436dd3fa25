"""What publishing needs to know of a family: its model classes, and the attention that a config describes.

The attn families choose registered mechanisms in `config.attention`. The families of `hf_attn.models.own`
have their attention built in: what a card says of it is written here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput

_NOT_MEASURED = "not measured for this model"


@dataclass(frozen=True)
class Attention:
    """One kind of attention in a model, as a card shows it.

    Attributes:
        name: the mechanism; also a tag on the Hub.
        layers: where it is.
        title, paper, equation, summary: what it is.
        options: name and value.
        capabilities: what it can do, in the same form.
        derived: modes that are not in the paper.
        unverified: there is no official implementation.
        pays_from: tokens from which it is faster than exact attention.
    """

    name: str
    layers: str
    title: str
    paper: str
    equation: str
    summary: str
    options: tuple[tuple[str, str], ...]
    capabilities: tuple[tuple[str, str], ...]
    derived: tuple[str, ...]
    unverified: bool
    pays_from: str


def attention_of(config: Any) -> list[Attention]:
    """Every kind of attention in a model with this config.

    Raises:
        InvalidInput: the config is none of this package.
    """
    from hf_attn.models.own import OWN

    described = DESCRIBED.get(getattr(config, "model_type", None) or "")
    if described is not None and config.model_type in OWN:
        return [described(config)]
    attention = getattr(config, "attention", None)
    if not isinstance(attention, dict) or not attention:
        raise InvalidInput(f"a {type(config).__name__} carries no attention mechanisms. Use a model of hf_attn.")
    everywhere = "all layers" if len(attention) == 1 else "all other layers"
    return [
        _registered(entry, everywhere if layers == "default" else f"layers {layers}")
        for layers, entry in attention.items()
    ]


def mechanism_names(config: Any) -> list[str]:
    """Registered mechanisms that models with this config ask the registry for."""
    attention = getattr(config, "attention", None)
    if isinstance(attention, dict):
        # softmax stands in where an entry names none
        return list(dict.fromkeys(["softmax", *(entry["name"] for entry in attention.values())]))
    if getattr(config, "block", None) == "transformer":
        return ["mixed_chunk" if attention == "mixed_chunk" else "softmax"]
    return []


def _registered(entry: dict[str, Any], layers: str) -> Attention:
    """A mechanism of the registry, with its options."""
    from hf_attn import get_mechanism

    record = get_mechanism(entry["name"])
    options = record.options_class.parse(**{key: value for key, value in entry.items() if key != "name"})
    capabilities = record.module_class.describe(options)
    return Attention(
        record.name,
        layers,
        record.title,
        record.paper,
        record.equation,
        record.summary,
        tuple((f.name, plain(getattr(options, f.name))) for f in fields(options)),
        tuple(capability_rows(capabilities)),
        tuple(capabilities.derived),
        "no official code" in record.paper,
        record.capabilities.pays_from,
    )


_HUA = "Hua, Dai, Liu, Le, ICML 2022 (arXiv 2202.10447); no official code"
_GAU = {
    ("gau", "quadratic"): (
        "gau",
        "FLASH-Quad, gated attention units over all pairs of tokens",
        "o = (u * A v) W_o,  A_ij = fn(c q_i.k_j + b_{j-i})",
        "Every layer is one unit that gates the result of single-head attention, in place of attention and feed-forward.",
    ),
    ("gau", "mixed_chunk"): (
        "flash_gau",
        "FLASH, gated attention units with mixed chunk attention",
        "o = (u * (A_local v + A_linear v)) W_o,  A_local = fn(q k^T / C + b) within chunks of C tokens,  "
        "A_linear = q' k'^T across chunks",
        "Every layer is one unit that gates the result of single-head attention, in time linear in the length.",
    ),
    ("transformer", "quadratic"): (
        "softmax",
        "Transformer++, the baseline of the gated attention units",
        "out_i = softmax_j(s q_i.k_j) . v,  queries and keys rotated",
        "Multi-head softmax attention with rotary positions, and a gated-linear feed-forward layer.",
    ),
    ("transformer", "mixed_chunk"): (
        "mixed_chunk",
        "MC-TFM++, the baseline with mixed chunk attention",
        "out_i = sum_{j in chunk(i)} softmax_j(s q_i.k_j) v_j + 1/|past(i)| sum_{j in past(i)} (q'_i.k'_j) v_j",
        "Multi-head mixed chunk attention, and a gated-linear feed-forward layer.",
    ),
}
"""block and attention of a GauConfig -> name, title, equation, summary."""


def _gated_units(config: Any) -> Attention:
    """The attention of the gau family."""
    name, title, equation, summary = _GAU[config.block, config.attention]
    shown = [(f.name, getattr(config.unit_options, f.name)) for f in fields(config.unit_options)]
    if config.block == "transformer":
        names = ["use_rope", "rope_theta", "norm_type", *(["chunk_size"] if config.attention == "mixed_chunk" else [])]
        shown = [(option, getattr(config, option)) for option in names]
    chunked = config.attention == "mixed_chunk"
    capabilities = (
        ("causal", plain(config.is_decoder)),
        ("padding", "at the end of the rows" if chunked else "on either side"),
        ("packed sequences", {"exact": "a row each", "refuse": "refused"}[config.packed_segments]),
        ("decoding keeps", ("a state of constant size" if chunked else "all tokens") if config.is_decoder else "none"),
        ("attention weights", "within chunks" if chunked and config.block == "gau" else "yes"),
    )
    options = tuple((option, plain(value)) for option, value in shown)
    derived = (*(() if chunked else ("left padding",)), *(("images",) if is_vision(config) else ()))
    if config.packed_segments == "exact":
        derived += ("packed rows by unpacking",)
    return Attention(
        name, "all layers", title, _HUA, equation, summary, options, capabilities, derived, True, _NOT_MEASURED
    )


def _augmented_convolutions(config: Any) -> Attention:
    """The attention of AA-ResNets."""
    stages = ", ".join(map(str, config.attention_stages))
    names = (
        "kappa", "upsilon", "num_attention_heads", "min_head_key_dim", "attention_stages", "pooled_stages", "relative",
    )  # fmt: skip
    capabilities = (
        ("image size", f"{config.image_size} x {config.image_size} pixels only"),
        ("learned", "yes"),
        ("attention weights", "by hf_attn.models.aa_resnet.attention_maps"),
    )
    bias = " + <q_n, rel_width[jx - ix]> + <q_n, rel_height[jy - iy]>" if config.relative else ""
    return Attention(
        "augmented_conv",
        f"the first 3 x 3 convolution of every block, stages {stages}" if config.upsilon and stages else "no layer",
        "Attention augmented convolutions",
        "Bello et al., ICCV 2019 (arXiv 1904.09925)",
        f"out = concat(conv(x), out_proj(softmax_m(d^-1/2 (<q_n, k_m>{bias})) . v))",
        "A part of the output channels of a convolution comes from attention over the whole map.",
        tuple((name, plain(getattr(config, name))) for name in names),
        capabilities,
        (),
        False,
        _NOT_MEASURED,
    )


DESCRIBED = {"gau": _gated_units, "aa_resnet": _augmented_convolutions}
"""Families of `hf_attn.models.own` that can be published."""


def capability_rows(capabilities: Capabilities) -> list[tuple[str, str]]:
    """Name and value of every cell, as a reader sees them."""
    return [(f.name.replace("_", " "), plain(getattr(capabilities, f.name))) for f in fields(capabilities)]


_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "num_channels", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_SIZES_OF = {
    "gau": ("block", *_SIZES),
    "aa_resnet": ("layer_type", "depths", "hidden_sizes", "embedding_size", "image_size", "num_channels"),
}


def architecture(config: Any) -> list[tuple[str, str]]:
    """The sizes of the model."""
    names = _SIZES_OF.get(config.model_type, _SIZES)
    if config.model_type == "gau":
        unused = ("vocab_size",) if is_vision(config) else ("image_size", "patch_size", "num_channels")
        names = tuple(name for name in names if name not in unused)
    return [(name.replace("_", " "), plain(value)) for name in names if (value := getattr(config, name, None))]


def is_vision(config: Any) -> bool:
    """Whether the model takes images; the gau family has both kinds."""
    if config.model_type == "gau":
        return "Image" in str((getattr(config, "architectures", None) or [""])[0])
    return getattr(config, "image_size", None) is not None


def plain(value: Any) -> str:
    """A value as a card shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)
