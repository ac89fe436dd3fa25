"""Dual encoders: queries and documents are embedded apart, and a score is the dot product of two embeddings.

Paper: Menon, Jayasumana, Rawat, Kim, Reddi, Kumar, "In defense of dual-encoders for neural ranking", ICML 2022
(PMLR 162:15376-15400). No official code exists.

    s(q, d) = score_scale * <f(q), g(d)>

f and g are any encoders of transformers or of this package, with one set of weights or two. Training:
`hf_attn.recipes.dual_encoder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.dual_encoder_config import DualEncoderConfig
from hf_attn.models.dual_encoder_losses import LOSSES, onehot_loss
from hf_attn.models.saving import SavedModelMixin
from hf_attn.models.wrapping import attention_modules


@dataclass
class DualEncoderOutput(ModelOutput):
    """What a dual encoder returns, for B queries of n documents each.

    Attributes:
        loss: where labels were given.
        scores: (B,n), -inf where there is no document.
        query_embeds: (B,D).
        doc_embeds: (B,n,D).
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    query_embeds: Tensor | None = None
    doc_embeds: Tensor | None = None


def pool(states: Tensor, attention_mask: Tensor, how: str) -> Tensor:
    """(B,D) of hidden states (B,L,D): the first token, the mean of the real tokens, or the last real token.

    A text without real tokens gives 0 for "mean" and "last".
    """
    if how == "cls":
        return states[:, 0]
    real = attention_mask.bool()[..., None]
    if how == "mean":
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return (wide.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)).to(states.dtype)
    places = torch.arange(1, states.shape[1] + 1, device=states.device)
    last = (places * attention_mask.bool()).argmax(1)
    return states.masked_fill(~real, 0).take_along_dim(last[:, None, None], dim=1)[:, 0]


