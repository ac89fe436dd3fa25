"""The config of dual encoders, and its entry in the Auto classes. Imports no torch, like AutoConfig."""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from hf_attn.errors import InvalidOption, Unsupported

POOLING = ("cls", "mean", "last")
DISTILL_LOSSES = ("m3se", "margin_mse", "mse", "softmax_ce", "onehot")


class DualEncoderConfig(PreTrainedConfig):
    """Two encoders of texts, and the loss they are trained with.

    Args:
        query_encoder: config of the queries' encoder, or its dict with `model_type`: any model of AutoModel that takes
            `input_ids` and `attention_mask` and returns `last_hidden_state`.
        document_encoder: that of the documents; None: one encoder for both.
        pooling: "cls" (the first token), "mean" (of the real tokens) or "last" (the last real token).
        embedding_dim: width of a linear layer after pooling; None: no layer.
        projection_bias: that layer has a bias.
        normalize: embeddings have length 1; the paper's do not.
        score_scale: factor of the dot product, positive.
        learn_score_scale: the factor is trained.
        distill_loss: "m3se", "margin_mse", "mse", "softmax_ce" or "onehot", see `hf_attn.models.dual_encoder_losses`.
        alpha_onehot: weight of the one-hot loss beside the distillation, 0 to 1.
        normalise_teacher: divide the teacher's scores of a batch by their standard deviation.
        in_batch_negatives: documents of other queries are negatives too: in the one-hot loss, and in the distillation
            where the teacher scored every pair.

    Raises:
        InvalidOption: a value outside its rule.
    """

    model_type = "dual_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {
        "query_encoder": AutoConfig,
        "document_encoder": AutoConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["query_embeds", "doc_embeds"]

    query_encoder: PreTrainedConfig | dict | None = None
    document_encoder: PreTrainedConfig | dict | None = None
    pooling: str = "cls"
    embedding_dim: int | None = None
    projection_bias: bool = False
    normalize: bool = False
    score_scale: float = 1.0
    learn_score_scale: bool = False
    distill_loss: str = "m3se"
    alpha_onehot: float = 0.0
    normalise_teacher: bool = False
    in_batch_negatives: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.query_encoder = _encoder_config(self.query_encoder, "query_encoder")
        self.document_encoder = _encoder_config(self.document_encoder, "document_encoder")
        # transformers hands None down otherwise, and each encoder forgets its own choice
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or {}
        super().__post_init__(**kwargs)
        self.check()
        register_dual_encoder()

    @property
    def shared_encoder(self) -> bool:
        """Whether queries and documents have one encoder."""
        return self.document_encoder is None

    @property
    def hidden_size(self) -> int:
        """Width of the encoders' hidden states."""
        return self.query_encoder.hidden_size

    def check(self) -> None:
        """Raise `InvalidOption` for a value outside its rule."""
        if self.pooling not in POOLING:
            raise InvalidOption(f"DualEncoderConfig: pooling={self.pooling!r} must be one of {', '.join(POOLING)}.")
        if self.distill_loss not in DISTILL_LOSSES:
            raise InvalidOption(
                f"DualEncoderConfig: distill_loss={self.distill_loss!r} must be one of {', '.join(DISTILL_LOSSES)}."
            )
        if self.embedding_dim is not None and self.embedding_dim < 1:
            raise InvalidOption(f"DualEncoderConfig: embedding_dim={self.embedding_dim} must be at least 1, or None.")
        if not 0 < self.score_scale < math.inf:
            raise InvalidOption(f"DualEncoderConfig: score_scale={self.score_scale} must be a positive number.")
        if not 0 <= self.alpha_onehot <= 1:
            raise InvalidOption(
                f"DualEncoderConfig: alpha_onehot={self.alpha_onehot} must be from 0 (the teacher alone) to 1 (labels alone)."
            )
        sizes = [c.hidden_size for c in (self.query_encoder, self.document_encoder) if c is not None]
        if self.embedding_dim is None and len(set(sizes)) > 1:
            raise InvalidOption(
                f"DualEncoderConfig: the encoders have hidden sizes {sizes}; give embedding_dim, to which both are projected."
            )


def _encoder_config(config: PreTrainedConfig | dict | None, name: str) -> PreTrainedConfig | None:
    if config is None and name == "query_encoder":
        # transformers makes an empty config to compare others with
        return AutoConfig.for_model("bert")
    if isinstance(config, dict):
        values = dict(config)
        if "model_type" not in values:
            raise InvalidOption(f"DualEncoderConfig: {name} is a dict without model_type, such as 'attn_bert'.")
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    if config is not None and (config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int)):
        raise Unsupported(
            f"DualEncoderConfig, {name}",
            f"a {type(config).__name__} describes no single encoder with a hidden_size",
            "Use an encoder such as BERT",
        )
    return config


def register_dual_encoder() -> type[DualEncoderConfig]:
    """Let AutoConfig and AutoModel know dual encoders; their config class."""
    from transformers import AutoModel

    model = importlib.import_module("hf_attn.models.dual_encoder").DualEncoderModel
    AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
    AutoModel.register(DualEncoderConfig, model, exist_ok=True)
    return DualEncoderConfig
