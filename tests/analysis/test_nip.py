"""Normalized Information Payload: the golden values, closed forms, named graphs, patterns of mechanisms, table and picture."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_attn.analysis.nip import GRAPHS, compare, draw, graph_of, mechanism_graph, named_graph, nip, score, table
from hf_attn.errors import InvalidInput, InvalidOption, UnknownMechanism, Unsupported

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nip.json").read_text())
VALUES = ("mean_degree", "diameter", "ip", "cc", "nip", "relative")


def graph_of_case(case):
    if case["graph"] != "explicit":
        return named_graph(case["graph"], case["n"], **case["arguments"])
    graph = np.eye(case["n"], dtype=bool)
    for i, j in case["edges"]:
        graph[i, j] = graph[j, i] = True
    return graph


def name(case):
    return f"{case['graph']} {case['n']} {case.get('self_loops', '')}"


def shortest_by_powers(graph, self_loops):
    """The score from powers of the step matrix, as the definition has it."""
    graph = np.array(graph, dtype=bool)
    np.fill_diagonal(graph, self_loops)
    nodes, degree = len(graph), graph.sum(axis=1)
    step = graph / degree[:, None]
    np.fill_diagonal(step, 0)
    power, distance, information = np.eye(nodes), np.where(np.eye(nodes), 0, -1), np.zeros((nodes, nodes))
    for k in range(1, nodes):
        power = step @ power
        new = (power > 0) & (distance < 0)
        distance[new], information[new] = k, power[new]
    payload = information[distance == distance.max()].min()
    return payload, payload / (degree.mean() * distance.max())


# -- golden values and closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=name)
def test_golden(case):
    found = nip(graph_of_case(case), self_loops=case["self_loops"])
    assert set(found) == set(VALUES)
    for value in VALUES:
        assert found[value] == pytest.approx(case[value], rel=1e-10, abs=0), value


@pytest.mark.parametrize("case", GOLDEN["errors"], ids=name)
def test_golden_errors(case):
    with pytest.raises(ValueError, match="nip"):
        nip(graph_of_case(case))


def test_06_the_number_stored_in_the_official_code():
    """4.85 beside the hypercube of 2048 tokens; with self loops the definition would give 1.7."""
    found = score("hypercube", 2048).score
    assert found["relative"] == pytest.approx(GOLDEN["hypercube_2048_relative"], rel=1e-10)
    assert found["relative"] == pytest.approx(4.85, abs=0.006)
    assert found["relative"] == pytest.approx(2047**2 * math.factorial(11) / 11**13, rel=1e-12)


EXACT = {"rel": 1e-12, "abs": 0}


@pytest.mark.parametrize("n", [2, 3, 50, 300])
def test_06_complete(n):
    found, loops = nip(named_graph("complete", n)), nip(named_graph("complete", n), self_loops=True)
    assert found["relative"] == 1 and loops["relative"] == 1
    assert found["nip"] == pytest.approx((n - 1) ** -2, **EXACT) and loops["nip"] == pytest.approx(n**-2, **EXACT)


@pytest.mark.parametrize("n", [3, 9, 64])
def test_06_star(n):
    found = nip(named_graph("star", n))
    assert found["mean_degree"] == pytest.approx(2 * (n - 1) / n, **EXACT) and found["diameter"] == 2
    assert found["ip"] == pytest.approx(1 / (n - 1), **EXACT)
    assert found["nip"] == pytest.approx(n / (4 * (n - 1) ** 2), **EXACT)
    assert found["relative"] == pytest.approx(n / 4, **EXACT)


@pytest.mark.parametrize("d", range(1, 10))
def test_06_hypercube(d):
    found, loops = nip(named_graph("hypercube", 2**d)), nip(named_graph("hypercube", 2**d), self_loops=True)
    assert (found["mean_degree"], found["diameter"]) == (d, d)
    assert found["nip"] == pytest.approx(math.factorial(d) / d ** (d + 2), **EXACT)
    assert loops["nip"] == pytest.approx(math.factorial(d) / ((d + 1) ** (d + 1) * d), **EXACT)


@pytest.mark.parametrize("n", [4, 10, 64, 400])
def test_06_even_ring(n):
    found = nip(named_graph("ring", n))
    assert (found["mean_degree"], found["diameter"]) == (2, n // 2)
    assert found["ip"] == pytest.approx(2.0 ** (1 - n // 2), **EXACT)
    assert found["nip"] == pytest.approx(found["ip"] / n, **EXACT)


@pytest.mark.parametrize("n", [3, 8, 100])
def test_06_path(n):
    """The last node has one neighbour, so that it passes everything on."""
    assert nip(named_graph("path", n))["ip"] == pytest.approx(2.0 ** -(n - 2), **EXACT)


@pytest.mark.parametrize("w,g", [(3, 1), (5, 2), (7, 3)])
def test_06_longformer(w, g):
    n = 80
    found = nip(named_graph("longformer", n, w=w, g=g))
    assert found["diameter"] == 2
    assert found["ip"] == pytest.approx(g / ((n - 1) * (w - 1 + g)), **EXACT)


TABLE_64 = {
    ("complete",): (63, 1, 1.5873e-2, 2.519526e-4, 1, 1),
    ("hypercube",): (6, 6, 1.5432e-2, 4.286694e-4, 1.7014, 0.59684),
    ("star",): (1.96875, 2, 1.5873e-2, 4.031242e-3, 16, 5.3895),
    ("longformer", ("w", 3), ("g", 1)): (3.9063, 2, 5.291005e-3, 6.772487e-4, 2.688, 1.6306),
    ("bigbird", ("w", 3), ("g", 1), ("r", 2)): (7.5312, 2, 1.587302e-3, 1.053810e-4, 0.41826, 0.34099),
}
TABLE_128 = {
    ("complete",): 1,
    ("hypercube",): 2.0144,
    ("star",): 32,
    ("longformer", ("w", 3), ("g", 1)): 5.354,
    ("longformer", ("w", 5), ("g", 1)): 2.150,
    ("bigbird", ("w", 3), ("g", 1), ("r", 2)): 0.6814,
    ("bigbird", ("w", 3), ("g", 1), ("r", 4)): 0.3244,
    ("ring",): 1.366e-17,
    ("window", ("w", 3)): 7.52e-37,
}


@pytest.mark.parametrize("key", TABLE_64, ids=str)
def test_06_the_table_of_64(key):
    graph = named_graph(key[0], 64, **dict(key[1:]))
    found = nip(graph)
    values = [found[v] for v in ("mean_degree", "diameter", "ip", "nip", "relative")]
    assert [*values, nip(graph, self_loops=True)["relative"]] == pytest.approx(TABLE_64[key], rel=1e-4)


@pytest.mark.parametrize("key", TABLE_128, ids=str)
def test_06_the_table_of_128(key):
    assert nip(named_graph(key[0], 128, **dict(key[1:])))["relative"] == pytest.approx(TABLE_128[key], rel=4e-4)


def test_06_names_of_the_nodes_do_not_matter():
    for graph in (named_graph("hypercube", 50), named_graph("bigbird", 40, w=3, g=1, r=2)):
        order = random.Random(1).sample(range(len(graph)), len(graph))
        assert list(nip(graph[order][:, order]).values()) == pytest.approx(list(nip(graph).values()), rel=1e-12)


def test_07_the_hypercube_gains_with_its_size():
    relative = [score("hypercube", 2**d).score["relative"] for d in range(6, 12)]
    assert relative == sorted(relative)
    assert relative == pytest.approx([1.70139, 2.01445, 2.44175, 3.01952, 3.79764, 4.84492], rel=1e-5)
    # 2^12 nodes by the closed form, which the others have been shown to follow
    assert relative[-1] < 4095**2 * math.factorial(12) / 12**14 == pytest.approx(6.25615, rel=1e-5)


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_equals_powers_of_the_step_matrix(seed, self_loops, monkeypatch):
    monkeypatch.setattr(sys.modules["hf_attn.analysis.nip"], "EDGES_AT_ONCE", 300)  # several groups of sources
    generator = np.random.default_rng(seed)
    graph = named_graph("ring", 31) | (generator.random((31, 31)) < 0.03 * seed)  # not symmetric
    found = nip(graph, self_loops)
    assert (found["ip"], found["nip"]) == pytest.approx(shortest_by_powers(graph, self_loops), rel=1e-12)


def test_the_direction_of_reading_matters():
    """Two nodes read the hub, and the hub reads nobody but them: information arrives at the reader."""
    chain = np.zeros((3, 3), dtype=bool)
    chain[1, 0] = chain[2, 1] = True
    found = nip(chain, pairs="reachable")
    assert (found["diameter"], found["ip"]) == (2, 1)
    chain[2, 0] = True
    assert nip(chain, pairs="reachable")["ip"] == 0.5


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_the_arguments_are_not_changed():
    graph = named_graph("ring", 6)
    nip(graph)
    assert graph.diagonal().all()
    assert nip(graph.tolist()) == nip(graph) == nip(graph.astype(float))


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("pattern", GRAPHS)
def test_named_graphs_are_symmetric_with_a_diagonal(pattern, n):
    arguments = {
        "window": {"w": 3},
        "longformer": {"w": 3, "g": 1},
        "bigbird": {"w": 3, "g": 1, "r": 1},
        "random": {"degree": 3},
    }
    graph = named_graph(pattern, n, **arguments.get(pattern, {}))
    assert graph.dtype == bool and graph.shape == (n, n)
    assert graph.diagonal().all() and (graph == graph.T).all()


@pytest.mark.parametrize("degree", [2, 3, 6, 7])
@pytest.mark.parametrize("n", [20, 21, 200])
def test_the_random_graph_is_connected_and_has_its_degree(n, degree):
    graphs = [named_graph("random", n, degree=degree, seed=seed) for seed in (0, 0, 1)]
    assert (graphs[0] == graphs[1]).all() and (graphs[0] != graphs[2]).any()
    degrees = graphs[0].sum(axis=1) - 1
    assert degrees.max() <= degree + n % 2 and degrees.mean() > degree * (0.75 if n < 100 else 0.95)
    nip(graphs[0])


@pytest.mark.parametrize(
    "pattern,n,arguments,match",
    [
        ("hypercub", 8, {}, r"'hypercub' \(did you mean 'hypercube'\?\)"),
        ("ring", 0, {}, "n=0 must be an integer of at least 1"),
        ("ring", 2.0, {}, "n=2.0"),
        ("window", 8, {}, "missing a required argument: 'w'"),
        ("window", 8, {"w": 0}, "w=0"),
        ("ring", 8, {"w": 3}, "'w'.*arguments: none"),
        ("longformer", 8, {"w": 3, "g": 9}, "g=9 must be an integer of at least 0 and at most n=8"),
        ("bigbird", 8, {"w": 3, "g": 1, "r": True}, "r=True"),
        ("hypercube", 8, {"block_size": 0}, "block_size=0"),
    ],
)
def test_refused_graphs(pattern, n, arguments, match):
    with pytest.raises(InvalidOption, match=match):
        named_graph(pattern, n, **arguments)


@pytest.mark.parametrize(
    "graph,arguments,error,match",
    [
        (np.ones((3, 4)), {}, InvalidInput, r"square.*\(3, 4\)"),
        (np.ones(4), {}, InvalidInput, "square"),
        (np.ones((1, 1)), {}, InvalidInput, "1 nodes"),
        (np.eye(4), {}, InvalidInput, "12 of 12 ordered pairs.*pairs='reachable'"),
        (np.eye(4), {"pairs": "reachable"}, InvalidInput, "no node reads"),
        (np.tril(np.ones((4, 4))), {}, InvalidInput, "6 of 12 ordered pairs"),
        (np.ones((4, 4)), {"pairs": "al"}, InvalidOption, "did you mean 'all'"),
    ],
)
def test_refused_matrices(graph, arguments, error, match):
    with pytest.raises(error, match=match):
        nip(graph, **arguments)


# -- patterns of mechanisms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 37])
@pytest.mark.parametrize("options", [{"block_size": 1}, {"block_size": 4, "num_global_tokens": 2}], ids=str)
def test_the_pattern_of_the_mechanism_is_the_named_graph(options, n):
    graph = named_graph("hypercube", n, **options)
    assert (mechanism_graph("hypercube", n, **options) == graph).all()
    assert (
        mechanism_graph("hypercube", n, is_causal=True, **options) == graph_of("hypercube", n, True, **options)
    ).all()


def test_patterns_of_other_mechanisms():
    assert graph_of("softmax", 10).all() and graph_of("rfa", 10).all()
    assert (graph_of("rfa", 10, is_causal=True) == np.tril(np.ones((10, 10)))).all()
    # a grid of 3 x 4, only the ring around each token
    near = graph_of("ripple", 12, ripple_weights="truncated", r_cap=2)
    row, column = np.divmod(np.arange(12), 4)
    assert (near == ((abs(row[:, None] - row) <= 1) & (abs(column[:, None] - column) <= 1))).all()


def test_a_pattern_leaves_the_generator_alone():
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    mechanism_graph("softmax", 5)
    assert torch.equal(torch.rand(1), expected)


def test_refused_patterns():
    with pytest.raises(InvalidOption, match=r"did you mean 'ripple'.*complete.*softmax"):
        graph_of("rippel", 8)
    with pytest.raises(InvalidOption, match="ripple.*'radius'"):
        graph_of("ripple", 9, radius=3)
    with pytest.raises(Unsupported, match="ripple.*causal"):
        graph_of("ripple", 9, is_causal=True)
    with pytest.raises(InvalidOption, match="n=0"):
        mechanism_graph("softmax", 0)
    with pytest.raises(UnknownMechanism):
        mechanism_graph("nothing", 5)


def test_a_causal_score_leaves_backward_pairs_out():
    row = score("complete", 10, is_causal=True)
    assert row.score["diameter"] == 1 and row.score["ip"] == pytest.approx(1 / 9)
    assert row.label == "complete is_causal=True"


# -- table, picture, cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 8, 37, 64, 128])
def test_the_table_compares_equal_degrees(n):
    rows = {row.pattern: row for row in compare(n)}
    assert list(rows) == ["hypercube", "longformer", "bigbird", "random", "ring", "complete"]
    degree = rows["hypercube"].score["mean_degree"]
    for pattern in ("longformer", "bigbird", "random"):
        # a window grows by two neighbours at a time
        assert abs(rows[pattern].score["mean_degree"] - degree) <= 1.1
    assert rows["complete"].score["relative"] == 1
    for row in rows.values():
        assert row.facts() == {"pattern": row.pattern, "arguments": row.arguments, "nodes": n, **nip(row.graph)}
        json.dumps(row.facts())


def test_the_order_of_the_paper_at_128():
    rows = {row.pattern: row.score["relative"] for row in compare(128)}
    assert rows["hypercube"] > rows["complete"] > rows["ring"]
    assert rows["complete"] > score("bigbird", 128, w=3, g=1, r=4).score["relative"]


def test_the_table_as_text():
    lines = table([score("hypercube", 64), score("longformer", 64, w=3, g=1)]).splitlines()
    assert lines[2] == "| hypercube | 64 | 6 | 6 | 0.01543 | 36 | 0.0004287 | 1.701 |"
    assert lines[3].startswith("| longformer w=3 g=1 | 64 | 3.906 | 2 |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_picture_is_the_same_every_time(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "other.png"]
    for path, n in zip(files, (64, 64, 130)):
        draw(compare(n), path)
    pictures = [path.read_bytes() for path in files]
    assert pictures[0] == pictures[1] != pictures[2]
    assert pictures[0].startswith(b"\x89PNG") and b"Software" not in pictures[0] and len(pictures[0]) > 10_000
    draw([score("ring", 2000)], tmp_path / "one.png")
    with pytest.raises(InvalidInput, match="no rows"):
        draw([], tmp_path / "none.png")
    with pytest.raises(InvalidInput, match="missing.*cannot be written|cannot be written.*missing"):
        draw([score("ring", 5)], tmp_path / "missing" / "a.png")


def test_named_graphs_need_neither_torch_nor_pyplot():
    code = (
        "import sys\nfrom hf_attn.analysis.nip import compare, draw\ndraw(compare(16), sys.argv[1])\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, os.devnull], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
