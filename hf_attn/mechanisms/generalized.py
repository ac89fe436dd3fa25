"""Generalized spatial attention: softmax over any sum of four terms of query content, key content and position.

Paper: Zhu, Cheng, Zhang, Lin, Dai, "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", ICCV 2019,
equation 8, with the encoding of positions of its public code.

    E_nm = b1 <q_n, k_m> + b2 <q_n, r_nm> + b3 <u, k_m> + b4 <v, r_nm>        out_n = softmax_m(scale E_nm) . value
    r_nm = V^R f(n - m),  f(d)[i] = sin(w_i d),  f(d)[P/2 + i] = cos(w_i d),  w_i = 1000 ** (-2 i / P)

Shapes: query (B,H,N,D), key and value (B,H,M,D), r (N,M,H,D), u and v (H,D), V^R (H*D,P); on a grid, r is the sum of
two such terms, of columns and rows, P/2 wide each, over sqrt(2).
When to use: to find out which of the terms a model needs; relative positions for any of them; "0010" as a cheap layer.
When not: "1111" for speed: it is softmax attention over D + P channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import causal_linear_attention, finite, linear_attention, masked_softmax
from hf_attn.functional_masks import ToeplitzMask
from hf_attn.kernels import flash
from hf_attn.kernels.causal_features import causal_feature_attention
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

FFT_FROM = 256
"""Keys from which "0001" and "0011" take the FFT; measured on a CPU, one thread, float32, D = P = 64."""
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class GeneralizedOptions(Options):
    """Options of `generalized`.

    Attributes:
        beta: four characters 0 or 1: query content x key content, query content x relative position, key content,
            relative position.
        position_dim: P, width of the sinusoid; even, and a multiple of 4 with `position_2d`.
        position_2d: positions are those of a grid, not indices of a sequence.
        energy_scale: factor of the sum of the terms; None = the call's scaling, 1.0 = as published.
        spatial_range: R >= 0: only keys at most R away on each axis are visible; -1 = all.
        kv_stride: t > 1: only keys in every t-th row and column of the grid exist.
    """

    mechanism: ClassVar[str] = "generalized"

    beta: str = "1111"
    position_dim: int = 64
    position_2d: bool = False
    energy_scale: float | None = None
    spatial_range: int = -1
    kv_stride: int = 1

    def check(self) -> None:
        if not isinstance(self.beta, str) or len(self.beta) != 4 or set(self.beta) - {"0", "1"}:
            raise self.refuse("beta", "must be four characters 0 or 1, such as '1111'")
        self.integer("position_dim", 2)
        self.boolean("position_2d")
        self.integer("spatial_range", -1)
        self.integer("kv_stride", 1)
        if self.position_2d and self.position_dim % 4:
            raise self.refuse(
                "position_dim", "must be a multiple of 4 with position_2d=True (sines, cosines, two axes)"
            )
        if self.position_dim % 2:
            raise self.refuse("position_dim", "must be even (sines and cosines)")
        if self.energy_scale is not None:
            self.number("energy_scale", -math.inf)
            if math.isinf(self.energy_scale):
                raise self.refuse("energy_scale", "must be finite")

    @property
    def terms(self) -> tuple[bool, ...]:
        """b1, b2, b3, b4."""
        return tuple(bit == "1" for bit in self.beta)

    @property
    def relative(self) -> bool:
        """A term asks for relative positions."""
        return self.terms[1] or self.terms[3]

    @property
    def same_for_all_queries(self) -> bool:
        """All queries that see the same keys get the same result: one running sum serves them."""
        return self.beta in ("0000", "0010") and self.spatial_range < 0


class GeneralizedAttention(AttentionModule):
    """Softmax over any sum of four terms: query and key content, query content and position, key content, position."""

    name = "generalized"
    options_class = GeneralizedOptions

    def __init__(self, num_heads: int, head_dim: int, options: GeneralizedOptions):
        super().__init__(num_heads, head_dim, options)
        _, _, key_content, position = options.terms
        if key_content:
            self.key_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        if position:
            self.position_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        if options.relative and options.position_2d:
            self.position_proj_x = nn.Linear(options.position_dim // 2, num_heads * head_dim, bias=False)
            self.position_proj_y = nn.Linear(options.position_dim // 2, num_heads * head_dim, bias=False)
        elif options.relative:
            self.position_proj = nn.Linear(options.position_dim, num_heads * head_dim, bias=False)

    @classmethod
    def describe(cls, options: GeneralizedOptions) -> Capabilities:
        sequence, prefix = not options.position_2d, options.position_2d and options.kv_stride == 1
        return Capabilities(
            causal=sequence,
            cross=sequence and not options.relative and options.spatial_range < 0,
            packed=sequence,
            sequence=sequence,
            grid="ignored" if sequence else "used",
            prefix_tokens=prefix,
            decode="none" if not sequence else "constant state" if options.same_for_all_queries else "full cache",
            learned=options.beta not in ("0000", "1000"),
            attention_weights=True,
            dropout=any(options.terms[:2]),
            derived=("CLS token",) if prefix else (),
            pays_from="none up to 4096 (2-core CPU, float32, D = 64, terms 1111)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        if not host.grid or "position_2d" in given or given.get("position_dim", 4) % 4:
            return {}
        return {"position_2d": True}

    def reset_parameters(self) -> None:
        for bias in ("key_bias", "position_bias"):
            if hasattr(self, bias):
                bound = (2 * self.head_dim) ** -0.5
                torch.nn.init.uniform_(getattr(self, bias), -bound, bound)
        for projection in self.projections():
            bound = (3 / projection.in_features) ** 0.5
            torch.nn.init.uniform_(projection.weight, -bound, bound)

    def reset_beside_pretrained(self) -> None:
        """u = 0 and V^R = 0: every "1xxx" starts as softmax attention. v stays drawn, or V^R would get no gradient."""
        self.reset_parameters()
        if hasattr(self, "key_bias"):
            torch.nn.init.zeros_(self.key_bias)
        for projection in self.projections():
            torch.nn.init.zeros_(projection.weight)

    def projections(self) -> list[nn.Linear]:
        """V^R of each axis: none, that of the sequence, or those of columns and rows."""
        names = ("position_proj", "position_proj_x", "position_proj_y")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        options, grid, causal = self.options, arguments.get("grid"), arguments.get("is_causal")
        prefix, refused = arguments.get("num_prefix_tokens", 0), None
        crossed = not causal and query.dim() == key.dim() == 4 and query.shape[2] != key.shape[2]
        if options.position_2d and grid is not None and min(grid) < 1:
            raise InvalidInput(f"generalized: grid={tuple(grid)} must be two numbers of at least 1.")
        if options.position_2d and causal:
            rule = "is_causal=True with position_2d=True: places of a grid have no causal order"
            refused = rule, "Leave is_causal out, or set position_2d=False"
        elif options.kv_stride > 1 and not options.position_2d:
            rule = f"kv_stride={options.kv_stride} with position_2d=False: only keys of a grid can be left out"
            refused = rule, "Set position_2d=True and pass a grid, or kv_stride=1"
        elif options.kv_stride > 1 and prefix:
            rule = f"num_prefix_tokens={prefix} before the grid with kv_stride={options.kv_stride}"
            refused = rule, "Drop the prefix tokens (mean pooling), or set kv_stride=1"
        elif crossed and (options.relative or options.spatial_range >= 0):
            rule = f"N={query.shape[2]} queries and M={key.shape[2]} keys with beta={options.beta!r}, "
            rule += f"spatial_range={options.spatial_range}: positions of two sequences are not comparable"
            refused = rule, "Use beta='1000', '1010', '0010' or '0000' with spatial_range=-1 for cross-attention"
        if refused:
            raise Unsupported(self.name, *refused)
        return super()._call(query, key, value, **arguments)

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def factor(self, call: Call) -> float:
        return call.scale if self.options.energy_scale is None else self.options.energy_scale

    def prefix(self, call: Call) -> int:
        """Tokens before the grid, which have no place on it."""
        return call.num_prefix_tokens if self.options.position_2d else 0

    def places(self, call: Call) -> list[Tensor]:
        """Place of every token on each axis: (M,) index, or column and row (rows * columns,) of the patches."""
        if not self.options.position_2d:
            return [torch.arange(call.keys, device=call.query.device)]
        rows, columns = call.grid or (0, 0)
        patch = torch.arange(rows * columns, device=call.query.device)
        return [patch % columns, patch // columns]

    def kept(self, places: list[Tensor]) -> Tensor:
        """(M,) bool: the key is in a row and a column that `kv_stride` keeps."""
        return torch.stack([place % self.options.kv_stride == 0 for place in places]).all(dim=0)

    def pattern(self, query: list[Tensor], key: list[Tensor], prefix: int) -> Tensor:
        """(N,M) bool: the key is within `spatial_range` of the query. Arguments are places, axis by axis."""
        near = [(q[:, None] - k).abs() <= self.options.spatial_range for q, k in zip(query, key, strict=True)]
        return pad(torch.stack(near).all(dim=0), (prefix, 0, prefix, 0), value=True)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        key_places, prefix = self.places(call), self.prefix(call)
        offset = call.keys - call.queries if call.is_causal else 0
        query_places = [place[offset:] for place in key_places]
        query, key, dtype = call.query, call.key, call.query.dtype
        content, query_position, key_content, position = self.options.terms
        energy = query.new_zeros(call.batch, self.num_heads, call.queries, call.keys)
        if content:
            energy = energy + query @ key.transpose(-1, -2)
        if key_content:
            energy = energy + (self.key_bias.to(dtype)[:, None] * key).sum(dim=-1)[:, :, None]
        if self.options.relative:
            relative = query.new_zeros(())
            for projection, q, k in zip(self.projections(), query_places, key_places, strict=True):
                waves = _sinusoid(q[:, None] - k, projection.in_features, dtype)
                relative = relative + waves @ projection.weight.to(dtype).T
            relative = (relative / len(key_places) ** 0.5).unflatten(-1, (self.num_heads, self.head_dim))
            relative = pad(relative, (0, 0, 0, 0, prefix, 0, prefix, 0))
            if query_position:
                energy = energy + torch.einsum("bhnd,nmhd->bhnm", query, relative)
            if position:
                energy = energy + torch.einsum("hd,nmhd->hnm", self.position_bias.to(dtype), relative)
        visible = call.visible()
        if self.options.spatial_range >= 0:
            near = self.pattern(query_places, key_places, prefix)
            visible = near if visible is None else near & visible
        if self.options.kv_stride > 1:
            kept = self.kept(key_places)
            visible = kept.expand(call.queries, -1) if visible is None else kept & visible
        return masked_softmax(self.factor(call) * energy, visible)

    # -- the efficient forms ---------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        places, options = self.places(call), self.options
        offset = call.keys - call.queries if call.is_causal else 0
        query_places = [place[offset:] for place in places]
        if options.kv_stride > 1:
            kept = self.kept(places)
            places = [place[kept] for place in places]
            mask = call.key_padding_mask
            mask = None if mask is None else mask[:, kept]
            call = replace(call, key=call.key[:, :, kept], value=call.value[:, :, kept], key_padding_mask=mask)
        if options.same_for_all_queries:
            return self._key_content(call)
        if not any(options.terms[:2]) and options.spatial_range < 0 and not options.position_2d:
            out = self._by_fft(call)
            if out is not None:
                return out
        return self._as_channels(call, query_places, places)

    def key_logits(self, call: Call) -> Tensor:
        """(B,H,M,1) scale E3, zero without that term."""
        if not self.options.terms[2]:
            return call.key.new_zeros(*call.key.shape[:3], 1)
        return self.factor(call) * (call.key @ self.key_bias.to(call.key.dtype)[:, :, None])

    def _key_content(self, call: Call) -> Tensor:
        """Weights exp(scale E3_m) for every query: linear attention with one feature."""
        log_key = self.key_logits(call)
        if call.is_causal:
            log_query = log_key.new_zeros(*call.query.shape[:3], 1)
            return causal_feature_attention(log_query, log_key, call.value, call.key_padding_mask)
        log_query = log_key.new_zeros(*call.query.shape[:2], 1, 1)
        out = linear_attention(log_query, log_key, call.value, call.key_padding_mask)
        return out.expand(-1, -1, call.queries, -1)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        log_query = call.query.new_zeros(*call.query.shape[:3], 1)
        return causal_linear_attention(log_query, self.key_logits(call), call.value, call.key_padding_mask, state)

    def _as_channels(self, call: Call, query_places: list[Tensor], key_places: list[Tensor]) -> Tensor:
        """Plain attention over the channels of the content and of the positions.

        The addition theorems turn a_i sin(w_i (n - m)) + c_i cos(w_i (n - m)) into a product of numbers of the query
        with sin(w_i m), cos(w_i m) of the key. So any kernel adds the terms, and nothing N x M is stored.
        """
        content, query_position, key_content, position = self.options.terms
        dtype, prefix, shape = call.query.dtype, self.prefix(call), call.query.shape[:2]
        queries, keys = [], []
        if content or key_content or not self.options.relative:
            query = call.query if content else torch.zeros_like(call.query)
            queries.append(query + self.key_bias.to(dtype)[:, None] if key_content else query)
            keys.append(call.key)
        if self.options.relative:
            asking = call.query[:, :, prefix:] if query_position else call.query.new_zeros(1, self.num_heads, 1, 1)
            asking = asking + self.position_bias.to(dtype)[:, None] if position else asking
            for projection, q, k in zip(self.projections(), query_places, key_places, strict=True):
                weight = projection.weight.to(dtype).unflatten(0, (self.num_heads, self.head_dim))
                sine, cosine = (asking @ weight / len(key_places) ** 0.5).chunk(2, dim=-1)
                at_query, at_key = (_sinusoid(place, projection.in_features, dtype) for place in (q, k))
                sin, cos = at_query.chunk(2, dim=-1)
                turned = torch.cat((cosine * sin - sine * cos, sine * sin + cosine * cos), dim=-1)
                queries.append(pad(turned, (0, 0, prefix, 0)).expand(*shape, -1, -1))
                keys.append(pad(at_key, (0, 0, prefix, 0)).expand(*shape, -1, -1))
        query, key, value = torch.cat(queries, dim=-1), torch.cat(keys, dim=-1), call.value
        missing = value.shape[-1] - query.shape[-1]  # kernels want values as wide as keys
        if missing > 0:
            query, key = pad(query, (0, missing)), pad(key, (0, missing))
        near = None
        if self.options.spatial_range >= 0:
            near = self.pattern(query_places, key_places, prefix)[None, None]
        out = flash.attention(
            query,
            key,
            pad(value, (0, max(-missing, 0))),
            key_padding_mask=call.key_padding_mask,
            attention_mask=near,
            is_causal=call.is_causal,
            scaling=self.factor(call),
            dropout=call.dropout if self.capabilities.dropout else 0.0,
        )
        return out[..., : self.head_dim]

    def _by_fft(self, call: Call) -> Tensor | None:
        """Weights w(n - m) exp(scale E3_m) by two convolutions; None where that is slower, or rounding would show.

        The rounding error of an FFT is relative to its largest number, so a query whose weights are all small beside
        those of other queries would lose its digits.
        """
        if torch.compiler.is_compiling() or call.keys < FFT_FROM:
            return None
        log_key, mask, dtype = self.key_logits(call), call.key_padding_mask, call.query.dtype
        if mask is not None:
            log_key = log_key.masked_fill(~mask[:, None, :, None], _NEGATIVE_INFINITY)
        weight = (log_key - finite(log_key.detach().amax(dim=2, keepdim=True))).exp()

        first = call.keys - call.queries if call.is_causal else 0
        offset = torch.arange(first + 1 - call.keys, first + call.queries, device=call.query.device)
        (projection,) = self.projections()
        matrix = projection.weight.to(dtype).unflatten(0, (self.num_heads, self.head_dim))
        asking = self.position_bias.to(dtype)[:, None] @ matrix
        log_kernel = self.factor(call) * (asking @ _sinusoid(offset, projection.in_features, dtype).T)[:, 0]
        if call.is_causal:
            log_kernel = log_kernel.masked_fill(offset < 0, _NEGATIVE_INFINITY)
        kernel = (log_kernel - log_kernel.detach().amax(dim=-1, keepdim=True)).exp()
        toeplitz = ToeplitzMask(kernel[..., None], (call.queries, 1), (call.keys, 1))

        sums = toeplitz.product(torch.cat((weight * call.value, weight), dim=-1))
        mass, seen = sums[..., -1:], torch.ones_like(sums[..., -1:], dtype=torch.bool)
        if mask is not None:
            some = mask.cumsum(dim=1)[:, first:] > 0 if call.is_causal else mask.any(dim=1, keepdim=True)
            seen = some[:, None, :, None] & seen
        noise = toeplitz.error * weight.detach().sum(dim=2, keepdim=True)
        exact = mass.detach() > noise / (1e-11 if dtype == torch.float64 else 1e-6)
        if not (exact | ~seen).all():
            return None
        return torch.where(seen, sums[..., :-1] / torch.where(seen, mass, 1), 0)


def _sinusoid(place: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(..., width) sines, then cosines, of places or displacements (...); float64 until the end, for far places."""
    frequency = 1000 ** (-2 * torch.arange(width // 2, device=place.device, dtype=torch.float64) / width)
    angle = place[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype)


register(
    Mechanism(
        name="generalized",
        title="Generalized spatial attention",
        paper="Zhu et al., ICCV 2019 (arXiv 1904.05873)",
        equation="out_n = softmax_m(scale (b1 <q_n, k_m> + b2 <q_n, r_nm> + b3 <u, k_m> + b4 <v, r_nm>)) . value,  "
        "r_nm = V^R f(n - m), f sinusoids",
        module_class=GeneralizedAttention,
        example={"position_dim": 8},
    )
)
