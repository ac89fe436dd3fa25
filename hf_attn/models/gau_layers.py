"""What the gated attention units share: norms, rotations, and the unit around its attention.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022 (arXiv 2202.10447).

    x'      = norm(x)                                     u, v, z = silu(x' W + b)       widths e, e, s
    h_r     = rope(z * gamma_r + beta_r)                  r: the copies of z, queries and keys
    y       = x + (u * attention(h, v)) W_o + b_o         or its norm, with norm_position="post"

Shapes: x (B,N,d), u and v (B,N,e), z (B,N,s), copies h (R,B,N,s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.kernels.linear import linear
from hf_attn.models.gau_config import UnitOptions

Rotation = tuple[Tensor, Tensor]
"""cos and sin (N, width / 2) of the angles of consecutive positions."""


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times one learned number (ScaleNorm) unless `scale` is False."""

    def __init__(self, dim: int, eps: float = 1e-5, scale: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(1)) if scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The factor starts at 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)."""
        x = functional.rms_norm(x, (self.dim,), eps=self.eps)
        return x if self.weight is None else x * self.weight

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, scale={self.weight is not None}"


def make_norm(norm_type: str, dim: int, eps: float) -> nn.Module:
    """The norm called `norm_type` in `UnitOptions`."""
    if norm_type == "layer_norm":
        return nn.LayerNorm(dim, eps=eps)
    return RootMeanSquareNorm(dim, eps, scale=norm_type == "scale_norm")


def rotation_of(first: int, count: int, width: int, theta: float, like: Tensor) -> Rotation:
    """cos and sin of the positions first.., for half-split rotations: channel f turns with channel f + width / 2.

    Computed in float32 at least, on the device of `like`.
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    channel = torch.arange(width // 2, dtype=exact, device=like.device)
    position = torch.arange(first, first + count, dtype=exact, device=like.device)
    angle = position[:, None] * theta ** (-channel / (width // 2))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first channels of x (...,N,s), as many as `rotation` is made for."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    if in_place(x):
        out = x.clone() if x.shape[-1] > 2 * half else torch.empty_like(x)
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
        return out
    parts = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)


def in_place(x: Tensor) -> bool:
    """Whether results may go where `x` or a new tensor is: nothing is recorded for a backward pass or a graph."""
    return not x.requires_grad and not torch.compiler.is_compiling()


@dataclass
class UnitState:
    """What a unit carries from one decoding step to the next. The first dimension of every tensor is the batch."""

    @property
    def tokens(self) -> int:
        """The number of tokens it stands for."""
        raise NotImplementedError

    def map(self, function: Callable[[Tensor], Tensor]) -> UnitState:
        """Replace every tensor by `function` of it; returns the same state."""
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                setattr(self, f.name, function(value))
        return self

    def reorder(self, beam_idx: Tensor) -> UnitState:
        """Select rows of the batch, in place; returns the same state."""
        return self.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, *args: Any) -> None:
        """Refused: what a chunk was summed to cannot be taken apart again."""
        raise Unsupported(
            "gau", f"crop{args}: tokens cannot be taken out of a state", "Decode without assisted generation"
        )


class GatedUnit(GradientCheckpointingLayer):
    """A gated attention unit without its attention. Subclasses have `copies` of z, and say what attends.

    Args:
        hidden_size: d.
        options: fields of the subclass's `options_class`.

    Raises:
        InvalidOption: an option outside its rule.
    """

    options_class: ClassVar[type[UnitOptions]]
    copies: ClassVar[int]
    bias_reach: int
    """Distances up to which a toeplitz bias is made for."""

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__()
        self.options = o = self.options_class.parse(hidden_size=hidden_size, **options)
        self.name = o.mechanism
        self.value_dim = o.expansion * o.hidden_size
        self.norm = make_norm(o.norm_type, o.hidden_size, o.norm_eps)
        self.in_proj = nn.Linear(o.hidden_size, 2 * self.value_dim + o.query_key_dim, bias=o.use_bias)
        self.out_proj = nn.Linear(self.value_dim, o.hidden_size, bias=o.use_bias)
        self.gamma = nn.Parameter(torch.empty(self.copies, o.query_key_dim))
        offset = nn.Parameter(torch.empty(self.copies, o.query_key_dim)) if o.offset_bias else None
        self.beta: nn.Parameter | None = offset
        self.make_bias()
        self.reset_parameters()

    def make_bias(self) -> None:
        """The parameters of `rel_pos_bias`."""
        if self.options.rel_pos_bias == "toeplitz":
            self.rel_bias = nn.Parameter(torch.empty(2 * self.bias_reach - 1))
        elif self.options.rel_pos_bias == "rope":
            self.rel_bias_a = nn.Parameter(torch.empty(self.options.query_key_dim))
            self.rel_bias_b = nn.Parameter(torch.empty(self.options.query_key_dim))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Projections, gamma and biases by distance from N(0, std^2); offsets 0, norm weights 1."""
        for layer in (self.in_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.options.norm_type != "rms_norm":
            nn.init.ones_(self.norm.weight)
        self.reset_own(std)

    def reset_own(self, std: float = 0.02) -> None:
        """The parameters that are not in a sub-module."""
        if self.beta is not None:
            nn.init.zeros_(self.beta)
        for name, parameter in self.named_parameters(recurse=False):
            if name != "beta":
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        past_state: UnitState | None = None,
        use_cache: bool = False,
        rotation: Rotation | None = None,
    ) -> Any:
        """One unit.

        Args:
            hidden_states: (B,N,d).
            key_padding_mask: bool (B,N), True for a real token.
            is_causal: a token sees itself and earlier ones only. A state implies it.
            past_state: what an earlier call returned; None at the start.
            use_cache: also return the state after these tokens.
            rotation: `rotation_of` these positions, where the caller has it already.

        Returns:
            (B,N,d), or with `use_cache` that and the state.

        Raises:
            InvalidInput: shapes do not fit.
            Unsupported: a call the unit does not define.
        """
        arguments = hidden_states, key_padding_mask, is_causal, past_state, use_cache
        return self._run(self.gated, *arguments, rotation)

    def naive(self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The definition: the same result by an N x N table of weights."""

        def gated(
            copies: Tensor, value: Tensor, gate: Tensor, real: Tensor | None, causal: bool, *rest: Any
        ) -> tuple[Tensor, None]:
            return gate * (self.weights(copies, real, causal) @ value).to(gate.dtype), None

        return self._run(gated, hidden_states, key_padding_mask, is_causal, None, False, None)

    def gated(
        self, copies: Tensor, value: Tensor, gate: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, Any]:
        """`attend`, times the gate (B,N,e)."""
        out, state = self.attend(copies, value, real, causal, past, use_cache)
        out = out.to(gate.dtype)
        return out.mul_(gate) if in_place(out) and in_place(gate) else gate * out, state

    def attend(
        self, copies: Tensor, value: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, Any]:
        """The efficient form: (B,N,e) and the new state. Copies (R,B,N,s), value (B,N,e), real (B,N)."""
        raise NotImplementedError

    def weights(self, copies: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        """(B,N,N) weights by their definition."""
        raise NotImplementedError

    def check(self, tokens: int, real: Tensor | None, causal: bool, past: Any, use_cache: bool) -> None:
        """Raise `Unsupported` for a call that the unit does not define."""

    def _run(
        self,
        gated: Any,
        x: Tensor,
        real: Tensor | None,
        causal: bool,
        past: Any,
        use_cache: bool,
        rotation: Rotation | None,
    ) -> Any:
        past = past if past is not None and past.tokens else None
        causal = causal or use_cache or past is not None
        self._check(x, real, causal, past, use_cache)
        gate, value, z, shifted = self._project(x, real, past)
        first = past.tokens if past is not None else 0
        exact = torch.promote_types(value.dtype, torch.float32)
        # scores over hundreds of tokens vanish in half precision, and sums over tokens lose their last terms
        with torch.autocast(x.device.type, enabled=False):
            copies = self._copies(z.to(exact), first, rotation)
            out, state = gated(copies, value.to(exact), gate, real, causal, past, use_cache)
        out = linear(self.out_proj, out)
        y = x + functional.dropout(out, self.options.hidden_dropout, self.training)
        if self.options.norm_position == "post":
            y = self.norm(y)
        if not use_cache:
            return y
        state.shifted = shifted
        return y, state

    def _check(self, x: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool) -> None:
        if x.dim() != 3 or x.shape[-1] != self.options.hidden_size or not x.shape[1]:
            raise InvalidInput(
                f"{self.name}: hidden_states must be (B,N,{self.options.hidden_size}) with N of at least 1; "
                f"got {tuple(x.shape)}."
            )
        if real is not None and (real.dtype != torch.bool or real.shape != x.shape[:2]):
            raise InvalidInput(
                f"{self.name}: key_padding_mask must be bool (B,N) = {tuple(x.shape[:2])}, True for a real token; "
                f"got {real.dtype} {tuple(real.shape)}."
            )
        if real is not None and past is not None:
            raise Unsupported(
                self.name,
                f"key_padding_mask with a past_state of {past.tokens} tokens: new tokens must all be real",
                "Give the mask with the first call, and none later",
            )
        self.check(x.shape[1], real, causal, past, use_cache)

    def _project(self, x: Tensor, real: Tensor | None, past: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gate, value and z of the normalised input, and what the next token gets from the last one."""
        o = self.options
        x = self.norm(x) if o.norm_position == "pre" else x
        last = None
        if o.token_shift:
            moving, staying = x.split((o.hidden_size - o.hidden_size // 2, o.hidden_size // 2), dim=-1)
            if real is not None:
                moving = moving.masked_fill(~real[..., None], 0)
            earlier = torch.zeros_like(moving[:, :1]) if past is None else past.shifted
            last = moving[:, -1:]
            x = torch.cat((torch.cat((earlier, moving[:, :-1]), dim=1), staying), dim=-1)
        hidden = linear(self.in_proj, x)
        hidden = functional.silu(hidden, inplace=in_place(hidden))
        gate, value, z = hidden.split((self.value_dim, self.value_dim, o.query_key_dim), dim=-1)
        return gate, value, z, last

    def _copies(self, z: Tensor, first: int, rotation: Rotation | None) -> Tensor:
        """(R,B,N,s): the scaled, shifted and rotated copies of z, from position `first` on."""
        o, gamma = self.options, self.gamma.to(z.dtype)[:, None, None]
        if self.beta is None:
            copies = z * gamma
        else:
            copies = torch.addcmul(self.beta.to(z.dtype)[:, None, None], z, gamma)
        if not o.use_rope:
            return copies
        return rotate(copies, self.rotation(first, z.shape[1], z) if rotation is None else rotation)

    def rotation(self, first: int, count: int, like: Tensor) -> Rotation:
        """`rotation_of` positions under the unit's options."""
        o = self.options
        return rotation_of(first, count, o.rope_dim or o.query_key_dim, o.rope_theta, like)

    def attention_weights(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The weights of a call, for looking at: (B,1,N,N), or those within chunks, (B,G,C,C)."""
        self._check(hidden_states, key_padding_mask, is_causal, None, False)
        _, _, z, _ = self._project(hidden_states, key_padding_mask, None)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        with torch.autocast(z.device.type, enabled=False):
            return self.shown_weights(self._copies(z, 0, None), key_padding_mask, is_causal)

    def shown_weights(self, copies: Tensor, real: Tensor | None, causal: bool) -> Tensor:
        """What `attention_weights` returns."""
        return self.weights(copies, real, causal)[:, None]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.changed().items())
