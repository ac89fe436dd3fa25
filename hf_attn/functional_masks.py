"""Structural masks on linear attention: Toeplitz, exponential decay, trees, kernels of graphs.

The lemma behind the products: with kernel weights <phi(q_n), phi(k_m)>, masking costs one product with the mask for
every feature and value column,

    sum_m mask_nm <phi(q_n), phi(k_m)> v_m = sum_f phi_f(q_n) [ mask (phi_f(k) v) ]_n
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_attn.functional import (
    absorb,
    empty_state,
    finite,
    log_kernel,
    masked_softmax,
    merge_parts,
    recomputed,
    seen_block,
)
from hf_attn.module import State

PRODUCT_NUMBERS = 1 << 24
"""Numbers of phi(k) v expanded at once; more features take turns, and the backward pass computes them again."""
TILE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Weights computed at once: on a CPU they should stay in the cache."""
DECAY_CHUNK = 64
"""Tokens a chunk of `decay_attention`: quadratic within, a recurrence between chunks."""
_NEGATIVE_INFINITY = float("-inf")

# -- masks ---------------------------------------------------------------------------------------------------------


class Mask(Protocol):
    """A mask (H,N,M), or (1,N,M) for all heads, that need not be built."""

    def rows(self, rows: slice) -> Tensor:
        """(H,T,M) or (1,T,M): the mask at these queries; causal order is left to the caller."""


class ProductMask(Mask, Protocol):
    """A mask that multiplies without being built."""

    error: Tensor | float
    """Rounding error of `product`, relative to the sum of its input; (H,1,1), or 0 where every entry is exact."""

    def product(self, x: Tensor) -> Tensor:
        """(B,H,M,C) -> (B,H,N,C), the mask times x; causal order is part of the mask."""


@dataclass
class ToeplitzMask:
    """mask_nm = f(n - m), the offset of two places on a grid. Sequences are grids of one column.

    Attributes:
        kernel: (H, rows + rows' - 1, columns + columns' - 1) f, from the first query to the last key on.
        queries: (rows, columns). keys: (rows', columns').
        future: (rows + rows' - 1, columns + columns' - 1) bool, offsets that `product` leaves out; None = none.
    """

    kernel: Tensor
    queries: tuple[int, int]
    keys: tuple[int, int]
    future: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        columns = self.queries[1]
        first, last = rows.start // columns, -(-rows.stop // columns)
        # window (n, m') starts at query n; m' counts the keys from the last
        windows = self.kernel[:, first : last + self.keys[0] - 1].unfold(1, self.keys[0], 1).unfold(2, self.keys[1], 1)
        windows = windows.flatten(3, 4).flatten(1, 2)
        return windows[:, rows.start - first * columns : rows.stop - first * columns].flip(-1)

    @property
    def error(self) -> Tensor:
        return 8 * torch.finfo(torch.float64).eps * self.kernel.detach().amax(dim=(1, 2))[:, None, None]

    def product(self, x: Tensor) -> Tensor:
        """By FFT, in float64: its error is relative to its largest number, and masks span orders of magnitude."""
        kernel = self.kernel if self.future is None else self.kernel.masked_fill(self.future, 0)
        # the columns of a sequence need no FFT
        axes = 1 if self.queries[1] == self.keys[1] == 1 else 2
        queries, keys, kernel = self.queries[:axes], self.keys[:axes], kernel.double().flatten(axes)
        options = {"s": [1 << (n + m - 2).bit_length() for n, m in zip(queries, keys)], "dim": tuple(range(-axes, 0))}
        signal = x.transpose(-1, -2).contiguous().double().unflatten(-1, keys)
        spectrum = torch.fft.rfftn(signal, **options) * torch.fft.rfftn(kernel, **options)[:, None]
        full = torch.fft.irfftn(spectrum, **options)
        for axis, n, m in zip(options["dim"], queries, keys):
            full = full.narrow(axis, m - 1, n)
        return full.flatten(-axes).to(x.dtype).transpose(-1, -2)


@dataclass
class DecayMask:
    """exp(-rate |n - m|); rate (H,), place of the first query, number of keys. Products: `decay_attention`."""

    rate: Tensor
    first: int
    keys: int

    def rows(self, rows: slice) -> Tensor:
        queries = torch.arange(rows.start + self.first, rows.stop + self.first, device=self.rate.device)
        distance = (queries[:, None] - torch.arange(self.keys, device=queries.device)).abs()
        return (-self.rate[:, None, None] * distance).exp()


