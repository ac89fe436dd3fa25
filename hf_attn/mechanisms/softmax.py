"""softmax: scaled dot-product attention, the baseline, as a mechanism like any other.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1.

    out_n = softmax_m(s <q_n, k_m>) . v        over the visible keys

Shapes: query (B,H,N,D), key and value (B,H,M,D).
When to use: as the reference, in the layers that need exact weights, and for masks of any form.
When not: where its N x M work is what you want to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_attn.capabilities import Capabilities
from hf_attn.functional import masked_softmax
from hf_attn.kernels import flash
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register


@dataclass(frozen=True)
class SoftmaxOptions(Options):
    """Options of `softmax`.

    Attributes:
        backend: "auto" takes the first that can run; a name fails loudly where it cannot. See `hf-attn doctor`.
    """

    mechanism: ClassVar[str] = "softmax"

    backend: str = "auto"

    def check(self) -> None:
        self.one_of("backend", "auto", *flash.BACKENDS)


class SoftmaxAttention(AttentionModule):
    """Scaled dot-product attention by the fastest exact kernel at hand."""

    name = "softmax"
    options_class = SoftmaxOptions
    in_float32 = False

    @classmethod
    def describe(cls, options: SoftmaxOptions) -> Capabilities:
        return Capabilities(
            causal=True,
            cross=True,
            packed=True,
            dense_mask=True,
            decode="full cache",
            attention_weights=True,
            dropout=True,
            backends=tuple(flash.BACKENDS),
            pays_from="is the baseline",
        )

    def weights(self, call: Call) -> Tensor:
        logits = call.scale * (call.query @ call.key.transpose(-1, -2))
        mask = call.attention_mask
        if mask is None or mask.dtype == torch.bool:
            return masked_softmax(logits, call.visible())
        # an additive mask hides by its most negative value; a wholly hidden row gives zeros
        return masked_softmax(logits + mask, mask > torch.finfo(mask.dtype).min / 2)

    def attend(self, call: Call) -> Tensor:
        return flash.attention(
            call.query,
            call.key,
            call.value,
            key_padding_mask=call.key_padding_mask,
            attention_mask=call.attention_mask,
            is_causal=call.is_causal,
            scaling=call.scale,
            dropout=call.dropout,
            backend=self.options.backend,
        )


register(
    Mechanism(
        name="softmax",
        title="Scaled dot-product attention",
        paper="Vaswani et al., NeurIPS 2017 (arXiv 1706.03762)",
        equation="out_n = softmax_m(s <q_n, k_m>) . v",
        module_class=SoftmaxAttention,
        example={},
    )
)
