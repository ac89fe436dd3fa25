"""Options of `topological`: which mask, its structure, and what of it is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_attn import functional_masks as structural
from hf_attn.options import Options

SEQUENCES = ("none", "toeplitz", "decay", "low_rank")
"""Masks of token sequences of any length; the others have one place for each token."""
CAUSAL = ("none", "toeplitz", "decay", "block_toeplitz")
TABLES = ("toeplitz", "block_toeplitz")
GRAPHS = ("graph_kernel", "heat")
READ_BY = {
    "max_length": ("toeplitz", "low_rank"),
    "rank": ("low_rank",),
    "grid_size": ("block_toeplitz", *GRAPHS),
    "parametrization": (*TABLES, "low_rank"),
    "poly_degree": TABLES,
    **dict.fromkeys(("parent", "edge_lengths"), ("tree",)),
    **dict.fromkeys(("edges", "num_nodes"), GRAPHS),
    **dict.fromkeys(("walk_length", "walk_discount", "walk_stop", "walk_norm", "walk_sampling"), ("graph_kernel",)),
    **dict.fromkeys(("num_walks", "seed"), ("graph_kernel",)),
}
"""Which mask types read an option; elsewhere it would silently do nothing."""


@dataclass(frozen=True)
class TopologicalOptions(Options):
    """Options of `topological`.

    Attributes:
        mask_type: "none", "toeplitz" (sequence), "block_toeplitz" (grid), "decay", "low_rank",
            "tree", "graph_kernel", "heat".
        feature_map: "relu" (with floors), "elu", or "favor" (positive random features).
        num_features: F of "favor"; None = D.
        eps: floor of the relu features, and of their weights under "none" and the Toeplitz masks.
        parametrization: Toeplitz entries as "abs_table", "exp_table", or "exp_poly" of the distance; factors of
            "low_rank" as one of the first two.
        poly_degree: degree of "exp_poly".
        max_length: longest sequence of the 1-D table and of the factors.
        rank: low_rank: P, columns of the factors.
        grid_size: (rows, columns) of "block_toeplitz", and of the grid graph of "heat" and "graph_kernel".
        parent: tree: parent of each node, an earlier node, or -1 for a root.
        edge_lengths: tree: length of the edge to the parent; None = all 1.
        edges: undirected graph of "heat" and "graph_kernel"; None = the 4-neighbour graph of grid_size.
        num_nodes: nodes of the graph given by edges.
        walk_length: graph_kernel: nodes of a walk, the start counted.
        walk_discount: graph_kernel: factor for each step.
        walk_stop: graph_kernel: probability of stopping before a step.
        walk_norm: power of the norm that rows of walk features are divided by; 1 makes the kernel a cosine.
        walk_sampling: "exact" expectation or "sampled" walks.
        num_walks: walks from each node, for "sampled".
        seed: of the sampled walks.
        fft_min_length: keys below which the dense form is used; the same numbers.
    """

    mechanism: ClassVar[str] = "topological"

    mask_type: str = "toeplitz"
    feature_map: str = "relu"
    num_features: int | None = None
    eps: float = 1e-8
    parametrization: str = "abs_table"
    poly_degree: int = 2
    max_length: int = 512
    rank: int = 4
    grid_size: tuple[int, int] | list[int] | None = None
    parent: list[int] | None = None
    edge_lengths: list[float] | None = None
    edges: list[tuple[int, int]] | None = None
    num_nodes: int | None = None
    walk_length: int = 4
    walk_discount: float = 1.0
    walk_stop: float = 0.0
    walk_norm: float = 1.0
    walk_sampling: str = "exact"
    num_walks: int = 100
    seed: int = 0
    fft_min_length: int = 512

    def check(self) -> None:
        self.one_of("mask_type", *SEQUENCES, "block_toeplitz", "tree", *GRAPHS)
        self.one_of("feature_map", "relu", "elu", "favor")
        self.one_of("parametrization", "abs_table", "exp_table", "exp_poly")
        self.one_of("walk_sampling", "exact", "sampled")
        for option in ("poly_degree", "max_length", "rank", "walk_length", "num_walks"):
            self.integer(option, 1)
        for option in ("seed", "fft_min_length"):
            self.integer(option, 0)
        for option in ("walk_discount", "walk_norm"):
            self.number(option, 0)
        self.number("walk_stop", 0, 1)
        self.number("eps", 1e-15, 1)
        for option, kinds in READ_BY.items():
            if option in self.changed() and self.mask_type not in kinds:
                rule = f"belongs to mask_type {' or '.join(map(repr, kinds))}, and mask_type={self.mask_type!r}"
                raise self.refuse(option, rule, f"Leave {option} out.")
        if self.mask_type == "low_rank" and self.parametrization == "exp_poly":
            rule = "is of a distance, and mask_type='low_rank' has none"
            raise self.refuse("parametrization", rule, "Use 'abs_table' or 'exp_table'.")
        if self.num_features is not None:
            self.integer("num_features", 1)
            if self.feature_map != "favor":
                raise self.refuse("num_features", f"belongs to feature_map 'favor', not {self.feature_map!r}")
        self.check_structure()

    def check_structure(self) -> None:
        grid, parent, lengths, edges = self.grid_size, self.parent, self.edge_lengths, self.edges
        if grid is not None and not (_numbers(grid, int, 1) and len(grid) == 2):
            raise self.refuse("grid_size", "must be two integers of at least 1, (rows, columns)")
        if grid is None and self.mask_type == "block_toeplitz":
            raise self.refuse("grid_size", "must be given with mask_type='block_toeplitz'", "Set (rows, columns).")
        if self.mask_type == "tree":
            if not (_numbers(parent, int, -1) and all(up < node for node, up in enumerate(parent))):
                raise self.refuse("parent", "must be a list in topological order: parent[i] < i, -1 for a root")
            if lengths is not None and not (_numbers(lengths, (int, float)) and len(lengths) == len(parent)):
                raise self.refuse("edge_lengths", f"must be {len(parent)} numbers, one for each node")
            if not _numbers(self.lengths, (int, float), 0):
                raise self.refuse("edge_lengths", "must not be negative")
        if (edges is None) != (self.num_nodes is None):
            raise self.refuse("num_nodes", f"and edges={edges!r} must be given together")
        if edges is not None:
            self.integer("num_nodes", 1)
            if not isinstance(edges, (list, tuple)) or not all(
                _numbers(edge, int, 0) and len(edge) == 2 and edge[0] != edge[1] and max(edge) < self.num_nodes
                for edge in edges
            ):
                raise self.refuse("edges", f"must be pairs of different nodes from 0 to {self.num_nodes - 1}")
            if grid is not None and math.prod(grid) != self.num_nodes:
                raise self.refuse("grid_size", f"does not have the num_nodes={self.num_nodes} nodes of the graph")
        elif self.mask_type in GRAPHS and grid is None:
            rule = f"must be given with mask_type={self.mask_type!r}"
            raise self.refuse("edges", rule, "Set edges and num_nodes, or grid_size for the graph of a grid.")

    @property
    def lengths(self) -> list[float]:
        """Tree: length of the edge from each node to its parent, 0 for roots."""
        lengths = [1.0] * len(self.parent) if self.edge_lengths is None else self.edge_lengths
        return [0.0 if up < 0 else length for up, length in zip(self.parent, lengths)]

    @property
    def size(self) -> int | None:
        """Tokens of the structure; None for sequences of any length."""
        if self.mask_type in SEQUENCES:
            return None
        if self.mask_type == "tree":
            return len(self.parent)
        return self.num_nodes or math.prod(self.grid_size)

    def graph(self) -> tuple[tuple[tuple[int, int], ...], int]:
        """Edges and number of nodes."""
        edges = structural.grid_edges(*self.grid_size) if self.edges is None else self.edges
        return tuple((i, j) for i, j in edges), self.size


def _numbers(values: Any, kind: Any, minimum: float = -math.inf) -> bool:
    """Whether `values` is a list of finite numbers of at least `minimum`."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(x, kind) and not isinstance(x, bool) and minimum <= x and abs(x) < math.inf for x in values
    )
