"""The heads of the gau family: language models, and classifiers of sequences, tokens and images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.gau import GauModel, GauPreTrainedModel, register_images
from hf_attn.models.gau_config import GauConfig

_TIED = {"lm_head.weight": "gau.embeddings.word_embeddings.weight"}


class GauForMaskedLM(GauPreTrainedModel):
    """A bidirectional model that predicts hidden tokens.

    Args:
        config: with is_decoder=False.
    """

    _tied_weights_keys = _TIED

    def __init__(self, config: GauConfig):
        if config.is_decoder:
            raise Unsupported("GauForMaskedLM", "is_decoder=True: causal attention", "Set is_decoder=False")
        super().__init__(config)
        self.gau = GauModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (B,N,V). Arguments of `GauModel`; `labels` (B,N), -100 where there is nothing to predict."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        found = encode(self.gau, *inputs, output_attentions, output_hidden_states)
        logits = self.lm_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions)


class GauForCausalLM(GauPreTrainedModel, GenerationMixin):
    """A causal language model; `generate` keeps a state of constant size with attention="mixed_chunk".

    Args:
        config: any; a copy of it gets is_decoder=True.
    """

    _tied_weights_keys = _TIED

    def __init__(self, config: GauConfig):
        if not config.is_decoder:
            config = causal(config)
        super().__init__(config)
        self.gau = GauModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B,N,V).

        Args:
            labels: (B,N), the input itself: shifting is done here. -100 where there is nothing to predict.
            logits_to_keep: compute logits of the last tokens only, or of the tokens with these indices; 0: of all.
            kwargs: of the loss, such as num_items_in_batch.
        The other arguments are those of `GauModel`.
        """
        found = self.gau(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values,
            use_cache=use_cache, output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def _validate_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        super()._validate_generated_length(generation_config, *args, **kwargs)
        config, longest = self.config, generation_config.max_length
        limited = config.block == "gau" and config.attention == "quadratic" and config.rel_pos_bias == "toeplitz"
        if limited and longest is not None and longest > config.max_position_embeddings:
            raise Unsupported(
                "gau",
                f"generating up to {longest} tokens, and the toeplitz bias has "
                f"max_position_embeddings={config.max_position_embeddings}",
                "Ask for fewer new tokens, or train with rel_pos_bias='rope' or 'none'",
            )


def causal(config: GauConfig) -> GauConfig:
    """A copy of `config` for a causal model.

    Raises:
        InvalidOption: the config has fields that only bidirectional models can have.
    """
    config = copy.deepcopy(config)
    config.is_decoder = True
    config._check()
    return config


class GauForSequenceClassification(GauPreTrainedModel):
    """A classifier (or regressor) of whole sequences, by the token or mean that config.pooling says.

    Args:
        config: the config.
    """

    def __init__(self, config: GauConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gau = GauModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B,labels). Arguments of `GauModel`; `labels` (B,), or (B,labels) for several labels a row."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        found = encode(self.gau, *inputs, output_attentions, output_hidden_states)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise InvalidInput("attention_mask must be (B,N) to say which tokens a sequence has.")
        pooled = pool(found.last_hidden_state, attention_mask, self.config)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )


class GauForTokenClassification(GauPreTrainedModel):
    """A classifier of every token.

    Args:
        config: the config.
    """

    def __init__(self, config: GauConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gau = GauModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B,N,labels). Arguments of `GauModel`; `labels` (B,N), -100 where there is no label."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        found = encode(self.gau, *inputs, output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(found.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )


class GauForImageClassification(GauPreTrainedModel):
    """A classifier of images: patches in raster order, after a first token with pooling="cls".

    Args:
        config: with image_size, patch_size and num_channels; pooling "cls" or "mean".

    Raises:
        InvalidOption: a causal config, pooling="last", or more tokens than max_position_embeddings allows.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: GauConfig):
        if config.is_decoder or config.pooling == "last":
            raise InvalidOption(
                f"GauForImageClassification: is_decoder={config.is_decoder!r}, pooling={config.pooling!r}: "
                "patches have no order to be causal in. Set is_decoder=False and pooling='cls' or 'mean'."
            )
        tokens = (config.image_size // config.patch_size) ** 2 + (config.pooling != "mean")
        if (
            config.attention == "quadratic"
            and config.rel_pos_bias == "toeplitz"
            and tokens > config.max_position_embeddings
        ):
            raise InvalidOption(
                f"GauForImageClassification: image_size={config.image_size!r} makes {tokens} tokens, more than "
                f"max_position_embeddings={config.max_position_embeddings}. Set a larger one."
            )
        super().__init__(config)
        register_images()
        self.num_labels = config.num_labels
        self.gau = GauModel(config, add_word_embeddings=False)
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        first = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if config.pooling != "mean" else None
        self.cls_token: nn.Parameter | None = first
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits (B,labels) of pixel_values (B,channels,image_size,image_size); `labels` (B,)."""
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.shape[1:] != expected:
            raise InvalidInput(
                f"pixel_values must be (B,{','.join(map(str, expected))}); got {tuple(pixel_values.shape)}."
            )
        x = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        found = encode(self.gau, None, None, None, None, x, output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(pool(found.last_hidden_state, None, config)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )


def encode(
    model: GauModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
) -> BaseModelOutputWithPast:
    """What `model` makes of the inputs, without a cache."""
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        use_cache=False,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        return_dict=True,
    )


def classifier_dropout(config: GauConfig) -> float:
    """The dropout before a classifier."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def pool(x: Tensor, attention_mask: Tensor | None, config: GauConfig) -> Tensor:
    """(B,d) of (B,N,d): the first real token, the mean of the real tokens, or the last real token."""
    real = torch.ones(x.shape[:2], device=x.device) if attention_mask is None else attention_mask.to(x.device, x.dtype)
    how = config.pooling or ("last" if config.is_decoder else "cls")
    if how == "mean":
        real = real.to(x.dtype)[..., None]
        return (x * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    places = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
    # the first or the largest place among the real ones
    index = (real > 0).to(torch.float32).argmax(dim=1) if how == "cls" else ((real > 0) * places).argmax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), index]
