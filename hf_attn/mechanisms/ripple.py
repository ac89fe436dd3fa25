"""Ripple attention: kernel attention whose weights depend on the 2-D ring distance between query and key.

Paper: Zheng, Pan, Kong, "Ripple Attention for Visual Perception with Sub-quadratic Complexity", ICML 2022, equation
of the ripple layer; reconstructed from the published description; no official code. The stick-breaking input, the
threshold rule, the tail, the feature map and the CLS token are choices made here.

    out_n = sum_m alpha_ring(n,m)(n) <phi(q_n), phi(k_m)> v_m / sum_m alpha_ring(n,m)(n) <phi(q_n), phi(k_m)>
    ring(n,m) = max(|row_m - row_n|, |column_m - column_n|)
    alpha_r = s_r prod_{r'<r} (1 - s_r'),  s_r = sigmoid(D**-0.5 <q_n, u_r> + b_r)      (`stick_query`)

Shapes: query, key and value (B,H,N,D), N = prefix tokens + rows * columns, features (B,H,N,F).
When to use: vision models on a token grid that should know distance on it; pretrained ViT weights with
`ripple_kernel="softmax"`, which only adds log alpha to the logits.
When not: text (the 1-D form is derived, not published); in float32 the tables of the sub-quadratic form subtract
large sums, so features of very different size (`feature_map="positive"`, long vectors) belong to the quadratic form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.functional import (
    draw_,
    log_elu1,
    log_kernel,
    log_positive,
    masked_softmax,
    random_directions,
    recomputed,
)
from hf_attn.kernels import rings
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

STICKS = ("stick_query", "stick_static")
SAT_FROM = {"inference": 576, "training": 1600}
"""Tokens per ring with a weight of its own from which "auto" takes the tables; measured on a 2-core CPU, r_cap 4."""
SAT_NUMBERS = 1 << 24
"""Numbers in one table; more heads and samples take turns."""
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class RippleOptions(Options):
    """Options of `ripple`.

    Attributes:
        ripple_weights: weight of a ring: "stick_query", "stick_static", "softmax", "decay", "truncated", "uniform".
        r_cap: rings with a weight of their own; the rings beyond share the tail.
        tau: sticks: rings share the tail once no more than tau of the stick is left; 0 = off.
        tail: sticks: every tail ring gets the leftover ("share"), or an equal part of it ("spread").
        ripple_kernel: "linear" (feature map) or "softmax" (exponential kernel).
        feature_map: "elu1", "mlp_fourier" (learned) or "positive" (random); linear kernel only.
        num_features: F of "mlp_fourier" and "positive"; None = D.
        orthogonal: rows of the "positive" draw orthogonal in blocks of D.
        ripple_cls: prefix tokens refused ("none"), or weighed by a "fixed" or "learned" weight.
        ripple_init: start of the sticks, as linear attention ("uniform") or halving from ring to ring ("local").
        ripple_impl: "quadratic", "sat" (summed-area tables) or "auto"; the same numbers.
        allow_1d: accept calls without a grid, as a 1 x N grid.
    """

    mechanism: ClassVar[str] = "ripple"

    ripple_weights: str = "stick_query"
    r_cap: int | None = None
    tau: float = 0.0
    tail: str = "share"
    ripple_kernel: str = "linear"
    feature_map: str = "elu1"
    num_features: int | None = None
    orthogonal: bool = True
    ripple_cls: str = "fixed"
    ripple_init: str = "uniform"
    ripple_impl: str = "auto"
    allow_1d: bool = False

    def check(self) -> None:
        self.one_of("ripple_weights", *STICKS, "softmax", "decay", "truncated", "uniform")
        self.one_of("tail", "share", "spread")
        self.one_of("ripple_kernel", "linear", "softmax")
        self.one_of("feature_map", "elu1", "mlp_fourier", "positive")
        self.one_of("ripple_cls", "none", "fixed", "learned")
        self.one_of("ripple_init", "uniform", "local")
        self.one_of("ripple_impl", "auto", "quadratic", "sat")
        self.boolean("orthogonal", "allow_1d")
        self.number("tau", 0, 1)
        if self.r_cap is not None or self.needs_cap(self.ripple_weights):
            self.integer("r_cap", 1)
        if self.ripple_weights not in STICKS:
            for option, off in (("tau", 0), ("tail", "share")):
                if getattr(self, option) != off:
                    rule = f"belongs to the stick forms, and ripple_weights={self.ripple_weights!r}"
                    raise self.refuse(option, rule, f"Leave {option} out.")
        if self.num_features is not None:
            self.integer("num_features", 1)
            if self.feature_map == "mlp_fourier" and self.num_features % 2:
                raise self.refuse("num_features", "must be even with feature_map='mlp_fourier' (cosines and sines)")
        if self.ripple_impl == "sat" and self.ripple_kernel == "softmax":
            raise self.refuse("ripple_impl", "has no form for that kernel", "Use 'auto' or 'quadratic' with it.")

    @staticmethod
    def needs_cap(ripple_weights: str) -> bool:
        return ripple_weights in (*STICKS, "softmax", "truncated")


class FourierFeatures(nn.Module):
    """log of phi(x) = relu(proj(D**-0.5 [cos(freq x), sin(freq x)])) + 1e-6, proj shared by the heads."""

    def __init__(self, heads: int, features: int, dim: int):
        super().__init__()
        self.freq = nn.Parameter(torch.empty(heads, features // 2, dim))
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        angle = x @ self.freq.to(x.dtype).transpose(-1, -2)
        waves = x.shape[-1] ** -0.5 * torch.cat((angle.cos(), angle.sin()), dim=-1)
        return (functional.linear(waves, self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)).relu() + 1e-6).log()


class RippleAttention(AttentionModule):
    """Ripple attention: linear attention on a token grid, with a learned weight for every ring around the query."""

    name = "ripple"
    options_class = RippleOptions

    def __init__(self, num_heads: int, head_dim: int, options: RippleOptions):
        super().__init__(num_heads, head_dim, options)
        scheme, entries = options.ripple_weights, options.r_cap or 0
        entries += scheme == "softmax"
        if scheme in ("stick_query", "softmax"):
            self.ring_query = nn.Parameter(torch.empty(num_heads, entries, head_dim))
        if scheme in (*STICKS, "softmax"):
            self.ring_bias = nn.Parameter(torch.empty(num_heads, entries))
        if scheme == "decay":
            self.decay_logit = nn.Parameter(torch.empty(num_heads))
        if options.ripple_cls == "learned":
            self.cls_logit = nn.Parameter(torch.empty(num_heads))
        self.feature_map = options.feature_map if options.ripple_kernel == "linear" else ""
        self.num_features = head_dim if options.num_features is None else options.num_features
        if self.feature_map == "mlp_fourier":
            if self.num_features % 2:
                rule = f"num_features must be even with feature_map='mlp_fourier', its default is head_dim={head_dim}"
                raise InvalidOption(f"ripple: {rule}. Set num_features.")
            self.feature = FourierFeatures(num_heads, self.num_features, head_dim)
        if self.feature_map == "positive":
            self.projection: Tensor
            self.register_buffer("projection", torch.empty(num_heads, self.num_features, head_dim))

    @classmethod
    def describe(cls, options: RippleOptions) -> Capabilities:
        linear = options.ripple_kernel == "linear"
        causal = options.allow_1d and options.tau == 0 and options.tail == "share"
        prefix = options.ripple_cls != "none"
        learned = options.ripple_weights in (*STICKS, "softmax", "decay") or options.ripple_cls == "learned"
        drawn = linear and options.feature_map == "positive"
        derived = (("1-D sequences", options.allow_1d), ("causal 1-D", causal), ("CLS token", prefix))
        return Capabilities(
            causal=causal,
            packed=options.allow_1d,
            sequence=options.allow_1d,
            grid="used",
            prefix_tokens=prefix,
            learned=learned or (linear and options.feature_map == "mlp_fourier"),
            random="feature directions: once at construction, saved" if drawn else "",
            attention_weights=True,
            derived=tuple(mode for mode, defined in derived if defined),
            pays_from="none up to 7744 (2-core CPU, float32, D = 64, r_cap 4)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        scheme = given.get("ripple_weights", RippleOptions.ripple_weights)
        if given.get("r_cap") is not None or not RippleOptions.needs_cap(scheme):
            return {}
        return {"r_cap": max(1, max(host.grid) - 1) if host.grid else max(1, min(16, (host.max_length or 17) - 1))}

    def reset_parameters(self) -> None:
        options = self.options
        if hasattr(self, "ring_query"):
            torch.nn.init.zeros_(self.ring_query)
        if options.ripple_weights in STICKS and options.ripple_init == "uniform":
            start = -torch.arange(options.r_cap, 0, -1, device=self.ring_bias.device, dtype=torch.float64).log()
            draw_(self.ring_bias, start.expand_as(self.ring_bias))
        elif hasattr(self, "ring_bias"):
            torch.nn.init.zeros_(self.ring_bias)
        if hasattr(self, "decay_logit"):
            torch.nn.init.constant_(self.decay_logit, 2.0)
        if hasattr(self, "cls_logit"):
            torch.nn.init.zeros_(self.cls_logit)
        if self.feature_map == "mlp_fourier":
            torch.nn.init.normal_(self.feature.freq, std=0.02)
            torch.nn.init.trunc_normal_(self.feature.proj.weight, std=0.02)
            torch.nn.init.zeros_(self.feature.proj.bias)
        if self.feature_map == "positive":
            heads, features, dim = self.projection.shape
            draw_(self.projection, random_directions(heads, features, dim, options.orthogonal, self.projection.device))

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        options, grid = self.options, arguments.get("grid")
        prefix, refused = arguments.get("num_prefix_tokens", 0), None
        if grid is not None and min(grid) < 1:
            raise InvalidInput(f"ripple: grid={tuple(grid)} must be two numbers of at least 1.")
        if query.dim() == key.dim() == 4 and query.shape[2] != key.shape[2]:
            rule = f"N={query.shape[2]} queries and M={key.shape[2]} keys: rings need queries and keys on the same grid"
            refused = rule, "Pass as many keys as queries"
        elif arguments.get("is_causal") and grid is not None:
            rule = f"is_causal=True with grid={tuple(grid)}: rings of a grid have no causal order"
            refused = rule, "Leave is_causal out"
        elif arguments.get("is_causal") and options.tau > 0:
            refused = f"is_causal=True with tau={options.tau}: causal use needs fixed rings", "Set tau=0 and use r_cap"
        elif grid is None and options.allow_1d and options.tail == "spread":
            rule = "tail='spread' without a grid: the number of tail rings is not fixed"
            refused = rule, "Pass a grid, or use tail='share'"
        elif grid is not None and prefix and options.ripple_cls == "none":
            rule = f"num_prefix_tokens={prefix} before the grid with ripple_cls='none'"
            refused = rule, "Use ripple_cls='fixed' or 'learned', or drop the prefix tokens (mean pooling)"
        if refused:
            raise Unsupported(self.name, *refused)
        return super()._call(query, key, value, **arguments)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        prefix, rows, columns = _geometry(call)
        if self.options.ripple_kernel == "softmax":
            logits = call.scale * (call.query @ call.key.transpose(-1, -2))
        else:
            log_query, log_key = self.log_features(call.query, call), self.log_features(call.key, call)
            logits = torch.logsumexp(log_query[:, :, :, None] + log_key[:, :, None], dim=-1)
        ring = _rings(rows, columns, call.query.device)
        log_alpha = logits.new_zeros(logits.shape)
        if prefix:
            log_alpha[:, :, prefix:, :prefix] = self.log_prefix_weight(call)[:, None, None]
        for r, log_weight in enumerate(self.log_alpha_by_ring(call)):
            patches = log_alpha[:, :, prefix:, prefix:]
            log_alpha[:, :, prefix:, prefix:] = torch.where(ring == r, log_weight[..., None], patches)
        reached = log_alpha > _NEGATIVE_INFINITY
        visible = call.visible()
        return masked_softmax(logits + log_alpha, reached if visible is None else reached & visible)

    def log_alpha_by_ring(self, call: Call) -> list[Tensor]:
        """log alpha_r (B,H,N) of the grid's queries for r = 0..R, ring by ring."""
        options, farthest = self.options, self.farthest_ring(call)
        query = call.query[:, :, _geometry(call)[0] :]
        zero = query.new_zeros(query.shape[:3])
        if options.ripple_weights in ("uniform", "truncated"):
            reach = options.r_cap if options.ripple_weights == "truncated" else farthest + 1
            return [zero if r < reach else zero + _NEGATIVE_INFINITY for r in range(farthest + 1)]
        if options.ripple_weights == "decay":
            rate = functional.logsigmoid(self.decay_logit.to(query.dtype))[:, None]
            cap = farthest if options.r_cap is None else options.r_cap
            return [zero + min(r, cap) * rate for r in range(farthest + 1)]
        logits = self.ring_logits(query) + zero[..., None]
        if options.ripple_weights == "softmax":
            log_alpha = logits.log_softmax(dim=-1)
            return [log_alpha[..., min(r, options.r_cap)] for r in range(farthest + 1)]

        cap = options.r_cap if call.grid is None else min(options.r_cap, farthest)
        log_left, stopped, last, pieces = zero, zero.bool(), zero, []
        for r in range(cap):
            if r and options.tau:
                stopped = stopped | (log_left.exp() <= options.tau)
            pieces.append(functional.logsigmoid(logits[..., r]) + log_left)
            log_left = torch.where(stopped, log_left, log_left + functional.logsigmoid(-logits[..., r]))
            last = last + ~stopped
        tail = log_left - (farthest - last + 1).log() if options.tail == "spread" else log_left
        return [torch.where(r < last, pieces[r], tail) if r < cap else tail for r in range(farthest + 1)]

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def farthest_ring(self, call: Call) -> int:
        """R: the farthest ring that can hold a key."""
        return max(_geometry(call)[1:]) - 1

    def log_features(self, x: Tensor, call: Call) -> Tensor:
        """log phi (B,H,N,F)."""
        if self.feature_map == "elu1":
            return log_elu1(x)
        if self.feature_map == "mlp_fourier":
            return self.feature(x)
        return log_positive(x, self.projection.to(x.dtype), call.scale)

    def ring_logits(self, query: Tensor) -> Tensor:
        """(B,H,N,r) logits of the rings; (1,H,1,r) where they do not depend on the query."""
        bias = self.ring_bias.to(query.dtype)[None, :, None]
        if self.options.ripple_weights == "stick_static":
            return bias
        return self.head_dim**-0.5 * (query @ self.ring_query.to(query.dtype).transpose(-1, -2)) + bias

    def log_prefix_weight(self, call: Call) -> Tensor:
        """(H,) log weight that a query of the grid gives to a prefix key."""
        shared = self.options.r_cap + 1 if self.options.ripple_weights in (*STICKS, "softmax") else 1
        zero = call.query.new_zeros(self.num_heads)
        logit = self.cls_logit.to(zero.dtype) if self.options.ripple_cls == "learned" else zero
        return logit - math.log(shared)

    def log_alpha(self, call: Call) -> Tensor:
        """(B|1,H,N|1,r) log weights of rings 0, 1, ... for the grid's queries; the last holds for all beyond."""
        options, farthest = self.options, self.farthest_ring(call)
        query = call.query[:, :, _geometry(call)[0] :]
        cap = farthest if options.r_cap is None else min(options.r_cap, farthest)
        if options.ripple_weights == "uniform":
            return query.new_zeros(1, self.num_heads, 1, 1)
        if options.ripple_weights == "truncated":
            weight = query.new_zeros(1, self.num_heads, 1, min(options.r_cap, farthest + 1))
            return functional.pad(weight, (0, 1), value=_NEGATIVE_INFINITY) if options.r_cap <= farthest else weight
        if options.ripple_weights == "decay":
            rate = functional.logsigmoid(self.decay_logit.to(query.dtype))[None, :, None, None]
            return rate * torch.arange(cap + 1, device=query.device)
        logits = self.ring_logits(query)
        if options.ripple_weights == "softmax":
            return logits.log_softmax(dim=-1)[..., : cap + 1]
        if call.grid is not None:
            logits = logits[..., :cap]
        sticks = logits.shape[-1]
        log_left = functional.pad(functional.logsigmoid(-logits).cumsum(dim=-1), (1, 0))
        log_alpha = functional.pad(functional.logsigmoid(logits), (0, 1)) + log_left
        last = torch.full_like(log_left[..., :1], sticks, dtype=torch.long)
        if options.tau:
            # the stick only gets shorter, so counting the long pieces finds the first short one
            last = (1 + (log_left[..., 1:].exp() > options.tau).sum(dim=-1, keepdim=True)).clamp(max=sticks)
        tail = log_left.gather(-1, last)
        if options.tail == "spread":
            tail = tail - (farthest - last + 1).to(tail.dtype).log()
        log_alpha = torch.where(torch.arange(sticks + 1, device=last.device) < last, log_alpha, tail)
        if options.tau and not torch.compiler.is_compiling():
            # no query has a weight of its own beyond the last threshold
            farthest = min(farthest, int(last.max()))
        return log_alpha[..., : farthest + 1]

    # -- the efficient forms ---------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        log_alpha, options = self.log_alpha(call), self.options
        sat = options.ripple_impl == "sat" and not call.is_causal
        if options.ripple_impl == "auto" and self.feature_map in ("elu1", "mlp_fourier") and not call.is_causal:
            mode = "training" if torch.is_grad_enabled() else "inference"
            sat = call.queries >= SAT_FROM[mode] * (log_alpha.shape[-1] - 1)
            sat = sat or rings.local(call.query, self.num_features)
        return self._by_rings(call, log_alpha) if sat else self._quadratic(call, log_alpha)

    def _quadratic(self, call: Call, log_alpha: Tensor) -> Tensor:
        """softmax of log kernel + log alpha, alpha gathered by ring."""
        prefix, rows, columns = _geometry(call)
        beyond = log_alpha.shape[-1] - 1
        ring = _rings(rows, columns, call.query.device).clamp(max=beyond)
        log_alpha = log_alpha.expand(-1, -1, rows * columns, -1)
        if prefix:
            weight = self.log_prefix_weight(call)[None, :, None, None].expand(*log_alpha.shape[:3], 1)
            log_alpha = functional.pad(torch.cat((log_alpha, weight), dim=-1), (0, 0, prefix, 0))
            ring = functional.pad(functional.pad(ring, (prefix, 0), value=beyond + 1), (0, 0, prefix, 0))
        bias = log_alpha.gather(-1, ring.expand(*log_alpha.shape[:2], -1, -1))
        visible = call.visible()
        if self.options.ripple_weights == "truncated":
            reached = bias > _NEGATIVE_INFINITY
            visible = reached if visible is None else reached & visible
        if self.options.ripple_kernel == "softmax":
            logits = call.scale * (call.query @ call.key.transpose(-1, -2))
        else:
            log_query, log_key = self.log_features(call.query, call), self.log_features(call.key, call)
            logits, visible = log_kernel(log_query, log_key, visible)
        return masked_softmax(logits + bias, visible) @ call.value

    def _by_rings(self, call: Call, log_alpha: Tensor) -> Tensor:
        """Sums over rings as numbers, not as logarithms: by tables, or by the kernel that needs none."""
        prefix, rows, columns = _geometry(call)
        log_query, log_key = self.log_features(call.query, call), self.log_features(call.key, call)
        if call.key_padding_mask is not None:
            log_key = log_key.masked_fill(~call.key_padding_mask[:, None, :, None], _NEGATIVE_INFINITY)
        reference = log_key.detach().amax(dim=2, keepdim=True)
        reference = torch.where(reference == _NEGATIVE_INFINITY, 0, reference)
        key, query = (log_key - reference).exp(), log_query + reference
        query = (query - query.detach().amax(dim=-1, keepdim=True)).exp()
        value = functional.pad(call.value, (0, 1), value=1.0)

        # a factor common to all weights of a query cancels
        log_prefix = self.log_prefix_weight(call)[None, :, None, None]
        top = log_alpha.detach().amax(dim=-1, keepdim=True)
        top = torch.maximum(top, log_prefix.detach()) if prefix else top
        alpha = (log_alpha - top).exp()
        grid_query, grid_key, grid_value = (x[:, :, prefix:] for x in (query, key, value))
        request = rings.Request(
            grid_query, grid_key, grid_value[..., :-1], alpha, rows, columns,
            lambda: _summed_area(grid_query, grid_key, grid_value, alpha, rows, columns),
        )  # fmt: skip
        result = rings.ring_sums(request)
        total = key.transpose(-1, -2) @ value
        if prefix:
            from_prefix = key[:, :, :prefix].transpose(-1, -2) @ value[:, :, :prefix]
            result = result + (log_prefix - top).exp() * (query[:, :, prefix:] @ from_prefix)
            result = torch.cat((query[:, :, :prefix] @ total, result), dim=2)
        mass = result[..., -1:]
        # differences of sums can end below zero where the true mass is smaller than their rounding error
        floor = torch.finfo(mass.dtype).eps * (query @ total[..., -1:]).detach()
        out = result[..., :-1] / torch.where(mass > floor, mass, torch.where(floor > 0, floor, 1))
        return out if call.key_padding_mask is None else torch.where(self._sees(call, call.key_padding_mask), out, 0)

    def _sees(self, call: Call, mask: Tensor) -> Tensor:
        """(B,1,N,1) bool: the query has a key that is no padding (`mask`) and has a weight."""
        prefix, rows, columns = _geometry(call)
        seen = mask.any(dim=1, keepdim=True).expand_as(mask)
        if self.options.ripple_weights == "truncated":
            radius = min(self.options.r_cap - 1, self.farthest_ring(call))
            patches = mask[:, prefix:].view(-1, 1, rows, columns).to(call.query.dtype)
            near = functional.max_pool2d(patches, 2 * radius + 1, stride=1, padding=radius).flatten(1) > 0
            seen = torch.cat((seen[:, :prefix], near | mask[:, :prefix].any(dim=1, keepdim=True)), dim=1)
        return seen[:, None, :, None]


