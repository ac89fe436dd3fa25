"""Hypercube attention: blocks of tokens are the corners of a hypercube and attend along its edges.

Paper: Wang, Lee, Guo, Yin, Zhou, Huang, Qiu, "What Dense Graph Do You Need for Self-Attention?", ICML 2022, the graph
of its official code. Global tokens and the causal form are additions made here.

    out_n = softmax_m(s <q_n, k_m>) . v        over the keys m whose place is joined with the place of n
    place(n) = floor(n / block_size),   gray(p) = p xor floor(p / 2)
    p and q are joined where gray(p) xor gray(q) has at most one bit set

Shapes: query (B,H,N,D), key and value (B,H,M,D), P = ceil(M / block_size) places, at most 1 + ceil(log2 P) of them
joined with one. The path from 0 to P - 1 is always in the graph.
When to use: long sequences, N log N work with plain softmax weights, nothing to learn; log2 P layers reach everything.
When not: up to two blocks of tokens (that is softmax attention); batches padded on the left, which shift the places.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput
from hf_attn.functional import masked_softmax
from hf_attn.kernels import flash
from hf_attn.kernels import hypercube as cube
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register


@dataclass(frozen=True)
class HypercubeOptions(Options):
    """Options of `hypercube`.

    Attributes:
        block_size: tokens of one place; 1 puts every token on a corner of its own.
        num_global_tokens: that many leading tokens stand outside the cube, see all and are seen by all.
        backend: "auto" takes gathered blocks; a name fails loudly where it cannot run. See `hf-attn doctor`.
    """

    mechanism: ClassVar[str] = "hypercube"

    block_size: int = 16
    num_global_tokens: int = 0
    backend: str = "auto"

    def check(self) -> None:
        self.integer("block_size", 1)
        self.integer("num_global_tokens", 0)
        self.one_of("backend", "auto", *cube.BACKENDS)


class HypercubeAttention(AttentionModule):
    """Softmax attention along the edges of a hypercube of token blocks: N log N work, nothing to learn."""

    name = "hypercube"
    options_class = HypercubeOptions
    in_float32 = False

    @classmethod
    def describe(cls, options: HypercubeOptions) -> Capabilities:
        return Capabilities(
            causal=True,
            padding_equals_cutting="at the end",
            packed=True,
            decode="full cache",
            attention_weights=True,
            dropout=True,
            backends=cube.BACKENDS,
            derived=("causal", "global tokens") if options.num_global_tokens else ("causal",),
            pays_from="512 (2-core CPU, float32, D = 64, blocks of 64)",
        )

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call = super()._call(query, key, value, **arguments)
        if self.options.num_global_tokens > call.keys:
            raise InvalidInput(
                f"hypercube: option num_global_tokens={self.options.num_global_tokens} is more than the M={call.keys} "
                "tokens there are. Pass longer sequences, or set a smaller num_global_tokens."
            )
        return call

    # -- the definition --------------------------------------------------------------------------------------------

    def pattern(self, call: Call) -> Tensor:
        """(N,M) bool: the graph lets the query see the key. Causal order and padding come on top."""
        token = torch.arange(call.keys, device=call.query.device)
        outside = token < self.options.num_global_tokens
        place = (token - self.options.num_global_tokens) // self.options.block_size
        gray = place ^ (place >> 1)
        different = gray[:, None] ^ gray
        joined = different & (different - 1) == 0
        return (joined | outside[:, None] | outside)[call.keys - call.queries :]

    def weights(self, call: Call) -> Tensor:
        pattern, visible = self.pattern(call), call.visible()
        logits = call.scale * (call.query @ call.key.transpose(-1, -2))
        return masked_softmax(logits, pattern if visible is None else pattern & visible)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        request = cube.Request(
            call.query,
            call.key,
            call.value,
            call.key_padding_mask,
            call.is_causal,
            call.scale,
            call.dropout,
            self.options.block_size,
            self.options.num_global_tokens,
            lambda: self._gathered(call),
        )
        return cube.hypercube_attention(request, self.options.backend)

    def _gathered(self, call: Call) -> Tensor:
        """Global queries by plain attention, the others along the edges of the cube."""
        block, outside, mask = self.options.block_size, self.options.num_global_tokens, call.key_padding_mask
        earlier = call.keys - call.queries
        ahead = min(max(outside - earlier, 0), call.queries)
        first, places = (earlier + ahead - outside) // block, -(-(call.keys - outside) // block)
        results = []
        if ahead:
            reach = outside if call.is_causal else call.keys
            key, value, seen = (
                call.key[:, :, :reach],
                call.value[:, :, :reach],
                mask if mask is None else mask[:, :reach],
            )
            results.append(_softmax(call, call.query[:, :, :ahead], key, value, seen))
        if ahead < call.queries:
            form = self._in_one_place if first == places - 1 else self._along_edges
            results.append(form(call, ahead, first, places))
        return results[0] if len(results) == 1 else torch.cat(results, dim=2)

    def _in_one_place(self, call: Call, ahead: int, first: int, places: int) -> Tensor:
        """(B,H,N-ahead,D) attention of all queries but the first `ahead`, which stand in the last place.

        A step of decoding: what it reads does not grow with the length, but with its logarithm.
        """
        block, outside, mask = self.options.block_size, self.options.num_global_tokens, call.key_padding_mask
        (group,), _ = _layout(first, places, call.is_causal, False)
        seen = torch.tensor(group.seen, device=call.query.device)
        token = (seen[:, None] * block + torch.arange(block, device=seen.device)).flatten() + outside
        token = torch.cat((torch.arange(outside, device=seen.device), token))
        token = token[: len(token) - (outside + places * block - call.keys)]
        key, value = call.key.index_select(2, token), call.value.index_select(2, token)
        return _softmax(
            call, call.query[:, :, ahead:], key, value, mask if mask is None else mask.index_select(1, token)
        )

    def _along_edges(self, call: Call, ahead: int, first: int, places: int) -> Tensor:
        """(B,H,N-ahead,D) attention of all queries but the first `ahead`, which stand in places from `first` on.

        Blocks of queries that see equally many blocks of keys are one batch of small attention problems.
        """
        block, outside = self.options.block_size, self.options.num_global_tokens
        # tokens before heads, as models store them: neighbouring tokens are then one view for all heads
        query, *sides = (x.transpose(1, 2) for x in (call.query[:, :, ahead:], call.key, call.value))
        if call.key_padding_mask is not None:
            sides.append(call.key_padding_mask)
        queries, length = query.shape[1], call.keys - outside
        before, after = length - queries - first * block, places * block - length
        # in causal order nothing but fillers sees the fillers at the end
        trim = 0 if call.is_causal else after
        query = _fill(query, before, after).unflatten(1, (places - first, block))
        blocks = [_fill(x[:, outside:], 0, after).unflatten(1, (places, block)) for x in sides]

        groups, order = _layout(first, places, call.is_causal, trim > 0)
        indices = [index for group in groups for index in (group.rows, group.seen)] + [order]
        flat = torch.tensor([place for index in indices for place in index], device=query.device)
        parts = flat.split([len(index) for index in indices])
        results = []
        for group, rows, seen in zip(groups, parts[:-1:2], parts[1::2]):
            own = query if len(groups) == 1 else query.index_select(1, rows)
            around = [x.index_select(1, seen).unflatten(1, (len(rows), -1)).flatten(2, 3) for x in blocks]
            if group.last:
                around = [x[:, :, : x.shape[2] - trim] for x in around]
            if outside:
                leading = [x[:, None, :outside].expand(-1, len(rows), outside, *x.shape[2:]) for x in sides]
                around = [torch.cat(pair, dim=2) for pair in zip(leading, around)]
            key, value, *mask = (x.flatten(0, 1) for x in around)
            out = _softmax(call, *(x.transpose(1, 2) for x in (own.flatten(0, 1), key, value)), *mask)
            results.append(out.transpose(1, 2).unflatten(0, (call.batch, -1)))
        out = results[0] if len(groups) == 1 else torch.cat(results, dim=1).index_select(1, parts[-1])
        return out.flatten(1, 2)[:, before : before + queries].transpose(1, 2)


def _softmax(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain softmax attention of these tensors, otherwise as `call` has it. `mask`: key padding."""
    order, scale, dropout = call.is_causal, call.scale, call.dropout
    return flash.attention(query, key, value, key_padding_mask=mask, is_causal=order, scaling=scale, dropout=dropout)


