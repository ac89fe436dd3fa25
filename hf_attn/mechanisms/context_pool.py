"""ContextPool: every token is replaced by a learned average of its neighbourhood, then any attention runs on the result.

Paper: Huang, Talbott, Jaitly, Susskind, "Efficient Representation Learning via Adaptive Context Pooling", ICML 2022.
Re-implementation from the description, no reference to compare with: no public code was found, and the equations are
the standard reading of the method, made precise here.

    (a, t) = conv(relu(conv(X)))                                one pooling logit and one support a token
    sigma_i = min_support + support_ratio support_ref sigmoid(t_i)
    R_ij = softmax over the sources j of (a_j - |p_i - p_j|^2 / (2 sigma_i^2))
    out = attention(R q, R k, R v)                              the inner mechanism

Shapes: query, key and value (B,H,N,D), layer input X (B,N,H*D), R (B,P,N,N) with P = 1 or H.
When to use: short or fine-grained tokens (characters, small patches) where a unit of meaning spans several of them.
When not: without the layer's input (stock models); with masks other than key padding and causal order; for speed: it
adds work to its inner mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.functional import draw_, masked_softmax
from hf_attn.kernels.bands import Bands
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, get_mechanism, register

TARGETS = ("query", "key", "value")
IDENTITY = -12.0
"""Start of the supports under `init_identity`: sigma is near min_support, and R is the identity to rounding."""
_ARGUMENTS = tuple(f.name for f in fields(Call) if f.name not in (*TARGETS, "extra"))
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class ContextPoolOptions(Options):
    """Options of `context_pool`.

    Attributes:
        inner: the mechanism that attends to the pooled tokens: a name, or {"name": ..., **its options}.
        spatial_dims: 1 for sequences, 2 for a token grid.
        kernel_size: side of both convolutions, odd.
        mapping_dim: hidden channels of the map; None = max(16, H*D/16 rounded up to a multiple of 8).
        support_ratio: largest support, as a part of support_ref.
        support_ref: reference length (sequences) or side (grids), never taken from the input.
        min_support: smallest support, in tokens; added.
        max_window: sources stand at most this far from a token; None = all tokens.
        normalize: rows of R sum to one; False = the literal reading, softmax(a) times the window.
        pool_targets: which of "query", "key", "value" are pooled.
        pool_heads: 1 (shared), or H: own logits and supports for every head.
        support_init: start of t.
        init_identity: start from R = identity, for pretrained backbones (support_init = -12).
    """

    mechanism: ClassVar[str] = "context_pool"

    inner: str | dict[str, Any] = "softmax"
    spatial_dims: int = 1
    kernel_size: int = 3
    mapping_dim: int | None = None
    support_ratio: float = 0.1
    support_ref: float = 512
    min_support: float = 1e-3
    max_window: int | None = None
    normalize: bool = True
    pool_targets: tuple[str, ...] | list[str] = TARGETS
    pool_heads: int = 1
    support_init: float = -2.0
    init_identity: bool = False

    def check(self) -> None:
        self.integer("spatial_dims", 1)
        if self.spatial_dims > 2:
            raise self.refuse("spatial_dims", "must be 1 (sequences) or 2 (grids)")
        self.integer("kernel_size", 1)
        if self.kernel_size % 2 == 0:
            raise self.refuse("kernel_size", "must be odd: a token stands in the middle of its kernel")
        self.integer("pool_heads", 1)
        for option in ("mapping_dim", "max_window"):
            if getattr(self, option) is not None:
                self.integer(option, 1 if option == "mapping_dim" else 0)
        self.number("support_ratio", 0)
        self.number("support_ref", 0)
        self.number("min_support", 1e-6)
        self.number("support_init", float("-inf"))
        self.boolean("normalize", "init_identity")
        if self.init_identity and self.support_init not in (type(self).support_init, IDENTITY):
            raise self.refuse("support_init", f"and init_identity=True, which means {IDENTITY}", "Give one of the two.")
        targets = self.pool_targets
        if not isinstance(targets, (list, tuple)) or not targets or not {*targets} <= {*TARGETS}:
            raise self.refuse("pool_targets", f"must be a list of some of {', '.join(map(repr, TARGETS))}")
        if len({*targets}) < len(targets):
            raise self.refuse("pool_targets", "names a target twice")
        self._check_inner()

    def _check_inner(self) -> None:
        if self.inner_name == self.mechanism:
            raise self.refuse("inner", "wraps itself", "Name the mechanism that attends, such as 'softmax'.")
        module_class, options = self.inner_parts()
        inner = module_class.describe(options)
        if not inner.sequence and self.spatial_dims == 1:
            raise self.refuse("inner", "needs a 2-D token grid", "Set spatial_dims=2.")
        if inner.needs_layer_input and ({*self.pool_targets} != {*TARGETS} or self.pool_heads > 1):
            rule = "reads the layer's input, which is pooled like query, key and value together"
            raise self.refuse("inner", rule, "Leave pool_targets and pool_heads out.")

    @property
    def inner_name(self) -> str:
        name = self.inner.get("name") if isinstance(self.inner, dict) else self.inner
        if not isinstance(name, str):
            raise self.refuse("inner", "must be a mechanism's name or a dict with 'name' and its options")
        return name

    def inner_parts(self) -> tuple[type[AttentionModule], Options]:
        """The inner mechanism's module class and its options."""
        record = get_mechanism(self.inner_name)
        given = {k: v for k, v in self.inner.items() if k != "name"} if isinstance(self.inner, dict) else {}
        return record.module_class, record.options_class.parse(**given)


