"""Normalized Information Payload: how much information an attention graph carries in the worst case, for its cost.

Paper: Wang, Lee, Guo, Yin, Zhou, Huang, Qiu, "What Dense Graph Do You Need for Self-Attention?", ICML 2022; the
definition follows a third party's notes on the paper, and agrees with a number stored in its official code.

    I(a, b) = sum over the shortest paths from a to b of the product of 1 / degree over their nodes except a
    NIP     = min of I over the pairs as far apart as the diameter  /  (mean degree * diameter)

A graph is an (n,n) bool matrix; entry (i, j) is True where node i reads node j. Named graphs, and the pattern of any
mechanism, are made by `graph_of`; `score` rates one, `compare` several of equal degree, `draw` draws them. numpy is
enough for all but the patterns of mechanisms.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_attn.errors import InvalidInput, InvalidOption, near

Graph = NDArray[np.bool_]

EDGES_AT_ONCE = 1 << 22
"""Edges that one step of the search follows at most, over all sources that it handles together."""
HEADS, DIM = 2, 8
"""Of the example module whose pattern is taken."""
CELLS = 128
"""Rows and columns of a drawn matrix; larger graphs are drawn in cells of several nodes."""


class Score(TypedDict):
    """The numbers of one graph, as `nip` gives them."""

    mean_degree: float
    diameter: int
    ip: float
    """Information payload: the least information over the pairs at the distance of the diameter."""
    cc: float
    """Computation cost: mean degree * diameter."""
    nip: float
    relative: float
    """nip over that of the complete graph of the same size."""


def nip(adjacency: ArrayLike, self_loops: bool = False, pairs: str = "all") -> Score:
    """The Normalized Information Payload of a graph. O(n * edges) work, O(n^2) memory.

    Args:
        adjacency: (n,n), entry (i, j) true where node i reads node j. The diagonal is ignored.
        self_loops: count in each degree that a node reads itself. The number stored in the official code is that of
            False.
        pairs: "all" refuses graphs in which a node cannot reach another; "reachable" leaves such pairs out (an
            extension, for causal patterns).

    Returns:
        Values below the smallest float are 0.

    Raises:
        InvalidInput: not a square matrix, a single node, or a graph that is not connected.
    """
    graph = np.array(adjacency, dtype=bool)
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1]:
        raise InvalidInput(f"nip: adjacency must be a square matrix (n,n); got shape {graph.shape}.")
    if pairs not in ("all", "reachable"):
        raise InvalidOption(f"nip: pairs={pairs!r} must be 'all' or 'reachable'{near(pairs, ('all', 'reachable'))}.")
    nodes = len(graph)
    if nodes < 2:
        raise InvalidInput(f"nip: a graph of {nodes} nodes has no pairs. Pass at least 2 nodes.")
    np.fill_diagonal(graph, self_loops)
    distance, information = _shortest(graph)
    cut = int((distance < 0).sum())
    if cut and pairs == "all":
        raise InvalidInput(
            f"nip: the graph is not connected: {cut} of {nodes * (nodes - 1)} ordered pairs have no path. "
            "Pass a connected graph, or pairs='reachable' to leave those pairs out."
        )
    diameter = int(distance.max())
    if not diameter:
        raise InvalidInput("nip: no node reads another one. Pass a graph with edges.")
    payload = float(information[distance == diameter].min())
    mean_degree = float(graph.sum() / nodes)
    cost = mean_degree * diameter
    everything = nodes if self_loops else nodes - 1
    return Score(
        mean_degree=mean_degree,
        diameter=diameter,
        ip=payload,
        cc=cost,
        nip=payload / cost,
        relative=payload / cost / (1 / everything / everything),
    )


def _shortest(graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distances (n,n) from row to column, -1 where there is no path, and the information that arrives.

    Breadth first from many sources at once; a step follows every edge out of the nodes reached last.
    """
    nodes = len(graph)
    _, reader = graph.T.nonzero()
    readers = graph.sum(axis=0)
    start = readers.cumsum() - readers
    share = 1 / np.maximum(graph.sum(axis=1), 1)
    distance = np.full((nodes, nodes), -1)
    information = np.zeros((nodes, nodes))
    group = max(1, EDGES_AT_ONCE // max(1, len(reader)))
    for sources in np.split(np.arange(nodes), range(group, nodes, group)):
        source, node, steps, left = sources, sources, 0, len(sources) * (nodes - 1)
        distance[source, node], information[source, node] = 0, 1
        while len(node) and left:
            steps += 1
            fan = readers[node]
            parent = np.repeat(np.arange(len(node)), fan)
            target = reader[np.arange(len(parent)) - (fan.cumsum() - fan - start[node])[parent]]
            new = distance[source[parent], target] < 0
            parent, target = parent[new], target[new]
            arriving = information[source[parent], node[parent]] * share[target]
            np.add.at(information, (source[parent], target), arriving)
            source, node = np.divmod(np.unique(source[parent] * nodes + target), nodes)
            distance[source, node] = steps
            left -= len(node)
    return distance, information


# -- graphs ------------------------------------------------------------------------------------------------------------


def _apart(nodes: int) -> NDArray[np.int64]:
    place = np.arange(nodes)
    return abs(place[:, None] - place)


def _hub(nodes: int, g: int) -> Graph:
    first = np.arange(nodes) < g
    return first[:, None] | first


def _window(nodes: int, w: int) -> Graph:
    return _apart(nodes) <= w // 2


def _longformer(nodes: int, w: int, g: int) -> Graph:
    return _window(nodes, w) | _hub(nodes, g)


def _bigbird(nodes: int, w: int, g: int, r: int, seed: int = 0) -> Graph:
    graph, draw = _longformer(nodes, w, g), random.Random(seed)
    for node in range(g, nodes):
        others = draw.sample(range(nodes), r)
        graph[node, others] = graph[others, node] = True
    return graph


def _hypercube(nodes: int, block_size: int = 1, num_global_tokens: int = 0) -> Graph:
    place = (np.arange(nodes) - num_global_tokens) // block_size
    gray = place ^ (place >> 1)
    different = gray[:, None] ^ gray
    return (different & (different - 1) == 0) | _hub(nodes, num_global_tokens)


def _random(nodes: int, degree: int, seed: int = 0) -> Graph:
    """Random closed tours through all nodes, two edges a node each, and a random pairing where the degree is odd."""
    graph, draw = np.eye(nodes, dtype=bool), random.Random(seed)
    for tour in range(-(-degree // 2)):
        order = draw.sample(range(nodes), nodes)
        pairs = list(zip(order, order[1:] + order[:1], strict=True))
        for i, j in pairs[::2] if 2 * tour + 1 == degree else pairs:
            graph[i, j] = graph[j, i] = True
    return graph


GRAPHS: dict[str, Callable[..., Graph]] = {
    "complete": lambda nodes: np.ones((nodes, nodes), dtype=bool),
    "path": lambda nodes: _apart(nodes) <= 1,
    "ring": lambda nodes: np.isin(_apart(nodes), (0, 1, nodes - 1)),
    "star": lambda nodes: _hub(nodes, 1) | np.eye(nodes, dtype=bool),
    "window": _window,
    "longformer": _longformer,
    "bigbird": _bigbird,
    "hypercube": _hypercube,
    "random": _random,
}


def named_graph(name: str, n: int, **arguments: int) -> Graph:
    """An (n,n) bool matrix with a true diagonal.

    Args:
        name: "complete", "path", "ring", "star" (node 0 is the hub), "window" (`w` nodes wide), "longformer" (a window
            of `w` and `g` nodes that read and are read by all), "bigbird" (that, and `r` random edges a node, drawn
            from `seed`), "hypercube" (`block_size` 1 and `num_global_tokens` 0 unless given), "random" (about `degree`
            edges a node, drawn from `seed`; connected from degree 2 on).
        n: number of nodes.
        arguments: integers, as above.

    Raises:
        InvalidOption: an unknown name, or arguments that the graph does not take or cannot have.
    """
    if name not in GRAPHS:
        raise InvalidOption(f"no graph is called {name!r}{near(name, GRAPHS)}. Graphs: {', '.join(GRAPHS)}.")
    signature = inspect.signature(GRAPHS[name])
    try:
        signature.bind(n, **arguments)
    except TypeError as error:
        takes = ", ".join([*signature.parameters][1:]) or "none"
        raise InvalidOption(f"graph {name!r}: {error}. Its arguments: {takes}.") from error
    for argument, value in (("n", n), *arguments.items()):
        least = 1 if argument in ("n", "w", "block_size") else 0
        most = n if argument in ("g", "r", "num_global_tokens") else None
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            upper = "" if most is None else f" and at most n={n}"
            raise InvalidOption(f"graph {name!r}: {argument}={value!r} must be an integer of at least {least}{upper}.")
    return GRAPHS[name](n, **arguments)


def mechanism_graph(name: str, n: int, is_causal: bool = False, **options: Any) -> Graph:
    """The pattern of a registered mechanism over n tokens: where any head of a small module gives a weight.

    The module is a fresh one and the inputs are random, the same every time. Quadratic: it asks for the attention
    weights. A mechanism that needs a grid gets its `grid_size`, or the most square grid.

    Args:
        name: a registered mechanism with attention weights.
        n: number of tokens.
        is_causal: causal order.
        options: of the mechanism; those that a model's configuration would fill in need not be given.

    Raises:
        UnknownMechanism, InvalidOption: the name or the options. Unsupported: no attention weights, or not causal.
    """
    import torch

    from hf_attn import build, get_mechanism
    from hf_attn.capabilities import Host

    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidOption(f"pattern of {name}: n={n!r} must be an integer of at least 1.")
    module_class = get_mechanism(name).module_class
    host = Host("pattern", HEADS, DIM, layer_idx=0, causal=is_causal, max_length=n)
    filled = {**options, **module_class.host_defaults(host, options)}
    parsed = module_class.options_class.parse(**filled)
    call: dict[str, Any] = {}
    if not module_class.describe(parsed).sequence:
        rows = max(r for r in range(1, int(n**0.5) + 1) if n % r == 0)
        call["grid"] = getattr(parsed, "grid_size", None) or (rows, n // rows)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        module = build(name, num_heads=HEADS, head_dim=DIM, **filled).double().eval()
        if module.capabilities.needs_layer_input:
            call["layer_input"] = torch.randn(1, n, HEADS * DIM, dtype=torch.float64)
        tokens = torch.randn(3, 1, HEADS, n, DIM, dtype=torch.float64)
        weights = module.attention_weights(*tokens, is_causal=is_causal, **call)
    return (weights != 0).any(dim=1)[0].numpy()


def graph_of(pattern: str, n: int, is_causal: bool = False, **arguments: Any) -> Graph:
    """The named graph `pattern` or, if there is none of this name, the pattern of the mechanism `pattern`.

    `hypercube` is both: here it is the named graph, in which every token is a place. With block_size=16 it is the
    pattern of the mechanism's default options.
    """
    if pattern in GRAPHS:
        graph = named_graph(pattern, n, **arguments)
        return np.tril(graph) if is_causal else graph
    from hf_attn import list_mechanisms

    if pattern not in list_mechanisms():
        known = [*GRAPHS, *(name for name in list_mechanisms() if name not in GRAPHS)]
        raise InvalidOption(f"no pattern is called {pattern!r}{near(pattern, known)}. Patterns: {', '.join(known)}.")
    return mechanism_graph(pattern, n, is_causal, **arguments)


# -- scores and the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One graph with its score: a row of the table, a panel of the picture."""

    pattern: str
    arguments: dict[str, Any]
    graph: Graph
    score: Score

    @property
    def label(self) -> str:
        """The pattern and its arguments, such as `longformer w=9 g=1`."""
        return " ".join([self.pattern, *(f"{name}={value}" for name, value in self.arguments.items())])

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON and tables."""
        return {"pattern": self.pattern, "arguments": self.arguments, "nodes": len(self.graph), **self.score}


def score(pattern: str, n: int, is_causal: bool = False, self_loops: bool = False, **arguments: Any) -> Row:
    """Rate one pattern over n tokens: a named graph, or the pattern of a mechanism under the options `arguments`.

    In causal order no information flows backwards; pairs that cannot reach each other are left out.

    Raises:
        InvalidOption, InvalidInput, Unsupported: as `graph_of` and `nip`.
    """
    graph = graph_of(pattern, n, is_causal, **arguments)
    causal = {"is_causal": True} if is_causal else {}
    return Row(pattern, {**arguments, **causal}, graph, nip(graph, self_loops, "reachable" if is_causal else "all"))


def compare(n: int, self_loops: bool = False) -> list[Row]:
    """The table: the hypercube of n tokens, other graphs of about its mean degree, and ring and complete graph.

    Longformer (one global node) gets the window, BigBird (window 3, one global node) the number of random edges, and
    the random graph the degree that come nearest to the hypercube's mean degree. Seeds are 0.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 4:
        raise InvalidOption(f"compare: n={n!r} must be an integer of at least 4.")
    target = int(named_graph("hypercube", n).sum())
    degree = round(target / n)

    def nearest(name: str, argument: str, values: range, **others: int) -> int:
        return min(
            values, key=lambda value: abs(int(named_graph(name, n, **{argument: value}, **others).sum()) - target)
        )

    graphs: list[tuple[str, dict[str, Any]]] = [
        ("hypercube", {}),
        ("longformer", {"w": nearest("longformer", "w", range(1, degree + 3, 2), g=1), "g": 1}),
        ("bigbird", {"w": 3, "g": 1, "r": nearest("bigbird", "r", range(degree), w=3, g=1)}),
        ("random", {"degree": nearest("random", "degree", range(2, degree + 2))}),
        ("ring", {}),
        ("complete", {}),
    ]
    return [score(name, n, self_loops=self_loops, **arguments) for name, arguments in graphs]


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| graph | nodes | mean degree | diameter | payload | cost | NIP | relative |", "|---|" + 7 * "---:|"]
    for row in rows:
        s = row.score
        lines.append(
            f"| {row.label} | {len(row.graph)} | {s['mean_degree']:.4g} | {s['diameter']} | {s['ip']:.4g} | "
            f"{s['cc']:.4g} | {s['nip']:.4g} | {s['relative']:.4g} |"
        )
    return "\n".join(lines)


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw graphs and their relative NIP as a PNG; equal rows draw equal files.

    One panel a graph, the node that reads down and the node that is read across; the last panel compares the scores.

    Raises:
        InvalidInput: there are no rows, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise InvalidInput("draw: there are no rows to draw.")
    columns = min(4, len(rows) + 1)
    lines = -(-(len(rows) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.5 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows):
        _matrix(axes, row)
    _bars(panels[len(rows)], rows)
    for axes in panels[len(rows) + 1 :]:
        axes.set_axis_off()
    figure.suptitle("Normalized Information Payload: worst-case information for its cost", fontsize="large")
    try:
        # without the version of matplotlib in it, equal pictures are equal files
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error


def _matrix(axes: Any, row: Row) -> None:
    nodes = len(row.graph)
    side = -(-nodes // CELLS)
    starts = range(0, nodes, side)
    cells = np.logical_or.reduceat(np.logical_or.reduceat(row.graph, starts, axis=0), starts, axis=1)
    axes.imshow(cells, cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest", extent=(0, nodes, nodes, 0))
    degree, diameter = row.score["mean_degree"], row.score["diameter"]
    axes.set_title(f"{row.label}\nmean degree {degree:.3g}, diameter {diameter}", fontsize="medium")
    axes.set_xlabel("is read" if side == 1 else f"is read (cells of {side} x {side})", fontsize="small")
    axes.set_ylabel("reads", fontsize="small")
    axes.set_xticks((0, nodes))
    axes.set_yticks((0, nodes))
    axes.tick_params(labelsize="small")


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    shown = [row.score["relative"] for row in rows]
    axes.barh(range(len(rows)), shown, color="tab:blue", height=0.6)
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.35 * max(*shown, 1))
    for place, value in enumerate(shown):
        axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_yticks(range(len(rows)), [row.pattern for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_title("relative NIP\n(complete graph: 1)", fontsize="medium")
    axes.tick_params(axis="x", labelsize="small")
