"""The attention of gated attention units as functions of query, key and value: relu2, laplace, softmax_plus.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022 (squared ReLU, Toeplitz bias); the Laplace
function is that of Ma et al., "Mega", ICLR 2023, the length-aware softmax that of GAU-alpha (Su, 2022). The paper has
one head, a gate, and one projection for queries and keys; here the functions act on the heads of a host model.

    relu2, laplace    out_i = sum_j fn(c q_i.k_j s sqrt(D) + b_{j-i}) v_j            over the visible keys
                      fn(x) = max(x, 0)^2   or   (1 + erf((x - sqrt(1/2)) / (sigma sqrt(2)))) / 2,  sigma = sqrt(1/(4 pi))
    softmax_plus      out_i = softmax_j(log(max(l_i, 16)) / log(n_ref) (s q_i.k_j + b_{j-i})) . v
                      l_i: number of keys that query i sees

Shapes: query (B,H,N,D), key and value (B,H,M,D), bias b (H, 2 n_max - 1). Rows of relu2 and laplace do not sum to one.
When to use: models trained with these functions; softmax_plus where a model should stand longer inputs.
When not: under pretrained softmax weights without training; for long inputs, as the work is N x M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import Unsupported
from hf_attn.functional import masked_softmax, recomputed
from hf_attn.kernels import flash
from hf_attn.masks import causal_order, visible_pairs
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

SPAN = 256
"""Queries handled at once; beyond that many, training computes the weights again instead of keeping them."""
SHORTEST = 16
"""The least number of visible keys that softmax_plus counts."""


@dataclass(frozen=True)
class Relu2Options(Options):
    """Options of `relu2`.

    Attributes:
        quad_norm: what divides the scores: n_ref ("ref"), the number of keys ("length") or of visible keys ("valid");
            "sqrt_s": sqrt(D), and the weights are divided by the number of visible keys.
        n_ref: reference length, never taken from the input.
        rel_pos_bias: learned bias of the scores by head and distance.
        max_position_embeddings: n_max, the length the bias is made for.
    """

    mechanism: ClassVar[str] = "relu2"

    quad_norm: str = "ref"
    n_ref: int = 512
    rel_pos_bias: bool = False
    max_position_embeddings: int = 512

    def check(self) -> None:
        self.one_of("quad_norm", "ref", "length", "valid", "sqrt_s")
        self.integer("n_ref", 1)
        self.boolean("rel_pos_bias")
        self.integer("max_position_embeddings", 1)


@dataclass(frozen=True)
class LaplaceOptions(Relu2Options):
    """Options of `laplace`, those of `relu2`.

    Attributes:
        quad_norm: what divides the scores: "ref", "length", "valid" or "sqrt_s".
        n_ref: reference length, never taken from the input.
        rel_pos_bias: learned bias of the scores by head and distance.
        max_position_embeddings: n_max, the length the bias is made for.
    """

    mechanism: ClassVar[str] = "laplace"


@dataclass(frozen=True)
class SoftmaxPlusOptions(Options):
    """Options of `softmax_plus`.

    Attributes:
        n_ref: the number of visible keys at which it is plain softmax attention.
        rel_pos_bias: learned bias of the scores by head and distance.
        max_position_embeddings: n_max, the length the bias is made for.
    """

    mechanism: ClassVar[str] = "softmax_plus"

    n_ref: int = 512
    rel_pos_bias: bool = False
    max_position_embeddings: int = 512

    def check(self) -> None:
        self.integer("n_ref", 2)
        self.boolean("rel_pos_bias")
        self.integer("max_position_embeddings", 1)


def relu2(scores: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return scores.relu().square()


def laplace(scores: Tensor) -> Tensor:
    """The normal distribution function that touches relu2 at sqrt(1/2), with value 1/2 and slope sqrt(2)."""
    return 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))


def toeplitz(table: Tensor, first: int, queries: int, keys: int) -> Tensor:
    """(H,N,M) bias table[h, j - i + n_max - 1] of queries at positions i = first.. and keys at positions j = 0.. ."""
    last = (table.shape[-1] + 1) // 2 - first - queries
    return table[:, last : last + queries + keys - 1].unfold(-1, keys, 1).flip(1)


def all_visible(call: Call) -> Tensor:
    """`call.visible()`, also where every query sees every key."""
    visible = call.visible()
    if visible is None:
        return torch.ones(1, 1, call.queries, call.keys, dtype=torch.bool, device=call.query.device)
    return visible


class _Biased(AttentionModule):
    """The learned bias by distance, and the number of keys a query sees."""

    options: Any

    def __init__(self, num_heads: int, head_dim: int, options: Any):
        super().__init__(num_heads, head_dim, options)
        if options.rel_pos_bias:
            self.rel_bias = nn.Parameter(torch.empty(num_heads, 2 * options.max_position_embeddings - 1))

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("rel_pos_bias") or "max_position_embeddings" in given:
            return {}
        tokens = host.num_prefix_tokens + math.prod(host.grid) if host.grid else host.max_length
        return {"max_position_embeddings": tokens} if tokens else {}

    def reset_parameters(self) -> None:
        if self.options.rel_pos_bias:
            nn.init.normal_(self.rel_bias, std=0.02)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        options = self.options
        if options.rel_pos_bias and query.dim() == key.dim() == 4:
            queries, keys = query.shape[2], key.shape[2]
            if queries != keys and not arguments.get("is_causal"):
                rule = f"rel_pos_bias=True with N={queries} queries and M={keys} keys: two sequences have no distances"
                raise Unsupported(self.name, rule, "Leave rel_pos_bias out, or pass as many keys as queries")
            if max(queries, keys) > options.max_position_embeddings:
                n_max = options.max_position_embeddings
                rule = f"{max(queries, keys)} tokens, and rel_pos_bias has max_position_embeddings={n_max}"
                raise Unsupported(self.name, rule, "Set a larger max_position_embeddings, or leave rel_pos_bias out")
        return super()._call(query, key, value, **arguments)

    def bias(self, call: Call) -> Tensor:
        """(H,N,M) bias by its definition."""
        position = torch.arange(call.keys, device=call.query.device)
        distance = position - position[call.keys - call.queries :, None]
        return self.rel_bias.to(call.query.dtype)[:, distance + self.options.max_position_embeddings - 1]


def _visible_keys(call: Call, dtype: torch.dtype) -> Tensor:
    """(B|1,1|H,N|1,1) number of keys a query sees, at least 1; without an N x M table of its own."""
    visible = None if call.attention_mask is None else call.visible()
    if visible is not None:
        count = visible.sum(dim=-1, keepdim=True)
    elif call.key_padding_mask is None:
        first = call.keys - call.queries + 1 if call.is_causal else call.keys
        count = torch.arange(first, call.keys + 1, device=call.query.device)[None, None, :, None]
    elif call.is_causal:
        count = call.key_padding_mask.cumsum(dim=-1)[:, None, call.keys - call.queries :, None]
    else:
        count = call.key_padding_mask.sum(dim=-1)[:, None, None, None]
    return count.clamp(min=1).to(dtype)


class SquaredReluAttention(_Biased):
    """Squared ReLU of the scores over a fixed length, in place of the softmax; rows do not sum to one."""

    name = "relu2"
    options_class = Relu2Options
    needs_training = "does not normalise the weights of a row"
    function = staticmethod(relu2)

    @classmethod
    def describe(cls, options: Relu2Options) -> Capabilities:
        total = options.quad_norm == "length"
        return Capabilities(
            causal=not total,
            cross=not options.rel_pos_bias,
            padding_equals_cutting="nowhere" if total else "anywhere",
            packed=not total,
            dense_mask=True,
            decode="none" if total else "full cache",
            learned=options.rel_pos_bias,
            attention_weights=True,
            convex=False,
            dropout=True,
            derived=("several heads, no gate", "padding") + (() if options.rel_pos_bias else ("cross-attention",)),
            pays_from="none up to 4096 (2-core CPU, float32, D = 64)",
        )

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        if self.options.quad_norm == "length" and arguments.get("is_causal"):
            rule = "is_causal=True with quad_norm='length': the result of a prefix would change with the length"
            raise Unsupported(self.name, rule, "Set quad_norm='ref'")
        return super()._call(query, key, value, **arguments)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        norm, visible = self.options.quad_norm, all_visible(call)
        # the reciprocal of an integer tensor would be float32
        count = visible.sum(dim=-1, keepdim=True).clamp(min=1).to(call.query.dtype)
        divisor: Any = {"ref": self.options.n_ref, "length": call.keys, "valid": count, "sqrt_s": self.head_dim**0.5}[
            norm
        ]
        scores = (call.query @ call.key.transpose(-1, -2)) / divisor * (call.scale / self.head_dim**-0.5)
        if self.options.rel_pos_bias:
            scores = scores + self.bias(call)
        # after the function: laplace(0) is not 0
        weights = torch.where(visible, self.function(scores), 0)
        return weights / count if norm == "sqrt_s" else weights

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """A span of queries at a time, over the keys that causal order leaves it."""
        norm, factor, earlier = self.options.quad_norm, call.scale * self.head_dim**0.5, call.keys - call.queries
        count = _visible_keys(call, call.query.dtype) if norm in ("valid", "sqrt_s") else 1
        divisor: Any = {"ref": self.options.n_ref, "length": call.keys, "valid": count, "sqrt_s": self.head_dim**0.5}[
            norm
        ]
        query = call.query * (factor / divisor)
        dense = None if call.attention_mask is None else visible_pairs(call.attention_mask)
        table = self.rel_bias.to(query.dtype) if self.options.rel_pos_bias else None
        # a recomputed span would drop other weights
        keep = call.queries <= SPAN or call.dropout > 0
        parts = []
        for start in range(0, call.queries, SPAN):
            rows = slice(start, min(start + SPAN, call.queries))
            seen = earlier + rows.stop if call.is_causal else call.keys
            visible = None if call.key_padding_mask is None else call.key_padding_mask[:, None, None, :seen]
            if call.is_causal:
                order = causal_order(rows.stop - start, seen, query.device)
                visible = order if visible is None else order & visible
            if dense is not None:
                visible = dense[:, :, rows, :seen] if visible is None else dense[:, :, rows, :seen] & visible
            tensors = query[:, :, rows], call.key[:, :, :seen], call.value[:, :, :seen]
            arguments = (self.function, *tensors, visible, table, earlier + start, call.dropout)
            parts.append(_span(*arguments) if keep else recomputed(_span, *arguments))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return out / count if norm == "sqrt_s" else out


def _span(
    function: Any, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, table: Tensor | None,
    first: int, dropout: float,
) -> Tensor:  # fmt: skip
    """sum_j fn(q_i.k_j + b_{j-i}) v_j for queries at positions first.. ."""
    scores = query @ key.transpose(-1, -2)
    if table is not None:
        scores = scores + toeplitz(table, first, *scores.shape[2:])
    weights = function(scores)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0)
    return (functional.dropout(weights, dropout) if dropout else weights) @ value


class LaplaceAttention(SquaredReluAttention):
    """The Laplace function of the scores over a fixed length: like relu2, and bounded by 1."""

    name = "laplace"
    options_class = LaplaceOptions
    function = staticmethod(laplace)


class SoftmaxPlusAttention(_Biased):
    """Softmax attention whose logits grow with the logarithm of the number of visible keys."""

    name = "softmax_plus"
    options_class = SoftmaxPlusOptions
    in_float32 = False
    needs_training = "is sharper or flatter than a softmax where a query does not see n_ref keys"

    @classmethod
    def describe(cls, options: SoftmaxPlusOptions) -> Capabilities:
        return Capabilities(
            causal=True,
            cross=not options.rel_pos_bias,
            packed=True,
            dense_mask=True,
            decode="full cache",
            learned=options.rel_pos_bias,
            attention_weights=True,
            dropout=True,
            derived=("several heads, no gate",) + (() if options.rel_pos_bias else ("cross-attention",)),
            pays_from="none: costs what softmax costs",
        )

    def weights(self, call: Call) -> Tensor:
        visible = all_visible(call)
        count = visible.sum(dim=-1, keepdim=True).clamp(min=SHORTEST)
        logits = call.scale * (call.query @ call.key.transpose(-1, -2))
        if self.options.rel_pos_bias:
            logits = logits + self.bias(call)
        return masked_softmax(count.to(logits.dtype).log() / math.log(self.options.n_ref) * logits, visible)

    def attend(self, call: Call) -> Tensor:
        """The factor of a row goes into its query, and the kernels of `softmax` do the rest."""
        # counts of tokens do not fit in half precision
        exact = torch.promote_types(call.query.dtype, torch.float32)
        count = _visible_keys(call, exact)
        factor = count.clamp(min=SHORTEST).log() / math.log(self.options.n_ref)
        mask, padding, causal = None, call.key_padding_mask, call.is_causal
        if call.attention_mask is not None:
            mask, padding, causal = call.visible(), None, False
        if self.options.rel_pos_bias:
            bias = factor * toeplitz(self.rel_bias.to(exact), call.keys - call.queries, call.queries, call.keys)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        return flash.attention(
            (call.query * factor).to(call.query.dtype),
            call.key,
            call.value,
            key_padding_mask=padding,
            attention_mask=mask,
            is_causal=causal,
            scaling=call.scale,
            dropout=call.dropout,
        )


_PAPER = "Hua, Dai, Liu, Le, ICML 2022 (arXiv 2202.10447)"
register(
    Mechanism(
        name="relu2",
        title="Squared ReLU attention",
        paper=_PAPER,
        equation="out_i = sum_j max(c s sqrt(D) q_i.k_j + b_{j-i}, 0)^2 v_j,  c = 1 / n_ref",
        module_class=SquaredReluAttention,
        example={"n_ref": 8},
    )
)
register(
    Mechanism(
        name="laplace",
        title="Laplace attention",
        paper=f"Ma et al., ICLR 2023 (arXiv 2209.10655), in place of the squared ReLU of {_PAPER}",
        equation="out_i = sum_j fn(c s sqrt(D) q_i.k_j + b_{j-i}) v_j,  fn(x) = (1 + erf((x - sqrt(1/2)) sqrt(2 pi))) / 2,  "
        "c = 1 / n_ref",
        module_class=LaplaceAttention,
        example={"n_ref": 8},
    )
)
register(
    Mechanism(
        name="softmax_plus",
        title="Length-aware softmax attention",
        paper=f"Su, GAU-alpha, 2022; of the gated attention units of {_PAPER}",
        equation="out_i = softmax_j(log(max(l_i, 16)) / log(n_ref) (s q_i.k_j + b_{j-i})) . v,  "
        "l_i the number of keys that query i sees",
        module_class=SoftmaxPlusAttention,
        example={"n_ref": 8},
    )
)
