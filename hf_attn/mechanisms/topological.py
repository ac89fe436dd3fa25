"""Topological masking: kernel attention whose weights are multiplied by a mask of positions, a grid, a tree or a graph.

Paper: Choromanski et al., "From block-Toeplitz matrices to differential equations on graphs: towards a general theory
for scalable masked Transformers", ICML 2022 (arXiv 2107.07999). The grid form follows the official TopViT code; the
paper's text was not at hand.

    A_nm = mask_nm <phi(q_n), phi(k_m)> + floor        out_n = sum_m A_nm v_m / sum_m A_nm, m over the visible keys

Shapes: query (B,H,N,D), key and value (B,H,M,D), features (B,H,N,F), mask (H,N,M) or (1,N,M).
When to use: linear-attention vision or sequence models that should know relative position without position
embeddings; tokens on a tree or a graph that is known beforehand; causal decoding with a state of constant size
(`mask_type="decay"` or "none").
When not: as a drop-in for pretrained softmax weights without training. For speed: general masks take quadratic time
up to very long sequences, because the exact tiled form beats the FFT there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn import functional_masks as structural
from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import (
    causal_linear_attention,
    draw_,
    linear_attention,
    log_elu1,
    log_positive,
    random_directions,
)
from hf_attn.kernels import toeplitz
from hf_attn.kernels.causal_features import causal_feature_attention
from hf_attn.mechanisms.topological_options import CAUSAL, GRAPHS, READ_BY, SEQUENCES, TABLES, TopologicalOptions
from hf_attn.module import AttentionModule, Call, State
from hf_attn.registry import Mechanism, register

STRUCTURED_FROM = {"decay": 1024, "low_rank": 128, "tree": math.inf, "toeplitz": math.inf, "block_toeplitz": math.inf}
"""Keys from which the structured form (FFT, tree passes, chunked recurrence, sums over the rank) replaces the tiled one;
of "low_rank" keys for each unit of rank; infinite where it won at no length measured. From
docs/benchmarks/topological_forms.md, written by `scripts/topological_forms.py --apply`. `fft_min_length` can only raise
it."""


class TopologicalAttention(AttentionModule):
    """Topologically masked attention: linear attention times a mask of relative position, tree or graph distance."""

    name = "topological"
    options_class = TopologicalOptions

    def __init__(self, num_heads: int, head_dim: int, options: TopologicalOptions):
        super().__init__(num_heads, head_dim, options)
        kind, self.structure = options.mask_type, {}
        if kind in TABLES and options.parametrization == "exp_poly":
            self.coefficients = nn.Parameter(torch.empty(num_heads, options.poly_degree))
        elif kind in TABLES:
            lengths = (options.max_length,) if kind == "toeplitz" else options.grid_size
            self.table = nn.Parameter(torch.empty(num_heads, *(2 * n - 1 for n in lengths)))
        if kind == "low_rank":
            self.mask_factors = nn.Parameter(torch.empty(num_heads, options.max_length, options.rank))
        if kind in ("decay", "tree"):
            self.log_decay_rate = nn.Parameter(torch.empty(num_heads))
        if kind == "tree":
            self.structure = structural.tree_path_table(options.parent, options.lengths)
        if kind == "heat":
            self.heat_time = nn.Parameter(torch.empty(num_heads))
            self.structure = dict(zip(("values", "vectors"), structural.graph_spectrum(*options.graph())))
        if kind == "graph_kernel":
            self.node_features: Tensor
            self.register_buffer("node_features", torch.empty(options.size, options.size))
        if options.feature_map == "favor":
            self.random_projection: Tensor
            rows = head_dim if options.num_features is None else options.num_features
            self.register_buffer("random_projection", torch.empty(rows, head_dim))
        self.floor = options.eps if options.feature_map == "relu" and kind in ("none", *TABLES) else 0.0

    @classmethod
    def describe(cls, options: TopologicalOptions) -> Capabilities:
        kind = options.mask_type
        drawn = {
            "feature directions: once at construction, saved": options.feature_map == "favor",
            f"walks: once at construction, from seed={options.seed}, saved": options.walk_sampling == "sampled",
        }
        derived = {
            "toeplitz": ("cross-attention",),
            "low_rank": ("learned factors",),
            "block_toeplitz": ("causal in raster order",),
        }
        if options.size is not None:
            derived[kind] = (*derived.get(kind, ()), "several prefix tokens")
        return Capabilities(
            causal=kind in CAUSAL,
            cross=kind in ("none", "toeplitz", "low_rank"),
            packed=kind in SEQUENCES,
            grid="ignored" if options.grid_size is None else "used",
            prefix_tokens=kind not in SEQUENCES,
            decode={"none": "constant state", "decay": "constant state", "toeplitz": "full cache"}.get(kind, "none"),
            learned=kind not in ("none", "graph_kernel"),
            random="; ".join(what for what, done in drawn.items() if done),
            attention_weights=True,
            derived=derived.get(kind, ()),
            pays_from="none up to 4096 (2-core CPU, float32, D = 64, Toeplitz masks; causal decay: 2048)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        filled: dict[str, Any] = {}
        if "mask_type" not in given:
            first = "block_toeplitz" if host.grid else "decay" if host.causal else "toeplitz"
            kinds = (first, "toeplitz", "block_toeplitz", "tree", "low_rank")
            reads = (k for k in kinds if all(k in READ_BY.get(option, kinds) for option in given))
            filled["mask_type"] = next(reads, first)
        kind = given.get("mask_type", filled.get("mask_type"))
        if kind in ("toeplitz", "low_rank") and "max_length" not in given and host.max_length:
            filled["max_length"] = host.max_length
        if kind in ("block_toeplitz", *GRAPHS) and host.grid and not {"grid_size", "edges"} & set(given):
            filled["grid_size"] = list(host.grid)
        return filled

    def reset_parameters(self) -> None:
        options = self.options
        if hasattr(self, "table"):
            torch.nn.init.constant_(self.table, 1.0 if options.parametrization == "abs_table" else 0.0)
        if hasattr(self, "coefficients"):
            torch.nn.init.zeros_(self.coefficients)
        if hasattr(self, "mask_factors"):
            # apart from each other, or all columns would learn the same
            torch.nn.init.normal_(self.mask_factors, 1.0 if options.parametrization == "abs_table" else 0.0, 0.1)
        if options.mask_type == "decay":
            head = torch.arange(1, self.num_heads + 1, device=self.log_decay_rate.device, dtype=torch.float64)
            draw_(self.log_decay_rate, -8 * math.log(2) * head / self.num_heads)
        if options.mask_type == "tree":
            torch.nn.init.zeros_(self.log_decay_rate)
        if options.mask_type == "heat":
            torch.nn.init.ones_(self.heat_time)
        if options.mask_type == "graph_kernel":
            draw_(self.node_features, self._walk_features())
        if options.feature_map == "favor":
            projection = self.random_projection
            draw_(projection, random_directions(1, *projection.shape, True, projection.device)[0])

    def _walk_features(self) -> Tensor:
        """(n,n) walk features of the graph's nodes, rows scaled."""
        o = self.options
        if o.walk_sampling == "exact":
            rows = structural.walk_features(*o.graph(), o.walk_length, o.walk_discount * (1 - o.walk_stop))
        else:
            steps = (o.walk_length, o.walk_discount, o.walk_stop)
            rows = structural.sampled_walk_features(*o.graph(), *steps, o.num_walks, o.seed)
        return rows / rows.norm(dim=1, keepdim=True) ** o.walk_norm

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call, options = super()._call(query, key, value, **arguments), self.options
        kind, grid, prefix = options.mask_type, options.grid_size, call.num_prefix_tokens
        if kind in ("toeplitz", "low_rank") and max(call.queries, call.keys) > options.max_length:
            raise InvalidInput(
                f"topological: {max(call.queries, call.keys)} tokens, and the mask was built for max_length={options.max_length}. Set max_length, or use mask_type='decay'."
            )
        if options.size is None:
            return call
        if call.queries != call.keys:
            rule = f"N={call.queries} queries and M={call.keys} keys with mask_type={kind!r}: the structure has one place for each token"
            raise Unsupported(self.name, rule, "Pass as many keys as queries")
        if grid is not None and call.grid is not None and tuple(call.grid) != tuple(grid):
            raise InvalidInput(
                f"topological: grid={tuple(call.grid)}, and the mask was built for grid_size={tuple(grid)}. Resize the input, or build the module for that grid."
            )
        if prefix < 0 or call.queries != prefix + options.size:
            raise InvalidInput(
                f"topological: N={call.queries} tokens, and mask_type={kind!r} with num_prefix_tokens={prefix} needs {prefix} + {options.size}. Pass one token for each place of the structure."
            )
        return call

    # -- features --------------------------------------------------------------------------------------------------

    def features(self, call: Call) -> tuple[Tensor, Tensor]:
        """phi of the queries (B,H,N,D), "elu" up to a factor per query, and of the keys (B,H,M,D)."""
        if self.options.feature_map == "relu":
            return (call.scale * call.query).relu() + self.options.eps, call.key.relu() + self.options.eps
        query, key = self.log_features(call)
        return (query - query.detach().amax(dim=-1, keepdim=True)).exp(), key.exp()

    def log_features(self, call: Call) -> tuple[Tensor, Tensor]:
        """log phi of the queries (B,H,N,F) and of the keys (B,H,M,F)."""
        if self.options.feature_map == "relu":
            query, key = self.features(call)
            return query.log(), key.log()
        if self.options.feature_map == "elu":
            return log_elu1(call.scale * call.query), log_elu1(call.key)
        z = self.random_projection.to(call.query.dtype)[None]
        constant = math.log(z.shape[1]) / 2
        return log_positive(call.query, z, call.scale) - constant, log_positive(call.key, z, call.scale) - constant

    def rate(self, call: Call) -> Tensor:
        """(H,) decay per unit of distance."""
        return self.log_decay_rate.to(call.query.dtype).exp()

    def factors(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """(H,tokens,P) factors F of the mask F F^T, not negative."""
        factors = self.mask_factors[:, :tokens].to(dtype)
        return factors.abs() if self.options.parametrization == "abs_table" else factors.exp()

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        mask, visible = self.full_mask(call), call.visible()
        if self.options.feature_map == "relu":
            query, key = self.features(call)
            kernel = (query[:, :, :, None] * key[:, :, None]).sum(dim=-1)
        else:
            log_query, log_key = self.log_features(call)
            logits = torch.logsumexp(log_query[:, :, :, None] + log_key[:, :, None], dim=-1)
            shown = mask > 0 if visible is None else (mask > 0) & visible
            # a factor common to all weights of a query cancels
            top = logits.detach().masked_fill(~shown, -math.inf).amax(dim=-1, keepdim=True)
            kernel = (logits - torch.where(top > -math.inf, top, 0)).clamp(max=0).exp()
        weights = mask * kernel + self.floor
        if visible is not None:
            weights = weights * visible
        mass = weights.sum(dim=-1, keepdim=True)
        return weights / torch.where(mass > 0, mass, 1)

    def full_mask(self, call: Call) -> Tensor:
        """(H,N,M) or (1,N,M), entry by entry."""
        options, kind = self.options, self.options.mask_type
        dtype, device = call.query.dtype, call.query.device
        n = torch.arange(call.queries, device=device)[:, None] + (call.keys - call.queries if call.is_causal else 0)
        m = torch.arange(call.keys, device=device)
        if kind == "none":
            return call.query.new_ones(1, call.queries, call.keys)
        if kind == "toeplitz":
            longest = options.max_length
            return self.entries((n - m + longest - 1,), (n - m).abs().to(dtype) / longest)
        if kind == "low_rank":
            left, right = self.factors(call.queries, dtype), self.factors(call.keys, dtype)
            return (left[:, :, None] * right[:, None]).sum(dim=-1)
        if kind == "decay":
            return (-self.rate(call)[:, None, None] * (n - m).abs()).exp()
        if kind == "block_toeplitz":
            rows, columns = options.grid_size
            place = torch.arange(options.size, device=device)
            down = place[:, None] // columns - place // columns
            right = place[:, None] % columns - place % columns
            distance = (down.abs() + right.abs()).to(dtype) / (rows + columns)
            mask = self.entries((down + rows - 1, right + columns - 1), distance)
        elif kind == "tree":
            distance = torch.full((options.size, options.size), math.inf, dtype=dtype)
            for node, (parent, length) in enumerate(zip(options.parent, options.lengths)):
                if parent >= 0:
                    distance[node, :node] = distance[:node, node] = distance[parent, :node] + length
                distance[node, node] = 0
            joined, distance = distance.isfinite().to(device), distance.nan_to_num(posinf=0).to(device)
            mask = (-self.rate(call)[:, None, None] * distance).exp() * joined
        elif kind == "graph_kernel":
            features = self.node_features.to(dtype)
            mask = (features @ features.T)[None]
        else:
            step = structural.normalised_adjacency(*options.graph()).to(device, dtype)
            mask = torch.matrix_exp(self.heat_time.to(dtype).abs()[:, None, None] * step)
        prefix = call.num_prefix_tokens
        return functional.pad(mask, (prefix, 0, prefix, 0), value=1.0)

    def entries(self, index: tuple[Tensor | slice, ...], distance: Tensor) -> Tensor:
        """(H, *distance.shape) entries of a Toeplitz mask: the table at `index`, or the polynomial of `distance`."""
        if self.options.parametrization == "exp_poly":
            powers = torch.stack([distance**p for p in range(1, self.options.poly_degree + 1)])
            return torch.einsum("hp,p...->h...", self.coefficients.to(distance.dtype), powers).exp()
        entries = self.table.to(distance.dtype)[(slice(None), *index)].reshape(-1, *distance.shape)
        return entries.abs() if self.options.parametrization == "abs_table" else entries.exp()

    # -- the efficient forms ---------------------------------------------------------------------------------------

    def form(self, keys: int) -> str:
        """ "dense", "tiled" or "structured": the form that was measured to be the fastest at this many keys."""
        options, kind = self.options, self.options.mask_type
        if keys < options.fft_min_length:
            return "dense"
        least = STRUCTURED_FROM.get(kind, math.inf) * (options.rank if kind == "low_rank" else 1)
        return "structured" if keys >= least else "tiled"

    def attend(self, call: Call) -> Tensor:
        options, kind, padding = self.options, self.options.mask_type, call.key_padding_mask
        if kind == "none":
            linear = causal_feature_attention if call.is_causal else linear_attention
            return linear(*self._floored(call), call.value, padding)
        form = self.form(call.keys)
        dense, structured = form == "dense", form == "structured"
        if kind == "decay" and structured:
            return self._decayed(call)
        mask = self.mask(call)
        if options.feature_map == "favor":
            weigh = partial(structural.weigh_exponential, key_padding_mask=padding)
            return structural.tiled(weigh, mask, *self.log_features(call), call.value, call.is_causal, dense)
        query, key = self.features(call)
        value, noise = functional.pad(call.value, (0, 1), value=1.0), 0.0
        if padding is not None:
            real = padding[:, None, :, None].to(key.dtype)
            key, value = key * real, value * real
        if structured and kind == "low_rank":
            sums = structural.factored_sums(query, key, value, mask)
        elif structured:
            sums = structural.masked_sums(query, key, value, mask)
            # sums below the rounding error of the products are no weights
            noise = mask.error * (query @ key.sum(dim=2)[..., None]).detach()
        else:
            sums = self._tiled(call, mask, query, key, value, dense)
        if self.floor:
            total = value.cumsum(dim=2)[:, :, -call.queries :] if call.is_causal else value.sum(dim=2, keepdim=True)
            sums = sums + self.floor * total
        mass = sums[..., -1:]
        return torch.where(mass > noise, sums[..., :-1] / torch.where(mass > noise, mass, 1), 0)

    def _tiled(self, call: Call, mask: Any, query: Tensor, key: Tensor, value: Tensor, dense: bool) -> Tensor:
        """(B,H,N,D+1) masked sums of values (B,H,M,D+1), tile by tile; of a Toeplitz mask by the kernel that can."""

        def plain() -> Tensor:
            return structural.tiled(structural.weigh_linear, mask, query, key, value, call.is_causal, dense)

        if self.options.mask_type not in TABLES:
            return plain()
        inner, prefix = (mask.inner, mask.prefix) if isinstance(mask, structural.PrefixedMask) else (mask, 0)
        request = toeplitz.Request(query, key, value, inner.kernel, inner.queries[1], prefix, call.is_causal, plain)
        return toeplitz.toeplitz_attention(request)

    def _decayed(self, call: Call) -> Tensor:
        """The chunked form of "decay"."""
        (query, key), value, rate = self.log_features(call), call.value, self.rate(call)

        def plain() -> Tensor:
            return structural.decay_attention(query, key, value, call.is_causal, rate, call.key_padding_mask)

        if not call.is_causal:
            return plain()
        return causal_feature_attention(query, key, value, call.key_padding_mask, rate=rate, plain=plain)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        if self.options.mask_type == "none":
            return causal_linear_attention(*self._floored(call), call.value, call.key_padding_mask, state)
        (log_query, log_key), rest = self.log_features(call), (self.rate(call), call.key_padding_mask, state)
        out = structural.decay_attention(log_query, log_key, call.value, True, *rest)
        return out, structural.decay_state(log_key, call.value, *rest)

    def _floored(self, call: Call) -> tuple[Tensor, Tensor]:
        """Log features; the floor is one more feature: 1 for queries, the floor for keys."""
        log_query, log_key = self.log_features(call)
        if self.floor:
            log_query = functional.pad(log_query, (0, 1))
            log_key = functional.pad(log_key, (0, 1), value=math.log(self.floor))
        return log_query, log_key

    def mask(self, call: Call) -> Any:
        """The mask of a call, not built."""
        kind, dtype, device = self.options.mask_type, call.query.dtype, call.query.device
        first = call.keys - call.queries if call.is_causal else 0
        if kind == "low_rank":
            return structural.FactoredMask(self.factors(call.queries, dtype), self.factors(call.keys, dtype), dtype)
        if kind == "decay":
            return structural.DecayMask(self.rate(call), first, call.keys)
        if kind == "toeplitz":
            longest, first = self.options.max_length, first + 1 - call.keys
            offset = torch.arange(first, first + call.queries + call.keys - 1, device=device)[:, None]
            window = slice(first + longest - 1, first + longest - 1 + len(offset))
            kernel = self.entries((window,), offset.abs().to(dtype) / longest)
            future = offset < 0 if call.is_causal else None
            return structural.ToeplitzMask(kernel, (call.queries, 1), (call.keys, 1), future)
        inner: Any
        if kind == "block_toeplitz":
            rows, columns = grid = tuple(self.options.grid_size)
            down = torch.arange(1 - rows, rows, device=device)[:, None]
            right = torch.arange(1 - columns, columns, device=device)
            kernel = self.entries((), (down.abs() + right.abs()).to(dtype) / (rows + columns))
            future = (down < 0) | (down == 0) & (right < 0) if call.is_causal else None
            inner = structural.ToeplitzMask(kernel, grid, grid, future)
        elif kind == "tree":
            inner = structural.TreeMask(self.rate(call), self._tables(device))
        elif kind == "graph_kernel":
            features = self.node_features.to(dtype)
            inner = structural.FactoredMask(features[None], features, dtype)
        else:
            # in float64: entries span many orders of magnitude, and the error is relative to the largest
            tables = self._tables(device)
            power = (self.heat_time.double().abs()[:, None, None] * tables["values"]).expm1()
            inner = structural.FactoredMask(power * tables["vectors"], tables["vectors"], dtype, diagonal=1.0)
        prefix = call.num_prefix_tokens
        return structural.PrefixedMask(inner, prefix, call.is_causal) if prefix else inner

    def _tables(self, device: torch.device) -> dict[str, Tensor]:
        """The constants of the structure, on the call's device."""
        tables = {name: tensor.to(device) for name, tensor in self.structure.items()}
        if not torch.compiler.is_compiling():
            self.structure = tables
        return tables


register(
    Mechanism(
        name="topological",
        title="Topologically masked attention",
        paper="Choromanski et al., ICML 2022 (arXiv 2107.07999)",
        equation="out_n = sum_m A_nm v_m / sum_m A_nm,  A_nm = mask_nm <phi(q_n), phi(k_m)> + floor,  "
        "mask: Toeplitz, block Toeplitz, decay, low rank, tree, graph kernel or heat kernel",
        module_class=TopologicalAttention,
        example={"mask_type": "toeplitz", "max_length": 128},
    )
)
