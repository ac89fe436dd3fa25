"""RA: randomized attention, the unbiased sampler that softmax attention is the mean of.

Paper: Zheng, Wang, Kong, "Linear Complexity Randomized Self-attention Mechanism", ICML 2022, section on RA.

    softmax attention of q_n = E[f(w)],   f(w) = softmax_m(s <w, k_m> - s |k_m|^2 / 2) . v
    w = q_n + k_m* + sigma e,   m* ~ softmax_m(s <q_n, k_m>),   e standard normal,   sigma = s**-0.5

Shapes: query (B,H,N,D), key and value (B,H,M,D), noise (B,H,S,N,D), key_index (B,H,S,N).
When to use: to study what random-feature attention approximates, and as a noisy softmax for training.
When not: for speed. It is quadratic like softmax and costs more. Unbiased only with the sampled proposal and exact
noise; the deterministic evaluation rule is an approximation of softmax, not softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import masked_softmax
from hf_attn.kernels import flash
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

NOISE_STD = ("exact", "unit", "none")


@dataclass(frozen=True)
class RandomizedOptions(Options):
    """Options of `randomized`.

    Attributes:
        ra_proposal: centre of the proposal: q_n plus a key drawn from softmax ("sample"), the mean key under softmax
            ("expected"), or the mean of the visible keys ("uniform").
        ra_samples: S, samples averaged.
        noise_std: factor of the noise: s ** -0.5 ("exact", the only unbiased one), 1 ("unit") or 0 ("none").
        noise_at_eval: draw in evaluation as in training; otherwise evaluation is deterministic.
    """

    mechanism: ClassVar[str] = "randomized"

    ra_proposal: str = "sample"
    ra_samples: int = 1
    noise_std: str = "exact"
    noise_at_eval: bool = False

    def check(self) -> None:
        self.one_of("ra_proposal", "sample", "expected", "uniform")
        self.integer("ra_samples", 1)
        self.one_of("noise_std", *NOISE_STD)
        self.boolean("noise_at_eval")


class RandomizedAttention(AttentionModule):
    """Randomized attention: softmax attention as a mean over directions drawn from each query's own distribution."""

    name = "randomized"
    options_class = RandomizedOptions
    extra_inputs = ("noise", "key_index")

    @classmethod
    def describe(cls, options: RandomizedOptions) -> Capabilities:
        index, noise = options.ra_proposal == "sample", options.noise_std != "none"
        drawn = " and ".join(what for what, is_drawn in (("key index", index), ("noise", noise)) if is_drawn)
        when = "each forward" if options.noise_at_eval else "each training forward"
        return Capabilities(
            causal=True,
            cross=True,
            packed=True,
            dense_mask=True,
            decode="full cache",
            random=f"{drawn}: {when}" if drawn else "",
            attention_weights=True,
            derived=("causal", "cross-attention", "dense masks"),
            pays_from="none: quadratic, and more work than softmax",
        )

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call, options = super()._call(query, key, value, **arguments), self.options
        noise, index = call.extra.get("noise"), call.extra.get("key_index")
        shape = (call.batch, self.num_heads, options.ra_samples, call.queries)
        if noise is not None and noise.shape != (*shape, self.head_dim):
            raise InvalidInput(
                f"randomized: noise must be (B,H,S,N,D) = {(*shape, self.head_dim)}; got {tuple(noise.shape)}."
            )
        if index is None:
            return call
        if options.ra_proposal != "sample":
            raise Unsupported(
                self.name,
                f"key_index was given and ra_proposal={options.ra_proposal!r} draws no index",
                "Leave key_index out, or use ra_proposal='sample'",
            )
        if index.shape != shape or index.dtype != torch.int64:
            raise InvalidInput(
                f"randomized: key_index must be int64 (B,H,S,N) = {shape}; got {index.dtype} {tuple(index.shape)}."
            )
        if not torch.compiler.is_compiling() and index.numel() and not 0 <= index.min() <= index.max() < call.keys:
            raise InvalidInput(
                f"randomized: key_index must be from 0 to {call.keys - 1}, the last of M={call.keys} keys."
            )
        return call

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        visible, bias = _mask(call)
        scale = call.scale
        logits = scale * (call.query @ call.key.transpose(-1, -2)) + bias
        pi = masked_softmax(logits, visible)
        directions = self.directions(call, expected=pi @ call.key)
        features = scale * torch.einsum("bhsnd,bhmd->bhsnm", directions, call.key)
        features = features - scale / 2 * call.key.square().sum(-1)[:, :, None, None] + bias[:, :, None]
        return masked_softmax(features, None if visible is None else visible[:, :, None]).mean(dim=2)

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def directions(self, call: Call, expected: Tensor | None = None) -> Tensor:
        """w (B,H,S,N,D), drawn, given, or the deterministic one; `expected` is the mean key under pi, if known."""
        options, noise, index = self.options, call.extra.get("noise"), call.extra.get("key_index")
        draws = self.training or options.noise_at_eval or noise is not None or index is not None
        samples = options.ra_samples if draws else 1
        query = call.query[:, :, None]
        if options.ra_proposal == "uniform":
            centre = query + _mean_visible_key(call)[:, :, None]
        elif draws and options.ra_proposal == "sample":
            index = self.sample_index(call) if index is None else index
            drawn = call.key.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, self.head_dim))
            centre = query + drawn.unflatten(2, index.shape[2:])
        else:
            centre = query + (_attention(call, call.query, call.key) if expected is None else expected)[:, :, None]
        if not draws or options.noise_std == "none":
            return centre.expand(-1, -1, samples, -1, -1)
        if noise is None:
            dtype = torch.promote_types(call.query.dtype, torch.float32)
            noise = torch.randn(*query.shape[:2], samples, *query.shape[3:], dtype=dtype, device=query.device)
        factor = call.scale**-0.5 if options.noise_std == "exact" else 1.0
        return centre + factor * noise.to(query.dtype)

    @torch.no_grad()
    def sample_index(self, call: Call) -> Tensor:
        """(B,H,S,N) indices of keys drawn from softmax: the largest of logits plus Gumbel noise is such a draw."""
        visible, bias = _mask(call)
        logits = call.scale * (call.query @ call.key.transpose(-1, -2)) + bias
        indices = []
        for _ in range(self.options.ra_samples):
            noisy = logits - torch.empty_like(logits).exponential_().log()
            noisy = noisy if visible is None else noisy.masked_fill(~visible, float("-inf"))
            indices.append(noisy.argmax(dim=-1))
        return torch.stack(indices, dim=2)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """Every sample is softmax attention of w over the keys [k, -|k|^2 / 2], with [w, 1] as the query.

        The bias as one more coordinate: kernels then need no mask for it, and give its gradient without an N x M tensor.
        """
        directions = self.directions(call)
        samples, dim = directions.shape[2], self.head_dim
        width = -(dim + 1) // 8 * -8  # kernels want multiples of 8
        key = torch.cat((call.key, call.key.square().sum(-1, keepdim=True) / -2), dim=-1)
        key = functional.pad(key, (0, width - dim - 1))
        value = functional.pad(call.value, (0, width - dim))
        query = functional.pad(functional.pad(directions, (0, 1), value=1.0), (0, width - dim - 1)).flatten(1, 2)
        if samples > 1:
            key, value = key.repeat_interleave(samples, dim=1), value.repeat_interleave(samples, dim=1)
            mask = call.attention_mask
            if mask is not None and mask.shape[1] > 1:
                call = replace(call, attention_mask=mask.repeat_interleave(samples, dim=1))
        out = _attention(call, query, value, key).unflatten(1, (-1, samples))
        return out.mean(dim=2)[..., :dim]


