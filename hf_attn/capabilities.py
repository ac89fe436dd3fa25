"""What a mechanism can do: the record that the README table, `hf-attn list`, the refusals and the tests come from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from hf_attn.errors import Unsupported


@dataclass(frozen=True)
class Capabilities:
    """One cell a field. Each cell that says yes is tested to work, each that says no is tested to refuse."""

    bidirectional: bool = True
    causal: bool = False
    cross: bool = False
    """Keys of another sequence (N != M without causal order)."""
    padding: bool = True
    """`key_padding_mask`, exact: a padded token never matters."""
    padding_anywhere: bool = True
    """Padding before and between real tokens as well; otherwise it must stand at the end."""
    padding_equals_cutting: Literal["anywhere", "at the end", "nowhere"] = "anywhere"
    """Where padding gives real tokens what they give with it cut off; windows and blocks count the places before."""
    packed: bool = False
    """Several sequences in one row, told apart by position_ids, exact: packed equals alone."""
    dense_mask: bool = False
    """Any boolean or additive (B,1|H,N,M) mask."""
    sequence: bool = True
    """Calls without a grid."""
    grid: Literal["ignored", "used", "refused"] = "ignored"
    prefix_tokens: bool = False
    """CLS or register tokens before the grid have a place of their own (only where the grid is not ignored)."""
    decode: Literal["none", "full cache", "constant state", "growing state", "full state"] = "none"
    """What a decoding step needs of the past: all keys and values, a state of constant size, a state that grows by
    less than a token's key and value with every token, or a state of its own with as much as a full cache or more."""
    learned: bool = False
    """Has parameters that a stock checkpoint lacks."""
    random: str = ""
    """What is drawn at random, and when; empty for a deterministic mechanism."""
    needs_layer_input: bool = False
    attention_weights: bool = False
    """The implied (B,H,N,M) weights can be returned, exactly."""
    convex: bool = True
    """The weights of a row with visible keys are at least 0 and sum to one."""
    dropout: bool = False
    """Attention dropout acts on the weights; otherwise it has no effect, with one warning."""
    compile: bool = True
    export: bool = True
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    backends: tuple[str, ...] = ("torch",)
    derived: tuple[str, ...] = field(default=())
    """Modes that follow from the definition but are not in the paper."""
    pays_from: str = "not measured"
    """Length from which it is faster than SDPA, with the machine class, or why there is none."""

    @property
    def keeps_state(self) -> bool:
        """Decoding goes through `step` and a state of its own, in place of the past keys and values."""
        return self.decode in ("constant state", "growing state", "full state")


@dataclass(frozen=True)
class Host:
    """What an attention module of a model asks of a mechanism. Lengths in tokens."""

    model: str
    num_heads: int
    head_dim: int
    layer_idx: int
    causal: bool = False
    cross: bool = False
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    sliding_window: int | None = None
    dropout: float = 0.0
    max_length: int | None = None


# host fact that asks for it -> capability, why, remedy
_HOST_RULES = (
    ("causal", "causal", "the model is causal and it is defined for bidirectional attention only",
     "Causal mechanisms: {causal}"),
    ("cross", "cross", "the module attends to another sequence (cross-attention) and it is not defined there",
     "Leave cross-attention out with add_cross_attention=False, or take one of: {cross}"),
    ("sliding_window", "dense_mask", "the layer has a sliding window, a mask it cannot take exactly",
     'Choose the full-attention layers only, as {{"default": "softmax", "0,3": ...}}, or take one of: {dense_mask}'),
)  # fmt: skip


def check_host(name: str, capabilities: Capabilities, host: Host, alternatives: dict[str, list[str]]) -> None:
    """Raise `Unsupported` where `host` asks for something the mechanism does not define.

    `alternatives` maps a capability to the names of the mechanisms that have it, for the remedy.
    """
    where = f"{name} in {host.model}, layer {host.layer_idx}"
    for fact, capability, reason, remedy in _HOST_RULES:
        if getattr(host, fact) and not getattr(capabilities, capability):
            raise Unsupported(where, reason, remedy.format(**{k: ", ".join(v) for k, v in alternatives.items()}) + ".")
    if host.grid is None and not capabilities.sequence:
        raise Unsupported(
            where,
            f"{name} needs a 2-D token grid and the model is a sequence model",
            "Use it in a vision model (AttnViT...), or set allow_1d=True where the mechanism has that option.",
        )
    if not host.causal and not host.cross and not capabilities.bidirectional:
        raise Unsupported(
            where,
            "it is defined for causal attention only",
            f"Bidirectional: {', '.join(alternatives['bidirectional'])}.",
        )


def flags() -> list[str]:
    """The yes/no cells, in the order of the record."""
    return [f.name for f in fields(Capabilities) if f.type in (bool, "bool")]
