"""The base class of every mechanism, and the checked record of one call.

Shapes, everywhere: B batch, H heads, N queries, M keys, D head dimension, F features. `query` (B,H,N,D), `key` and
`value` (B,H,M,D), result (B,H,N,D). A call is checked once, in `Call`; the forms behind it trust what they get.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.masks import causal_order, visible_pairs
from hf_attn.options import Options

State = dict[str, Tensor]
"""What a causal mechanism carries from one decoding step to the next; batch is the first dimension of every tensor."""


@dataclass
class Call:
    """The arguments of one attention call, checked against the shapes. Fields are those of `AttentionModule.forward`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    is_causal: bool = False
    scaling: float | None = None
    grid: tuple[int, int] | None = None
    num_prefix_tokens: int = 0
    layer_input: Tensor | None = None
    layer_idx: int | None = None
    attention_mask: Tensor | None = None
    dropout: float = 0.0
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that only one mechanism knows, such as `noise`."""

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def visible(self) -> Tensor | None:
        """(B|1,1|H,N,M) bool, True where a query sees a key; None where every query sees every key.

        Additive masks are not pairs of seen and unseen: only `softmax` takes them, and it does not ask.
        """
        visible = None
        if self.is_causal:
            visible = causal_order(self.queries, self.keys, self.query.device)[None, None]
        if self.key_padding_mask is not None:
            padding = self.key_padding_mask[:, None, None]
            visible = padding if visible is None else visible & padding
        if self.attention_mask is not None:
            dense = visible_pairs(self.attention_mask)
            if dense is None:
                raise InvalidInput(
                    "an additive attention_mask with biases besides 0 and minus infinity hides no pairs."
                )
            visible = dense if visible is None else visible & dense
        return visible

    def float32(self) -> Call:
        """The same call with half-precision tensors in float32."""
        low = (torch.float16, torch.bfloat16)
        cast = {
            n: t.float()
            for n in ("query", "key", "value", "layer_input")
            if (t := getattr(self, n)) is not None and t.dtype in low
        }
        return replace(self, **cast) if cast else self

    def check(self, name: str, capabilities: Capabilities, num_heads: int, head_dim: int) -> Call:
        """Raise `InvalidInput` for wrong shapes, `Unsupported` for a mode outside `capabilities`."""
        q, k, v = self.query, self.key, self.value
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise InvalidInput(f"{name}: query, key and value must be (B,H,N,D); got {_shapes(q, k, v)}.")
        if q.shape[1] != num_heads or q.shape[3] != head_dim:
            raise InvalidInput(
                f"{name}: query has shape {tuple(q.shape)}; this module was built for num_heads={num_heads}, head_dim={head_dim}."
            )
        if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim:
            raise InvalidInput(f"{name}: query, key and value do not fit together; got {_shapes(q, k, v)}.")
        mask = self.key_padding_mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (self.batch, self.keys)):
            raise InvalidInput(
                f"{name}: key_padding_mask must be bool (B,M) = ({self.batch},{self.keys}), True for a real token; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        if self.is_causal and self.queries > self.keys:
            raise Unsupported(
                name,
                f"is_causal=True with N={self.queries} queries and M={self.keys} keys: the last query would stand after the last key",
                "Pass at least as many keys as queries",
            )
        if self.is_causal and not capabilities.causal:
            raise Unsupported(
                name,
                "is_causal=True, and it is defined for bidirectional attention only",
                "Use a causal mechanism, such as rfa",
            )
        if not self.is_causal and self.queries != self.keys and not capabilities.cross:
            raise Unsupported(
                name,
                f"N={self.queries} queries and M={self.keys} keys: cross-attention is not defined",
                "Use a mechanism with cross-attention, such as softmax or rfa",
            )
        if self.attention_mask is not None:
            if not capabilities.dense_mask:
                raise Unsupported(
                    name,
                    f"a dense attention_mask of shape {tuple(self.attention_mask.shape)}: it has no N x M weights to mask",
                    "Pass a key padding mask (B,M), or use softmax",
                )
            if self.attention_mask.dim() != 4 or self.attention_mask.shape[-2:] != (self.queries, self.keys):
                raise InvalidInput(
                    f"{name}: attention_mask must be (B,1|H,N,M) with N={self.queries}, M={self.keys}; got {tuple(self.attention_mask.shape)}."
                )
        self.check_grid(name, capabilities)
        return self

    def check_grid(self, name: str, capabilities: Capabilities) -> None:
        if self.grid is None:
            if not capabilities.sequence:
                raise Unsupported(
                    name, f"no grid was given: {name} needs a 2-D token grid", "Pass grid=(rows, columns)"
                )
            return
        if capabilities.grid == "ignored":
            return
        rows, columns = self.grid
        if self.num_prefix_tokens + rows * columns != self.queries:
            raise InvalidInput(
                f"{name}: grid {rows} x {columns} with num_prefix_tokens={self.num_prefix_tokens} makes "
                f"{self.num_prefix_tokens + rows * columns} tokens, and there are N={self.queries}."
            )
        if self.num_prefix_tokens and not capabilities.prefix_tokens:
            raise Unsupported(
                name,
                f"num_prefix_tokens={self.num_prefix_tokens} before the grid",
                "Drop the prefix tokens (mean pooling)",
            )

    def require_layer_input(self, name: str, why: str, remedy: str) -> None:
        """Raise unless `layer_input` is there and (B,N,H*D); `why` names what needs it, `remedy` what does not."""
        if self.layer_input is None:
            raise Unsupported(name, f"no layer_input was given, and {why}", f"Pass layer_input (B,N,H*D), or {remedy}")
        expected = (self.batch, self.queries, self.query.shape[1] * self.query.shape[3])
        if self.layer_input.shape != expected:
            raise InvalidInput(
                f"{name}: layer_input must be (B,N,H*D) = {expected}; got {tuple(self.layer_input.shape)}."
            )


class AttentionModule(nn.Module):
    """A mechanism with its options, parameters and buffers: `module(query, key, value, ...)`.

    A subclass implements `attend` (the efficient form) and either `weights` (the definition, as an N x M matrix) or
    `define`. Causal mechanisms that decode with a state of their own implement `recurrent`.

    Args:
        num_heads: H.
        head_dim: D.
        options: the mechanism's options dataclass.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Options]] = Options
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors a call may carry besides the common ones."""
    in_float32: ClassVar[bool] = True
    """Half-precision calls are computed in float32; False where the kernels keep their own accumulators."""
    needs_training: ClassVar[str] = ""
    """How its output differs so much from softmax attention's that putting it in a pretrained model is warned about."""

    def __init__(self, num_heads: int, head_dim: int, options: Any):
        super().__init__()
        self.num_heads, self.head_dim, self.options = num_heads, head_dim, options
        self.capabilities = self.describe(options)

    @classmethod
    def describe(cls, options: Any) -> Capabilities:
        """The capabilities under these options."""
        raise NotImplementedError(f"{cls.__name__} must say what it can do")

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Options a model family fills in from its configuration where the user `given` none."""
        return {}

    @classmethod
    def warn_untrained(cls) -> None:
        """Say that a model pretrained with softmax is of no use with this mechanism yet, where that is so."""
        if cls.needs_training and not torch.compiler.is_compiling():
            warnings.warn(
                f"{cls.name} {cls.needs_training}. A model pretrained with softmax needs training with it before it is of use.",
                stacklevel=3,
            )

    def reset_parameters(self) -> None:
        """(Re)initialise this module's own parameters and buffers, and its children's, to their documented values.

        Uses `torch.nn.init` and `functional.draw_` only, which leave loaded tensors alone while transformers
        initialises the missing ones.
        """

    def reset_beside_pretrained(self) -> None:
        """`reset_parameters` for a model whose own weights are trained; differs where that start would disturb them."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        scaling: float | None = None,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        layer_input: Tensor | None = None,
        layer_idx: int | None = None,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        **extra: Tensor,
    ) -> Tensor:
        """Attention in its efficient form.

        Args:
            query: (B,H,N,D).
            key, value: (B,H,M,D).
            key_padding_mask: bool (B,M), True for a real token.
            is_causal: query n sees keys m <= n + (M - N).
            scaling: factor of the logits; D ** -0.5 by default.
            grid: (rows, columns) of the token grid, raster order, after the prefix tokens.
            num_prefix_tokens: CLS or register tokens before the grid.
            layer_input: (B,N,H*D) hidden states, for mechanisms that need them.
            layer_idx: number of the layer, for mechanisms that depend on it.
            attention_mask: any bool or additive mask (B,1|H,N,M), for mechanisms with dense masks.
            dropout: probability of dropping an attention weight, for mechanisms with dropout.
            extra: tensors of one mechanism, such as `noise`.

        Returns:
            (B,H,N,D). A query that sees no key gives zeros.

        Raises:
            InvalidInput: wrong shapes. Unsupported: a mode the mechanism does not define.
        """
        call = self._call(
            query, key, value, key_padding_mask=key_padding_mask, is_causal=is_causal, scaling=scaling, grid=grid,
            num_prefix_tokens=num_prefix_tokens, layer_input=layer_input, layer_idx=layer_idx,
            attention_mask=attention_mask, dropout=dropout, **extra,
        )  # fmt: skip
        return self._guarded(self.attend, call)

    def naive(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """The definition, quadratic and obviously correct. Arguments of `forward`."""
        return self._guarded(self.define, self._call(query, key, value, **call))

    def attention_weights(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """The implied weights (B,H,N,M): `naive` is their product with `value`. Arguments of `forward`."""
        if not self.capabilities.attention_weights:
            raise Unsupported(
                self.name, "output_attentions: it has no N x M attention weights", "Leave output_attentions out"
            )
        return self._guarded(self.weights, self._call(query, key, value, **call))

    def step(self, query: Tensor, key: Tensor, value: Tensor, state: State | None, **call: Any) -> tuple[Tensor, State]:
        """Causal attention over the tokens in `state` and the N new ones; returns the result and the new state."""
        checked = self._call(query, key, value, is_causal=True, **call)
        if not self.capabilities.keeps_state:
            raise Unsupported(self.name, "decoding with a state of its own is not defined", "Use a full cache")
        result: list[State] = []

        def run(call: Call) -> Tensor:
            out, new = self.recurrent(call, state)
            result.append(new)
            return out

        return self._guarded(run, checked), result[0]

    def attend(self, call: Call) -> Tensor:
        """The efficient form of a checked call."""
        raise NotImplementedError(f"{type(self).__name__} must implement attend")

    def define(self, call: Call) -> Tensor:
        """The definition of a checked call; the product of `weights` and the values unless overridden."""
        return self.weights(call) @ call.value

    def weights(self, call: Call) -> Tensor:
        """(B,H,N,M) weights of a checked call, zero where a query does not see a key."""
        raise NotImplementedError(f"{type(self).__name__} has no weights")

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """Causal attention after `state` (None: nothing seen yet), and the state after this call's tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")

    def extra_repr(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.changed().items())
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}{', ' if options else ''}{options}"

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        extra = {n: arguments.pop(n) for n in self.extra_inputs if n in arguments}
        unknown = [n for n in arguments if n not in Call.__dataclass_fields__ or n == "extra"]
        if unknown:
            raise InvalidInput(
                f"{self.name}: unknown argument {unknown[0]!r}. Its own arguments: {', '.join(self.extra_inputs) or 'none'}."
            )
        call = Call(query, key, value, extra={n: t for n, t in extra.items() if t is not None}, **arguments)
        return call.check(self.name, self.capabilities, self.num_heads, self.head_dim)

    def _guarded(self, form: Any, call: Call) -> Tensor:
        """Run `form` in float32 at least: log-space feature maps lose their meaning in half precision."""
        device = call.query.device.type
        if not self.in_float32 or not (torch.is_autocast_enabled(device) or call.query.dtype.itemsize < 4):
            return form(call)
        with torch.autocast(device, enabled=False):
            return form(call.float32()).to(call.query.dtype)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