def _attention(call: Call, query: Tensor, value: Tensor, key: Tensor | None = None) -> Tensor:
    """Softmax attention under the masks of `call`."""
    return flash.attention(
        query,
        call.key if key is None else key,
        value,
        key_padding_mask=call.key_padding_mask,
        attention_mask=call.attention_mask,
        is_causal=call.is_causal,
        scaling=call.scale,
    )


def _mask(call: Call) -> tuple[Tensor | None, Tensor]:
    """The visible pairs, None for all, and the additive bias of every pair, zero where it hides one."""
    mask = call.attention_mask
    zero = call.query.new_zeros(1, 1, 1, 1)
    if mask is None or mask.dtype == torch.bool:
        return call.visible(), zero
    shown = mask > torch.finfo(mask.dtype).min / 2
    return replace(call, attention_mask=shown).visible(), mask.to(zero.dtype).masked_fill(~shown, 0)


def _mean_visible_key(call: Call) -> Tensor:
    """(B,H,N|1,D) mean of the keys each query sees; zero where it sees none."""
    visible = None if call.attention_mask is None else _mask(call)[0]
    if visible is not None:
        share = visible.to(call.key.dtype)
        return (share @ call.key) / share.sum(-1, keepdim=True).clamp(min=1)
    key, count = call.key, call.key.new_ones(1, 1, call.keys, 1)
    if call.key_padding_mask is not None:
        real = call.key_padding_mask[:, None, :, None]
        key, count = torch.where(real, key, 0), real.to(key.dtype)
    if call.is_causal:
        seen = slice(call.keys - call.queries, None)
        total, count = key.cumsum(dim=2)[:, :, seen], count.cumsum(dim=2)[:, :, seen]
    else:
        total, count = key.sum(dim=2, keepdim=True), count.sum(dim=2, keepdim=True)
    return total / count.clamp(min=1)


register(
    Mechanism(
        name="randomized",
        title="Randomized attention (RA)",
        paper="Zheng, Wang, Kong, ICML 2022 (arXiv 2204.04667)",
        equation="out_n = softmax_m(s <w_n, k_m> - s |k_m|^2 / 2) . v,  w_n = q_n + k_m* + s**-0.5 e,  "
        "m* ~ softmax_m(s <q_n, k_m>)",
        module_class=RandomizedAttention,
        example={},
    )
)
