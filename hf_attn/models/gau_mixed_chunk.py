"""FLASH: the gated attention unit with mixed chunk attention, in time linear in the length.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022. No relation of the flash-attention kernels.

    attention_i = sum_{j in chunk(i)} fn(q_i.k_j / C + b_{j-i}) v_j  +  1/|past(i)| sum_{j in past(i)} (q'_i.k'_j) v_j
                  past(i): every real token; in causal order those of earlier chunks

Shapes: q, k, q', k' (B,N,s), v (B,N,e), b 2C - 1 numbers. q' and k' are further copies of z and may be negative.
Between chunks go sums of k' v^T, (s,e) a chunk; in causal order the sum before a chunk never contains its own, so that
no later token changes a bit of an earlier row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import Unsupported
from hf_attn.kernels.mixed_chunk import Request, mixed_chunk_attention
from hf_attn.masks import causal_order
from hf_attn.mechanisms.gau import laplace, relu2, toeplitz
from hf_attn.models.gau_config import MixedChunkUnitOptions
from hf_attn.models.gau_layers import GatedUnit, UnitState, in_place

FUNCTIONS = {"relu2": relu2, "laplace": laplace}


@dataclass
class MixedChunkState(UnitState):
    """A state of constant size: the open chunk, and what the finished ones come to.

    Attributes:
        seq_length: tokens so far.
        past_kv: (B,s,e) sum of k' v^T over the finished chunks, float32 at least.
        num_past: tokens in them.
        chunk_kv: (B,s,e) the same sum over the open chunk.
        chunk_key: (B,r,s) its keys. chunk_value: (B,r,e) its values.
        ended: (B,) bool, rows whose last token was padding; None where every token was real.
        shifted: (B,1,d/2), with token_shift.
    """

    seq_length: int
    past_kv: Tensor
    num_past: int
    chunk_kv: Tensor
    chunk_key: Tensor
    chunk_value: Tensor
    ended: Tensor | None = None
    shifted: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.seq_length


class FlashGatedAttentionUnit(GatedUnit):
    """A gated attention unit with mixed chunk attention (FLASH): linear time, and a decoding state of constant size.

    Args:
        hidden_size: d.
        options: fields of `MixedChunkUnitOptions`.
    """

    options_class = MixedChunkUnitOptions
    copies = 4
    options: MixedChunkUnitOptions

    @property
    def bias_reach(self) -> int:
        return self.options.chunk_size

    def check(self, tokens: int, real: Tensor | None, causal: bool, past: Any, use_cache: bool) -> None:
        if real is not None:
            self._refuse_where(
                (real[:, 1:] & ~real[:, :-1]).any() | (~real[:, 0] & real.any(dim=1)).any(),
                "key_padding_mask has real tokens after padded ones, which would shift the chunks",
            )
        if past is not None and past.ended is not None:
            self._refuse_where(past.ended.any(), "a past_state whose rows end with padding: chunks would shift")

    def _refuse_where(self, wrong: Tensor, rule: str) -> None:
        remedy = 'Pad at the end (tokenizer.padding_side="right"), and decode prompts of equal length'
        if torch.compiler.is_compiling():
            torch._assert_async(~wrong, f"{self.name}: {rule}. {remedy}")
        elif wrong:
            raise Unsupported(self.name, rule, remedy)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, copies: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        o, (query, key, linear_query, linear_key) = self.options, copies
        place = torch.arange(query.shape[1], device=key.device)
        chunk = place // o.chunk_size
        visible = torch.ones_like(place, dtype=torch.bool)[None, None] if real is None else real[:, None]
        past = visible & ((chunk < chunk[:, None]) if causal else torch.ones_like(chunk[:, None] == chunk))
        count = past.sum(dim=-1, keepdim=True).clamp(min=1).to(key.dtype)
        linear = torch.where(past, linear_query @ linear_key.transpose(-1, -2), 0)
        linear = linear / (count if o.linear_norm == "mean" else o.chunk_size)
        return linear + self._local_weights(query, key, real, causal)

    def _local_weights(self, query: Tensor, key: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        """(B,N,N) weights within chunks."""
        o, place = self.options, torch.arange(query.shape[1], device=key.device)
        near = (place // o.chunk_size == (place // o.chunk_size)[:, None])[None]
        if causal:
            near = near & (place <= place[:, None])
        if real is not None:
            near = near & real[:, None]
        scores = query @ key.transpose(-1, -2) / o.chunk_size
        if o.rel_pos_bias == "toeplitz":
            # beyond the chunk there is no bias; those pairs are hidden
            distance = (place - place[:, None]).clamp(1 - o.chunk_size, o.chunk_size - 1)
            scores = scores + self.rel_bias.to(scores.dtype)[distance + o.chunk_size - 1]
        return torch.where(near, FUNCTIONS[o.attention_fn](scores), 0)

    def shown_weights(self, copies: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        """(B,G,C,C) weights within chunks; the linear part has none that are small enough to keep."""
        size = self.options.chunk_size
        weights = self._local_weights(copies[0], copies[1], real, causal)
        missing = -weights.shape[1] % size
        weights = functional.pad(weights, (0, missing, 0, missing)).unflatten(1, (-1, size)).unflatten(3, (-1, size))
        return weights.diagonal(dim1=1, dim2=3).movedim(-1, 1)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def gated(
        self, copies: Tensor, value: Tensor, gate: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, MixedChunkState | None]:
        """Whole sequences by the kernel that can run them; decoding in torch."""
        plain = super().gated
        if use_cache or past is not None:
            return plain(copies, value, gate, real, causal, past, use_cache)
        o, (query, key, linear_query, linear_key) = self.options, copies[:, :, None]
        request = Request(
            query, key, linear_query, linear_key, value[:, None], gate[:, None],
            self.rel_bias.to(value.dtype)[None] if o.rel_pos_bias == "toeplitz" else None,
            real, causal, o.chunk_size, o.attention_fn, 1 / o.chunk_size, o.linear_norm == "mean",
            o.attention_dropout if self.training else 0.0,
            lambda: plain(copies, value, gate, real, causal, None, False)[0][:, None],
        )  # fmt: skip
        return mixed_chunk_attention(request)[:, 0], None

    def attend(
        self, copies: Tensor, value: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, MixedChunkState | None]:
        """Chunks are a batch dimension, without a loop."""
        if causal:
            # real tokens come first, so no real token sees a padded one
            return self._causal(copies, value, real, past, use_cache)
        size, (query, key, linear_query, linear_key) = self.options.chunk_size, copies
        divisor: Any = value.shape[1]
        if real is not None:
            # weights are not normalised: hidden keys may keep theirs if their values are zero
            value = value.masked_fill(~real[..., None], 0)
            divisor = real.sum(dim=1).clamp(min=1).to(value.dtype)[:, None, None]
        total = linear_key.transpose(-1, -2) @ value / (divisor if self.options.linear_norm == "mean" else size)
        count = -(-value.shape[1] // size)
        query, key, linear_query, chunk_value = (_chunks(x, 0, count, size) for x in (query, key, linear_query, value))
        linear = (linear_query.unflatten(0, (-1, count)).flatten(1, 2) @ total).unflatten(1, (count, -1)).flatten(0, 1)
        out = _plus(linear, self._weigh(query, key, 0, causal=False), chunk_value)
        return _tokens(out, count, 0, value.shape[1]), None

    def _weigh(self, query: Tensor, key: Tensor, first: int, causal: bool) -> Tensor:
        """(BG,n,m) weights of the queries at places first.. of their chunk, without dropped ones."""
        o, (queries, keys) = self.options, (query.shape[1], key.shape[1])
        bias = None
        if o.rel_pos_bias == "toeplitz":
            bias = toeplitz(self.rel_bias.to(query.dtype)[None], first, queries, keys)
        if causal and queries > 1:
            bias = query.new_zeros(1, queries, keys) if bias is None else bias
            # relu2 and laplace of minus infinity are 0
            bias = bias.masked_fill(~causal_order(queries, keys, query.device), float("-inf"))
        key = key.transpose(-1, -2)
        if bias is None:
            bias = query.new_zeros(1, 1, 1)
        scores = torch.baddbmm(bias, query, key, alpha=1 / o.chunk_size)
        if o.attention_fn == "relu2" and in_place(scores):
            weights = scores.relu_().square_()
        else:
            weights = FUNCTIONS[o.attention_fn](scores)
        return functional.dropout(weights, o.attention_dropout, self.training)

    def _causal(
        self, copies: Tensor, value: Tensor, real: Tensor | None, past: MixedChunkState | None, use_cache: bool
    ) -> tuple[Tensor, MixedChunkState | None]:
        o, size, (query, key, linear_query, linear_key) = self.options, self.options.chunk_size, copies
        batch, tokens, _ = value.shape
        held = past.chunk_key.shape[1] if past is not None else 0
        count = -(-(held + tokens) // size)
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat((past.chunk_key, key), dim=1), torch.cat((past.chunk_value, value), dim=1)
        # one chunk keeps its length
        before = held if count > 1 else 0
        queries, linear_queries = (_chunks(x, before, count, size) for x in (query, linear_query))
        weights = self._weigh(queries, _chunks(keys, 0, count, size), held - before, causal=True)
        seen = sums = None
        finished = (held + tokens) // size
        if count > 1 or use_cache:
            # held tokens are in the state's sum already, and their place stays zero
            parts = _chunks(linear_key, before, count, size), _chunks(value, before, count, size)
            sums = (parts[0].transpose(-1, -2) @ parts[1]).unflatten(0, (batch, count))
            if past is not None:
                sums = torch.cat(((sums[:, 0] + past.chunk_kv)[:, None], sums[:, 1:]), dim=1)
        if count > 1 or past is not None:
            earlier = value.new_zeros(batch, 1, *self._sum_shape) if past is None else past.past_kv[:, None]
            # shift, then accumulate: subtracting the own chunk would leak its rounding into its past
            seen = (earlier if sums is None else torch.cat((earlier, sums[:, :-1]), dim=1)).cumsum(dim=1)
            first = past.num_past if past is not None else 0
            number = torch.arange(first, first + count * size, size, device=value.device, dtype=value.dtype)
            divisor = number.clamp(min=1)[:, None, None] if o.linear_norm == "mean" else size
            linear = linear_queries @ (seen / divisor).flatten(0, 1)
            out = _plus(linear, weights, _chunks(values, 0, count, size))
        else:
            out = weights @ values
        state = None
        if use_cache:
            state = self._state(past, sums, seen, keys, values, finished, held + tokens, real)
        return _tokens(out, count, before, tokens), state

    @property
    def _sum_shape(self) -> tuple[int, int]:
        return self.options.query_key_dim, self.value_dim

    def _state(
        self, past: MixedChunkState | None, sums: Tensor, seen: Tensor | None, keys: Tensor, values: Tensor,
        finished: int, total: int, real: Tensor | None,
    ) -> MixedChunkState:  # fmt: skip
        """The state after a call whose chunks hold `total` tokens, of which `finished` chunks are full."""
        size = self.options.chunk_size
        nothing = torch.zeros_like(sums[:, 0])
        before_last = nothing if seen is None else seen[:, -1]
        full = total == finished * size
        num_past = (past.num_past if past is not None else 0) + finished * size
        return MixedChunkState(
            seq_length=num_past + total - finished * size,
            past_kv=before_last + sums[:, -1] if full else before_last,
            num_past=num_past,
            chunk_kv=nothing if full else sums[:, -1],
            # clones: views would keep every token of a long prompt
            chunk_key=keys[:, finished * size :].clone(),
            chunk_value=values[:, finished * size :].clone(),
            ended=None if real is None else ~real[:, -1],
        )


def _plus(linear: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """linear + weights @ value; without gradients in the place of `linear`."""
    return linear.baddbmm_(weights, value) if in_place(linear) else torch.baddbmm(linear, weights, value)


def _chunks(x: Tensor, before: int, count: int, size: int) -> Tensor:
    """(B,N,D) -> (B count,size,D), zeros where there are no tokens; one chunk keeps its length."""
    if count == 1:
        return x
    missing = count * size - before - x.shape[1]
    if before or missing:
        x = functional.pad(x, (0, 0, before, missing))
    return x.unflatten(1, (count, size)).flatten(0, 1)


def _tokens(x: Tensor, count: int, before: int, tokens: int) -> Tensor:
    """(B count,size,D) -> (B,N,D), without what `_chunks` filled up."""
    if count == 1:
        return x
    x = x.unflatten(0, (-1, count)).flatten(1, 2)
    return x if x.shape[1] == tokens else x[:, before : before + tokens]
