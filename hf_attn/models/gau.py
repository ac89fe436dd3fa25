"""The gau family: models of gated attention units (FLASH-Quad, FLASH) and of the transformers they are compared with.

    config = GauConfig(vocab_size=..., hidden_size=256, num_hidden_layers=8, attention="mixed_chunk")
    model = GauForCausalLM(config)

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022 (arXiv 2202.10447). No relation of the
flash-attention kernels.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers 5.17 has it under the same path
from transformers.utils.generic import can_return_tuple

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.masks import Packing, interpret, packed_segments
from hf_attn.models.cache import StateLayer, state_layer
from hf_attn.models.gau_baselines import TransformerBlock
from hf_attn.models.gau_config import GauConfig
from hf_attn.models.gau_layers import GatedUnit, RootMeanSquareNorm, UnitState, make_norm
from hf_attn.models.gau_mixed_chunk import FlashGatedAttentionUnit, MixedChunkState
from hf_attn.models.gau_quadratic import GatedAttentionUnit, QuadraticState
from hf_attn.models.saving import SavedModelMixin
from hf_attn.module import AttentionModule

HEADS = {
    "AutoModelForMaskedLM": "GauForMaskedLM",
    "AutoModelForCausalLM": "GauForCausalLM",
    "AutoModelForSequenceClassification": "GauForSequenceClassification",
    "AutoModelForTokenClassification": "GauForTokenClassification",
    "AutoModelForImageClassification": "GauForImageClassification",
}
"""Auto class -> the model of `hf_attn.models.gau_heads` it loads."""

__all__ = [
    "FlashGatedAttentionUnit",
    "GatedAttentionUnit",
    "GauConfig",
    "GauModel",
    "GauPreTrainedModel",
    "MixedChunkState",
    "QuadraticState",
    *sorted(HEADS.values()),
]


class UnitLayer(StateLayer):
    """One layer of a `Cache`: the state of a unit."""

    state: Any

    def put(self, state: UnitState, like: Tensor) -> None:
        """Keep the state after a call on `like`."""
        self.state, self.cumulative_length = state, state.tokens
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state.map(function)

    def memory(self) -> int:
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        self._map(count)
        return sum(sizes)


class GauPreTrainedModel(SavedModelMixin, PreTrainedModel):
    """What all models of the family share."""

    config_class = GauConfig
    config: GauConfig
    base_model_prefix = "gau"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedAttentionUnit", "FlashGatedAttentionUnit", "TransformerBlock"]

    def __init__(self, config: GauConfig, *args: Any, **kwargs: Any):
        self._refuse_implementation(config._attn_implementation_internal)
        super().__init__(config, *args, **kwargs)

    def _refuse_implementation(self, name: Any) -> None:
        if name not in (None, "eager"):
            raise Unsupported(
                type(self).__name__,
                f"attn_implementation={name!r}: its attention is part of its units",
                "Leave attn_implementation out, and choose by GauConfig(attention=...)",
            )

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refused, but for "eager", which is what the units are."""
        self._refuse_implementation(attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedUnit):
            module.reset_own(self.config.initializer_range)
        elif isinstance(module, (AttentionModule, RootMeanSquareNorm, GauEmbeddings)):
            module.reset_parameters()


class GauEmbeddings(nn.Module):
    """Token embeddings, plus token types and the scaled sinusoid where the config has them."""

    def __init__(self, config: GauConfig, words: bool):
        super().__init__()
        self.dim, self.dropout = config.hidden_size, nn.Dropout(config.hidden_dropout_prob)
        self.word_embeddings = (
            nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id) if words else None
        )
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, config.hidden_size) if types else None
        added = config.absolute_positions == "sinusoid"
        self.position_scale: nn.Parameter | None = nn.Parameter(torch.empty(1)) if added else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The sinusoid starts with length 1 / sqrt(2), beside token embeddings of length 0.02 sqrt(d)."""
        if self.position_scale is not None:
            nn.init.constant_(self.position_scale, self.dim**-0.5)

    def forward(self, embedded: Tensor, types: Tensor | None, positions: Tensor) -> Tensor:
        """(B,N,d) from the embedded tokens (B,N,d), their types (B,N) and positions (B|1,N)."""
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(positions) if types is None else types
            embedded = embedded + self.token_type_embeddings(types)
        elif types is not None and (torch.compiler.is_compiling() or types.any()):
            raise InvalidInput("token_type_ids are given, and the model has type_vocab_size=0. Leave them out.")
        if self.position_scale is not None:
            dtype = torch.promote_types(embedded.dtype, torch.float32)
            embedded = embedded + self.position_scale * sinusoid(positions, self.dim, dtype).to(embedded.dtype)
        return self.dropout(embedded)


def sinusoid(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(B,N,d) sines, then cosines, of positions (B,N) at wavelengths from 2 pi to 10000 * 2 pi."""
    channel = torch.arange(0, dim, 2, dtype=dtype, device=positions.device)
    angle = positions[..., None] * 10000 ** (-channel / dim)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Layout(NamedTuple):
    """How tokens lie in the rows that the layers see."""

    real: Tensor | None
    """(B,N) bool."""
    positions: Tensor
    """(B|1,N) for the sinusoid."""
    packing: Packing | None = None