class DualEncoderModel(SavedModelMixin, PreTrainedModel):
    """A dual encoder.

    Args:
        config: a DualEncoderConfig. `DualEncoderModel.from_encoders` makes one of loaded encoders.

    Raises:
        Unsupported: an encoder that takes no tokens, or "cls" pooling of a causal one, whose first token sees no other.
    """

    config_class = DualEncoderConfig
    config: DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "query_input_ids"
    supports_gradient_checkpointing = True
    # what the encoders do with it is checked when they are made
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: DualEncoderConfig, query_encoder: Any | None = None, document_encoder: Any | None = None
    ):
        super().__init__(config)
        shared = config.shared_encoder
        if query_encoder is None:
            query_encoder = AutoModel.from_config(config.query_encoder)
        if document_encoder is None and not shared:
            document_encoder = AutoModel.from_config(config.document_encoder)
        self.query_encoder, self.document_encoder = query_encoder, document_encoder
        # the encoders may have filled in their mechanisms' options
        config.query_encoder = self.query_encoder.config
        if self.document_encoder is not None:
            config.document_encoder = self.document_encoder.config
        for encoder in (self.query_encoder, self.document_encoder):
            if encoder is not None:
                _check_encoder(encoder, config.pooling)
        self.query_projection = self._projection(config.query_encoder.hidden_size)
        self.document_projection = None if shared else self._projection(config.document_encoder.hidden_size)
        self.log_score_scale = nn.Parameter(torch.empty(())) if config.learn_score_scale else None
        self.post_init()

    def _projection(self, width: int) -> nn.Linear | None:
        dim = self.config.embedding_dim
        return None if dim is None else nn.Linear(width, dim, bias=self.config.projection_bias)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.log_score_scale is not None:
            nn.init.constant_(self.log_score_scale, math.log(self.config.score_scale))

    @classmethod
    def from_encoders(
        cls, query_encoder: PreTrainedModel, document_encoder: PreTrainedModel | None = None, **fields: Any
    ) -> DualEncoderModel:
        """A dual encoder around loaded encoders, which become a part of it.

        Args:
            query_encoder: such as `AutoModel.from_pretrained(...)`, with any mechanism.
            document_encoder: None: the same encoder for documents.
            fields: of DualEncoderConfig.
        """
        if document_encoder is query_encoder:
            document_encoder = None
        config = DualEncoderConfig(
            query_encoder=query_encoder.config,
            document_encoder=None if document_encoder is None else document_encoder.config,
            **fields,
        )
        # initialising the whole must not touch loaded weights
        for encoder in (query_encoder, document_encoder):
            modules: Any = () if encoder is None else encoder.modules()
            for module in modules:
                module._is_hf_initialized = True
        return cls(config, query_encoder, document_encoder)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Switch the attention of every encoder in place, as the encoders themselves do."""
        for encoder in (self.query_encoder, self.document_encoder):
            if encoder is not None:
                encoder.set_attn_implementation(attn_implementation, *args, **kwargs)

    @property
    def score_scale(self) -> Tensor | float:
        """The factor of the dot product."""
        return self.config.score_scale if self.log_score_scale is None else self.log_score_scale.exp()

    def encode_queries(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,L) tokens, and 1 where they are real -> (B,D)."""
        return self._encode(self.query_encoder, self.query_projection, input_ids, attention_mask)

    def encode_documents(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,L) tokens, and 1 where they are real -> (B,D)."""
        if self.document_encoder is None:
            return self.encode_queries(input_ids, attention_mask)
        return self._encode(self.document_encoder, self.document_projection, input_ids, attention_mask)

    def _encode(self, encoder: Any, projection: nn.Linear | None, ids: Tensor, mask: Tensor | None) -> Tensor:
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            shape = None if mask is None else tuple(mask.shape)
            raise InvalidInput(f"input_ids {tuple(ids.shape)} must be (B,L), and attention_mask {shape} alike.")
        mask = torch.ones_like(ids) if mask is None else mask
        pooled = pool(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask, self.config.pooling)
        embedded = pooled if projection is None else projection(pooled)
        return functional.normalize(embedded, dim=-1) if self.config.normalize else embedded

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor | None = None,
        doc_input_ids: Tensor | None = None,
        doc_attention_mask: Tensor | None = None,
        doc_mask: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_scores: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Embeddings, scores, and the loss of the config where `labels` are given.

        Args:
            query_input_ids, query_attention_mask: (B,L).
            doc_input_ids, doc_attention_mask: (B,n,M), the documents of each query.
            doc_mask: (B,n) bool, False where a query has fewer documents.
            labels: (B,n) int64, 1 for a positive; what stands at places without a document is not read.
            teacher_scores: (B,n); or (B,B*n) of every query and every document of the batch, with in_batch_negatives.

        Raises:
            InvalidInput: shapes do not fit, or a loss lacks what it needs.
        """
        if doc_input_ids is None or doc_input_ids.dim() != 3 or len(doc_input_ids) != len(query_input_ids):
            shape = None if doc_input_ids is None else tuple(doc_input_ids.shape)
            raise InvalidInput(
                f"doc_input_ids {shape} must be (B,n,M), n documents for each of {len(query_input_ids)} queries. "
                "To embed queries or documents alone, use encode_queries or encode_documents."
            )
        batch, count, length = doc_input_ids.shape
        doc_mask = torch.ones_like(doc_input_ids[..., 0], dtype=torch.bool) if doc_mask is None else doc_mask.bool()
        if doc_mask.shape != (batch, count):
            raise InvalidInput(f"doc_mask {tuple(doc_mask.shape)} must be ({batch}, {count}).")
        if doc_attention_mask is None:
            doc_attention_mask = torch.ones_like(doc_input_ids)
        # a place without a document shows one token: attention without visible keys may be NaN
        shown = torch.zeros_like(doc_attention_mask)
        shown[..., 0] = 1
        doc_attention_mask = doc_attention_mask.where(doc_mask[..., None], shown)
        query = self.encode_queries(query_input_ids, query_attention_mask)
        document = self.encode_documents(doc_input_ids.flatten(0, 1), doc_attention_mask.flatten(0, 1))
        # half precision rounds scores of the usual size by more than their margins
        wide = torch.promote_types(query.dtype, torch.float32)
        every = self.score_scale * (query.to(wide) @ document.to(wide).T)
        own = every.unflatten(1, (batch, count))[torch.arange(batch), torch.arange(batch)]
        loss = None
        if labels is not None:
            tokens = (doc_input_ids * doc_attention_mask).flatten(0, 1)
            loss = self._loss(every, own, labels, doc_mask, teacher_scores, tokens)
        output = DualEncoderOutput(
            loss=loss,
            scores=own.masked_fill(~doc_mask, -math.inf),
            query_embeds=query,
            doc_embeds=document.unflatten(0, (batch, count)),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _loss(
        self, every: Tensor, own: Tensor, labels: Tensor, mask: Tensor, teacher: Tensor | None, tokens: Tensor
    ) -> Tensor:
        config = self.config
        listed = (own, labels, mask)
        wide = (every, *in_batch(labels, mask, tokens)) if config.in_batch_negatives else listed
        weight = 1.0 if config.distill_loss == "onehot" else config.alpha_onehot
        onehot = onehot_loss(wide[0], None, *wide[1:]) if weight else own.new_zeros(())
        if weight == 1:
            return onehot
        if teacher is None:
            raise InvalidInput(
                f"DualEncoderModel: labels without teacher_scores, which distill_loss={config.distill_loss!r} needs. "
                "Give them, or set distill_loss='onehot' in the config."
            )
        chosen = wide if teacher.shape == wide[0].shape else listed
        if teacher.shape != chosen[0].shape:
            raise InvalidInput(
                f"teacher_scores {tuple(teacher.shape)} must be {tuple(own.shape)}"
                + (f" or {tuple(every.shape)}." if config.in_batch_negatives else ".")
            )
        if config.in_batch_negatives and chosen is listed and not weight and len(own) > 1:
            raise InvalidInput(
                "DualEncoderModel: in_batch_negatives have no teacher scores and no one-hot loss. Give teacher_scores of "
                f"every pair, {tuple(every.shape)}, or set alpha_onehot above 0."
            )
        scores, targets, real = chosen
        if config.normalise_teacher:
            teacher = teacher / _spread(teacher, real)
        return (1 - weight) * LOSSES[config.distill_loss](scores, teacher, targets, real) + weight * onehot


def in_batch(labels: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and mask (B,B*n) of every query and every document of the batch: documents of other queries are negatives.

    A document that a query lists itself counts once, with the label it has there.

    Args:
        labels, mask: (B,n), of each query's own documents.
        tokens: (B*n,M), 0 at padding.
    """
    batch, count = labels.shape
    own = torch.eye(batch, dtype=torch.bool, device=labels.device)[:, :, None]
    same = (tokens[:, None] == tokens[None]).all(-1).view(batch, count, batch, count)
    listed = (same & mask[:, :, None, None]).any(1)
    every = own.to(labels.dtype) * labels[:, None]
    return every.flatten(1), (mask[None] & (own | ~listed)).flatten(1)


def _spread(scores: Tensor, real: Tensor) -> Tensor:
    """Standard deviation of the scores at real documents; 1 where they are all alike."""
    count = real.sum().clamp(min=1)
    mean = scores.masked_fill(~real, 0).sum() / count
    variance = (scores - mean).masked_fill(~real, 0).square().sum() / count
    return variance.where(variance > 0, torch.ones_like(variance)).sqrt()


def _check_encoder(encoder: Any, pooling: str) -> None:
    name = f"DualEncoderModel, {type(encoder).__name__}"
    if encoder.main_input_name != "input_ids":
        raise Unsupported(name, f"it takes {encoder.main_input_name}", "Use an encoder of tokens, such as BERT")
    causal = any(getattr(module, "is_causal", False) for module in attention_modules(encoder).values())
    if pooling == "cls" and (causal or getattr(encoder.config, "is_decoder", False)):
        raise Unsupported(name, "its first token sees no other, so pooling='cls' reads nothing", "Set pooling='last'")