class Group(NamedTuple):
    """Places that see equally many places."""

    rows: tuple[int, ...]
    """Their numbers, counted from the first place with queries."""
    seen: tuple[int, ...]
    """The places they see, in ascending order, row after row."""
    last: bool
    """The last place is among those that each of them sees; only known where it was asked for."""


def layout(first: int, places: int, is_causal: bool, ask_last: bool) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """What the places from `first` on see, in groups; and where each of them stands once the groups are in a row.

    Flipping bit b of a Gray code mirrors the place within its aligned run of 2^(b+1) places: p xor (2^(b+1) - 1).
    """
    mirrors = [0, *((2 << bit) - 1 for bit in range((places - 1).bit_length()))]
    groups: dict[tuple[int, bool], tuple[list[int], list[int]]] = {}
    for row, place in enumerate(range(first, places)):
        seen = sorted(place ^ mirror for mirror in mirrors if place ^ mirror <= (place if is_causal else places - 1))
        rows, all_seen = groups.setdefault((len(seen), ask_last and seen[-1] == places - 1), ([], []))
        rows.append(row)
        all_seen.extend(seen)
    order = [row for rows, _ in groups.values() for row in rows]
    return (
        tuple(Group(tuple(rows), tuple(seen), last) for (_, last), (rows, seen) in groups.items()),
        tuple(sorted(range(len(order)), key=order.__getitem__)),
    )


_cached_layout = functools.lru_cache(maxsize=128)(layout)


def _layout(first: int, places: int, is_causal: bool, ask_last: bool) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """`layout`, made once a length; compiled code keeps what it traced."""
    return (layout if torch.compiler.is_compiling() else _cached_layout)(first, places, is_causal, ask_last)


def _fill(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros (False) before and after the tokens, dimension 1."""
    return pad(x, (0, 0) * (x.dim() - 2) + (before, after)) if before or after else x


register(
    Mechanism(
        name="hypercube",
        title="Hypercube attention",
        paper="Wang, Lee, Guo, Yin, Zhou, Huang, Qiu, ICML 2022 (arXiv 2205.14014)",
        equation="out_n = softmax_m(s <q_n, k_m>) . v over the keys m with popcount(gray(place(n)) xor gray(place(m))) <= 1,  "
        "place(n) = floor(n / block_size), gray(p) = p xor floor(p / 2)",
        module_class=HypercubeAttention,
        example={"block_size": 2},
    )
)
