"""Lightweight and dynamic convolution: a short kernel over neighbouring values, learned or predicted from the token.

Paper: Wu, Fan, Baevski, Dauphin, Auli, "Pay Less Attention with Lightweight and Dynamic Convolutions", ICLR 2019
(arXiv 1901.10430); padding, renormalisation and initialisation as in its official code (fairseq).

    out_n = sum_t kernel_n[t] value_{n+t-l}        t = 0..K-1; values outside the sequence are 0
    kernel_n = softmax_t(W x_n)  (dynamic)    or    softmax_t(w), the same for all tokens  (lightweight)
    l = K - 1 causal, floor((K - 1) / 2) otherwise

Shapes: query, key and value (B,H,N,D), kernel (B,H,N,K), W (H*K, H*D), w (H,K); x_n (H*D) is the query, value or layer
input of token n with its heads side by side.
When to use: local mixing in O(N K D), decoding with a state of K - 1 values; beside layers of global attention.
When not: where tokens farther apart than K must meet in one layer, or pretrained query and key weights must keep
their meaning: no product of query and key enters, and the key is not used at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.functional import masked_softmax
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

BLOCK = 16
"""Queries that share one banded product; 16 to 64 took about the same time on a CPU with K = 7 and 31."""


@dataclass(frozen=True)
class DynamicConvOptions(Options):
    """Options of `dynamic_conv`.

    Attributes:
        kernel_size: K, the taps of the kernel.
        dynamic: True predicts the kernel of a token from that token; False learns one kernel a head (lightweight).
        weight_softmax: softmax of the kernel over its taps.
        renormalize: the softmax runs only over the taps that fall on a real token: exact local attention.
        predict_from: what the kernel is predicted from, "query", "value" or "layer_input"; dynamic only.
    """

    mechanism: ClassVar[str] = "dynamic_conv"

    kernel_size: int = 7
    dynamic: bool = True
    weight_softmax: bool = True
    renormalize: bool = False
    predict_from: str = "query"

    def check(self) -> None:
        self.integer("kernel_size", 1)
        self.boolean("dynamic", "weight_softmax", "renormalize")
        self.one_of("predict_from", "query", "value", "layer_input")
        if self.renormalize and not self.weight_softmax:
            rule = "belongs to the softmax over the taps, and weight_softmax=False"
            raise self.refuse("renormalize", rule, "Leave renormalize out.")
        if not self.dynamic and self.predict_from != "query":
            rule = "belongs to predicted kernels, and dynamic=False"
            raise self.refuse("predict_from", rule, "Leave predict_from out.")


class DynamicConvolution(AttentionModule):
    """Convolution of the values with a short kernel a head, predicted from each token or learned."""

    name = "dynamic_conv"
    options_class = DynamicConvOptions

    def __init__(self, num_heads: int, head_dim: int, options: DynamicConvOptions):
        super().__init__(num_heads, head_dim, options)
        if options.dynamic:
            self.weight_linear = nn.Linear(num_heads * head_dim, num_heads * options.kernel_size, bias=False)
        else:
            self.weight = nn.Parameter(torch.empty(num_heads, options.kernel_size))

    @classmethod
    def describe(cls, options: DynamicConvOptions) -> Capabilities:
        return Capabilities(
            causal=True,
            packed=True,
            decode="constant state",
            learned=True,
            needs_layer_input=options.predict_from == "layer_input",
            # without it rows sum to less than one near edges: a kernel, but no attention weights
            attention_weights=options.renormalize,
            dropout=True,
            pays_from="256 (2-core CPU, float32, D = 64)",
        )

    def reset_parameters(self) -> None:
        """Xavier uniform; a lightweight kernel counts as a convolution of one input channel, shape (H,1,K)."""
        if self.options.dynamic:
            nn.init.xavier_uniform_(self.weight_linear.weight)
        else:
            heads, taps = self.weight.shape
            bound = (6 / (taps + heads * taps)) ** 0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call = super()._call(query, key, value, **arguments)
        if self.capabilities.needs_layer_input:
            call.require_layer_input(self.name, "predict_from='layer_input'", "use predict_from='query'")
        return call

    def logits(self, call: Call) -> Tensor:
        """The kernel before its softmax: (B,H,N,K), or (1,H,1,K) where all tokens share it."""
        dtype = call.query.dtype
        if not self.options.dynamic:
            return self.weight.to(dtype)[None, :, None]
        source = getattr(call, self.options.predict_from)
        if source.dim() == 4:
            source = source[:, :, -call.queries :].transpose(1, 2).flatten(2)
        logits = functional.linear(source, self.weight_linear.weight.to(dtype))
        return logits.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def left(self, call: Call) -> int:
        """Taps before the token itself."""
        return self.options.kernel_size - 1 if call.is_causal else (self.options.kernel_size - 1) // 2

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        """The tap on which key m falls for query n, for all pairs."""
        taps, shape = self.options.kernel_size, (call.batch, self.num_heads, call.queries, call.keys)
        query = torch.arange(call.queries, device=call.query.device)[:, None] + call.keys - call.queries
        tap = torch.arange(call.keys, device=call.query.device) - query + self.left(call)
        visible = ((tap >= 0) & (tap < taps))[None, None]
        if call.key_padding_mask is not None:
            visible = visible & call.key_padding_mask[:, None, None]
        logits = self.logits(call).expand(*shape[:3], -1)
        place = tap.clamp(0, taps - 1).expand(shape)
        if self.options.renormalize:
            return masked_softmax(logits.gather(-1, place), visible)
        kernel = logits.softmax(dim=-1) if self.options.weight_softmax else logits
        return kernel.gather(-1, place).masked_fill(~visible, 0)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        return self._convolve(call, *_hide(call))

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """The state: the last K - 1 values (B,H,K-1,D), and which of them are tokens (B,K-1)."""
        value, real = _hide(call)
        past = self.options.kernel_size - 1
        if state is None:
            state = {
                "value": value.new_zeros(call.batch, self.num_heads, past, self.head_dim),
                "real": real.new_zeros(call.batch, past),
            }
        value = torch.cat((state["value"], value), dim=2)
        real = torch.cat((state["real"], real), dim=1)
        keep = value.shape[2] - past
        # copies: a view would keep the whole prompt
        new = {"value": value[:, :, keep:].clone(), "real": real[:, keep:].clone()}
        return self._convolve(call, value, real), new

    def _convolve(self, call: Call, value: Tensor, real: Tensor) -> Tensor:
        """The last N of the values (B,H,M,D), 0 where not `real` (B,M), each with its window."""
        options, left = self.options, self.left(call)
        # a negative number cuts off the values before the first window
        before, after = left - (value.shape[2] - call.queries), options.kernel_size - 1 - left
        kernel = self.logits(call)
        if options.renormalize:
            windows = functional.pad(real, (before, after), value=False).unfold(1, options.kernel_size, 1)
            kernel = masked_softmax(kernel, windows[:, None])
        elif options.weight_softmax:
            kernel = kernel.softmax(dim=-1)
        kernel = functional.dropout(kernel, call.dropout, self.training)
        return _banded(kernel, functional.pad(value, (0, 0, before, after)), call.queries)


def _hide(call: Call) -> tuple[Tensor, Tensor]:
    """The values, zero at padding, and (B,M) bool, True for a real token."""
    mask = call.key_padding_mask
    if mask is None:
        return call.value, torch.ones(call.batch, call.keys, dtype=torch.bool, device=call.value.device)
    return call.value.masked_fill(~mask[:, None, :, None], 0), mask


def _banded(kernel: Tensor, value: Tensor, queries: int) -> Tensor:
    """(B,H,N,D) sum_t kernel[n,t] value[n+t], a block of queries at a time as a banded matrix.

    Args: kernel (B,H,N,K), or (1,H,1,K) for all tokens. value (B,H,N+K-1,D).
    """
    size, taps = min(BLOCK, queries), kernel.shape[-1]
    width, missing = size + taps - 1, -queries % size
    kernel = (
        functional.pad(kernel, (0, 0, 0, missing)) if kernel.shape[2] == queries else kernel.expand(-1, -1, size, -1)
    )
    # rows of size + taps numbers read as rows of one less: each row moves one place to the right
    rows = functional.pad(kernel, (0, size)).unflatten(2, (-1, size)).flatten(3)
    band = rows[..., : size * width].unflatten(3, (size, width))
    windows = functional.pad(value, (0, 0, 0, missing)).unfold(2, width, size).transpose(-1, -2)
    return (band @ windows).flatten(2, 3)[:, :, :queries]


register(
    Mechanism(
        name="dynamic_conv",
        title="Lightweight and dynamic convolution",
        paper="Wu, Fan, Baevski, Dauphin, Auli, ICLR 2019 (arXiv 1901.10430)",
        equation="out_n = sum_t kernel_n[t] value_{n+t-l},  kernel_n = softmax_t(W x_n) (dynamic) or softmax_t(w) (lightweight)",
        module_class=DynamicConvolution,
        example={"kernel_size": 5, "renormalize": True},
    )
)
