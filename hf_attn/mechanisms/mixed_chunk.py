"""Mixed chunk attention: softmax or squared ReLU within chunks, linear attention without a feature map across them.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022, section on mixed chunk attention, in its form
for several heads (MC-TFM++). The per-head details are choices made here. The paper's model FLASH is no relation of the
flash-attention kernels.

    out_i    = local_i + linear_i           chunks of C positions, g(i) = floor(i / C)
    local_i  = sum of w_ij v_j over the visible keys of the same chunk,   w_ij = softmax_j(s q_i.k_j + b_{j-i})
               or fn(q_i.k_j s sqrt(D) / C + b_{j-i}), fn as in relu2 and laplace
    linear_i = 1 / |past(i)| sum_{j in past(i)} (q'_i . k'_j) v_j,   q' = q * gamma + beta, likewise k', or q and k
               past(i): every real key; in causal order those of earlier chunks, g(j) < g(i)

Shapes: query (B,H,N,D), key and value (B,H,M,D), gamma and beta (H,D), b (H, 2C - 1). Weights may be negative.
When to use: long sequences, and decoding with a state of constant size, in models trained with it.
When not: under pretrained softmax weights without training; padding on the left; fewer tokens than a chunk holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_attn.capabilities import Capabilities
from hf_attn.errors import Unsupported
from hf_attn.functional import masked_softmax
from hf_attn.kernels import flash
from hf_attn.kernels import mixed_chunk as kernel
from hf_attn.masks import causal_order
from hf_attn.mechanisms.gau import all_visible, laplace, relu2, toeplitz
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

FUNCTIONS = {"relu2": relu2, "laplace": laplace}


@dataclass(frozen=True)
class MixedChunkOptions(Options):
    """Options of `mixed_chunk`.

    Attributes:
        chunk_size: C, positions of a chunk.
        local_attention: weights within a chunk: "softmax", "relu2" or "laplace".
        linear_norm: the sum over other chunks is divided by the number of its keys ("mean") or by C ("chunk").
        offset_scale: learned copies of query and key for the linear part.
        rel_pos_bias: learned bias by head and distance within a chunk.
    """

    mechanism: ClassVar[str] = "mixed_chunk"

    chunk_size: int = 256
    local_attention: str = "softmax"
    linear_norm: str = "mean"
    offset_scale: bool = False
    rel_pos_bias: bool = False

    def check(self) -> None:
        self.integer("chunk_size", 1)
        self.one_of("local_attention", "softmax", *FUNCTIONS)
        self.one_of("linear_norm", "mean", "chunk")
        self.boolean("offset_scale", "rel_pos_bias")


class MixedChunkAttention(AttentionModule):
    """Exact attention within chunks and linear attention across them: linear time, and a state of constant size."""

    name = "mixed_chunk"
    options_class = MixedChunkOptions
    needs_training = "adds a linear part on another scale than a softmax"

    def __init__(self, num_heads: int, head_dim: int, options: MixedChunkOptions):
        super().__init__(num_heads, head_dim, options)
        if options.offset_scale:
            self.lin_query_gamma = nn.Parameter(torch.empty(num_heads, head_dim))
            self.lin_query_beta = nn.Parameter(torch.empty(num_heads, head_dim))
            self.lin_key_gamma = nn.Parameter(torch.empty(num_heads, head_dim))
            self.lin_key_beta = nn.Parameter(torch.empty(num_heads, head_dim))
        if options.rel_pos_bias:
            self.rel_bias = nn.Parameter(torch.empty(num_heads, 2 * options.chunk_size - 1))

    @classmethod
    def describe(cls, options: MixedChunkOptions) -> Capabilities:
        return Capabilities(
            causal=True,
            padding_anywhere=False,
            padding_equals_cutting="at the end",
            packed=True,
            decode="constant state",
            learned=options.offset_scale or options.rel_pos_bias,
            attention_weights=True,
            convex=False,
            derived=("padding at the end",),
            pays_from="512 (2-core CPU, float32, D = 64)",
        )

    def reset_parameters(self) -> None:
        if self.options.offset_scale:
            for gamma, beta in ((self.lin_query_gamma, self.lin_query_beta), (self.lin_key_gamma, self.lin_key_beta)):
                nn.init.normal_(gamma, std=0.02)
                nn.init.zeros_(beta)
        if self.options.rel_pos_bias:
            nn.init.normal_(self.rel_bias, std=0.02)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call = super()._call(query, key, value, **arguments)
        if call.key_padding_mask is not None:
            self._real_first(call.key_padding_mask)
        return call

    def _real_first(self, real: Tensor, ended: Tensor | None = None) -> None:
        """Refuse a real token after a padded one, in this call or (`ended`, (B,)) after an earlier one."""
        first = torch.ones_like(real[:, :1]) if ended is None else ~ended[:, None]
        late = (real & ~torch.cat((first, real[:, :-1]), dim=1)).any()
        rule = "key_padding_mask has real tokens after padded ones, which would shift the chunks"
        remedy = 'Pad at the end (tokenizer.padding_side="right"); decode prompts of equal length'
        if torch.compiler.is_compiling():
            torch._assert_async(~late, f"{self.name}: {rule}. {remedy}")
        elif late:
            raise Unsupported(self.name, rule, remedy)

    def copies(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """q' and k' of the linear part."""
        if not self.options.offset_scale:
            return query, key
        parts = self.lin_query_gamma, self.lin_query_beta, self.lin_key_gamma, self.lin_key_beta
        query_gamma, query_beta, key_gamma, key_beta = (p.to(query.dtype)[:, None] for p in parts)
        return query * query_gamma + query_beta, key * key_gamma + key_beta

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        options, size, visible = self.options, self.options.chunk_size, all_visible(call)
        place = torch.arange(call.keys, device=call.query.device)
        own = place[call.keys - call.queries :, None]
        near = visible & (own // size == place // size)
        scores = call.query @ call.key.transpose(-1, -2)
        bias = scores.new_zeros(())
        if options.rel_pos_bias:
            # beyond the chunk there is no bias; those pairs are hidden below
            bias = self.rel_bias.to(scores.dtype)[:, (place - own).clamp(1 - size, size - 1) + size - 1]
        if options.local_attention == "softmax":
            local = masked_softmax(call.scale * scores + bias, near)
        else:
            scaled = scores / size * (call.scale / self.head_dim**-0.5) + bias
            local = torch.where(near, FUNCTIONS[options.local_attention](scaled), 0)
        past = visible & (place // size < own // size) if call.is_causal else visible
        divisor = past.sum(dim=-1, keepdim=True).clamp(min=1).to(scores.dtype)
        query, key = self.copies(call.query, call.key)
        linear = torch.where(past, query @ key.transpose(-1, -2), 0)
        return local + linear / (divisor if options.linear_norm == "mean" else size)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """By the kernel that can run the call."""
        options, bias = self.options, None
        if options.rel_pos_bias:
            bias = self.rel_bias.to(call.query.dtype)
        request = kernel.Request(
            call.query, call.key, *self.copies(call.query, call.key), call.value, None, bias, call.key_padding_mask,
            call.is_causal, options.chunk_size, options.local_attention,
            call.scale * self.head_dim**0.5 / options.chunk_size, options.linear_norm == "mean", 0.0,
            lambda: self._in_torch(call),
        )  # fmt: skip
        return kernel.mixed_chunk_attention(request)

    def _in_torch(self, call: Call) -> Tensor:
        """Chunks are a batch dimension; between them go sums of k' v^T, (D,D) a chunk."""
        if call.is_causal:
            return self._causal(call, call.key, call.value, call.key_padding_mask, None)[0]
        real, size = call.key_padding_mask, self.options.chunk_size
        query, key = self.copies(call.query, call.key)
        if real is not None:
            key = key.masked_fill(~real[:, None, :, None], 0)
        count: Any = call.keys if real is None else real.sum(dim=1).clamp(min=1).to(key.dtype)[:, None, None, None]
        total = key.transpose(-1, -2) @ call.value / (count if self.options.linear_norm == "mean" else size)
        return query @ total + self._local(call, call.query, call.key, call.value, real, 0)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """The state holds the tokens of the open chunk, and what the finished ones come to.

        key, value (B,H,C,D) and real (B,C): room for a chunk; filled (B,n,0): that its first n places are taken, as
        a shape, which costs no transfer to read; total (B,H,D,D) and count (B,) of the finished chunks; ended (B,).
        """
        size, real = self.options.chunk_size, call.key_padding_mask
        if real is None:
            real = torch.ones(call.batch, call.queries, dtype=torch.bool, device=call.key.device)
        key, value = call.key, call.value
        if state is not None:
            self._real_first(real, state["ended"])
            held = state["filled"].shape[1]
            key = torch.cat((state["key"][:, :, :held], key), dim=2)
            value = torch.cat((state["value"][:, :, :held], value), dim=2)
            real = torch.cat((state["real"][:, :held], real), dim=1)
        out, total, count = self._causal(call, key, value, real, state)
        left = key.shape[2] % size
        key, value = (pad(x[:, :, x.shape[2] - left :], (0, 0, 0, size - left)) for x in (key, value))
        ended = ~real[:, -1]
        real = pad(real[:, real.shape[1] - left :], (0, size - left))
        filled = key.new_empty(call.batch, left, 0)
        state = {"key": key, "value": value, "real": real, "filled": filled, "total": total, "count": count}
        return out, {**state, "ended": ended}

    def _causal(
        self, call: Call, key: Tensor, value: Tensor, real: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal attention of the queries, the last of all positions; `key`, `value` and `real` begin with a chunk.

        Returns:
            (B,H,N,D), and the sum of k' v^T (B,H,D,D) and the number of keys (B,) of all finished chunks.
        """
        size, keys = self.options.chunk_size, key.shape[2]
        first, finished = (keys - call.queries) // size, keys // size
        query, linear_key = self.copies(call.query, key[:, :, : finished * size])
        if real is None:
            counts = key.new_full((call.batch, finished), size)
        else:
            done = real[:, : finished * size]
            linear_key = linear_key.masked_fill(~done[:, None, :, None], 0)
            counts = done.unflatten(1, (finished, size)).sum(dim=-1).to(key.dtype)
        linear_key, done_value = (
            x[:, :, : finished * size].unflatten(2, (finished, size)) for x in (linear_key, value)
        )
        sums = linear_key.transpose(-1, -2) @ done_value
        if state is None:
            sums, counts = pad(sums, (0, 0, 0, 0, 1, 0)), pad(counts, (1, 0))
        else:
            sums = torch.cat((state["total"][:, :, None], sums), dim=2)
            counts = torch.cat((state["count"][:, None], counts), dim=1)
        # entry g is the sum of all chunks before g: the own chunk is never added, so its rounding cannot leak
        sums, counts = sums.cumsum(dim=2), counts.cumsum(dim=1)
        last = (keys - 1) // size + 1
        seen = sums[:, :, first:last]
        if self.options.linear_norm == "mean":
            seen = seen / counts[:, None, first:last, None, None].clamp(min=1)
        else:
            seen = seen / size
        before = keys - call.queries - first * size
        linear = (_chunks(query, before, last - first, size) @ seen).flatten(2, 3)
        begin = 0 if last - first == 1 else before
        linear = linear[:, :, begin : begin + call.queries]
        key, value = key[:, :, first * size :], value[:, :, first * size :]
        real = None if real is None else real[:, first * size :]
        return linear + self._local(call, call.query, key, value, real, before), sums[:, :, -1], counts[:, -1]

    def _local(self, call: Call, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, before: int) -> Tensor:
        """(B,H,N,D) attention within chunks; the keys begin with a chunk, the queries `before` places after it."""
        options, size, (batch, _, queries, _) = self.options, self.options.chunk_size, query.shape
        count = -(-key.shape[2] // size)
        if count > 1:
            if real is None and key.shape[2] % size and not call.is_causal:
                real = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
            if real is not None:
                real = pad(real, (0, count * size - key.shape[2])).unflatten(1, (count, size)).flatten(0, 1)
            # chunks before heads, so that a chunk is a row of a batch
            chunked = (_chunks(x, n, count, size) for x, n in ((query, before), (key, 0), (value, 0)))
            query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in chunked)
        bias = None
        if options.rel_pos_bias:
            start = before if count == 1 else 0
            bias = toeplitz(self.rel_bias.to(query.dtype), start, query.shape[2], key.shape[2])
        if options.local_attention == "softmax":
            out = flash.attention(
                query,
                key,
                value,
                key_padding_mask=real,
                attention_mask=None if bias is None else bias[None],
                is_causal=call.is_causal,
                scaling=call.scale,
            )
        else:
            scores = (query * (call.scale * self.head_dim**0.5 / size)) @ key.transpose(-1, -2)
            weights = FUNCTIONS[options.local_attention](scores if bias is None else scores + bias)
            if real is not None:
                weights = weights.masked_fill(~real[:, None, None], 0)
            if call.is_causal:
                weights = weights.masked_fill(~causal_order(weights.shape[2], weights.shape[3], weights.device), 0)
            out = weights @ value
        if count == 1:
            return out
        out = out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
        return out[:, :, before : before + queries]


def _chunks(x: Tensor, before: int, count: int, size: int) -> Tensor:
    """(B,H,N,D) -> (B,H,count,size,D), zeros where there are no tokens; one chunk keeps its length."""
    if count == 1:
        return x[:, :, None]
    return pad(x, (0, 0, before, count * size - before - x.shape[2])).unflatten(2, (count, size))


register(
    Mechanism(
        name="mixed_chunk",
        title="Mixed chunk attention",
        paper="Hua, Dai, Liu, Le, ICML 2022 (arXiv 2202.10447)",
        equation="out_i = sum_{j in chunk(i)} w_ij v_j + 1/|past(i)| sum_{j in past(i)} (q'_i.k'_j) v_j,  "
        "w_ij = softmax_j(s q_i.k_j + b_{j-i}) or fn(s sqrt(D) q_i.k_j / C + b_{j-i})",
        module_class=MixedChunkAttention,
        example={"chunk_size": 4},
    )
)