class ContextPool(AttentionModule):
    """Adaptive context pooling in front of any attention mechanism."""

    name = "context_pool"
    options_class = ContextPoolOptions
    # the map is in float32 at least; the products with R run in the tensors' own precision, like the inner mechanism
    in_float32 = False

    def __init__(self, num_heads: int, head_dim: int, options: ContextPoolOptions):
        super().__init__(num_heads, head_dim, options)
        if options.pool_heads not in (1, num_heads):
            raise InvalidOption(
                f"context_pool: option pool_heads={options.pool_heads} must be 1 or num_heads={num_heads}."
            )
        width = num_heads * head_dim
        hidden = options.mapping_dim or max(16, -(-width // 128) * 8)
        conv = nn.Conv1d if options.spatial_dims == 1 else nn.Conv2d
        self.mapping_in = conv(width, hidden, options.kernel_size)
        self.mapping_out = conv(hidden, 2 * options.pool_heads, options.kernel_size)
        module_class, inner_options = options.inner_parts()
        self.inner = module_class(num_heads, head_dim, inner_options)
        self.extra_inputs = self.inner.extra_inputs

    @classmethod
    def describe(cls, options: ContextPoolOptions) -> Capabilities:
        module_class, inner_options = options.inner_parts()
        inner = module_class.describe(inner_options)
        grid = options.spatial_dims == 2
        causal = inner.causal and not grid and options.normalize
        derived = (("key padding", not grid), ("causal order", causal), ("CLS token", True))
        return replace(
            inner,
            causal=causal,
            cross=False,
            padding=inner.padding and not grid,
            packed=inner.packed and not grid,
            dense_mask=False,
            sequence=not grid,
            grid="used" if grid else "refused",
            prefix_tokens=not grid or inner.grid == "ignored" or inner.prefix_tokens,
            decode=_decode(inner, options) if causal else "none",
            learned=True,
            needs_layer_input=True,
            derived=(*(mode for mode, defined in derived if defined), *inner.derived),
            pays_from="none: work on top of its inner mechanism",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if host.grid and "spatial_dims" not in given:
            options["spatial_dims"] = 2
        if "support_ref" not in given and (host.grid or host.max_length):
            options["support_ref"] = max(host.grid) if host.grid else host.max_length
        inner = given.get("inner", "softmax")
        entry = dict(inner) if isinstance(inner, dict) else {"name": inner}
        if not isinstance(entry.get("name"), str):
            return options  # which the options' own check refuses
        module_class = get_mechanism(entry["name"]).module_class
        filled = module_class.host_defaults(host, {k: v for k, v in entry.items() if k != "name"})
        return {**options, "inner": {**entry, **filled}} if filled else options

    def reset_parameters(self) -> None:
        options, first, last = self.options, self.mapping_in, self.mapping_out
        nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
        bound = first.weight[0].numel() ** -0.5
        nn.init.uniform_(first.bias, -bound, bound)
        nn.init.normal_(last.weight, std=0.02)
        start = torch.zeros_like(last.bias)
        start[options.pool_heads :] = IDENTITY if options.init_identity else options.support_init
        draw_(last.bias, start)
        self.inner.reset_parameters()

    def pool(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
    ) -> Tensor:
        """R applied to the hidden states (B,N,H*D) themselves. Arguments and errors of `forward`."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.num_heads * self.head_dim:
            raise self._wrong_input(hidden_states, "(B,N,H*D)")
        heads = self._split(hidden_states)
        call = self._call(
            heads, heads, heads, key_padding_mask=key_padding_mask, is_causal=is_causal, grid=grid,
            num_prefix_tokens=num_prefix_tokens, layer_input=hidden_states,
        )  # fmt: skip
        return self._merge(self._windows(call)(heads))

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        options, refused = self.options, None
        grid, is_causal = arguments.get("grid"), arguments.get("is_causal")
        if query.dim() == key.dim() == 4 and query.shape[2] != key.shape[2]:
            rule = (
                f"N={query.shape[2]} queries and M={key.shape[2]} keys: pooling needs the layer's input at every token"
            )
            refused = rule, "Pass as many keys as queries; to decode token by token, use step"
        elif arguments.get("layer_input") is None:
            rule = "layer_input is missing: the pooling weights are a function of the layer's input"
            refused = rule, "Pass layer_input (B,N,H*D), the hidden states that query, key and value are projections of"
        elif grid is not None and options.spatial_dims == 1:
            refused = f"grid={tuple(grid)} with spatial_dims=1", "Set spatial_dims=2, or leave grid out"
        elif is_causal and options.spatial_dims == 2:
            refused = "is_causal=True with spatial_dims=2: a grid has no causal order", "Leave is_causal out"
        elif is_causal and not options.normalize:
            rule = "is_causal=True with normalize=False: its sum runs over all tokens, later ones too"
            refused = rule, "Set normalize=True"
        elif arguments.get("key_padding_mask") is not None and options.spatial_dims == 2:
            rule = "key_padding_mask with spatial_dims=2: the convolutions of the map need the whole grid"
            refused = rule, "Leave the mask out"
        if refused:
            raise Unsupported(self.name, *refused)
        call = super()._call(query, key, value, **arguments)
        hidden = call.layer_input
        expected = (call.batch, call.queries, self.num_heads * self.head_dim)
        if hidden.shape != expected:
            raise self._wrong_input(hidden, f"(B,N,H*D) = {expected}")
        if not 0 <= call.num_prefix_tokens < call.queries:
            raise InvalidInput(
                f"context_pool: num_prefix_tokens={call.num_prefix_tokens} must leave one of N={call.queries} tokens."
            )
        self._inner_call(call)  # what the inner mechanism refuses, before anything is computed
        return call

    def _wrong_input(self, hidden: Tensor, expected: str) -> InvalidInput:
        return InvalidInput(f"context_pool: layer_input must be {expected}; got {tuple(hidden.shape)}.")

    def _inner_call(self, call: Call) -> Call:
        given = {argument: getattr(call, argument) for argument in _ARGUMENTS}
        return self.inner._call(call.query, call.key, call.value, **given, **call.extra)

    def _inner_form(self, form: str, call: Call, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """A form of the inner mechanism, called with what `pool` (R x for x (B,H,N,E)) makes of its inputs."""
        pooled = {target: pool(getattr(call, target)) for target in self.options.pool_targets}
        if self.inner.capabilities.needs_layer_input:
            pooled["layer_input"] = self._merge(pool(self._split(call.layer_input)))
        return self.inner._guarded(getattr(self.inner, form), self._inner_call(replace(call, **pooled)))

    # -- the definition --------------------------------------------------------------------------------------------

    def define(self, call: Call) -> Tensor:
        matrix = self.pooling_matrix(call)
        return self._inner_form("define", call, lambda x: matrix.to(x.dtype) @ x)

    def weights(self, call: Call) -> Tensor:
        matrix = self.pooling_matrix(call).to(call.query.dtype)
        weights = self._inner_form("weights", call, lambda x: matrix @ x)
        return weights @ matrix if "value" in self.options.pool_targets else weights

    def pooling_matrix(self, call: Call) -> Tensor:
        """R (B,P,N,N) of a checked call."""
        prefix, rows, columns = _geometry(call)
        logits, support = self.logits_and_supports(call)
        place = torch.arange(rows * columns, device=logits.device)
        position = torch.stack((place // columns, place % columns), dim=-1)
        offset = position[:, None] - position
        source = torch.ones_like(offset[..., 0], dtype=torch.bool)
        if call.is_causal:
            source = source & (place <= place[:, None])
        if self.options.max_window is not None:
            source = source & (offset.abs().amax(dim=-1) <= self.options.max_window)
        real = _real(call)
        if real is not None:
            source = source & real[:, None, None]
        log_window = -offset.square().sum(dim=-1) / (2 * support[..., None].square())
        if self.options.normalize:
            matrix = masked_softmax(logits[:, :, None] + log_window, source)
        else:
            share = masked_softmax(logits, None if real is None else real[:, None])
            matrix = torch.where(source, share[:, :, None] * log_window.exp(), 0)
        if real is not None:
            matrix = torch.where(source.any(dim=-1, keepdim=True), matrix, torch.eye(rows * columns).to(matrix))
        out = torch.eye(call.queries).to(matrix).repeat(*matrix.shape[:2], 1, 1)
        out[:, :, prefix:, prefix:] = matrix
        return out

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def logits_and_supports(self, call: Call, past: State | None = None) -> tuple[Tensor, Tensor]:
        """a and sigma, (B,P,n) in float32 at least, of the n tokens that are no prefix tokens.

        `past` holds the last inputs of the causal convolutions, under their names, and is brought up to date.
        """
        prefix, rows, columns = _geometry(call)
        hidden, kernel, one_dim = call.layer_input[:, prefix:], self.options.kernel_size, self.options.spatial_dims == 1
        # more than needed on the right; the first columns are those of a kernel that ends at its token
        side = kernel - 1 if call.is_causal else kernel // 2
        padding, real = (0, side) if one_dim else (side, side), _real(call)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float() if hidden.dtype.itemsize < 4 else hidden
            # a 2-D convolution with channels last reads the tokens as they lie; a 1-D one would copy them
            x = _zero(hidden.transpose(1, 2).unflatten(2, (rows, columns)), real)
            for name, layer in (("mapping_in", self.mapping_in), ("mapping_out", self.mapping_out)):
                if past is not None:
                    x = torch.cat((past.get(name, x.new_zeros(*x.shape[:3], kernel - 1)), x), dim=3)
                    past[name], padding = x[..., columns:], 0
                weight = layer.weight[:, :, None] if one_dim else layer.weight
                weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
                x = functional.conv2d(x, weight, layer.bias.to(x.dtype), 1, padding)[..., :columns]
                x = _zero(x.relu() if name == "mapping_in" else x, real)
            logits, support = x.flatten(2).chunk(2, dim=1)
            largest = self.options.support_ratio * self.options.support_ref
            return logits, self.options.min_support + largest * support.sigmoid()

    def _split(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge(self, heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(2)

    # -- the efficient forms ---------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        return self._inner_form("attend", call, self._windows(call))

    def _windows(self, call: Call) -> Callable[[Tensor], Tensor]:
        """x (B,H,N,E) -> R x, band by band: no more than the sources within reach are looked at."""
        return self._pooling(call, *self.logits_and_supports(call), _real(call))

    def _pooling(self, call: Call, logits: Tensor, support: Tensor, real: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The same from logits (B,P,n) and supports (B,P,m), for the last m of n tokens."""
        prefix, rows, columns = _geometry(call)
        earlier = logits.shape[2] - support.shape[2]
        reach, width = self._reach(logits, support, real), 1 if rows == 1 else columns
        bands = Bands.of(support.shape[2], earlier, width, reach, call.is_causal)
        lines, places = bands.offsets(logits.device)
        near = lines >= 0 if call.is_causal else torch.ones_like(lines, dtype=torch.bool)
        if reach is not None:
            near = near & (lines.abs() <= reach) & (places.abs() <= reach)
        source, seen = bands.sources(logits.device)
        lonely = None
        if real is not None:
            seen = (seen & real[:, source])[:, None]
            lonely = ~bands.join((near & seen[..., None, :]).any(dim=-1))[..., None]
        # a number, for rows that see nothing: minus infinity would make them not-a-number
        hidden = torch.finfo(logits.dtype).min / 8
        beyond = torch.zeros_like(near, dtype=logits.dtype).masked_fill(~near, hidden)
        square = (lines.square() + places.square()).to(logits.dtype)
        log_window = torch.addcmul(beyond, square, -0.5 / bands.split(support)[..., None].square())
        if self.options.normalize:
            weight = (torch.where(seen, logits[..., source], hidden)[..., None, :] + log_window).softmax(dim=-1)
        else:
            share = masked_softmax(logits, None if real is None else real[:, None])
            weight = torch.where(seen, share[..., source], 0)[..., None, :] * log_window.exp()

        def pool(x: Tensor) -> Tensor:
            tokens = x[:, :, prefix:]
            # shared weights: one product for all heads, whose tokens are read as they lie
            shared = self.options.pool_heads == 1
            groups = tokens.transpose(1, 2) if shared else tokens.flatten(0, 1)
            with torch.autocast(x.device.type, enabled=False):
                out = bands.product(weight.flatten(0, 1).to(x.dtype), groups)
            out = out.transpose(1, 2) if shared else out.unflatten(0, x.shape[:2])
            out = out if lonely is None else torch.where(lonely, tokens[:, :, earlier:], out)
            return torch.cat((x[:, :, :prefix], out), dim=2) if prefix else out

        return pool

    def _reach(self, logits: Tensor, support: Tensor, real: Tensor | None) -> int | None:
        """Distance beyond which weights vanish in rounding; None where all tokens are to be looked at.

        Row i weighs itself by exp(a_i), and no more than (1 + 2 sigma)^dims tokens as far away as d, each by at most
        exp(max a - d^2 / (2 sigma^2)).
        """
        if self.options.max_window is not None or torch.compiler.is_compiling():
            return self.options.max_window
        logits, support = logits.detach(), support.detach()
        if real is not None:
            logits = logits.masked_fill(~real[:, None], _NEGATIVE_INFINITY)
        own, largest = logits[..., -support.shape[2] :], logits.amax(dim=-1, keepdim=True)
        room = self.options.spatial_dims * torch.log1p(2 * support) - math.log(torch.finfo(support.dtype).eps)
        reach = support * (2 * (largest - own + room)).sqrt()
        if real is not None:
            reach = torch.where(own > _NEGATIVE_INFINITY, reach, 0)
        return int(reach.amax().nan_to_num(nan=1e9).clamp(max=1e9))

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """The state: what the convolutions saw last, the window's tokens with their logits, the inner mechanism's."""
        if call.num_prefix_tokens:
            rule = f"num_prefix_tokens={call.num_prefix_tokens} while decoding: they have no place in the state"
            raise Unsupported(self.name, rule, "Leave num_prefix_tokens out")
        state, targets, kept = dict(state or {}), self.options.pool_targets, self.options.max_window
        logits, support = self.logits_and_supports(call, state)
        real = _ones(call, call.queries) if call.key_padding_mask is None else call.key_padding_mask[:, None]
        tokens = {"logits": logits, "real": real, **{target: getattr(call, target) for target in targets}}
        for name, new in tokens.items():
            none = new.new_zeros(*new.shape[:2], kept or 0, *new.shape[3:])
            tokens[name] = torch.cat((state.get(name, none), new), dim=2)
        pool = self._pooling(call, tokens["logits"], support, tokens["real"][:, 0])
        pooled = replace(call, **{target: pool(tokens[target]) for target in targets})
        inner = {n.removeprefix("inner."): t for n, t in state.items() if n.startswith("inner.")}
        out, inner = self._inner_step(pooled, inner)
        for name, held in tokens.items():
            state[name] = held if kept is None else held[:, :, held.shape[2] - kept :]
        return out, state | {f"inner.{name}": tensor for name, tensor in inner.items()}

    def _inner_step(self, call: Call, state: State) -> tuple[Tensor, State]:
        """The inner mechanism after `state`: its own state, or the pooled keys and values so far."""
        given = {argument: getattr(call, argument) for argument in _ARGUMENTS}
        if self.inner.capabilities.decode == "constant state":
            del given["is_causal"]
            return self.inner.step(call.query, call.key, call.value, state or None, **given, **call.extra)
        new, mask = {"key": call.key, "value": call.value}, call.key_padding_mask
        if mask is not None or "real" in state:
            # no mask is kept before there is one: exact kernels are faster without
            new["real"] = _ones(call, call.queries) if mask is None else mask[:, None]
            if state:
                state = {"real": _ones(call, state["key"].shape[2]), **state}
        state = {name: torch.cat((state[name], t), dim=2) if state else t for name, t in new.items()}
        given["key_padding_mask"] = state["real"][:, 0] if "real" in state else None
        return self.inner(call.query, state["key"], state["value"], **given, **call.extra), state


def _decode(inner: Capabilities, options: ContextPoolOptions) -> str:
    """How a causal inner mechanism decodes behind pooled tokens."""
    if inner.decode == "none" or inner.needs_layer_input:
        return "none"
    constant = inner.decode == "constant state" and options.max_window is not None
    return "constant state" if constant else "full state"


def _geometry(call: Call) -> tuple[int, int, int]:
    """Prefix tokens, rows and columns; a sequence is one row."""
    prefix = call.num_prefix_tokens
    return (prefix, 1, call.queries - prefix) if call.grid is None else (prefix, *call.grid)


def _ones(call: Call, tokens: int) -> Tensor:
    """(B,1,tokens) True."""
    return torch.ones(call.batch, 1, tokens, dtype=torch.bool, device=call.query.device)


def _zero(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B,C,rows,columns), one row where there is padding, with zeros at padded tokens."""
    return x if real is None else torch.where(real[:, None, None], x, 0)


def _real(call: Call) -> Tensor | None:
    """(B,n) bool: the tokens after the prefix that are no padding."""
    return None if call.key_padding_mask is None else call.key_padding_mask[:, call.num_prefix_tokens :]


register(
    Mechanism(
        name="context_pool",
        title="Adaptive context pooling",
        paper="Huang, Talbott, Jaitly, Susskind, ICML 2022 (arXiv 2207.01844); re-implementation from the description, "
        "no reference to compare with",
        equation="out = attention(R q, R k, R v),  R_ij = softmax over j of (a_j - |p_i - p_j|^2 / (2 sigma_i^2)),  "
        "(a, t) = conv(relu(conv(X))),  sigma_i = min_support + support_ratio support_ref sigmoid(t_i)",
        module_class=ContextPool,
        example={},
    )
)
