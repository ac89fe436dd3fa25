"""EVA: exact softmax over a local window, and one control variate for each chunk of the sequence.

Paper: Zheng, Yuan, Wang, Kong, "Efficient Attention via Control Variates", ICLR 2023, in the form of the authors' code:
every chunk takes part, the query's own too.

    out_n  = softmax over E(n) and the chunks of [ s <q_n, k_m> + bias ; s <q_n, kbar_i> ], times [ v_m ; beta_i ]
    beta_i = softmax over P_i of ( s <w_i, k_m> - s |k_m|^2 / 2 ), times v_m
    w_i    = (qbar_i + kbar_i) / 2 + noise, causal: qbar_i + kbar_i + noise
    qbar_i = f_q(mean over P_i of q), kbar_i = f_k(mean over P_i of k), f = Linear and LayerNorm, shared by the heads

Shapes: query, key and value (B,H,N,D). A sequence is cut into W windows of w tokens and C chunks of c tokens, a grid
into squares of w x w and c x c tokens; E(n) is the query's window, P_i the chunk. qbar, kbar, w, beta (B,H,C,D).
When to use: local detail matters and the rest may be seen through averages; causal models of long sequences.
When not: in place of a pretrained softmax without training (f is learned); short sequences, where softmax is faster;
batches padded on the left that must give what they give without padding (windows and chunks keep their places).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities, Host
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import SummaryProjection, masked_softmax
from hf_attn.kernels import flash
from hf_attn.masks import causal_order
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register


@dataclass(frozen=True)
class EvaOptions(Options):
    """Options of `eva`.

    Attributes:
        window_size: w, tokens of a window; on a grid the side of the square.
        num_landmarks: number of chunks aimed at; unused if chunk_size is given.
        chunk_size: c, tokens of a chunk; on a grid the side of the square. None: from num_landmarks and the length.
        overlap_window: windows and chunks reach max(1, w // 2) tokens further on every side; causal: windows reach w
            tokens further back.
        adaptive_proj: f is Linear and LayerNorm ("default", "qk"), Linear ("no-ln"), or w_i has no mean ("none").
        use_rpe: learned relative bias within the window; not causal.
        rpe_2d: the bias is for grids.
        exclude_own_chunk: leave out the chunks that share a token with the query's own window.
        noise_std: "exact" (s ** -0.5), "unit" (1) or "none": standard deviation of the noise in training.
        noise_at_eval: draw noise in evaluation too.
    """

    mechanism: ClassVar[str] = "eva"

    window_size: int = 8
    num_landmarks: int = 8
    chunk_size: int | None = None
    overlap_window: bool = False
    adaptive_proj: str = "default"
    use_rpe: bool = False
    rpe_2d: bool = False
    exclude_own_chunk: bool = False
    noise_std: str = "unit"
    noise_at_eval: bool = False

    def check(self) -> None:
        self.integer("window_size", 1)
        self.integer("num_landmarks", 1)
        if self.chunk_size is not None:
            self.integer("chunk_size", 1)
        self.boolean("overlap_window", "use_rpe", "rpe_2d", "exclude_own_chunk", "noise_at_eval")
        self.one_of("adaptive_proj", "default", "qk", "no-ln", "none")
        self.one_of("noise_std", "exact", "unit", "none")

    @property
    def reach(self) -> int:
        """Tokens by which a window or chunk extends on every side, in bidirectional use."""
        return max(1, self.window_size // 2) if self.overlap_window else 0

    def sides(self, tokens: int, grid: tuple[int, int] | None) -> tuple[int, ...]:
        """Tokens on each axis: a grid's two, or a sequence's one, padded to whole windows."""
        return tuple(grid) if grid is not None else (-(-tokens // self.window_size) * self.window_size,)

    def chunk(self, sides: tuple[int, ...]) -> int:
        """c for these sides."""
        if self.chunk_size is not None:
            return self.chunk_size
        tokens = math.prod(sides) // self.num_landmarks
        return max(1, tokens if len(sides) == 1 else math.isqrt(tokens))

    def refusal(self, is_causal: bool, grid: tuple[int, int] | None) -> tuple[str, str] | None:
        """The rule these options break with or without causal order and a grid, and the remedy; whatever the length."""
        w, c, causal = self.window_size, self.chunk_size, "is_causal=True with"
        rules = (
            (is_causal and grid is not None, f"{causal} grid={grid}: a grid has no order", "Leave is_causal out"),
            (is_causal and c is None, f"{causal} chunk_size=None: the length of the sequence would decide on the chunks",
             f"Set chunk_size to a divisor of window_size={w}"),
            (is_causal and c and w % c, f"{causal} window_size={w}, which is no multiple of chunk_size={c}",
             "Choose a multiple, so that a chunk lies in one window"),
            (is_causal and self.adaptive_proj == "none", f"{causal} adaptive_proj='none'", "Use 'default' or 'no-ln'"),
            (is_causal and self.use_rpe, f"{causal} use_rpe=True", "Leave use_rpe out"),
            (self.use_rpe and grid is not None and not self.rpe_2d, f"grid={grid} with a relative bias for sequences",
             "Set rpe_2d=True"),
            (self.use_rpe and grid is None and self.rpe_2d, "no grid was given with rpe_2d=True, a relative bias for grids",
             "Pass a grid, or leave rpe_2d out"),
        )  # fmt: skip
        broken = [(rule, remedy) for holds, rule, remedy in rules if holds]
        return broken[0] if broken else None if grid is None else self.misfit(grid)

    def misfit(self, sides: tuple[int, ...]) -> tuple[str, str] | None:
        """The rule that windows and chunks fill these sides, where they do not, and the remedy."""
        w, c = self.window_size, self.chunk(sides)
        if not any(side % w or side % c for side in sides):
            return None
        if len(sides) == 1:
            given = f"chunk_size={self.chunk_size}, num_landmarks={self.num_landmarks}"
            rule = f"chunks of {c} tokens ({given}) do not divide {sides[0]}, the length in whole windows of {w}"
            return rule, f"Set chunk_size to a divisor of window_size={w}"
        rule = f"window_size={w} and chunk_size={c} must divide both sides of the grid {sides[0]} x {sides[1]}"
        return rule, f"Sizes that do: {', '.join(map(str, _divisors(math.gcd(*sides))))}"


class EvaAttention(AttentionModule):
    """EVA: exact attention within windows, the rest of the sequence through one key and value for each chunk."""

    name = "eva"
    options_class = EvaOptions
    extra_inputs = ("noise",)

    def __init__(self, num_heads: int, head_dim: int, options: EvaOptions):
        super().__init__(num_heads, head_dim, options)
        norm = options.adaptive_proj != "no-ln"
        self.q_bar_gen = None if options.adaptive_proj == "none" else SummaryProjection(head_dim, norm)
        self.k_bar_gen = SummaryProjection(head_dim, norm)
        if options.use_rpe:
            w, reach = options.window_size, options.reach
            shape = (2 * (w + reach) - 1,) * 2 if options.rpe_2d else (w, w + 2 * reach)
            self.rpe_table = nn.Parameter(torch.empty(num_heads, *shape))

    @classmethod
    def describe(cls, options: EvaOptions) -> Capabilities:
        causal = options.refusal(is_causal=True, grid=None) is None
        sequence, c = not (options.use_rpe and options.rpe_2d), options.chunk_size
        derived = (("CLS token", True), ("decoding", causal), ("exclude_own_chunk", options.exclude_own_chunk))
        when = "each forward" if options.noise_at_eval else "each training forward"
        return Capabilities(
            causal=causal,
            padding_equals_cutting="at the end",
            packed=sequence and c is not None and options.window_size % c == 0,
            sequence=sequence,
            grid="used",
            prefix_tokens=True,
            decode="growing state" if causal else "none",
            learned=True,
            random="" if options.noise_std == "none" else f"noise of the chunks: {when}",
            attention_weights=True,
            derived=tuple(mode for mode, defined in derived if defined),
            pays_from="512 (2-core CPU, float32, D = 64, windows of 64)",
        )

    @classmethod
    def host_defaults(cls, host: Host, given: dict[str, Any]) -> dict[str, Any]:
        EvaOptions.parse(**given)
        filled: dict[str, Any] = {}
        window, chunk, landmarks = (given.get(n) for n in ("window_size", "chunk_size", "num_landmarks"))
        if host.grid is None:
            if chunk is None and landmarks is None:
                chunk = filled["chunk_size"] = max(d for d in _divisors(window or 8) if d <= 8)
            if window is None:
                near, step = min(128, host.max_length or 128) if host.causal else 8, chunk or landmarks or 1
                filled["window_size"] = max(1, near // step) * step
        elif sizes := [d for d in _divisors(math.gcd(*host.grid)) if 1 < d <= 8]:
            if window is None:
                filled["window_size"] = sizes[-1]
            if chunk is None and landmarks is None:
                side = math.sqrt(math.prod(host.grid) / 49)
                filled["chunk_size"] = min(sizes, key=lambda size: abs(size - side))
        if host.grid is not None and given.get("use_rpe"):
            filled["rpe_2d"] = given.get("rpe_2d", True)
        refusal = EvaOptions.parse(**{**given, **filled}).refusal(host.causal, host.grid)
        if refusal and not host.cross:
            raise Unsupported(f"eva in {host.model}, layer {host.layer_idx}", *refusal)
        return filled

    def reset_parameters(self) -> None:
        for generator in (self.q_bar_gen, self.k_bar_gen):
            if generator is not None:
                generator.reset_parameters()
        if self.options.use_rpe:
            torch.nn.init.trunc_normal_(self.rpe_table, std=0.02)

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: State | None, **call: Any) -> tuple[Tensor, State]:
        if call.get("noise") is not None:
            raise Unsupported("eva", "noise was given to step: a chunk may end in a later step", "Leave noise out")
        return super().step(query, key, value, state, **call)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        grid = arguments.get("grid")
        if grid is not None and min(grid) < 1:
            raise InvalidInput(f"eva: grid={tuple(grid)} must be two numbers of at least 1.")
        if refusal := self.options.refusal(arguments.get("is_causal", False), grid):
            raise Unsupported(self.name, *refusal)
        call = super()._call(query, key, value, **arguments)
        if call.queries != call.keys:
            rule = f"N={call.queries} queries and M={call.keys} keys: a chunk needs both from each of its tokens"
            raise Unsupported(self.name, rule, "Pass as many keys as queries; decode with step and its state")
        sides = self.options.sides(call.queries, grid)
        if refusal := self.options.misfit(sides):
            raise Unsupported(self.name, *refusal)
        chunks = math.prod([side // self.options.chunk(sides) for side in sides])
        noise, shape = call.extra.get("noise"), (call.batch, self.num_heads, chunks, self.head_dim)
        if noise is not None and noise.shape != shape:
            raise InvalidInput(f"eva: noise must be (B,H,C,D) = {shape}; got {tuple(noise.shape)}.")
        return call

    def direction(self, query_bar: Tensor, key_bar: Tensor, call: Call) -> Tensor:
        """w_i (B,H,C,D) from qbar before f, and kbar after it."""
        mean = torch.zeros_like(key_bar)
        if self.q_bar_gen is not None:
            mean = (self.q_bar_gen(query_bar) + key_bar) * (1.0 if call.is_causal else 0.5)
        noise = call.extra.get("noise")
        if self.options.noise_std == "none" or not (noise is not None or self.training or self.options.noise_at_eval):
            return mean
        if noise is None:
            noise = torch.randn(mean.shape, dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device)
        std = call.scale**-0.5 if self.options.noise_std == "exact" else 1.0
        return mean + std * noise[:, :, : mean.shape[2]].to(mean.dtype)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        """The local softmax weights, plus the weight of every chunk times the chunk's own weights of its tokens."""
        options, tokens, device = self.options, call.queries, call.query.device
        prefix, sides = 0 if call.grid is None else call.num_prefix_tokens, options.sides(tokens, call.grid)
        w, c, reach = options.window_size, options.chunk(sides), options.reach
        before, after, reach = (w * options.overlap_window, 0, 0) if call.is_causal else (reach, reach, reach)
        place, corner = (
            torch.cartesian_prod(*(torch.arange(0, side, step, device=device) for side in sides)).view(-1, len(sides))
            for step in (1, c)
        )
        place = place[: tokens - prefix]
        window = place // w * w
        in_window = place - window[:, None]  # (N,N,axes): the key's place in the window of the query
        in_chunk = place - corner[:, None]  # (C,N,axes)
        local = ((in_window >= -before) & (in_window < w + after)).all(-1)
        own = ((in_chunk >= 0) & (in_chunk < c)).all(-1)
        member = ((in_chunk >= -reach) & (in_chunk < c + reach)).all(-1)
        sees = torch.ones(len(place), len(corner), dtype=torch.bool, device=device)
        if call.is_causal:
            local, sees = local & (place[:, 0] <= place), corner[:, 0] // c < place // c
        if options.exclude_own_chunk:
            sees = sees & ~((corner < window[:, None] + w) & (corner + c > window[:, None])).all(-1)
        # a prefix key is in every window, a prefix query sees every token and no chunk
        local = functional.pad(functional.pad(local, (prefix, 0), value=True), (0, 0, prefix, 0), value=True)
        own, member = functional.pad(own, (prefix, 0)), functional.pad(member, (prefix, 0))
        sees = functional.pad(sees, (0, 0, prefix, 0))

        bias = call.query.new_zeros(self.num_heads, tokens, tokens)
        if options.use_rpe and options.rpe_2d:
            apart = (place - place[:, None] + w + reach - 1).clamp(0, 2 * (w + reach) - 2)
            bias[:, prefix:, prefix:] = self.rpe_table.to(bias.dtype)[:, apart[..., 0], apart[..., 1]]
        elif options.use_rpe:
            key_place = (in_window[..., 0] + reach).clamp(0, w + 2 * reach - 1)
            bias = self.rpe_table.to(bias.dtype)[:, (place - window).expand(-1, tokens), key_place]

        real = (
            torch.ones_like(bias[:1, 0], dtype=torch.bool) if call.key_padding_mask is None else call.key_padding_mask
        )
        member, alive = member & real[:, None], (own & real[:, None]).any(-1)
        share = member.to(bias.dtype) / member.sum(-1, keepdim=True).clamp(min=1)
        key_bar = self.k_bar_gen(share[:, None] @ call.key)
        direction = self.direction(share[:, None] @ call.query, key_bar, call)
        inner = direction @ call.key.mT - call.key.square().sum(-1)[:, :, None] / 2
        inner = masked_softmax(call.scale * inner, member[:, None])
        logits = torch.cat((call.scale * call.query @ call.key.mT + bias, call.scale * call.query @ key_bar.mT), dim=-1)
        visible = torch.cat((local & real[:, None], sees & alive[:, None]), dim=-1)
        near, far = masked_softmax(logits, visible[:, None]).split((tokens, len(corner)), dim=-1)
        return near + far @ inner

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        if call.is_causal:
            return self.recurrent(call, None)[0]
        options, prefix = self.options, 0 if call.grid is None else call.num_prefix_tokens
        sides, real = options.sides(call.queries, call.grid), call.key_padding_mask
        w, reach, pad = options.window_size, options.reach, math.prod(sides) - (call.queries - prefix)
        query, key, value = (_pad(x[:, :, prefix:], 0, pad) for x in (call.query, call.key, call.value))
        if real is None and (pad or reach or options.exclude_own_chunk):
            real = torch.ones(1, call.keys, dtype=torch.bool, device=key.device)
        seen = None if real is None else _pad(real[:, None, prefix:, None], 0, pad)
        far_key, far_value, far_seen = self.chunks(query, key, value, seen, sides, call)
        if options.exclude_own_chunk:
            far_seen = far_seen & _apart(sides, w, options.chunk(sides), key.device)[:, None]
        if prefix:
            far_key = torch.cat((call.key[:, :, :prefix], far_key), dim=2)
            far_value = torch.cat((call.value[:, :, :prefix], far_value), dim=2)
            if real is not None:
                first = real[:, None, None, None, :prefix].expand(*far_seen.shape[:-1], -1)
                far_seen = torch.cat((first, far_seen), dim=-1)
        near_key, near_value = _blocks(key, sides, w, reach), _blocks(value, sides, w, reach)
        near_seen = None if seen is None else _blocks(seen, sides, w, reach).mT
        near, far = (near_key, near_value, near_seen), (far_key, far_value, far_seen)
        out = _near_and_far(_blocks(query, sides, w), near, far, call.scale, self.bias(query.dtype))
        if call.grid is not None:
            out = out.unflatten(2, (sides[0] // w, sides[1] // w, w, w)).transpose(3, 4).flatten(2, 5)
        out = out[:, :, : call.queries - prefix]
        if not prefix:
            return out
        first, real = call.query[:, :, :prefix], call.key_padding_mask
        first = flash.attention(first, call.key, call.value, key_padding_mask=real, scaling=call.scale)
        return torch.cat((first, out), dim=2)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """Causal attention; windows and chunks start at fixed places, so any split into steps gives the same numbers.

        The state: keys and values of the current window (with `overlap_window` of the one before, too), queries of
        the open chunk, a key and a value for every finished chunk, and which of all these are real.
        """
        options, new, device = self.options, call.queries, call.key.device
        w, c, before = options.window_size, options.chunk_size, options.window_size * options.overlap_window
        real = call.key_padding_mask
        if real is None:
            real = torch.ones(1 if state is None else call.batch, new, dtype=torch.bool, device=device)
        if state is None:
            state = dict.fromkeys(("query", "key", "value", "chunk_key", "chunk_value"), call.key[:, :, :0])
            state["real"] = state["chunk_real"] = real[:, :0]
        held, opened, done = (state[n].shape[2] for n in ("key", "query", "chunk_key"))
        seen = done * c + opened
        query, key, value = (_append(state[n], getattr(call, n), 2) for n in ("query", "key", "value"))
        real = _append(state["real"], real, 1)

        chunk_key, chunk_value, chunk_real = state["chunk_key"], state["chunk_value"], state["chunk_real"]
        finished = query.shape[2] // c * c
        if finished:
            part = slice(held - opened, held - opened + finished)
            tokens = query[:, :, :finished], key[:, :, part], value[:, :, part], real[:, None, part, None]
            new_key, new_value, new_real = self.chunks(*tokens, (finished,), call)
            chunk_key, chunk_value = _append(chunk_key, new_key, 2), _append(chunk_value, new_value, 2)
            chunk_real = _append(chunk_real, new_real[:, 0, 0, 0], 1)

        # within one window the new queries alone are a block; otherwise blocks start where the window does, and the
        # rows before the first new query are cut off at the end
        first, left, right, rows, span = 0, 0, 0, new, held + new
        if (inside := seen % w) + new > w:
            first, left, right, rows, span = inside, before + inside - held, -(inside + new) % w, w, before + w
        near_key, near_value = (_cut(_pad(x, left, right), 1, span, rows) for x in (key, value))
        near_seen = _cut(_pad(real[:, None, :, None], left, right), 1, span, rows).mT & causal_order(rows, span, device)
        block = _cut(_pad(call.query, first, right), 1, rows, rows)
        place = seen - first + torch.arange(first + new + right, device=device).view(-1, rows, 1)
        limit = place // w * (w // c) if options.exclude_own_chunk else place // c
        far_seen = torch.arange(chunk_key.shape[2], device=device) < limit
        far = chunk_key, chunk_value, far_seen & chunk_real[:, None, None, None]
        out = _near_and_far(block, (near_key, near_value, near_seen), far, call.scale)

        start = held + new - (seen + new) % w - (before if seen + new >= w else 0)
        kept = {"query": query[:, :, finished:], "key": key[:, :, start:], "value": value[:, :, start:]}
        kept = {n: x.clone() for n, x in kept.items()}  # a view would hold the whole prompt
        kept["real"] = real[:, start:].expand(call.batch, -1).clone()
        past = {"chunk_key": chunk_key, "chunk_value": chunk_value, "chunk_real": chunk_real.expand(call.batch, -1)}
        return out[:, :, first : first + new], {**kept, **past}

    def chunks(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, sides: tuple[int, ...], call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """kbar and beta (B,H,C,D), and which chunks have a real token of their own (B|1,1,1,1,C).

        Args:
            query, key, value: (B,H,T,D), the tokens of `sides`. real: bool (B|1,1,T,1), None where all are.
        """
        c, reach = self.options.chunk(sides), 0 if call.is_causal else self.options.reach
        queries, keys, values = (_blocks(x, sides, c, reach) for x in (query, key, value))
        if real is None:
            query_bar, key_bar, member = queries.mean(dim=3), keys.mean(dim=3), None
            alive = torch.ones(1, 1, 1, 1, keys.shape[2], dtype=torch.bool, device=key.device)
        else:
            member, alive = _blocks(real, sides, c, reach), _blocks(real, sides, c).any(dim=3).mT[:, :, None]
            count = member.sum(dim=3).clamp(min=1)
            query_bar, key_bar = (torch.where(member, x, 0).sum(dim=3) / count for x in (queries, keys))
        key_bar = self.k_bar_gen(key_bar)
        direction = self.direction(query_bar, key_bar, call)[:, :, :, None]
        logits = call.scale * ((direction - keys / 2) * keys).sum(-1)
        weights = masked_softmax(logits, None if member is None else member[..., 0])
        return key_bar, (weights[:, :, :, None] @ values)[:, :, :, 0], alive

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(H,r,L) relative bias of a window's r queries and L keys."""
        if not self.options.use_rpe:
            return None
        table, w = self.rpe_table.to(dtype), self.options.window_size
        if not self.options.rpe_2d:
            return table
        span = torch.arange(w + 2 * self.options.reach, device=table.device)
        apart = span - span[:w, None] + w - 1
        return table[:, apart[:, None, :, None], apart[None, :, None]].flatten(3, 4).flatten(1, 2)


def _near_and_far(
    query: Tensor, near: tuple[Tensor, Tensor, Tensor | None], far: tuple[Tensor, Tensor, Tensor], scale: float,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of every window over its own keys and the far keys that all windows share: (B,H,W*r,D).

    Args:
        query: (B,H,W,r,D).
        near: keys and values (B,H,W,L,D), and which are seen, bool, broadcast to (B,1,W,r,L); None: all, near and far.
        far: keys and values (B,H,G,D), and which are seen, bool, broadcast to (B,1,W,r,G).
        bias: (H,r,L), added to the logits of the window.
    """
    (key, value, near_seen), (far_key, far_value, far_seen), visible = near, far, None
    batch, heads, windows, rows, dim = query.shape
    if near_seen is not None:
        shape = torch.broadcast_shapes(near_seen.shape[:-1], far_seen.shape[:-1])
        visible = torch.cat((near_seen.expand(*shape, -1), far_seen.expand(*shape, -1)), dim=-1)
    if bias is None and rows >= dim:
        # a copy of the far keys for every window is smaller than the logits, which a fused kernel need not store
        keys, values = (
            torch.cat((x, y[:, :, None].expand(-1, -1, windows, -1, -1)), dim=3).transpose(1, 2).flatten(0, 1)
            for x, y in ((key, far_key), (value, far_value))
        )
        if visible is not None:
            visible = visible.expand(batch, 1, windows, rows, -1).transpose(1, 2).flatten(0, 1)
        out = flash.attention(query.transpose(1, 2).flatten(0, 1), keys, values, attention_mask=visible, scaling=scale)
        return out.unflatten(0, (batch, windows)).transpose(1, 2).flatten(2, 3)
    query = scale * query
    local = query @ key.mT if bias is None else query @ key.mT + bias[:, None]
    remote = (query.flatten(2, 3) @ far_key.mT).unflatten(2, (windows, rows))
    weights = masked_softmax(torch.cat((local, remote), dim=-1), visible)
    inner, outer = weights.split((key.shape[3], far_key.shape[2]), dim=-1)
    return (inner @ value).flatten(2, 3) + outer.flatten(2, 3) @ far_value


def _pad(x: Tensor, left: int, right: int) -> Tensor:
    """(B,H,T,D) with zeros (False) before and after its tokens; `x` itself where there are none to add."""
    return functional.pad(x, (0, 0, left, right)) if left or right else x


def _append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    return torch.cat((past, new), dim=dim) if past.shape[dim] else new


def _blocks(x: Tensor, sides: tuple[int, ...], size: int, reach: int = 0) -> Tensor:
    """(B,H,T,D) tokens of `sides` -> (B,H,blocks,members,D); a block extends by `reach` on every side, over zeros."""
    x = x.unflatten(2, sides)
    if reach:
        x = functional.pad(x, (0, 0) + (reach, reach) * len(sides))
    return _cut(x, len(sides), size + 2 * reach, size)


def _cut(x: Tensor, axes: int, size: int, step: int) -> Tensor:
    """(B,H,*sides,D) -> (B,H,blocks,members,D): a block of `size` on every axis, one every `step` tokens."""
    for axis in range(2, 2 + axes):
        x = x.unfold(axis, size, step)
    return x.movedim(2 + axes, -1).flatten(2 + axes, 1 + 2 * axes).flatten(2, 1 + axes)


def _apart(sides: tuple[int, ...], window: int, chunk: int, device: torch.device) -> Tensor:
    """(W,C) bool: the chunk shares no token with the window."""
    meets = torch.ones(1, 1, dtype=torch.bool, device=device)
    for side in sides:
        first, start = (torch.arange(0, side, size, device=device) for size in (window, chunk))
        axis = (start < first[:, None] + window) & (start + chunk > first[:, None])
        meets = (meets[:, None, :, None] & axis[:, None]).flatten(2, 3).flatten(0, 1)
    return ~meets


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


register(
    Mechanism(
        name="eva",
        title="Efficient attention via control variates",
        paper="Zheng, Yuan, Wang, Kong, ICLR 2023 (arXiv 2302.04542)",
        equation="out_n = softmax over window and chunks of [s <q_n, k_m> ; s <q_n, kbar_i>], times [v_m ; beta_i],  beta_i = softmax over chunk i of (s <w_i, k_m> - s |k_m|^2 / 2), times v_m",
        module_class=EvaAttention,
        example={"window_size": 4, "chunk_size": 2},
    )
)