def _geometry(call: Call) -> tuple[int, int, int]:
    """Prefix tokens, rows and columns; a sequence is one row."""
    return (0, 1, call.queries) if call.grid is None else (call.num_prefix_tokens, call.grid[0], call.grid[1])


def _rings(rows: int, columns: int, device: torch.device) -> Tensor:
    """(N,N) ring of the key around the query, raster order."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())


def _summed_area(query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, rows: int, columns: int) -> Tensor:
    """(B,H,N,D+1) sum_r (alpha_r - alpha_{r+1}) phi(q)^T Box_r + alpha_last phi(q)^T Total.

    Box_r is the sum of phi(k) v^T over the square of radius r, value (B,H,N,D+1) has a column of ones.
    """
    coefficient = torch.cat((alpha[..., :-1] - alpha[..., 1:], alpha[..., -1:]), dim=-1)
    coefficient = coefficient.expand(*query.shape[:3], -1)
    parts = [x.flatten(0, 1) for x in (query, key, value, coefficient)]
    group = max(1, SAT_NUMBERS // (rows * columns * key.shape[-1] * value.shape[-1]))
    several = zip(*(x.split(group) for x in parts), strict=True)
    return torch.cat([recomputed(_boxes, *part, rows, columns) for part in several]).unflatten(0, query.shape[:2])


def _boxes(query: Tensor, key: Tensor, value: Tensor, coefficient: Tensor, rows: int, columns: int) -> Tensor:
    """(G,N,D+1) sum_r coefficient_r phi(q)^T Box_r, the last coefficient that of the whole grid.

    Args: query, key (G,N,F) features. value (G,N,D+1) with a column of ones. coefficient (G,N,r).
    """
    rings = coefficient.shape[-1] - 1
    result = coefficient[..., rings:] * (query @ (key.transpose(-1, -2) @ value))
    if rings:
        result = result + coefficient[..., :1] * (query * key).sum(dim=-1, keepdim=True) * value
    if rings > 1:
        outer = (key[..., None] * value[:, :, None]).unflatten(1, (rows, columns))
        table = functional.pad(outer.cumsum(dim=1).cumsum(dim=2), (0, 0, 0, 0, 1, 0, 1, 0)).unbind(1)
        for r in range(1, rings):
            result = result + coefficient[..., r : r + 1] * recomputed(_box, query, r, *table)
    return result


def _box(query: Tensor, radius: int, *table: Tensor) -> Tensor:
    """(G,N,D+1) phi(q)^T Box_radius; `table`: rows+1 parts (G,columns+1,F,D+1), sums of all above and to the left."""
    rows, columns = len(table) - 1, table[0].shape[1] - 1
    place = torch.arange(columns, device=query.device)
    after, before = (place + radius + 1).clamp(max=columns), (place - radius).clamp(min=0)
    result = []
    # row by row: one row of boxes stays in the cache
    for row, part in enumerate(query[:, :, None].split(columns, dim=1)):
        band = table[min(row + radius + 1, rows)] - table[max(row - radius, 0)]
        result.append(part @ (band.index_select(1, after) - band.index_select(1, before)))
    return torch.cat(result, dim=1).squeeze(2)


register(
    Mechanism(
        name="ripple",
        title="Ripple attention",
        paper="Zheng, Pan, Kong, ICML 2022 (arXiv 2110.02453); reconstructed from the published description; "
        "no official code",
        equation="out_n = sum_m w_nm v_m / sum_m w_nm,  w_nm = alpha_ring(n,m)(n) <phi(q_n), phi(k_m)>,  "
        "ring(n,m) = max(|row_m - row_n|, |column_m - column_n|)",
        module_class=RippleAttention,
        example={"r_cap": 3},
    )
)