@dataclass
class FactoredMask:
    """left right^T + diagonal, in the factors' precision, then in `dtype`; left (H,N,P) or (1,N,P), right (M,P) or
    (H,M,P). The diagonal is of square masks."""

    left: Tensor
    right: Tensor
    dtype: torch.dtype
    diagonal: float = 0.0

    def rows(self, rows: slice) -> Tensor:
        mask = self.left[:, rows] @ self.right.mT
        if self.diagonal:
            place = torch.arange(self.right.shape[-2], device=mask.device)
            mask = mask + self.diagonal * (place[rows, None] == place)
        # entries are not negative, but their rounding errors are
        return mask.clamp(min=0).to(self.dtype)


@dataclass
class TreeMask:
    """exp(-rate * distance(n, m)) in a forest, 0 between trees; rate (H,), `tree_path_table`.

    The product: with E[parent(n), n] = e_n = exp(-rate * edge_n) the mask is (1 - E)^-T diag(1 - e^2) (1 - E)^-1,
    where e = 0 at a root: sums over the common ancestors of two nodes telescope to their lowest one. (1 - E)^-1 is the
    product of 1 + E^(2^k), and E^(2^k) leads to the 2^k-th ancestor: about log2(depth) steps up and as many down,
    which add non-negative terms only.
    """

    rate: Tensor
    table: dict[str, Tensor]
    error = 0.0

    def rows(self, rows: slice) -> Tensor:
        distance, joined = self.distances(rows)
        return (-self.rate[:, None, None] * distance.to(self.rate.dtype)).exp() * joined

    def distances(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(T,N) lengths of the paths, by the lowest common ancestor, and whether there is a path."""
        table = self.table
        path = torch.arange(rows.start, rows.stop, device=self.rate.device)[:, None]
        for ancestor in table["ancestor"]:
            path = torch.cat((path, ancestor[path]), dim=1)
        above = torch.zeros(len(path), len(table["edge"]), dtype=torch.bool, device=path.device)
        above = above.scatter(1, path, True)
        common = table["height"].expand_as(above)
        for ancestor in table["ancestor"]:
            common = torch.where(above, common, common[:, ancestor])
            above = above | above[:, ancestor]
        return torch.where(above, table["height"][rows, None] + table["height"] - 2 * common, 0), above

    def product(self, x: Tensor) -> Tensor:
        table, rate = self.table, self.rate[:, None]
        steps = (-rate[..., None] * table["path"].to(x.dtype)).exp() * table["has_ancestor"]
        for ancestor, weight in zip(table["ancestor"], steps.unbind(1)):
            x = x.index_add(2, ancestor, weight[..., None] * x)
        not_above = torch.where(table["has_ancestor"][0], -torch.expm1(-2 * rate * table["edge"].to(x.dtype)), 1)
        x = not_above[..., None] * x
        for ancestor, weight in zip(table["ancestor"], steps.unbind(1)):
            x = x + weight[..., None] * x.index_select(2, ancestor)
        return x


def tree_path_table(parent: Sequence[int], edge_lengths: Sequence[float]) -> dict[str, Tensor]:
    """Index tables of a forest, on the CPU; edge lengths of roots are 0.

    Returns:
        "ancestor" (K,N) the 2^k-th ancestor of a node, or its root; "has_ancestor" (K,N) bool, whether there is one;
        "path" (K,N) length of the way to it; "edge" (N,) length of the edge to the parent; "height" (N,) of the way to
        the root.
    """
    has = torch.tensor(list(parent), device="cpu") >= 0
    ancestor = torch.tensor([node if up < 0 else up for node, up in enumerate(parent)], device="cpu")
    path = torch.tensor(list(edge_lengths), dtype=torch.float64, device="cpu")
    steps = [(ancestor, has, path)]
    while has.any():
        has, path, ancestor = has & has[ancestor], path + path[ancestor], ancestor[ancestor]
        steps.append((ancestor, has, path))
    # the last step leads nowhere: its path is the way to the root
    kept = steps[: max(1, len(steps) - 1)]
    names = ("ancestor", "has_ancestor", "path")
    table = {name: torch.stack(column) for name, column in zip(names, zip(*kept))}
    return {**table, "edge": steps[0][2], "height": path}


@dataclass
class PrefixedMask:
    """`inner` on the tokens after the first `prefix`, which see and are seen by all (in causal order: by all later)."""

    inner: Any
    prefix: int
    is_causal: bool

    @property
    def error(self) -> Tensor | float:
        return self.inner.error

    def rows(self, rows: slice) -> Tensor:
        start, stop = max(rows.start - self.prefix, 0), max(rows.stop - self.prefix, 0)
        # a tile may hold prefix tokens only
        mask = self.inner.rows(slice(start, max(stop, start + 1)))[:, : stop - start]
        return pad(mask, (self.prefix, 0, rows.stop - rows.start - (stop - start), 0), value=1.0)

    def product(self, x: Tensor) -> Tensor:
        head, body = x[:, :, : self.prefix], x[:, :, self.prefix :]
        seen = head.cumsum(dim=2) if self.is_causal else x.sum(dim=2, keepdim=True).expand_as(head)
        return torch.cat((seen, self.inner.product(body) + head.sum(dim=2, keepdim=True)), dim=2)


# -- sums under a mask ---------------------------------------------------------------------------------------------


def masked_sums(query: Tensor, key: Tensor, value: Tensor, mask: ProductMask) -> Tensor:
    """(B,H,N,E) sum_m mask_nm <q_n, k_m> v_m, by one product with the mask for every feature and value column.

    Args: query (B,H,N,F) and key (B,H,M,F) features. value (B,H,M,E).
    """

    def some(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outer = (key[..., :, None] * value[..., None, :]).flatten(-2)
        return (query[..., None] * mask.product(outer).unflatten(-1, (key.shape[-1], -1))).sum(dim=-2)

    group = max(1, PRODUCT_NUMBERS // value.numel())
    if group >= key.shape[-1]:
        return some(query, key, value)
    parts = zip(query.split(group, dim=-1), key.split(group, dim=-1))
    return functools.reduce(torch.add, (recomputed(some, q, k, value) for q, k in parts))


def factored_sums(query: Tensor, key: Tensor, value: Tensor, mask: FactoredMask) -> Tensor:
    """(B,H,N,E) sum_m mask_nm <q_n, k_m> v_m for a mask left right^T: its P columns times the features are features.

    In O((N + M) F P E) time and O((N + M) F P) memory. Shapes as in `masked_sums`; left (H,N,P), right (H,M,P).
    """
    query, key = ((x[..., None] * f[:, :, None]).flatten(-2) for x, f in ((query, mask.left), (key, mask.right)))
    return query @ (key.transpose(-1, -2) @ value)


Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tiled(weigh: Weigh, mask: Mask, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, dense: bool) -> Tensor:
    """(B,H,N,E) `weigh(mask rows, query rows, key, value)` for all rows if `dense`, or for as many at once as pay.

    Unless `dense` the backward pass computes the tiles again, so that memory is linear in the length.
    """
    queries, keys = query.shape[2], key.shape[2]

    def tile(rows: slice) -> Tensor:
        part = mask.rows(rows)
        return weigh(part.tril(rows.start + keys - queries) if is_causal else part, query[:, :, rows], key, value)

    if dense:
        return tile(slice(0, queries))
    size = max(1, tile_numbers(query) // (query.shape[0] * keys))
    starts = range(0, queries, size)
    return torch.cat([recomputed(tile, slice(start, min(start + size, queries))) for start in starts], dim=2)


def weigh_linear(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B,H,T,E) sum_m mask_nm <q_n, k_m> v_m; features query (B,H,T,F), key (B,H,M,F)."""
    # a few heads at a time: weights that leave the cache cost twice the time
    heads = max(1, tile_numbers(query) // (query.shape[0] * query.shape[2] * key.shape[2]))
    masks = mask.split(heads) if mask.shape[0] > 1 else [mask] * -(-query.shape[1] // heads)
    parts = zip(masks, *(x.split(heads, dim=1) for x in (query, key, value)))
    return torch.cat([(m * (q @ k.transpose(-1, -2))) @ v for m, q, k, v in parts], dim=1)


def weigh_exponential(
    mask: Tensor, log_query: Tensor, log_key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> Tensor:
    """(B,H,T,D) weighted mean for exponential features: their weights are compared as logarithms."""
    visible = (mask > 0)[None]
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None]
    logits, shown = log_kernel(log_query, log_key, visible)
    return masked_softmax(logits + torch.where(mask > 0, mask, 1).log(), shown) @ value


def tile_numbers(like: Tensor) -> int:
    return TILE_NUMBERS["cpu" if like.device.type == "cpu" else "cuda"]


# -- exponential decay ---------------------------------------------------------------------------------------------


def decay_attention(
    log_query: Tensor,
    log_key: Tensor,
    value: Tensor,
    is_causal: bool,
    rate: Tensor,
    key_padding_mask: Tensor | None = None,
    state: State | None = None,
) -> Tensor:
    """Linear attention with weights exp(-rate |n - m|) <phi(q_n), phi(k_m)>, in chunks; causal: after `state`.

    Within a chunk the work is quadratic; what lies before it, and without causal order after it, is a state of the
    form of `functional.causal_linear_attention`, taken at the chunk's border.

    Args:
        log_query: (B,H,N,F). log_key: (B,H,M,F), M >= N; M = N without causal order. value: (B,H,M,D). rate: (H,).
        key_padding_mask: bool (B,M). state: what came before the first key, see `decay_state`.
    """
    tokens, earlier = log_query.shape[2], log_key.shape[2] - log_query.shape[2]
    real = key_padding_mask
    if real is None:
        real = torch.ones(log_key.shape[0], log_key.shape[2], dtype=torch.bool, device=log_key.device)
    if earlier:
        state = decay_state(log_key[:, :, :earlier], value[:, :, :earlier], rate, real[:, :earlier], state)
        log_key, value, real = log_key[:, :, earlier:], value[:, :, earlier:], real[:, earlier:]
    size = min(DECAY_CHUNK, 1 << (tokens - 1).bit_length())
    empty = -tokens % size
    # a factor common to all weights of a query cancels
    log_query = log_query - log_query.detach().amax(dim=-1, keepdim=True)
    query, key, value = (pad(x, (0, 0, 0, empty)).unflatten(2, (-1, size)) for x in (log_query, log_key, value))
    real = pad(real, (0, empty)).unflatten(1, (-1, size))[:, None]
    seen = key.masked_fill(~real[..., None], _NEGATIVE_INFINITY)
    place = torch.arange(size, device=key.device)
    rate = rate[:, None, None, None]

    parts = [seen_block(query - rate * (place + 1)[:, None], _states_before(seen, value, rate, state))]
    if not is_causal:
        after = _states_before(seen.flip(2, 3), value.flip(2, 3), rate, None)
        after = {name: tensor.flip(2) for name, tensor in after.items()}
        parts.append(seen_block(query - rate * (size - place)[:, None], after))

    visible = real[..., None, :].expand(-1, key.shape[1], -1, size, -1)
    if is_causal:
        visible = visible & (place[:, None] >= place)
    logits, near = log_kernel(query.flatten(1, 2), key.flatten(1, 2), visible.flatten(1, 2))
    logits = logits.unflatten(1, key.shape[1:3]) - rate * (place[:, None] - place).abs()
    logits = logits.masked_fill(~near.unflatten(1, key.shape[1:3]), _NEGATIVE_INFINITY)
    top = logits.detach().amax(dim=-1)
    weight = (logits - finite(top)[..., None]).exp()
    parts.append((top, weight.sum(dim=-1), weight @ value))
    return merge_parts(parts).flatten(2, 3)[:, :, :tokens]


def decay_state(
    log_key: Tensor, value: Tensor, rate: Tensor, key_padding_mask: Tensor | None, state: State | None
) -> State:
    """The state after these keys: sums with weights exp(-rate * distance to the last key). Shapes as above."""
    if key_padding_mask is not None:
        log_key = log_key.masked_fill(~key_padding_mask[:, None, :, None], _NEGATIVE_INFINITY)
    state = empty_state(log_key, value) if state is None else state
    tokens = log_key.shape[2]
    distance = torch.arange(tokens - 1, -1, -1, device=log_key.device)
    state = {**state, "reference": state["reference"] - tokens * rate[:, None]}
    return absorb(log_key - rate[:, None, None] * distance[:, None], value, state)


def _states_before(log_key: Tensor, value: Tensor, rate: Tensor, state: State | None) -> State:
    """The state before each chunk, taken at its border; log_key (B,H,chunks,size,F), rate (H,1,1,1)."""
    chunks, size = log_key.shape[2:4]
    state = empty_state(log_key[:, :, 0], value[:, :, 0]) if state is None else state
    log_key = log_key - rate * torch.arange(size - 1, -1, -1, device=log_key.device)[:, None]
    largest = log_key.detach().amax(dim=3)
    weight = (log_key - finite(largest)[:, :, :, None]).exp()
    reference = torch.cat((state["reference"][:, :, None], largest), dim=2)[:, :, :chunks]
    mass = torch.cat((state["mass"][:, :, None], weight.sum(dim=3)), dim=2)[:, :, :chunks]
    total = torch.cat((state["value"][:, :, None], weight.transpose(-1, -2) @ value), dim=2)[:, :, :chunks]
    # each state already sums the `span` chunks before it; twice as many after every step
    span = 1
    while span < chunks:
        earlier = pad(reference[:, :, :-span], (0, 0, span, 0), value=_NEGATIVE_INFINITY)
        earlier = earlier - span * size * rate[..., 0]
        top = torch.maximum(reference, earlier).detach()
        own, past = (reference - finite(top)).exp(), (earlier - finite(top)).exp()
        mass = own * mass + past * pad(mass[:, :, :-span], (0, 0, span, 0))
        total = own[..., None] * total + past[..., None] * pad(total[:, :, :-span], (0, 0, 0, 0, span, 0))
        reference, span = top, 2 * span
    return {"reference": reference, "mass": mass, "value": total}


# -- kernels of graphs ---------------------------------------------------------------------------------------------

Edges = Iterable[Sequence[int]]


def grid_edges(rows: int, columns: int) -> list[tuple[int, int]]:
    """Edges of the 4-neighbour graph of a grid, raster order."""
    place = torch.arange(rows * columns, device="cpu").view(rows, columns)
    across = torch.stack((place[:, :-1].flatten(), place[:, 1:].flatten()), dim=1)
    down = torch.stack((place[:-1].flatten(), place[1:].flatten()), dim=1)
    return [(i, j) for i, j in torch.cat((across, down)).tolist()]


def adjacency(edges: Edges, nodes: int) -> Tensor:
    """(n,n) float64 0/1 matrix of an undirected graph, on the CPU."""
    matrix = torch.zeros(nodes, nodes, dtype=torch.float64, device="cpu")
    pairs = torch.tensor(list(edges), dtype=torch.long, device="cpu").reshape(-1, 2)
    matrix[pairs[:, 0], pairs[:, 1]] = 1
    matrix[pairs[:, 1], pairs[:, 0]] = 1
    return matrix


def normalised_adjacency(edges: Edges, nodes: int) -> Tensor:
    """Dg^-1/2 Adj Dg^-1/2; zero rows for nodes without edges."""
    matrix = adjacency(edges, nodes)
    factor = matrix.sum(dim=1).clamp(min=1).rsqrt()
    return factor[:, None] * matrix * factor


@functools.lru_cache(maxsize=4)
def graph_spectrum(edges: tuple[tuple[int, int], ...], nodes: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n,n) of the normalised adjacency, once for all layers of a model."""
    values, vectors = torch.linalg.eigh(normalised_adjacency(edges, nodes))
    return values, vectors


def walk_features(edges: Edges, nodes: int, length: int, factor: float) -> Tensor:
    """(n,n) expected visits: sum_{l < length} (factor Dg^-1 Adj)^l, Dg at least 1."""
    matrix = adjacency(edges, nodes)
    step = (factor * matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)).to_sparse()
    term = total = torch.eye(nodes, dtype=torch.float64, device="cpu")
    for _ in range(length - 1):
        term = step @ term
        total = total + term
    return total


def sampled_walk_features(
    edges: Edges, nodes: int, length: int, discount: float, stop: float, walks: int, seed: int
) -> Tensor:
    """(n,n) mean over `walks` random walks from each node of sum_l discount^l [the walk is at that node at step l].

    A walk has at most `length` nodes, the start counted; it ends before a step with probability `stop`, and at a node
    without edges. Its expectation is `walk_features` with factor = discount * (1 - stop).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    matrix = adjacency(edges, nodes)
    degree = matrix.sum(dim=1).long()
    neighbours = matrix.nonzero()[:, 1]
    first = degree.cumsum(0) - degree
    start = torch.arange(nodes, device="cpu").repeat_interleave(walks)
    place, alive = start, torch.ones(nodes * walks, device="cpu", dtype=torch.float64)
    total = torch.eye(nodes, dtype=torch.float64, device="cpu")
    for position in range(1, length):
        going, choice = torch.rand(2, nodes * walks, generator=generator, device="cpu", dtype=torch.float64)
        alive = alive * (going >= stop) * (degree[place] > 0)
        # a walk that has ended may point at any place: its weight is zero
        step = (first[place] + (choice * degree[place]).long()).clamp(max=max(0, len(neighbours) - 1))
        place = neighbours[step] if len(neighbours) else place
        total.index_put_((start, place), discount**position * alive / walks, accumulate=True)
    return total
