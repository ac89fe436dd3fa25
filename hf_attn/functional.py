"""Maths shared by mechanisms: random directions, log feature maps, linear attention in log space.

Everything that weighs tokens by features works with the *logarithms* of the features, log phi (B,H,N,F). Sums of
exponentials are taken relative to a running maximum, so long vectors neither overflow nor underflow, and no epsilon
or clamp enters the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_attn.module import State

_NEGATIVE_INFINITY = float("-inf")


def draw_(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into a parameter or buffer, unless transformers has just loaded it from a checkpoint."""
    if not getattr(tensor, "_is_hf_initialized", False):
        with torch.no_grad():
            tensor.copy_(values)


def random_directions(
    heads: int, features: int, dim: int, orthogonal: bool, device: torch.device | str | None = None
) -> Tensor:
    """(H,F,D) standard normal rows, float32; `orthogonal` makes the rows orthogonal in blocks of D.

    An orthogonal row keeps the length of an independent D-dimensional normal vector, so that one row alone is still
    standard normal (Performers, Choromanski et al. 2021, section 3.2).
    """
    if torch.device(device or "cpu").type == "meta" or not orthogonal:
        return torch.randn(heads, features, dim, device=device)
    blocks = -(-features // dim)
    square, triangle = torch.linalg.qr(torch.randn(heads, blocks, dim, dim, device=device))
    # QR is unique up to signs, and LAPACK's favour some directions; with a positive diagonal of R, Q favours none
    square = square * torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[..., None, :]
    rows = square.transpose(-1, -2).reshape(heads, blocks * dim, dim)[:, :features]
    return rows * torch.randn(heads, features, dim, device=device).norm(dim=-1, keepdim=True)


def log_positive(x: Tensor, directions: Tensor, scale: float) -> Tensor:
    """log of the positive random features: sqrt(s) <z, x> - s |x|^2 / 2. x (B,H,N,D), directions (H,F,D)."""
    return (x @ (scale**0.5 * directions).transpose(-1, -2)).sub_(scale / 2 * x.square().sum(-1, keepdim=True))


def log_elu1(x: Tensor) -> Tensor:
    """log(elu(x) + 1), which is x itself where x < 0."""
    return torch.where(x < 0, x, torch.log1p(x.clamp(min=0)))


def linear_attention(
    log_query: Tensor, log_key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
) -> Tensor:
    """sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>, in O((N + M) F D).

    Args:
        log_query: (B,H,N,F) log phi(q). log_key: (B,H,M,F) log phi(k). value: (B,H,M,D).
        key_padding_mask: bool (B,M).
    """
    if key_padding_mask is not None:
        log_key = log_key.masked_fill(~key_padding_mask[:, None, :, None], _NEGATIVE_INFINITY)
    reference = finite(log_key.detach().amax(dim=2, keepdim=True))
    weight = (log_key - reference).exp()
    mass = weight.sum(dim=2, keepdim=True)
    mass = torch.where(mass > 0, mass, 1)
    per_feature = (weight.transpose(-1, -2) @ value) / mass.transpose(-1, -2)
    return (log_query + reference + mass.log()).softmax(dim=-1) @ per_feature


def linear_weights(log_query: Tensor, log_key: Tensor, visible: Tensor | None) -> Tensor:
    """(B,H,N,M) normalised weights of linear attention, from its definition; rows without a visible key are zero."""
    logits = torch.logsumexp(log_query[:, :, :, None] + log_key[:, :, None], dim=-1)
    return masked_softmax(logits, visible)


def masked_softmax(logits: Tensor, visible: Tensor | None) -> Tensor:
    """softmax over the visible keys of each row; zeros in rows without one."""
    if visible is None:
        return logits.softmax(dim=-1)
    weights = logits.masked_fill(~visible, _NEGATIVE_INFINITY).softmax(dim=-1)
    return torch.where(visible.any(dim=-1, keepdim=True), weights, 0)


class SummaryProjection(nn.Module):
    """Linear, and LayerNorm unless `norm` is False, of a summary of tokens (...,D); computed in the summary's dtype."""

    def __init__(self, dim: int, norm: bool = True):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if norm else None

    def reset_parameters(self) -> None:
        """Weights truncated normal with deviation 0.02, biases 0, LayerNorm 1 and 0."""
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
            nn.init.zeros_(self.norm.bias)

    def forward(self, summary: Tensor) -> Tensor:
        dtype = summary.dtype
        out = nn.functional.linear(summary, self.proj.weight.to(dtype), self.proj.bias.to(dtype))
        if self.norm is None:
            return out
        weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        return nn.functional.layer_norm(out, self.norm.normalized_shape, weight, bias, self.norm.eps)


def log_kernel(log_query: Tensor, log_key: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """log <phi(q), phi(k)> (B,H,N,N) up to a constant per query, and the mask; one matrix product.

    The features of a token are taken relative to its largest. Pairs whose features hardly overlap would underflow;
    those get the exact sum, or, in compiled code, where shapes may not depend on data, weight zero.
    """
    query_top, key_top = log_query.detach().amax(dim=-1, keepdim=True), log_key.detach().amax(dim=-1, keepdim=True)
    product = (log_query - query_top).exp() @ (log_key - key_top).exp().transpose(-1, -2)
    small = product < torch.finfo(product.dtype).tiny ** 0.8
    logits = torch.where(small, 1, product).log() + key_top.transpose(-1, -2)
    if torch.compiler.is_compiling():
        return logits, ~small if visible is None else visible & ~small
    wanted = small if visible is None else small & visible
    if wanted.any():
        b, h, n, m = wanted.nonzero(as_tuple=True)
        exact = torch.logsumexp(log_query[b, h, n] - query_top[b, h, n] + log_key[b, h, m], dim=-1)
        logits = logits.index_put((b, h, n, m), exact)
    return logits, visible


def recomputed(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)`; the backward pass computes it again instead of keeping its tables."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


CHUNK = 64
"""Tokens a chunk of the causal form: within it the work is quadratic, between chunks it is a recurrence."""
NARROW = 40.0
"""Spread of the log weights in a chunk up to which one reference serves all of it: exp(-40) is far from underflow."""
SPAN = 32 * CHUNK
"""Tokens handled at once; longer sequences carry a state from span to span, so memory stays linear."""


def causal_linear_attention(
    log_query: Tensor,
    log_key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Causal linear attention in chunks, after `state`; returns the result and the state after the last token.

    Query n sees the state and keys m <= n + (M - N). The state of a layer is, for every feature, the largest log
    weight so far (B,H,F), the sum of the weights relative to it (B,H,F), and the weighted sum of values (B,H,F,D).

    Args:
        log_query: (B,H,N,F). log_key: (B,H,M,F), M >= N. value: (B,H,M,D). key_padding_mask: bool (B,M).
    """
    if key_padding_mask is not None:
        log_key = log_key.masked_fill(~key_padding_mask[:, None, :, None], _NEGATIVE_INFINITY)
    state = empty_state(log_key, value) if state is None else state
    queries, earlier = log_query.shape[2], log_key.shape[2] - log_query.shape[2]
    if earlier:
        state = absorb(log_key[:, :, :earlier], value[:, :, :earlier], state)
        log_key, value = log_key[:, :, earlier:], value[:, :, earlier:]
    outputs = []
    for start in range(0, queries, SPAN):
        part = slice(start, start + SPAN)
        out, state = _causal_span(log_query[:, :, part], log_key[:, :, part], value[:, :, part], state)
        outputs.append(out)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state


def empty_state(log_key: Tensor, value: Tensor) -> State:
    """The state before the first token."""
    batch, heads, _, features = log_key.shape
    return {
        "reference": log_key.new_full((batch, heads, features), _NEGATIVE_INFINITY),
        "mass": log_key.new_zeros(batch, heads, features),
        "value": value.new_zeros(batch, heads, features, value.shape[-1]),
    }


def absorb(log_key: Tensor, value: Tensor, state: State) -> State:
    """`state` after keys that every later query sees."""
    reference = torch.maximum(state["reference"], log_key.detach().amax(dim=2))
    weight = (log_key - finite(reference)[:, :, None]).exp()
    decay = (state["reference"] - finite(reference)).exp()
    return {
        "reference": reference,
        "mass": state["mass"] * decay + weight.sum(dim=2),
        "value": state["value"] * decay[..., None] + weight.transpose(-1, -2) @ value,
    }


def _causal_span(log_query: Tensor, log_key: Tensor, value: Tensor, state: State) -> tuple[Tensor, State]:
    """Causal attention of one span: chunks see the state before them, and their own past at once or by halving.

    Halving is for keys of very different weight. A query and a key of the same chunk meet at the level where halving puts them into sibling blocks; there the query
    sees the whole key block, so weights relative to that block's maximum can only lose what is negligible. A single
    reference for the chunk could be set by a key that the query does not see, and would flush what it does see.
    """
    tokens = log_query.shape[2]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())
    reference = torch.maximum(state["reference"], log_key.detach().amax(dim=2))
    earlier = torch.where(state["reference"] == _NEGATIVE_INFINITY, reference, state["reference"])
    if _narrow(log_key, reference, earlier):
        return _narrow_span(log_query, log_key, value, state, reference, size)
    pad = -tokens % size
    if pad:
        log_query = torch.nn.functional.pad(log_query, (0, 0, 0, pad))
        log_key = torch.nn.functional.pad(log_key, (0, 0, 0, pad), value=_NEGATIVE_INFINITY)
        value = torch.nn.functional.pad(value, (0, 0, 0, pad))
    chunks = (tokens + pad) // size
    log_query, log_key, value = (x.unflatten(2, (chunks, size)) for x in (log_query, log_key, value))

    largest = log_key.detach().amax(dim=3)
    weight = (log_key - finite(largest)[:, :, :, None]).exp()
    before, after = _states_between_chunks(largest, weight, value, state)
    if _narrow(log_key, largest):
        return _narrow_chunks(log_query, largest, weight, value, before).flatten(2, 3)[:, :, :tokens], after
    parts = [seen_block(log_query, before)]
    half = size // 2
    while half:
        q, k, v = (x.unflatten(3, (-1, 2, half)) for x in (log_query, log_key, value))
        top, mass, total = _seen_keys(q[:, :, :, :, 1], k[:, :, :, :, 0], v[:, :, :, :, 0])
        first = torch.zeros_like(top)
        parts.append(
            (
                torch.stack((first + _NEGATIVE_INFINITY, top), dim=4).flatten(3, 5),
                torch.stack((first, mass), dim=4).flatten(3, 5),
                torch.stack((torch.zeros_like(total), total), dim=4).flatten(3, 5),
            )
        )
        half //= 2
    own = log_query + log_key
    top = own.detach().amax(dim=-1)
    mass = (own - finite(top)[..., None]).exp().sum(-1)
    parts.append((top, mass, mass[..., None] * value))
    return merge_parts(parts).flatten(2, 3)[:, :, :tokens], after


def _narrow(log_key: Tensor, largest: Tensor, earlier: Tensor | None = None) -> bool:
    """Whether one reference serves all keys (...,T,F): none, and nothing `earlier` (...,F), is far below `largest` (...,F).

    Whatever a query sees of its best feature then weighs at least exp(-NARROW), far above all that may underflow.
    Compiled code cannot look at the data, and goes without the answer.
    """
    if torch.compiler.is_compiling() or (earlier is not None and not bool((largest - earlier < NARROW).all())):
        return False
    if bool((largest - log_key.detach().amin(dim=-2) < NARROW).all()):
        return True
    # once more without the hidden keys
    smallest = torch.where(log_key == _NEGATIVE_INFINITY, float("inf"), log_key.detach()).amin(dim=-2)
    return bool((largest - smallest < NARROW).all())


def _narrow_span(
    log_query: Tensor, log_key: Tensor, value: Tensor, state: State, reference: Tensor, size: int
) -> tuple[Tensor, State]:
    """Causal attention of a span whose keys, and the state, are all weighed relative to one `reference` (B,H,F).

    The states before the chunks (of `size` tokens) are then running sums.
    """
    batch, heads, tokens, features = log_query.shape
    shift = finite(reference)
    # in place where nothing of it is needed again: new memory is what costs time here
    logits = log_query + shift[:, :, None]
    query = logits.sub_(logits.detach().amax(dim=-1, keepdim=True)).exp_()
    weight = (log_key - shift[:, :, None]).exp_()
    pad = -tokens % size
    if pad:
        query, weight, value = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (query, weight, value))
    chunks = (tokens + pad) // size
    query, weight, value = (x.reshape(batch * heads * chunks, size, -1) for x in (query, weight, value))
    carried = (state["reference"] - shift).exp()
    mass, total = state["mass"] * carried, state["value"] * carried[..., None]
    sums = torch.bmm(weight.transpose(1, 2), value).view(batch * heads, chunks, -1)
    masses = weight.sum(dim=1).view(batch * heads, chunks, features)
    # running sums as products: cumsum over a strided dimension is several times slower on a CPU
    earlier = masses.new_ones(chunks, chunks).tril(-1).expand(batch * heads, -1, -1)
    mass_before = torch.baddbmm(mass.view(batch * heads, 1, features), earlier, masses)
    total_before = torch.baddbmm(total.view(batch * heads, 1, -1), earlier, sums)
    scores = torch.bmm(query, weight.transpose(1, 2)).tril_()
    seen = scores.sum(dim=-1, keepdim=True) + torch.bmm(query, mass_before.view(-1, features, 1))
    out = torch.baddbmm(torch.bmm(scores, value), query, total_before.view(-1, features, value.shape[2]))
    out = out.div_(torch.where(seen > 0, seen, 1))
    after = {
        "reference": reference,
        "mass": mass + masses.sum(dim=1).view_as(mass),
        "value": total + sums.sum(dim=1).view_as(total),
    }
    return out.view(batch, heads, tokens + pad, -1)[:, :, :tokens], after


def _narrow_chunks(log_query: Tensor, largest: Tensor, weight: Tensor, value: Tensor, before: State) -> Tensor:
    """Causal attention in chunks whose keys are weighed relative to their largest: (B,H,C,T,D)."""
    reference = finite(torch.maximum(before["reference"], largest))
    logits = log_query + reference[:, :, :, None]
    query = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    past, present = (before["reference"] - reference).exp(), (largest - reference).exp()
    scores = ((query * present[:, :, :, None]) @ weight.transpose(-1, -2)).tril()
    mass = scores.sum(dim=-1) + (query @ (past * before["mass"])[..., None]).squeeze(-1)
    total = scores @ value + query @ (past[..., None] * before["value"])
    return total / torch.where(mass > 0, mass, 1)[..., None]


def _states_between_chunks(largest: Tensor, weight: Tensor, value: Tensor, state: State) -> tuple[State, State]:
    """The states before each chunk (a chunk dimension after the heads), and the one after the last.

    `weight` (B,H,C,T,F) is that of the keys relative to the `largest` (B,H,C,F) of their chunk.
    """
    largest = torch.cat((state["reference"][:, :, None], largest), dim=2)
    mass = torch.cat((state["mass"][:, :, None], weight.sum(dim=3)), dim=2)
    total = torch.cat((state["value"][:, :, None], weight.transpose(-1, -2) @ value), dim=2)

    reference = largest.cummax(dim=2).values
    # factor[f, i, j]: what chunk j's sums count for in the state after chunk i
    factor = (largest[:, :, None] - finite(reference)[:, :, :, None]).permute(0, 1, 4, 2, 3)
    factor = factor.masked_fill(
        torch.ones(factor.shape[-2:], dtype=torch.bool, device=factor.device).triu(1), _NEGATIVE_INFINITY
    ).exp()
    mass = (factor @ mass.permute(0, 1, 3, 2)[..., None])[..., 0].permute(0, 1, 3, 2)
    total = (factor @ total.permute(0, 1, 3, 2, 4)).permute(0, 1, 3, 2, 4)
    states = {"reference": reference, "mass": mass, "value": total}
    return {k: t[:, :, :-1] for k, t in states.items()}, {k: t[:, :, -1] for k, t in states.items()}


def seen_block(log_query: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """What queries (...,T,F) gather from a state they see whole: log maximum, mass and weighted values relative to it."""
    reference = state["reference"][..., None, :]
    logits = log_query + finite(reference)
    top = logits.detach().amax(dim=-1)
    weight = (logits - top[..., None]).exp()
    top = torch.where(reference.amax(dim=-1) == _NEGATIVE_INFINITY, _NEGATIVE_INFINITY, top)
    return top, (weight * state["mass"][..., None, :]).sum(-1), weight @ state["value"]


def _seen_keys(log_query: Tensor, log_key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`seen_block` for a block of keys (...,T,F), without its F x D state."""
    reference = log_key.detach().amax(dim=-2, keepdim=True)
    logits = log_query + finite(reference)
    top = logits.detach().amax(dim=-1)
    scores = (logits - top[..., None]).exp() @ (log_key - finite(reference)).exp().transpose(-1, -2)
    top = torch.where(reference.amax(dim=-1) == _NEGATIVE_INFINITY, _NEGATIVE_INFINITY, top)
    return top, scores.sum(-1), scores @ value


def merge_parts(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Weighted mean over everything the parts saw; zeros where nothing was seen."""
    top = torch.stack([p[0] for p in parts]).amax(dim=0)
    share = [(p[0] - finite(top)).exp() for p in parts]
    mass = torch.stack([s * p[1] for s, p in zip(share, parts, strict=True)]).sum(dim=0)
    total = torch.zeros_like(parts[0][2])
    for s, p in zip(share, parts, strict=True):
        total = total + s[..., None] * p[2]
    return total / torch.where(mass > 0, mass, 1)[..., None]


def finite(reference: Tensor) -> Tensor:
    """A reference to subtract: 0 in place of minus infinity, which stands for "no key yet"."""
    return torch.where(reference == _NEGATIVE_INFINITY, 0, reference)
