"""The config of the gated attention family, and the options of its two units. Imported without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from hf_attn.errors import InvalidOption
from hf_attn.models.configuration import StoredConfigMixin
from hf_attn.options import Options

TOEPLITZ_UP_TO = 512
"""Lengths up to which the learned bias is one number for every distance; beyond, two rotated vectors."""


@dataclass(frozen=True)
class UnitOptions(Options):
    """Options that both gated attention units have.

    Attributes:
        hidden_size: d, width of the input and output.
        expansion: e / d, the width of gate and values.
        query_key_dim: s, width of queries and keys.
        attention_fn: what makes weights of scores.
        rel_pos_bias: learned bias of the scores by distance.
        use_rope: rotate queries and keys by their positions.
        rope_theta: base of the rotation's wavelengths.
        rope_dim: how many of the s channels rotate; None: all.
        norm_type: "layer_norm", "scale_norm" (one learned factor) or "rms_norm" (none).
        norm_position: "pre" normalises the input, "post" the sum of input and output.
        norm_eps: added to the mean square (layer_norm: to the variance).
        use_bias: the projections have a bias.
        offset_bias: the copies of z have an offset beside their scale.
        token_shift: the first half of the channels comes from the token before.
        attention_dropout: probability of dropping an attention weight.
        hidden_dropout: probability of dropping an output before the residual.
    """

    mechanism: ClassVar[str] = "gau"
    functions: ClassVar[tuple[str, ...]] = ()
    biases: ClassVar[tuple[str, ...]] = ()

    hidden_size: int = 768
    expansion: int = 2
    query_key_dim: int = 128
    attention_fn: str = "relu2"
    rel_pos_bias: str = "toeplitz"
    use_rope: bool = True
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    norm_type: str = "layer_norm"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    use_bias: bool = True
    offset_bias: bool = True
    token_shift: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    def check(self) -> None:
        for name in ("hidden_size", "expansion", "query_key_dim"):
            self.integer(name, 1)
        self.one_of("attention_fn", *self.functions)
        self.one_of("rel_pos_bias", *self.biases)
        self.one_of("norm_type", "layer_norm", "scale_norm", "rms_norm")
        self.one_of("norm_position", "pre", "post")
        self.boolean("use_rope", "use_bias", "offset_bias", "token_shift")
        self.number("rope_theta", 1)
        self.number("norm_eps", 0)
        self.number("attention_dropout", 0, 1)
        self.number("hidden_dropout", 0, 1)
        if self.query_key_dim % 2 and (self.rel_pos_bias == "rope" or (self.use_rope and self.rope_dim is None)):
            raise self.refuse("query_key_dim", "must be even to be rotated")
        if self.rope_dim is not None:
            self.integer("rope_dim", 2)
            if self.rope_dim % 2 or self.rope_dim > self.query_key_dim:
                raise self.refuse("rope_dim", f"must be even and at most query_key_dim={self.query_key_dim}")
        if self.token_shift and self.hidden_size < 2:
            raise self.refuse("token_shift", "needs hidden_size of at least 2")


@dataclass(frozen=True)
class QuadraticOptions(UnitOptions):
    """Options of `GatedAttentionUnit`.

    Attributes:
        quad_norm: what divides the scores of relu2 and laplace: n_ref ("ref"), the number of keys ("length") or of
            visible keys ("valid"); "sqrt_s": sqrt(s), and the weights are divided by the number of visible keys.
        n_ref: reference length, never taken from the input.
        max_position_embeddings: n_max, the length a "toeplitz" bias is made for.
    """

    functions = ("relu2", "laplace", "softmax", "softmax_plus")
    biases = ("toeplitz", "rope", "none")

    quad_norm: str = "ref"
    n_ref: int = 512
    max_position_embeddings: int = 512

    def check(self) -> None:
        super().check()
        self.one_of("quad_norm", "ref", "length", "valid", "sqrt_s")
        self.integer("n_ref", 1)
        self.integer("max_position_embeddings", 1)


@dataclass(frozen=True)
class MixedChunkUnitOptions(UnitOptions):
    """Options of `FlashGatedAttentionUnit`.

    Attributes:
        chunk_size: C, positions of a chunk.
        linear_norm: the sum over other chunks is divided by the number of its keys ("mean") or by C ("chunk").
    """

    mechanism = "flash_gau"
    functions = ("relu2", "laplace")
    biases = ("toeplitz", "none")

    chunk_size: int = 256
    linear_norm: str = "mean"

    def check(self) -> None:
        super().check()
        self.integer("chunk_size", 1)
        self.one_of("linear_norm", "mean", "chunk")


UNITS: dict[str, type[UnitOptions]] = {"quadratic": QuadraticOptions, "mixed_chunk": MixedChunkUnitOptions}
_ONLY_UNITS = (
    "attention_fn", "quad_norm", "linear_norm", "norm_position", "token_shift", "rope_dim", "rel_pos_bias",
    "expansion", "query_key_dim",
)  # fmt: skip
"""Fields without a meaning for block="transformer"."""
_RENAMED = {"attention_dropout": "attention_probs_dropout_prob", "hidden_dropout": "hidden_dropout_prob"}


class GauConfig(StoredConfigMixin, PreTrainedConfig):
    """Config of the `gau` family: gated attention units (FLASH-Quad, FLASH) and the transformers they are compared with.

    | | `attention="quadratic"` | `attention="mixed_chunk"` |
    |---|---|---|
    | `block="gau"` | FLASH-Quad | FLASH |
    | `block="transformer"` | Transformer++ | MC-TFM++ |

    Fields named like an option of the units (`QuadraticOptions`, `MixedChunkUnitOptions`) are that option.

    Args:
        attention: "quadratic", or "mixed_chunk", whose time is linear in the length.
        block: "gau", or "transformer": rotary multi-head attention and a gated-linear feed-forward layer.
        num_hidden_layers: units, or transformer blocks; two units replace one block.
        n_ref: reference length of quad_norm="ref". None: max_position_embeddings.
        rel_pos_bias: None: "toeplitz" for up to 512 tokens (mixed_chunk: of a chunk), else "rope" (mixed_chunk: "none").
        absolute_positions: "sinusoid", scaled by one learned number, is added to the token embeddings; or "none".
        final_norm_type, final_norm_eps: of the norm behind the last layer of a "pre" model. None: as in the layers.
        num_attention_heads, intermediate_size: of block="transformer". None: hidden_size / 64 and 8/3 hidden_size.
        attention_probs_dropout_prob, hidden_dropout_prob: attention_dropout and hidden_dropout of the units.
        classifier_dropout: before the classifiers. None: hidden_dropout_prob.
        pooling: what a classifier sees: "cls" (the first token), "mean" or "last". None: "last" for causal models,
            else "cls".
        packed_segments: "refuse" rows of several sequences, or "exact": every sequence gets a row of its own.
        is_decoder: attention is causal. `GauForCausalLM` sets it.
        head_bias: the language model heads have a bias.
        type_vocab_size: number of token types; 0: no such embedding.
        image_size, patch_size, num_channels: of `GauForImageClassification`.

    Raises:
        InvalidOption: a field outside its rule, or two that contradict each other.
    """

    model_type = "gau"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 24
    attention: str = "mixed_chunk"
    block: str = "gau"
    expansion: int = 2
    query_key_dim: int = 128
    attention_fn: str = "relu2"
    quad_norm: str = "ref"
    n_ref: int | None = None
    chunk_size: int = 256
    linear_norm: str = "mean"
    rel_pos_bias: str | None = None
    use_rope: bool = True
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    absolute_positions: str = "sinusoid"
    max_position_embeddings: int = 512
    norm_type: str = "layer_norm"
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    final_norm_type: str | None = None
    final_norm_eps: float | None = None
    use_bias: bool = True
    offset_bias: bool = True
    token_shift: bool = False
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    attention_probs_dropout_prob: float = 0.0
    hidden_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    pooling: str | None = None
    packed_segments: str = "refuse"
    is_decoder: bool = False
    head_bias: bool = False
    type_vocab_size: int = 0
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._check()
        super().__post_init__(**kwargs)
        from hf_attn.models.gau import register_models

        register_models()

    @property
    def unit_options(self) -> UnitOptions:
        """The options of every unit, checked."""
        kind = UNITS[self.attention]
        return kind(**{f.name: getattr(self, _RENAMED.get(f.name, f.name)) for f in fields(kind)})

    def _check(self) -> None:
        self._one_of("attention", *UNITS)
        self._one_of("block", "gau", "transformer")
        self._one_of("absolute_positions", "sinusoid", "none")
        self._one_of("final_norm_type", "layer_norm", "scale_norm", "rms_norm", None)
        self._one_of("pooling", "cls", "mean", "last", None)
        self._one_of("packed_segments", "refuse", "exact")
        sizes = (
            "vocab_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "image_size",
            "patch_size",
            "num_channels",
        )
        for name in sizes:
            self._integer(name, 1)
        self._integer("type_vocab_size", 0)
        if self.n_ref is None:
            self.n_ref = self.max_position_embeddings
        if self.rel_pos_bias is None and self.block == "transformer":
            self.rel_pos_bias = "none"
        if self.rel_pos_bias is None:
            longest = self.chunk_size if self.attention == "mixed_chunk" else self.max_position_embeddings
            beyond = "none" if self.attention == "mixed_chunk" else "rope"
            self.rel_pos_bias = "toeplitz" if longest <= TOEPLITZ_UP_TO else beyond
        if self.absolute_positions == "sinusoid" and self.hidden_size % 2:
            raise self._refuse("hidden_size", "must be even with absolute_positions='sinusoid'")
        if self.is_decoder and self.attention == "quadratic" and self.quad_norm == "length":
            raise self._refuse(
                "quad_norm", "and is_decoder=True: the result of a prefix would change with the length. Set 'ref'"
            )
        if self.is_decoder and self.pooling == "cls":
            raise self._refuse("pooling", "and is_decoder=True: the first token sees no other. Set 'last' or 'mean'")
        if self.image_size % self.patch_size:
            raise self._refuse("image_size", f"must be a multiple of patch_size={self.patch_size}")
        if self.block == "transformer":
            self._check_transformer()
        # checks the options of the units
        _ = self.unit_options

    def _check_transformer(self) -> None:
        """Fill in what only the baselines have, and refuse what only the units have."""
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        if self.intermediate_size is None:
            # as many parameters as a feed-forward layer of 4 d without a gate
            self.intermediate_size = -(-8 * self.hidden_size // 24) * 8
        self._integer("num_attention_heads", 1)
        self._integer("intermediate_size", 1)
        if self.hidden_size % self.num_attention_heads:
            raise self._refuse("num_attention_heads", f"must divide hidden_size={self.hidden_size}")
        if self.use_rope and (self.hidden_size // self.num_attention_heads) % 2:
            raise self._refuse("num_attention_heads", "must leave heads of even width for use_rope=True")
        for name in _ONLY_UNITS:
            if getattr(self, name) not in (type(self).__dataclass_fields__[name].default, "none"):
                raise self._refuse(name, "is an option of block='gau'. Leave it out with block='transformer'")

    def _one_of(self, name: str, *allowed: str | None) -> None:
        if getattr(self, name) not in allowed:
            raise self._refuse(name, f"must be one of {', '.join(map(repr, allowed))}")

    def _integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._refuse(name, f"must be an integer of at least {minimum}")

    def _refuse(self, name: str, rule: str) -> InvalidOption:
        return InvalidOption(f"GauConfig: {name}={getattr(self, name)!r} {rule}.")