class GauModel(GauPreTrainedModel):
    """The units behind token embeddings, without a head.

    Args:
        config: the config.
        add_word_embeddings: False for models that embed something else than tokens.
    """

    def __init__(self, config: GauConfig, add_word_embeddings: bool = True):
        super().__init__(config)
        self.embeddings = GauEmbeddings(config, add_word_embeddings)
        self.layers: Any = nn.ModuleList(make_layer(config) for _ in range(config.num_hidden_layers))
        post = config.block == "gau" and config.norm_position == "post"
        kind = config.final_norm_type or config.norm_type
        eps = config.norm_eps if config.final_norm_eps is None else config.final_norm_eps
        self.norm = nn.Identity() if post else make_norm(kind, config.hidden_size, eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def _embed(self, input_ids: Any) -> Tensor:
        if self.embeddings.word_embeddings is None:
            raise InvalidInput("this model embeds no tokens: give inputs_embeds.")
        return self.embeddings.word_embeddings(input_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """The hidden states of all tokens.

        Args:
            input_ids: (B,N); or
            inputs_embeds: (B,N,d).
            attention_mask: (B,N), 1 for real tokens, with the tokens in the cache before them; or a 4-D mask that is
                nothing but padding, order and packing. Padding stands at the end of the rows with "mixed_chunk".
            token_type_ids: (B,N), with type_vocab_size.
            position_ids: (B|1,N), for the sinusoid; units count tokens themselves. Restarts mark packed sequences.
            past_key_values: a `DynamicCache`, which takes the units' states.
            use_cache: return the cache. None: in evaluation, if config.use_cache and the model is causal.
            output_attentions: return the weights of every layer: (B,1,N,N) for "quadratic" units, those within chunks
                (B,G,C,C) for "mixed_chunk" units, (B,H,N,N) for transformer blocks.
            output_hidden_states: return the input of every layer, and the result.

        Raises:
            InvalidInput, Unsupported: an input that does not fit, or a mode the model does not define.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidInput("give either input_ids or inputs_embeds, and not both.")
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        layout = self._layout(x, attention_mask, position_ids, past)
        if layout.packing is not None:
            self._check_packing(past_key_values, attentions)
            cache = None
            x = layout.packing.unpack(x[:, None])[:, 0]
            if token_type_ids is not None:
                token_type_ids = layout.packing.unpack(token_type_ids[:, None, :, None])[:, 0, :, 0]
        if attentions and past:
            raise Unsupported(
                "gau", "output_attentions while decoding with a state: the past keys are gone", "Pass use_cache=False"
            )

        x = self.embeddings(x, token_type_ids, layout.positions)
        rotation = self.layers[0].rotation(past, x.shape[1], x) if config.use_rope else None
        states, maps = [], []
        for index, layer in enumerate(self.layers):
            if hidden:
                states.append(x)
            if attentions:
                maps.append(layer.attention_weights(x, layout.real, config.is_decoder))
            if cache is None:
                x = layer(x, layout.real, config.is_decoder, None, False, rotation)
            else:
                held = state_layer(cache, index, "gau", UnitLayer)
                x, state = layer(x, layout.real, True, held.state, True, rotation)
                held.put(state, x)
        states.append(x := self.norm(x))
        if layout.packing is not None:
            states = [layout.packing.pack(s[:, None])[:, 0] for s in states]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if hidden else None,
            attentions=tuple(maps) if attentions else None,
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache of this call, or None."""
        asked, config = use_cache or cache is not None, self.config
        if asked and not config.is_decoder:
            raise Unsupported(
                "gau", "a cache with is_decoder=False: bidirectional attention has no past", "Leave it out"
            )
        if asked and self.gradient_checkpointing and self.training:
            raise Unsupported("gau", "a cache in training with gradient checkpointing", "Pass use_cache=False")
        if cache is None and use_cache is None:
            use_cache = config.use_cache and config.is_decoder and not self.training
        return DynamicCache(config=config) if cache is None and use_cache else cache

    def _check_packing(self, cache: Cache | None, attentions: bool | None) -> None:
        """Packed rows take no cache and have no maps."""
        if self.config.packed_segments == "refuse":
            raise Unsupported(
                "gau",
                "packed sequences in a row",
                'Set packed_segments="exact", which gives every sequence a row of its own, or pad one sequence a row',
            )
        if cache is not None or attentions:
            given = "a cache" if cache is not None else "output_attentions"
            raise Unsupported("gau", f"{given} with packed sequences", "Pass one sequence a row")

    def _layout(self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int) -> Layout:
        """What the mask and the positions mean for the N new tokens."""
        batch, tokens, _ = x.shape
        compiling = torch.compiler.is_compiling()
        found = interpret(mask, batch, tokens, past + tokens, self.config.is_decoder, keep_dense=False)
        if found.dense is not None:
            raise Unsupported(
                "gau",
                f"an attention_mask of shape {tuple(found.dense.shape)} that is more than padding, order and packing",
                "Pass a 2-D mask",
            )
        real, segments = found.key_padding, found.segments
        if real is not None and not compiling and real.all():
            real = None
        if position_ids is not None and real is None and segments is None and not past:
            segments = packed_segments(position_ids, batch)
        if segments is not None:
            packing = Packing.of(segments)
            places = torch.arange(packing.key_padding.shape[1], device=x.device)[None]
            return Layout(packing.key_padding, places, packing)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=x.device)[None]
            if real is not None:
                position_ids = (real.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        if past and real is not None:
            self._refuse_late_padding(real[:, past:])
            real = None
        return Layout(real, position_ids)

    def _refuse_late_padding(self, new: Tensor) -> None:
        rule = "attention_mask hides new tokens while decoding with a state"
        remedy = "Decode rows of equal length, or pass use_cache=False"
        if torch.compiler.is_compiling():
            torch._assert_async(new.all(), f"gau: {rule}. {remedy}")
        elif not new.all():
            raise Unsupported("gau", rule, remedy)


def make_layer(config: GauConfig) -> nn.Module:
    """One unit, or one block of a baseline."""
    if config.block == "transformer":
        return TransformerBlock(config)
    options = vars(config.unit_options)
    return (FlashGatedAttentionUnit if config.attention == "mixed_chunk" else GatedAttentionUnit)(**options)


@functools.cache
def register_models() -> None:
    """Register the family with the Auto classes of models; AutoConfig knows it by `announce_own`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto import modeling_auto, tokenization_auto

    from hf_attn.models import gau_heads

    modeling_auto.AutoModel.register(GauConfig, GauModel, exist_ok=True)
    for auto, head in HEADS.items():
        getattr(modeling_auto, auto).register(GauConfig, getattr(gau_heads, head), exist_ok=True)
    tokenization_auto.TOKENIZER_MAPPING.register(GauConfig, PreTrainedTokenizerFast, exist_ok=True)


@functools.cache
def register_images() -> None:
    """Let AutoImageProcessor know the family: ViT's processor. Put off until there is a model of images."""
    from transformers import ViTConfig

    # transformers 5.17 hides this module from `from ... import` where torchvision is missing, and needs none itself
    mapping = importlib.import_module("transformers.models.auto.image_processing_auto").IMAGE_PROCESSOR_MAPPING
    mapping.register(GauConfig, mapping[ViTConfig], exist_ok=True)


def __getattr__(name: str) -> Any:
    """The heads, which are built on this module."""
    if name not in HEADS.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("hf_attn.models.gau_heads"), name)
