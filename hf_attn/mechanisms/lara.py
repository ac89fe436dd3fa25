"""LARA: linear randomized attention, a few proposals shared by all queries and weighed by importance.

Paper: Zheng, Wang, Kong, "Linear Complexity Randomized Self-attention Mechanism", ICML 2022, section on LARA.

    mu_c = qbar_c + kbar_c,   w_j = mu_c(j) + noise            C landmarks qbar, kbar summarise queries and keys
    f(w) = softmax_m(L(k_m, w)) . v,                           L(x, w) = s <w, x> - s |x|^2 / 2
    out_n = sum_j W_nj f(w_j) / sum_j W_nj,                    W_nj = alpha_nj p_n(w_j) / q(w_j)
    p_n(w) = exp(L(q_n, w)) sum_m exp(L(k_m, w)),              q: density of the proposals, alpha: see `mis_type`

Shapes: query, key and value (B,H,N,D), landmarks (B,H,C,D), noise (B,H,C,D), or (B,H,2C,D) with `use_multisample`.
When to use: training bidirectional models on long sequences or large images, where softmax is too slow.
When not: causal models (the landmarks summarise the whole sequence); as a drop-in for a pretrained softmax model
without training, unless the keys and queries are short or clustered; sequences of a few hundred tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import SummaryProjection, recomputed
from hf_attn.kernels import landmarks
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

POOLS = ("pool", "pool-mixed", "pool-vmixed")
FREE_POOLS = ("no-param-pool", "no-param-pool-mixed", "no-param-pool-vmixed")
ALPHA_FLOOR = 1e-8
"""Smallest alpha of "mis-opt": its query-specific part can push the sum below zero."""
RECOMPUTE_FROM = 4096
"""Tokens from which the backward pass computes the tables of weights again instead of keeping them."""
QUERIES = 512
"""Queries that ask the landmarks at once then."""
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class LaraOptions(Options):
    """Options of `lara`.

    Attributes:
        num_landmarks: C; on a grid g x g cells with g = int(sqrt(C)).
        proposal_gen: how landmarks come about. On a grid, average pooling: "pool" (then Linear and LayerNorm),
            "no-param-pool" (without), each also "-mixed" (key landmarks mixed by softmax) and "-vmixed" (mixed, by
            the size of the values too). In a sequence, segment means: "adaptive-1d" (of Linear and LayerNorm of every
            token) and "seg-means"; the pools fall back to "seg-means" there.
        pool_module_type: Linear and LayerNorm of D channels shared by the heads ("light"), or of H*D ("dense").
        mis_type: weights of multiple importance sampling: "mis-opt", "mis-bh" (balance heuristic), "mis-biased".
        alpha_coeff: weight of the query-specific part of "mis-opt".
        use_multisample: two independent draws per proposal.
        use_antithetics: two opposite draws per proposal; `use_multisample` wins over it.
        noise_std: factor of the noise: 1 ("unit"), s ** -0.5 ("exact") or 0 ("none").
        noise_at_eval: draw in evaluation as in training.
    """

    mechanism: ClassVar[str] = "lara"

    num_landmarks: int = 16
    proposal_gen: str = "no-param-pool"
    pool_module_type: str = "light"
    mis_type: str = "mis-opt"
    alpha_coeff: float = 1.0
    use_multisample: bool = False
    use_antithetics: bool = False
    noise_std: str = "unit"
    noise_at_eval: bool = False

    def check(self) -> None:
        self.integer("num_landmarks", 1)
        self.one_of("proposal_gen", *POOLS, *FREE_POOLS, "adaptive-1d", "seg-means")
        self.one_of("pool_module_type", "light", "dense")
        if self.pool_module_type == "dense" and self.proposal_gen not in POOLS:
            rule = f"belongs to {', '.join(map(repr, POOLS))}, and proposal_gen={self.proposal_gen!r}"
            raise self.refuse("pool_module_type", rule, "Use 'light', or one of these generators.")
        self.one_of("mis_type", "mis-opt", "mis-bh", "mis-biased")
        self.number("alpha_coeff", 0)
        self.boolean("use_multisample", "use_antithetics", "noise_at_eval")
        self.one_of("noise_std", "unit", "exact", "none")

    @property
    def learned(self) -> bool:
        return self.proposal_gen in (*POOLS, "adaptive-1d")

    @property
    def on_grid(self) -> bool:
        return self.proposal_gen in (*POOLS, *FREE_POOLS)

    @property
    def draws(self) -> int:
        """Independent draws per proposal."""
        return 2 if self.use_multisample else 1


class LinearRandomizedAttention(AttentionModule):
    """Linear randomized attention: softmax attention estimated from a few proposals made of landmarks."""

    name = "lara"
    options_class = LaraOptions
    extra_inputs = ("noise",)

    def __init__(self, num_heads: int, head_dim: int, options: LaraOptions):
        super().__init__(num_heads, head_dim, options)
        if options.learned:
            channels = head_dim * (num_heads if options.pool_module_type == "dense" else 1)
            self.q_bar_gen, self.k_bar_gen = SummaryProjection(channels), SummaryProjection(channels)

    @classmethod
    def describe(cls, options: LaraOptions) -> Capabilities:
        when = "each forward" if options.noise_at_eval else "each training forward"
        return Capabilities(
            packed=True,
            grid="used" if options.on_grid else "ignored",
            prefix_tokens=options.on_grid,
            learned=options.learned,
            random="" if options.noise_std == "none" else f"noise of the proposals: {when}",
            attention_weights=True,
            derived=("exact padding", "CLS token") if options.on_grid else ("exact padding",),
            pays_from="512 (2-core CPU, float32, D = 64, 64 landmarks)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        # the recipe belongs together: who picks another generator gets the documented defaults
        if "proposal_gen" in given:
            return {}
        if host.grid is None:
            recipe = {"proposal_gen": "adaptive-1d", "num_landmarks": 16}
        else:
            recipe = {"proposal_gen": "pool-mixed", "num_landmarks": min(7, *host.grid) ** 2, "alpha_coeff": 2.0}
            if given.get("mis_type", LaraOptions.mis_type) != "mis-opt":
                del recipe["alpha_coeff"]
        return {option: value for option, value in recipe.items() if option not in given}

    def reset_parameters(self) -> None:
        if self.options.learned:
            for generator in (self.q_bar_gen, self.k_bar_gen):
                generator.reset_parameters()

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        grid = arguments.get("grid")
        if arguments.get("is_causal"):
            raise Unsupported(
                self.name,
                "is_causal=True: LARA proposals depend on the whole sequence; causal use would leak future tokens",
                "Use rfa, randomized or causal eva",
            )
        if self.options.on_grid and grid is not None and min(grid) < 1:
            raise InvalidInput(f"lara: grid={tuple(grid)} must be two numbers of at least 1.")
        call = super()._call(query, key, value, **arguments)
        noise = call.extra.get("noise")
        shape = (call.batch, self.num_heads, self.options.draws * self.slots(call), self.head_dim)
        if noise is not None and noise.shape != shape:
            draws = "2C" if self.options.use_multisample else "C"
            raise InvalidInput(f"lara: noise must be (B,H,{draws},D) = {shape}; got {tuple(noise.shape)}.")
        return call

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        """Sample by sample, over its real tokens only; zeros where no landmark has a real token."""
        tokens = torch.arange(call.queries, device=call.query.device)
        mask, noise, rows = call.key_padding_mask, self.noise(call), []
        for b in range(call.batch):
            real = tokens if mask is None else tokens[mask[b]]
            cells = {slot: cell for slot, cell in enumerate(self.cells(call, real.tolist())) if cell}
            row = call.query.new_zeros(1, self.num_heads, call.queries, call.keys)
            if cells:
                drawn = None if noise is None else noise[b : b + 1, :, :, list(cells)]
                q, k, v = (x[b : b + 1] for x in (call.query, call.key, call.value))
                row = row.index_copy(-1, real, self._sample_weights(call, q, k, v, real, list(cells.values()), drawn))
            rows.append(row)
        return torch.cat(rows)

    def _sample_weights(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, real: Tensor, cells: list[list[int]], noise: Tensor | None
    ) -> Tensor:
        """(1,H,N,real tokens) weights W_nj normalised over j, times the weights inside f(w_j)."""
        options, s = self.options, call.scale

        def mean(x: Tensor) -> Tensor:
            return torch.stack([x[:, :, cell].mean(dim=2) for cell in cells], dim=2)

        def log_feature(x: Tensor, w: Tensor) -> Tensor:
            return s * x @ w.transpose(-1, -2) - s / 2 * x.square().sum(-1, keepdim=True)

        if options.proposal_gen == "adaptive-1d":
            q_bar, k_bar = mean(self.q_bar_gen(q)), mean(self.k_bar_gen(k))
        else:
            q_bar, k_bar = self.refine(call, mean(q), mean(k), mean(v))
        mu = q_bar + k_bar
        sampled = self.sample(call, mu, noise)
        repeats = sampled.shape[2]
        w, mu_of_w = sampled.flatten(2, 3), mu.repeat(1, 1, repeats, 1)

        log_key = log_feature(k[:, :, real], w)
        log_target = log_feature(q, w) + log_key.logsumexp(dim=2, keepdim=True)
        log_density = log_feature(mu, w)
        own = log_density.repeat(1, 1, repeats, 1).diagonal(dim1=-2, dim2=-1)[:, :, None]
        mixture = log_density.logsumexp(dim=2, keepdim=True)
        if options.mis_type == "mis-bh":
            log_weight = log_target - mixture
        elif options.mis_type == "mis-biased":
            log_weight = log_target + s * q @ mu_of_w.transpose(-1, -2) - mixture
        else:
            patches = real[real >= self.prefix(call)]
            t = (s * q[:, :, patches] @ q_bar.transpose(-1, -2)).softmax(dim=2)
            specific = q.new_zeros(*q.shape[:3], t.shape[-1])
            specific = specific.index_copy(2, patches, t - t.mean(dim=-1, keepdim=True)).repeat(1, 1, 1, repeats)
            alpha = (own - mixture).exp() / repeats + options.alpha_coeff * specific
            log_weight = alpha.clamp(min=ALPHA_FLOOR).log() + log_target - own
        return log_weight.softmax(dim=-1) @ log_key.softmax(dim=2).transpose(-1, -2)

    def cells(self, call: Call, real: list[int]) -> list[list[int]]:
        """The real tokens behind every landmark, slot by slot."""
        if self.pools(call):
            (rows, columns), g, prefix = call.grid, self.side(), self.prefix(call)
            there = set(real)
            return [
                [n for r in range(*_span(i, g, rows)) for c in range(*_span(j, g, columns))
                 if (n := prefix + r * columns + c) in there]
                for i in range(g) for j in range(g)
            ]  # fmt: skip
        count, landmarks = len(real), self.options.num_landmarks
        if count <= landmarks:
            return [[n] for n in real]
        size = count // landmarks
        short = (size + 1) * landmarks - count
        sizes = [size] * short + [size + 1] * (landmarks - short)
        starts = [sum(sizes[:c]) for c in range(landmarks)]
        return [real[start : start + length] for start, length in zip(starts, sizes, strict=True)]

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def pools(self, call: Call) -> bool:
        return self.options.on_grid and call.grid is not None

    def prefix(self, call: Call) -> int:
        """Tokens before the grid, where landmarks come from the grid."""
        return call.num_prefix_tokens if self.pools(call) else 0

    def side(self) -> int:
        """g: cells along each side of a grid."""
        return math.isqrt(self.options.num_landmarks)

    def slots(self, call: Call) -> int:
        """Number of landmarks, those without a real token included."""
        return self.side() ** 2 if self.pools(call) else min(self.options.num_landmarks, call.queries)

    def refine(
        self, call: Call, q_bar: Tensor, k_bar: Tensor, v_bar: Tensor | None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pooled landmarks (B,H,C,D) after Linear, LayerNorm and mixing; `valid` (B,1,C) bool."""
        if not self.pools(call):
            return q_bar, k_bar
        generator = self.options.proposal_gen
        if generator in POOLS:
            q_bar, k_bar = self._generate(self.q_bar_gen, q_bar), self._generate(self.k_bar_gen, k_bar)
        if generator.endswith("mixed"):
            logits = call.scale * k_bar @ k_bar.transpose(-1, -2)
            if generator.endswith("vmixed"):
                logits = logits + (torch.linalg.vector_norm(v_bar, dim=-1) + 1e-4).log()[:, :, None]
            if valid is not None:
                logits = logits.masked_fill(~valid[:, :, None], _NEGATIVE_INFINITY)
            k_bar = logits.softmax(dim=-1) @ k_bar
        return q_bar, k_bar

    def _generate(self, generator: SummaryProjection, x: Tensor) -> Tensor:
        if self.options.pool_module_type == "light":
            return generator(x)
        return generator(x.transpose(1, 2).flatten(2)).unflatten(2, x.shape[1::2]).transpose(1, 2)

    def noise(self, call: Call) -> Tensor | None:
        """(B,H,draws,C,D) standard normal numbers, given or drawn; None where w = mu."""
        noise, options = call.extra.get("noise"), self.options
        if options.noise_std == "none" or (noise is None and not (self.training or options.noise_at_eval)):
            return None
        if noise is None:
            shape = (call.batch, self.num_heads, options.draws * self.slots(call), self.head_dim)
            dtype = torch.promote_types(call.query.dtype, torch.float32)
            noise = torch.randn(shape, dtype=dtype, device=call.query.device)
        return noise.unflatten(2, (options.draws, -1))

    def sample(self, call: Call, mu: Tensor, noise: Tensor | None) -> Tensor:
        """w (B,H,repeats,C,D) around mu (B,H,C,D); noise (B,H,draws,C,D)."""
        if noise is None:
            return mu[:, :, None]
        step = (call.scale**-0.5 if self.options.noise_std == "exact" else 1.0) * noise.to(mu.dtype)
        if self.options.use_antithetics and not self.options.use_multisample:
            step = torch.cat((step, -step), dim=2)
        return mu[:, :, None] + step

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """Two stages of attention: from the w_j to the keys, then from the queries to the w_j."""
        # read several times each: copied once where a model hands over strided views
        call = replace(call, query=call.query.contiguous(), key=call.key.contiguous())
        q, s, mask, real = call.query, call.scale, call.key_padding_mask, None
        if mask is not None:
            # a sample without landmarks runs unmasked and is cleared at the end: no infinities, forward or backward
            alive = mask[:, self.prefix(call) :].any(dim=1)[:, None]
            real = mask | ~alive
        stage = _stage(call)
        q_bar, k_bar, valid = self.landmarks(call, real)
        mu = q_bar + k_bar
        w = self.sample(call, mu, self.noise(call))

        log_density = (s * w) @ mu[:, :, None].transpose(-1, -2) - s / 2 * mu.square().sum(-1)[:, :, None, None]
        own = log_density.diagonal(dim1=-2, dim2=-1)
        if valid is not None:
            log_density = log_density.masked_fill(~valid[:, :, None, None], _NEGATIVE_INFINITY)
        mixture = log_density.logsumexp(dim=-1)

        scaled = s * w.flatten(2, 3)
        request = landmarks.Request(
            scaled, call.key, call.value, None, real, 1.0, s / 2,
            lambda: _by_head(call, partial(_to_landmarks, scale=s, real=real), scaled, call.key, call.value),
        )  # fmt: skip
        f, log_mass = landmarks.landmark_stage(request)
        optimal = self.options.mis_type == "mis-opt"
        bias = log_mass.view_as(own) - (own if optimal else mixture)
        if valid is not None:
            bias = bias.masked_fill(~valid[:, :, None], _NEGATIVE_INFINITY)

        direction = s * (w + mu[:, :, None] if self.options.mis_type == "mis-biased" else w).flatten(2, 3)
        size = QUERIES if call.queries >= RECOMPUTE_FROM else call.queries
        queries: Any = zip(q.split(size, dim=2))
        of_alpha: tuple[Any, ...] = ()
        if optimal:
            competing = self._competing(call, real)
            queries = zip(
                q.split(size, dim=2), itertools.repeat(None) if competing is None else competing.split(size, dim=1)
            )
            of_alpha = (stage(self._log_total, call, q, q_bar, competing), q_bar, (own - mixture).exp(), valid)

        def plain() -> tuple[Tensor, None]:
            parts = [stage(self._from_landmarks, call, f, direction, bias, of_alpha, *some) for some in queries]
            return torch.cat(parts, dim=2), None

        if optimal:
            # its weights are no softmax
            out, _ = plain()
        else:
            request = landmarks.Request(q, direction, f, bias.flatten(2), None, 1.0, 0.0, plain)
            out, _ = landmarks.landmark_stage(request)
        return out if mask is None else out.masked_fill(~alive[:, None, None], 0)

    def _competing(self, call: Call, real: Tensor | None) -> Tensor | None:
        """(B,N) bool: the queries that share a landmark's specific part among them, None for all."""
        prefix = self.prefix(call)
        if not prefix:
            return real
        real = call.query.new_ones(call.batch, call.queries, dtype=torch.bool) if real is None else real
        return real & (torch.arange(call.queries, device=real.device) >= prefix)

    def _similarity(self, call: Call, query: Tensor, q_bar: Tensor, competing: Tensor | None) -> Tensor:
        """(B,H,N,C) logits of the specific part of "mis-opt", minus infinity for queries that take no part."""
        t = query @ (call.scale * q_bar).transpose(-1, -2)
        return t if competing is None else t.masked_fill(~competing[:, None, :, None], _NEGATIVE_INFINITY)

    def _log_total(self, call: Call, query: Tensor, q_bar: Tensor, competing: Tensor | None) -> Tensor:
        return self._similarity(call, query, q_bar, competing).logsumexp(dim=2, keepdim=True)

    def _from_landmarks(
        self, call: Call, f: Tensor, direction: Tensor, bias: Tensor, of_alpha: tuple[Any, ...], query: Tensor,
        competing: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The second stage: (B,H,N,D) of some queries, from f (B,H,J,D), what the landmarks found."""
        weight = (query @ direction.transpose(-1, -2) + bias.flatten(2)[:, :, None]).softmax(dim=-1)
        if not of_alpha:
            return weight @ f
        # alpha as a factor of the weights, which it cannot underflow, instead of its logarithm
        weight = weight * self.alpha(call, query, competing, *of_alpha)
        return (weight @ f) / weight.sum(dim=-1, keepdim=True)

    def alpha(
        self, call: Call, query: Tensor, competing: Tensor | None, log_total: Tensor, q_bar: Tensor, balance: Tensor,
        valid: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """(B,H,N,J) weights of "mis-opt"; balance (B,H,repeats,C) is that of the balance heuristic, times repeats."""
        repeats = balance.shape[2]
        t = (self._similarity(call, query, q_bar, competing) - log_total).exp()
        if valid is None:
            mean = t.mean(dim=-1, keepdim=True)
        else:
            shown = valid[:, :, None].to(t.dtype)
            mean = (t * shown).sum(dim=-1, keepdim=True) / shown.sum(dim=-1, keepdim=True)
        specific = t - mean
        if repeats > 1:
            specific = specific.repeat(1, 1, 1, repeats)
        balance = balance.flatten(2)[:, :, None] / repeats
        return torch.add(balance, specific, alpha=self.options.alpha_coeff).clamp(min=ALPHA_FLOOR)

    def landmarks(self, call: Call, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Landmarks of queries and keys (B,H,C,D), and which have a real token, (B,1,C) bool; None for all."""
        q, k, v = call.query, call.key, None
        mean, valid = self._mean(call, real)
        if self.options.proposal_gen == "adaptive-1d":
            (q_bar,), (k_bar,) = (
                _by_head(call, lambda x, layer=layer: (mean(layer(x)),), tokens)
                for layer, tokens in ((self.q_bar_gen, q), (self.k_bar_gen, k))
            )
        else:
            q_bar, k_bar = mean(q), mean(k)
        if self.pools(call) and self.options.proposal_gen.endswith("vmixed"):
            v = mean(call.value)
        return (*self.refine(call, q_bar, k_bar, v, valid), valid)

    def _mean(self, call: Call, real: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """The function from tokens (B,H,N,D) to means (B,H,C,D), and which means have a real token."""
        if not self.pools(call):
            if real is None:
                return lambda x: _segment_means(x, self.slots(call)), None
            member = _segments(real, self.options.num_landmarks, self.slots(call))
            count = member.sum(dim=-1, keepdim=True)
            average = (member.to(call.query.dtype) / count.clamp(min=1))[:, None]
            return lambda x: average @ x, (count > 0).transpose(1, 2)

        (rows, columns), prefix, dtype = call.grid, self.prefix(call), call.query.dtype
        vertical, horizontal = (_cells(self.side(), n, call.query.device).to(dtype) for n in (rows, columns))

        def total(x: Tensor) -> Tensor:
            x = torch.einsum("ir,bhrcd->bhicd", vertical, x.unflatten(2, (rows, columns)))
            return torch.einsum("jc,bhicd->bhijd", horizontal, x).flatten(2, 3)

        if real is None:
            size = total(call.query.new_ones(1, 1, rows * columns, 1))
            return lambda x: total(x[:, :, prefix:]) / size, None
        patches = real[:, None, prefix:, None].to(dtype)
        count = total(patches)
        return lambda x: total(x[:, :, prefix:] * patches) / count.clamp(min=1), count.squeeze(-1) > 0


def _stage(call: Call) -> Callable[..., Any]:
    """How a stage is computed: long sequences keep none of its tables (B,H,N,J) for the backward pass."""
    if call.queries >= RECOMPUTE_FROM:
        return recomputed
    return lambda function, *arguments: function(*arguments)


def _by_head(call: Call, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
    """A stage that reads all keys, from (B,H,...) to (B,H,...): in long sequences heads take turns as well."""
    if call.queries < RECOMPUTE_FROM:
        return function(*tensors)
    heads = zip(*(x.split(1, dim=1) for x in tensors), strict=True)
    parts = zip(*(recomputed(function, *one) for one in heads), strict=True)
    return tuple(torch.cat(part, dim=1) for part in parts)


def _to_landmarks(w: Tensor, key: Tensor, value: Tensor, scale: float, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first stage: f (B,H,J,D) and log sum_m exp(s <w_j, k_m> - s |k_m|^2 / 2) (B,H,J). w (B,H,J,D) is scaled."""
    log_key = w @ key.transpose(-1, -2) - scale / 2 * key.square().sum(-1)[:, :, None]
    if real is not None:
        log_key = log_key.masked_fill(~real[:, None, None], _NEGATIVE_INFINITY)
    return log_key.softmax(dim=-1) @ value, log_key.logsumexp(dim=-1)


def _span(cell: int, cells: int, length: int) -> tuple[int, int]:
    """First place of a cell of adaptive pooling, and the first after it."""
    return cell * length // cells, -(-(cell + 1) * length // cells)


def _cells(cells: int, length: int, device: torch.device) -> Tensor:
    """(cells,length) bool: the place belongs to the cell."""
    place, cell = torch.arange(length, device=device), torch.arange(cells, device=device)[:, None]
    return (place >= cell * length // cells) & (place < ((cell + 1) * length + cells - 1) // cells)


def _segment_means(x: Tensor, landmarks: int) -> Tensor:
    """(B,H,C,D) means of `landmarks` segments of x (B,H,N,D), the shorter ones first."""
    tokens = x.shape[2]
    size = tokens // landmarks
    short = (size + 1) * landmarks - tokens
    means = x[:, :, : short * size].unflatten(2, (short, size)).mean(dim=3)
    if short == landmarks:
        return means
    rest = x[:, :, short * size :].unflatten(2, (landmarks - short, size + 1)).mean(dim=3)
    return torch.cat((means, rest), dim=2)


def _segments(real: Tensor, landmarks: int, slots: int) -> Tensor:
    """(B,slots,N) bool: the segment of every real token (B,N), each sample segmented by its own real tokens."""
    count, rank = real.sum(dim=1, keepdim=True), real.cumsum(dim=1) - 1
    size = count // landmarks
    short = (size + 1) * landmarks - count
    rest = rank - short * size
    segment = torch.where(rest < 0, rank // size.clamp(min=1), short + rest // (size + 1))
    segment = torch.where(count <= landmarks, rank, segment)
    return (segment[:, None] == torch.arange(slots, device=real.device)[:, None]) & real[:, None]


register(
    Mechanism(
        name="lara",
        title="Linear randomized attention (LARA)",
        paper="Zheng, Wang, Kong, ICML 2022 (arXiv 2204.04667)",
        equation="out_n = sum_j W_nj f(w_j) / sum_j W_nj,  W_nj = alpha_nj p_n(w_j) / q(w_j),  "
        "f(w) = softmax_m(s <w, k_m> - s |k_m|^2 / 2) . v,  w_j = qbar_c + kbar_c + noise",
        module_class=LinearRandomizedAttention,
        example={"num_landmarks": 4},
    )
)
