"""FLASH-Quad: the gated attention unit with attention over all pairs of tokens.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022. The Laplace function is that of Ma et al.,
"Mega", ICLR 2023; the length-aware softmax that of GAU-alpha (Su, 2022).

    attention_i = sum_j fn(c q_i.k_j + b_{j-i}) v_j        over the visible keys; c = 1 / n_ref by default
                  or softmax_j(s^-0.5 q_i.k_j + b_{j-i}) . v, with a factor log(max(l_i, 16)) / log 512 in softmax_plus
                  l_i: number of keys that token i sees

Shapes: q, k (B,N,s), v (B,N,e), one head. b is a table of 2 n_max - 1 numbers, or rope(a)_i . rope(b)_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import Unsupported
from hf_attn.functional import masked_softmax, recomputed
from hf_attn.masks import causal_order
from hf_attn.mechanisms.gau import SHORTEST, laplace, relu2, toeplitz
from hf_attn.models.gau_config import QuadraticOptions
from hf_attn.models.gau_layers import GatedUnit, UnitState, rotate, rotation_of

SPAN = 256
"""Queries handled at once; beyond that many, training computes the weights again instead of keeping them."""
FUNCTIONS = {"relu2": relu2, "laplace": laplace}
PLAIN_SOFTMAX_AT = 512
"""Number of visible keys at which softmax_plus is plain softmax attention."""


@dataclass
class QuadraticState(UnitState):
    """Keys and values of all tokens so far.

    Attributes:
        key: (B,t,s), rotated. value: (B,t,e).
        real: (B,t) bool; None where every token is real.
        shifted: (B,1,d/2), with token_shift.
    """

    key: Tensor
    value: Tensor
    real: Tensor | None = None
    shifted: Tensor | None = None

    @property
    def seq_length(self) -> int:
        return self.key.shape[1]

    @property
    def tokens(self) -> int:
        return self.key.shape[1]


class GatedAttentionUnit(GatedUnit):
    """A gated attention unit (FLASH-Quad); two of them replace a block of attention and feed-forward.

    Args:
        hidden_size: d.
        options: fields of `QuadraticOptions`.
    """

    options_class = QuadraticOptions
    copies = 2
    options: QuadraticOptions

    @property
    def bias_reach(self) -> int:
        return self.options.max_position_embeddings

    def check(self, tokens: int, real: Tensor | None, causal: bool, past: Any, use_cache: bool) -> None:
        o = self.options
        if o.quad_norm == "length" and causal:
            raise Unsupported(
                self.name,
                "causal attention with quad_norm='length': the result of a prefix would change with the length",
                "Set quad_norm='ref'",
            )
        total = tokens + (past.tokens if past is not None else 0)
        if o.rel_pos_bias == "toeplitz" and total > o.max_position_embeddings:
            raise Unsupported(
                self.name,
                f"{total} tokens, and the toeplitz bias has max_position_embeddings={o.max_position_embeddings}",
                "Set a larger max_position_embeddings, or rel_pos_bias='rope' or 'none'",
            )

    def _positions(self, first: int, count: int, vector: Tensor, like: Tensor) -> Tensor:
        """(N,s) rotated copies of one vector of the "rope" bias."""
        rotation = rotation_of(first, count, self.options.query_key_dim, self.options.rope_theta, like)
        return rotate(vector.to(like.dtype).expand(count, -1), rotation)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, copies: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        o, (query, key) = self.options, copies
        tokens = query.shape[1]
        visible = torch.ones(1, tokens, tokens, dtype=torch.bool, device=key.device)
        if causal:
            visible = visible & causal_order(tokens, tokens, key.device)
        if real is not None:
            visible = visible & real[:, None]
        # the reciprocal of an integer tensor would be float32
        count = visible.sum(dim=-1, keepdim=True).clamp(min=1).to(key.dtype)
        scores = query @ key.transpose(-1, -2)
        bias = self._bias(tokens, key)
        if o.attention_fn in FUNCTIONS:
            norms: dict[str, Any] = {"ref": o.n_ref, "length": tokens, "valid": count, "sqrt_s": o.query_key_dim**0.5}
            # after the function: laplace(0) is not 0
            weights = torch.where(visible, FUNCTIONS[o.attention_fn](scores / norms[o.quad_norm] + bias), 0)
            return weights / count if o.quad_norm == "sqrt_s" else weights
        logits = scores * o.query_key_dim**-0.5 + bias
        if o.attention_fn == "softmax_plus":
            logits = count.clamp(min=SHORTEST).log() / math.log(PLAIN_SOFTMAX_AT) * logits
        return masked_softmax(logits, visible)

    def _bias(self, tokens: int, like: Tensor) -> Tensor:
        """(N,N) bias by its definition."""
        if self.options.rel_pos_bias == "none":
            return like.new_zeros(())
        if self.options.rel_pos_bias == "rope":
            rows, columns = (self._positions(0, tokens, v, like) for v in (self.rel_bias_a, self.rel_bias_b))
            return rows @ columns.T
        place = torch.arange(tokens, device=like.device)
        return self.rel_bias.to(like.dtype)[place - place[:, None] + self.options.max_position_embeddings - 1]

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(
        self, copies: Tensor, value: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, QuadraticState | None]:
        """A span of queries at a time, over the keys that causal order leaves it."""
        o, (query, key) = self.options, copies
        if past is not None:
            key, value = torch.cat((past.key, key), dim=1), torch.cat((past.value, value), dim=1)
            if past.real is not None:
                real = functional.pad(past.real, (0, query.shape[1]), value=True)
        # a copy: the value is a view of the whole projection
        state = QuadraticState(key, value.contiguous(), real) if use_cache else None
        queries, keys = query.shape[1], key.shape[1]
        earlier = keys - queries
        count, factor = _visible_keys(queries, keys, real, causal, key), None
        if o.attention_fn in FUNCTIONS:
            norms: dict[str, Any] = {"ref": o.n_ref, "length": keys, "valid": count, "sqrt_s": o.query_key_dim**0.5}
            query = query / norms[o.quad_norm]
            if real is not None:
                # unnormalised weights of hidden keys may stay if their values are zero
                value = value.masked_fill(~real[..., None], 0)
        else:
            query = query * o.query_key_dim**-0.5
        if o.rel_pos_bias == "rope":
            rows = self._positions(earlier, queries, self.rel_bias_a, query)
            columns = self._positions(0, keys, self.rel_bias_b, query)
            query = torch.cat((query, rows.expand(query.shape[0], -1, -1)), dim=-1)
            key = torch.cat((key, columns.expand(key.shape[0], -1, -1)), dim=-1)
        if o.attention_fn == "softmax_plus":
            factor = count.clamp(min=SHORTEST).log() / math.log(PLAIN_SOFTMAX_AT)
            query = query * factor
        table = self.rel_bias.to(query.dtype)[None] if o.rel_pos_bias == "toeplitz" else None
        dropout = o.attention_dropout if self.training else 0.0
        function = FUNCTIONS.get(o.attention_fn)
        # a recomputed span would drop other weights
        keep = queries <= SPAN or dropout > 0
        parts = []
        for start in range(0, queries, SPAN):
            rows_ = slice(start, min(start + SPAN, queries))
            seen = earlier + rows_.stop if causal else keys
            share = factor[:, rows_] if factor is not None and factor.shape[1] > 1 else factor
            hidden = None if real is None or function is not None else ~real[:, None, :seen]
            tensors = query[:, rows_], key[:, :seen], value[:, :seen], table, share, hidden
            arguments = (function, *tensors, earlier + start, causal, dropout)
            parts.append(_span(*arguments) if keep else recomputed(_span, *arguments))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out / count if o.quad_norm == "sqrt_s" and function is not None else out, state


def _span(
    function: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, factor: Tensor | None,
    hidden: Tensor | None, first: int, causal: bool, dropout: float,
) -> Tensor:  # fmt: skip
    """(B,n,e) attention of queries at positions first.. over keys at positions 0.. ."""
    queries, keys = query.shape[1], key.shape[1]
    bias = None if table is None else toeplitz(table, first, queries, keys)
    if bias is not None and factor is not None:
        bias = bias * factor
    if causal and queries > 1:
        bias = query.new_zeros(1, queries, keys) if bias is None else bias
        # relu2 and laplace of minus infinity are 0
        bias = bias.masked_fill(~causal_order(queries, keys, query.device), float("-inf"))
    scores = query @ key.transpose(-1, -2) if bias is None else torch.baddbmm(bias, query, key.transpose(-1, -2))
    if function is not None:
        weights = function(scores)
    elif hidden is None:
        weights = scores.softmax(dim=-1)
    else:
        visible = ~hidden & (scores > float("-inf"))
        weights = masked_softmax(scores, visible)
    return (functional.dropout(weights, dropout) if dropout else weights) @ value


def _visible_keys(queries: int, keys: int, real: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """(B|1,N|1,1) number of keys a token sees, at least 1."""
    if real is None:
        count = torch.arange(keys - queries + 1 if causal else keys, keys + 1, device=like.device)[None, :, None]
    elif causal:
        count = real.cumsum(dim=1)[:, keys - queries :, None]
    else:
        count = real.sum(dim=1)[:, None, None]
    return count.clamp(min=1).to(like.dtype)
