"""Topological masks: the invariants of the specification (numbered as there), the refusals, the forms against each other."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers import BERT, GPT2, VIT
from torch.utils._python_dispatch import TorchDispatchMode

import hf_attn
from hf_attn import functional_masks
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms import topological
from hf_attn.mechanisms.topological import TopologicalAttention, TopologicalOptions

B, H, D = 2, 2, 6
PARENT = [-1, 0, 0, 1, 1, 2, -1, 6, 6, 8, 3, 7]
LENGTHS = [9.0, 0.5, 0.25, 1.0, 0.75, 0.0, 7.0, 0.3, 0.6, 0.2, 0.9, 0.4]
EDGES = [[0, 1], [1, 2], [2, 3], [3, 0], [3, 4], [4, 5], [5, 6], [6, 4], [7, 8], [8, 9], [9, 5], [10, 9]]
MASKS = {
    "none": {"mask_type": "none"},
    "toeplitz": {"mask_type": "toeplitz", "max_length": 16},
    "toeplitz exp_table": {"mask_type": "toeplitz", "max_length": 12, "parametrization": "exp_table"},
    "toeplitz exp_poly": {"mask_type": "toeplitz", "parametrization": "exp_poly", "poly_degree": 3},
    "decay": {"mask_type": "decay"},
    "low rank": {"mask_type": "low_rank", "max_length": 16, "rank": 3},
    "low rank exp_table": {"mask_type": "low_rank", "max_length": 16, "parametrization": "exp_table"},
    "grid": {"mask_type": "block_toeplitz", "grid_size": (3, 4)},
    "grid exp_poly": {"mask_type": "block_toeplitz", "grid_size": [4, 3], "parametrization": "exp_poly"},
    "one row": {"mask_type": "block_toeplitz", "grid_size": (1, 12), "parametrization": "exp_table"},
    "forest": {"mask_type": "tree", "parent": PARENT, "edge_lengths": LENGTHS},
    "chain": {"mask_type": "tree", "parent": list(range(-1, 11))},
    "graph kernel": {"mask_type": "graph_kernel", "edges": EDGES, "num_nodes": 12, "walk_discount": 0.8},
    "walks": {"mask_type": "graph_kernel", "grid_size": (3, 4), "walk_sampling": "sampled", "num_walks": 7},
    "heat": {"mask_type": "heat", "grid_size": (3, 4)},
    "heat of a graph": {"mask_type": "heat", "edges": EDGES, "num_nodes": 12},
}
SEQUENCES = ["none", "toeplitz", "toeplitz exp_table", "toeplitz exp_poly", "decay"]
LOW_RANK = ["low rank", "low rank exp_table"]
GRIDS = ["grid", "grid exp_poly", "one row"]
FEATURES = ["relu", "elu", "favor"]


def module(mask="toeplitz", seed=0, **options):
    """A float64 module whose parameters are drawn, not at their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("topological", num_heads=H, head_dim=D, **{**MASKS[mask], **options}).double()
    built.reset_parameters()  # the start in full precision
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return built


def tokens(n=12, m=None, seed=1, grad=False, batch=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, H, length, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)
        for length in (n, m or n, m or n)
    ]


def padding(n, seed=2):
    """Each sample has padded and real tokens; the last is real."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, -1], mask[:, 1] = True, False
    return mask


def agree(a, b, tolerance=1e-10, rows=None):
    if rows is not None:
        a, b = a.transpose(1, 2)[rows], b.transpose(1, 2)[rows]
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def use(monkeypatch, form, numbers=64):
    far = 0 if form == "structured" else math.inf
    monkeypatch.setattr(topological, "STRUCTURED_FROM", dict.fromkeys(topological.STRUCTURED_FROM, far))
    monkeypatch.setattr(functional_masks, "TILE_NUMBERS", {"cpu": numbers})
    monkeypatch.setattr(functional_masks, "PRODUCT_NUMBERS", numbers)
    monkeypatch.setattr(functional_masks, "DECAY_CHUNK", 4)
    return {"fft_min_length": 512 if form == "dense" else 0}


def gradients(run, built, qkv, rows, **call):
    out = run(*qkv, **call)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    weight = weight if rows is None else weight * rows[:, None, :, None]
    leaves = [*qkv, *built.parameters()]
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return out, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]


def forms_agree(built, n=12, m=None, masked=False, **call):
    """The form the module takes against the definition, values and gradients."""
    qkv, rows = tokens(n, m, grad=True), None
    if masked:
        call["key_padding_mask"] = padding(m or n)
        rows = call["key_padding_mask"][:, -n:] if n <= (m or n) else None
    expected, expected_grads = gradients(built.naive, built, qkv, rows, **call)
    out, grads = gradients(built, built, qkv, rows, **call)
    agree(out, expected, rows=rows)
    assert out.isfinite().all()
    for a, b in zip(grads, expected_grads):
        agree(a, b, 1e-8)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_01_every_form_equals_the_definition(mask, features, form, monkeypatch):
    built = module(mask, feature_map=features, **use(monkeypatch, form))
    for masked in (False, True):
        forms_agree(built, masked=masked)
        if mask in (*SEQUENCES, *LOW_RANK):
            for n in (1, 2, 7):
                forms_agree(built, n, masked=masked and n > 2)
        else:
            forms_agree(built, 14, masked=masked, num_prefix_tokens=2)


@pytest.mark.parametrize("grid", [(3, 4), (1, 12), (4, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_01_every_grid_with_every_number_of_prefix_tokens(grid, form, monkeypatch):
    built = module("grid", grid_size=grid, **use(monkeypatch, form))
    for prefix in (0, 1, 2):
        forms_agree(built, prefix + grid[0] * grid[1], num_prefix_tokens=prefix, masked=prefix > 0)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_01_causal_and_cross_calls(features, form, monkeypatch):
    pieces = use(monkeypatch, form)
    # early queries see few keys, and their relu weights can be floors: see the next test
    by_fft = form == "structured" and features == "relu"
    for mask in SEQUENCES if not by_fft else ("none", "decay"):
        built = module(mask, feature_map=features, **pieces)
        for masked in (False, True):
            forms_agree(built, masked=masked, is_causal=True)
            forms_agree(built, 5, 12, masked=masked, is_causal=True)
            if mask != "decay":
                forms_agree(built, 5, 12, masked=masked)
                forms_agree(built, 12, 5, masked=masked)
    for mask in LOW_RANK:
        built = module(mask, feature_map=features, **pieces)
        for n, m in ((5, 12), (12, 5)):
            forms_agree(built, n, m)
            forms_agree(built, n, m, masked=True)
    for mask in GRIDS if not by_fft else ():
        built = module(mask, feature_map=features, **pieces)
        for prefix in (0, 1, 2):
            forms_agree(built, 12 + prefix, is_causal=True, num_prefix_tokens=prefix)


@pytest.mark.parametrize("mask", ["toeplitz", "toeplitz exp_table", "toeplitz exp_poly", *GRIDS])
def test_01_the_error_of_an_fft_is_relative_to_the_largest_sum(mask, monkeypatch):
    built, qkv = module(mask, **use(monkeypatch, "structured")), tokens()
    call = built._call(*qkv, is_causal=True)
    query, key = built.features(call)
    mass = (built.full_mask(call).tril() * (query @ key.transpose(-1, -2)) + built.floor).sum(-1)
    error = (built(*qkv, is_causal=True) - built.naive(*qkv, is_causal=True)).abs().amax(dim=-1)
    assert (error * mass < 1e-14 * mass.amax()).all()


@pytest.mark.parametrize("form", ["dense", "structured"])
def test_02_one_row_is_the_sequence_and_a_chain_is_a_decay(form, monkeypatch):
    pieces, qkv = use(monkeypatch, form), tokens()
    row, line = (module(mask, feature_map="elu", **pieces) for mask in ("one row", "toeplitz exp_table"))
    with torch.no_grad():
        line.table.copy_(row.table[:, 0])
    agree(row(*qkv), line(*qkv))
    agree(row(*qkv, is_causal=True), line(*qkv, is_causal=True))
    chain, decay = module("chain", **pieces), module("decay", **pieces)
    decay.load_state_dict(chain.state_dict())
    agree(chain(*qkv), decay(*qkv))


@pytest.mark.parametrize("mask", [*SEQUENCES, *GRIDS])
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_03_future_values_never_matter(mask, form, monkeypatch):
    built, qkv = module(mask, feature_map="elu", **use(monkeypatch, form)), tokens()
    out = built(*qkv, is_causal=True)
    changed = [torch.cat((x[:, :, :8], -x[:, :, 8:]), dim=2) for x in qkv]
    agree(built(*changed, is_causal=True)[:, :, :8], out[:, :, :8], 1e-12)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("mask", ["none", "decay"])
@pytest.mark.parametrize("masked", [False, True])
def test_03_recurrence_equals_dense_equals_step_by_step(mask, features, masked, monkeypatch):
    built = module(mask, feature_map=features, **use(monkeypatch, "dense"))
    q, k, v = tokens(23)
    mask = padding(23) if masked else torch.ones(B, 23, dtype=torch.bool)
    expected = built(q, k, v, is_causal=True, key_padding_mask=mask)
    for cuts in (range(24), (0, 9, 10, 23), (0, 23)):
        state, parts = None, []
        for start, stop in zip(cuts, list(cuts)[1:]):
            part = slice(start, stop)
            out, state = built.step(q[:, :, part], k[:, :, part], v[:, :, part], state, key_padding_mask=mask[:, part])
            parts.append(out)
        agree(torch.cat(parts, dim=2), expected, rows=mask)
        assert sum(x.numel() for x in state.values()) == B * H * state["mass"].shape[-1] * (D + 2)


def test_03_gradient_of_the_rate_goes_through_the_state(monkeypatch):
    built = module("decay", **use(monkeypatch, "dense"))
    q, k, v = tokens(9)
    expected = torch.autograd.grad(built(q, k, v, is_causal=True)[:, :, -2:].square().sum(), built.log_decay_rate)
    _, state = built.step(q[:, :, :7], k[:, :, :7], v[:, :, :7], None)
    out, _ = built.step(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], state)
    agree(torch.autograd.grad(out.square().sum(), built.log_decay_rate), expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_04_padding_is_a_mask_of_zeros(mask, form, monkeypatch):
    built, qkv, real = module(mask, **use(monkeypatch, form)), tokens(), padding(12)
    noisy = [torch.where(real[:, None, :, None], x, 50.0) for x in qkv]
    out = built(*noisy, key_padding_mask=real)
    agree(out, built(*qkv, key_padding_mask=real), rows=real)
    # the definition without padding, its weights zeroed and normalised anew
    weights = built.attention_weights(*qkv) * real[:, None, None]
    agree(out, weights / weights.sum(dim=-1, keepdim=True) @ qkv[2], rows=real)
    alone = torch.zeros(B, 12, dtype=torch.bool)
    assert (built(*qkv, key_padding_mask=alone) == 0).all()


@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_05_topvit(form, monkeypatch):
    """The official layer, written out: a table of 2 rows * 2 columns entries, CLS border of ones, floors after masking."""
    rows, columns = 3, 4
    built = module("grid", **use(monkeypatch, form))
    q, k, v = tokens(13)
    place = [(a, b) for a in range(rows) for b in range(columns)]
    mask = torch.ones(H, 13, 13, dtype=torch.float64)
    for i, (a, b) in enumerate(place):
        for j, (c, d) in enumerate(place):
            mask[:, 1 + i, 1 + j] = built.table.detach()[:, a - c + rows - 1, b - d + columns - 1]
    weights = ((q / D**0.5).relu() + 1e-8) @ (k.relu() + 1e-8).transpose(-1, -2) * mask.abs() + 1e-8
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    agree(built(q, k, v, grid=(3, 4), num_prefix_tokens=1), expected)


@pytest.mark.parametrize("mask", ["toeplitz", "toeplitz exp_table", "toeplitz exp_poly", *GRIDS])
def test_05_the_start_is_unmasked_attention(mask):
    built, qkv = module(mask), tokens()
    built.reset_parameters()
    for features in FEATURES:
        plain = module("none", feature_map=features)
        built = module(mask, feature_map=features)
        built.reset_parameters()
        if features == "favor":
            plain.random_projection.copy_(built.random_projection)
        agree(built(*qkv), plain(*qkv))


@pytest.mark.parametrize("mask", LOW_RANK)
def test_low_rank_starts_close_to_unmasked_attention_and_its_columns_apart(mask):
    for features in ("relu", "elu"):
        built, plain = module(mask, feature_map=features), module("none", feature_map=features)
        built.reset_parameters()
        qkv = tokens()
        torch.testing.assert_close(built(*qkv), plain(*qkv), rtol=0, atol=0.1)
        columns = torch.autograd.grad(built(*qkv).square().sum(), built.mask_factors)[0].unbind(-1)
        assert (columns[0] - columns[1]).abs().max() > 1e-6


@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_low_rank_equals_the_mask_written_out(form, monkeypatch):
    built, (q, k, v) = module("low rank", feature_map="elu", **use(monkeypatch, form)), tokens()
    factors = built.mask_factors.detach()[:, :12].abs()
    mask = torch.stack([f @ f.T for f in factors])
    weights = mask * ((q / D**0.5).exp().where(q < 0, q / D**0.5 + 1) @ k.exp().where(k < 0, k + 1).mT)
    agree(built(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_low_rank_padded_equals_truncated(features, form, monkeypatch):
    built, (q, k, v) = module("low rank", feature_map=features, **use(monkeypatch, form)), tokens()
    real = torch.arange(12) < torch.tensor([[7], [12]])
    out = built(q, k, v, key_padding_mask=real)
    agree(out[:1, :, :7], built(*(x[:1, :, :7] for x in (q, k, v))))
    agree(out[1:], built(*(x[1:] for x in (q, k, v))))


@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_low_rank_factors_of_zero_are_finite(form, monkeypatch):
    built, qkv = module("low rank", feature_map="elu", **use(monkeypatch, form)), tokens(grad=True)
    with torch.no_grad():
        built.mask_factors[..., 0] = 0
        built.mask_factors[:, 4] = 0
    forms_agree(built)
    assert (built(*qkv)[:, :, 4] == 0).all(), "a row of zero sum"


@pytest.mark.parametrize("mask", ["heat", "heat of a graph"])
def test_06_no_time_leaves_the_values(mask):
    built, qkv = module(mask), tokens()
    torch.nn.init.zeros_(built.heat_time)
    agree(built(*qkv), qkv[2])
    assert (built.full_mask(built._call(*qkv)) == torch.eye(12)).all()


def test_06_heat_of_a_node_without_edges_is_its_own():
    built = module("heat", edges=[(0, 1)], grid_size=None, num_nodes=3)
    qkv = tokens(3)
    agree(built(*qkv)[:, :, 2], qkv[2][:, :, 2])


@pytest.mark.parametrize("mask", ["graph kernel", "walks"])
def test_07_the_graph_kernel_is_a_kernel(mask):
    built = module(mask)
    kernel = built.node_features @ built.node_features.T
    agree(kernel.diagonal(), torch.ones(12, dtype=torch.float64))
    agree(kernel, kernel.T, 0)
    assert ((kernel >= 0) & (kernel <= 1 + 1e-12)).all()
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12


def test_07_sampled_walks_tend_to_the_exact_features():
    graph = {"edges": EDGES, "num_nodes": 12, "walk_stop": 0.2, "walk_discount": 0.9, "walk_norm": 0.0}
    exact = module("graph kernel", **graph).node_features
    error = {}
    for walks in (100, 10_000):
        sampled = module("graph kernel", **graph, walk_sampling="sampled", num_walks=walks).node_features
        error[walks] = (sampled - exact).abs().mean().item()
    assert error[10_000] < 0.005
    assert 5 < error[100] / error[10_000] < 20, "the error falls as 1 / sqrt(walks)"
    again = module("graph kernel", **graph, walk_sampling="sampled", num_walks=100, seed=0).node_features
    other = hf_attn.build("topological", num_heads=H, head_dim=D, **MASKS["graph kernel"] | graph | {"walk_sampling": "sampled", "seed": 1})  # fmt: skip
    assert (again - exact).abs().mean().item() == error[100]
    assert (other.node_features - again).abs().max() > 0.01


def test_07_exact_features_are_the_sum_of_powers():
    built = module("graph kernel", walk_length=3, walk_discount=0.5, walk_stop=0.2, walk_norm=0.5)
    adjacency = torch.zeros(12, 12, dtype=torch.float64)
    for i, j in EDGES:
        adjacency[i, j] = adjacency[j, i] = 1
    step = 0.4 * adjacency / adjacency.sum(dim=1, keepdim=True).clamp(min=1)
    features = torch.eye(12) + step + step @ step
    agree(built.node_features, features / features.norm(dim=1, keepdim=True).sqrt())


def test_07_a_walk_of_one_node_and_a_graph_without_edges():
    for options in ({"walk_length": 1}, {"edges": []}, {"edges": [], "walk_sampling": "sampled"}):
        agree(module("graph kernel", **options).node_features, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("form", ["dense", "tiled", "structured"])
def test_08_trees_of_a_forest_do_not_influence_each_other(form, monkeypatch):
    built, qkv = module("forest", **use(monkeypatch, form)), tokens()
    first = torch.tensor([0, 1, 2, 3, 4, 5, 10])
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[:, :, [6, 7, 8, 9, 11]] = 30.0
    agree(built(*changed)[:, :, first], built(*qkv)[:, :, first], 1e-12)


def test_09_a_positive_factor_of_the_mask_changes_nothing():
    qkv = tokens()
    for features in ("elu", "favor"):
        built = module(feature_map=features)
        expected = built(*qkv)
        with torch.no_grad():
            built.table.mul_(37.0)
        agree(built(*qkv), expected, 1e-12)


@pytest.mark.parametrize("form", ["dense", "structured"])
def test_10_reversal_and_reflections_commute(form, monkeypatch):
    pieces, qkv = use(monkeypatch, form), tokens()
    built = module(**pieces)
    reversed_, moved = copy.deepcopy(built), [x.flip(2) for x in qkv]
    with torch.no_grad():
        reversed_.table.copy_(built.table.flip(1))
    agree(reversed_(*moved), built(*qkv).flip(2))
    built = module("grid", **pieces)
    for dim in (0, 1):
        reflected = copy.deepcopy(built)
        with torch.no_grad():
            reflected.table.copy_(built.table.flip(1 + dim))
        moved = [x.unflatten(2, (3, 4)).flip(2 + dim).flatten(2, 3) for x in qkv]
        agree(reflected(*moved).unflatten(2, (3, 4)), built(*qkv).unflatten(2, (3, 4)).flip(2 + dim))


# -- numerics and cost -------------------------------------------------------------------------------------------------


FORMS = [(m, x, f) for m in MASKS if m != "walks" for x in FEATURES for f in ("dense", "structured")]


# floors next to weights of 1e6 are below the rounding of an FFT
@pytest.mark.parametrize("mask,features,form", [c for c in FORMS if c[1:] != ("relu", "structured") or c[0] in ("decay", "chain", "forest")])  # fmt: skip
def test_long_vectors_neither_overflow_nor_lose_a_row(mask, features, form, monkeypatch):
    built = module(mask, feature_map=features, **use(monkeypatch, form))
    q, k, v = tokens()
    qkv = q * 1000, k * 1000, v
    agree(built(*qkv), built.naive(*qkv), 1e-8)
    assert built(*qkv).abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("log_rate", [-12.0, 0.0, 6.0])
@pytest.mark.parametrize("causal", [False, True])
def test_decay_in_float32_over_many_chunks(log_rate, causal):
    built = module("decay", feature_map="favor")
    torch.nn.init.constant_(built.log_decay_rate, log_rate)
    qkv = tokens(700)
    expected = built.naive(*qkv, is_causal=causal)
    out = copy.deepcopy(built).float()(*(x.float() for x in qkv), is_causal=causal)
    agree(out.double(), expected, 2e-5)


@pytest.mark.parametrize("mask", ["toeplitz", "grid", "decay", "forest"])
@pytest.mark.parametrize("form", ["dense", "structured"])
def test_float32_is_as_good_in_every_form(mask, form, monkeypatch):
    built, qkv = module(mask, feature_map="elu", **use(monkeypatch, form)), tokens()
    expected = built.naive(*qkv)
    agree(built.float()(*(x.float() for x in qkv)).double(), expected, 2e-6)


@pytest.mark.parametrize("form", ["dense", "structured"])
def test_a_row_of_zero_sum_gives_zeros(form, monkeypatch):
    built, qkv = module(feature_map="elu", **use(monkeypatch, form)), tokens(grad=True)
    torch.nn.init.zeros_(built.table)
    out = built(*qkv)
    assert (out == 0).all() and (built.naive(*qkv) == 0).all()
    grads = torch.autograd.grad(out.sum(), [*qkv, built.table])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mask", ["heat", "forest"])
def test_constants_of_the_structure_keep_their_precision(mask):
    built, qkv = module(mask), tokens()
    expected = built(*qkv)
    low = copy.deepcopy(built).bfloat16()
    assert all(t.dtype in (torch.float64, torch.int64, torch.bool) for t in low.structure.values())
    with torch.no_grad():
        for a, b in zip(built.parameters(), low.parameters()):
            a.copy_(b)
    expected = built(*(x.bfloat16().double() for x in qkv))
    assert (low(*(x.bfloat16() for x in qkv)).double() - expected).abs().max() < 0.02


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                # an expanded tensor holds few numbers
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("mask,form", [("toeplitz", "tiled"), ("grid", "tiled"), ("decay", "structured"), ("none", "dense"), ("forest", "tiled"), ("heat", "tiled"), ("low rank", "tiled"), ("low rank", "structured")])  # fmt: skip
def test_long_calls_make_no_matrix_of_all_pairs(mask, form, monkeypatch):
    n, pieces = 1024, use(monkeypatch, form, numbers=1 << 15)
    monkeypatch.setattr(functional_masks, "DECAY_CHUNK", 32)
    structure = {
        "toeplitz": {"max_length": n}, "low rank": {"max_length": n}, "grid": {"grid_size": (32, 32)},
        "forest": {"parent": [(i - 1) // 2 for i in range(n)], "edge_lengths": None}, "heat": {"grid_size": (32, 32)},
    }  # fmt: skip
    built = module(mask, **pieces, **structure.get(mask, {}))
    qkv = tokens(n, grad=True, batch=1)
    with Largest() as largest:
        out = built(*qkv)
        torch.autograd.grad(out.sum(), [*qkv, *built.parameters()], allow_unused=True)
    # the eigenvectors of the heat kernel are as many, once for all heads
    assert largest.numbers < n * n / 4 or (mask == "heat" and largest.numbers <= H * n * n)


def test_forms_are_chosen_by_length(monkeypatch):
    qkv, called = tokens(), []
    for name in ("tiled", "masked_sums", "factored_sums", "decay_attention"):
        original = getattr(functional_masks, name)
        monkeypatch.setattr(functional_masks, name, lambda *a, _n=name, _f=original, **k: called.append(_n) or _f(*a, **k))  # fmt: skip
    monkeypatch.setattr(
        topological, "STRUCTURED_FROM", {"toeplitz": 12, "tree": 12, "decay": 12, "block_toeplitz": 13, "low_rank": 4}
    )
    for mask, least, expected in (
        ("toeplitz", 12, "masked_sums"), ("toeplitz", 13, "tiled"), ("forest", 0, "masked_sums"),
        ("decay", 12, "decay_attention"), ("decay", 13, "tiled"), ("grid", 0, "tiled"), ("heat", 0, "tiled"),
        ("low rank", 12, "factored_sums"), ("low rank", 13, "tiled"), ("low rank exp_table", 0, "tiled"),
    ):  # fmt: skip
        called.clear()
        module(mask, fft_min_length=least)(*qkv)
        assert called == [expected], (mask, least)
    called.clear()
    module("toeplitz", fft_min_length=0, feature_map="favor")(*qkv)
    assert called == ["tiled"], "exponential features need their logarithms"


@pytest.mark.parametrize("mask", MASKS)
def test_compile_and_export(mask):
    built, qkv = module(mask).float(), tokens(dtype=torch.float32)
    expected = built(*qkv)
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*qkv), expected)
    program = torch.export.export(built, tuple(qkv), {})
    torch.testing.assert_close(program.module()(*qkv), expected)


def test_compile_of_the_structured_forms(monkeypatch):
    for mask in ("toeplitz", "grid", "forest", "decay", "low rank"):
        built, qkv = module(mask, **use(monkeypatch, "structured")), tokens()
        torch._dynamo.reset()
        compiled = torch.compile(built, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*qkv), built(*qkv))


# -- parameters, options, refusals -------------------------------------------------------------------------------------


def test_state_dict_and_start():
    shapes = {
        "none": {}, "toeplitz": {"table": (H, 31)}, "toeplitz exp_table": {"table": (H, 23)},
        "toeplitz exp_poly": {"coefficients": (H, 3)}, "decay": {"log_decay_rate": (H,)}, "grid": {"table": (H, 5, 7)},
        "grid exp_poly": {"coefficients": (H, 2)}, "one row": {"table": (H, 1, 23)}, "forest": {"log_decay_rate": (H,)},
        "low rank": {"mask_factors": (H, 16, 3)}, "graph kernel": {"node_features": (12, 12)}, "heat": {"heat_time": (H,)},
    }  # fmt: skip
    for mask, expected in shapes.items():
        built = hf_attn.build("topological", num_heads=H, head_dim=D, **MASKS[mask])
        assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == expected
        assert built.capabilities.learned == bool(list(built.parameters()))
        value = {"abs_table": 1, "exp_table": 0, "exp_poly": 0}[built.options.parametrization]
        for name in ("table", "coefficients"):
            assert (getattr(built, name, torch.tensor(value)) == value).all()
    decay = hf_attn.build("topological", num_heads=4, head_dim=D, mask_type="decay")
    agree(decay.log_decay_rate.exp(), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]), 1e-6)
    assert (hf_attn.build("topological", num_heads=H, head_dim=D, **MASKS["forest"]).log_decay_rate == 0).all()
    assert (hf_attn.build("topological", num_heads=H, head_dim=D, **MASKS["heat"]).heat_time == 1).all()


def test_favor_directions():
    built = module("none", feature_map="favor", num_features=2 * D + 1)
    projection = built.random_projection
    assert projection.shape == (2 * D + 1, D) and built.capabilities.random
    block = projection[:D] @ projection[:D].T
    agree(block - block.diagonal().diag(), torch.zeros(D, D, dtype=torch.float64), 1e-5)
    many = module("none", feature_map="favor", num_features=50_000)
    q, k, v = (x / 3 for x in tokens())
    agree(many(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-2)


def test_built_on_meta_and_filled_later():
    for mask in MASKS:
        with torch.device("meta"):
            built = TopologicalAttention(H, D, TopologicalOptions.parse(**MASKS[mask]))
        built = built.to_empty(device="cpu")
        built.reset_parameters()
        assert built(*tokens(dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"mask_type": "ring"}, {"feature_map": "softmax"}, {"parametrization": "log"}, {"max_length": 0}, {"eps": 0},
     {"mask_type": "block_toeplitz"}, {"mask_type": "block_toeplitz", "grid_size": (3,)}, {"mask_type": "block_toeplitz", "grid_size": (3, 0)},
     {"mask_type": "tree"}, {"mask_type": "tree", "parent": [0, 1]}, {"mask_type": "tree", "parent": [-1, 2, 0]}, {"mask_type": "tree", "parent": [-1, -2]},
     {"mask_type": "tree", "parent": [-1, 0], "edge_lengths": [0, -0.1]}, {"mask_type": "tree", "parent": [-1, 0], "edge_lengths": [1]},
     {"mask_type": "tree", "parent": [-1, 0], "edge_lengths": [0, math.nan]}, {"mask_type": "tree", "parent": [-1, 0], "edge_lengths": [0, math.inf]},
     {"mask_type": "heat"}, {"mask_type": "graph_kernel"}, {"mask_type": "heat", "edges": [(0, 1)]}, {"mask_type": "heat", "num_nodes": 3},
     {"mask_type": "heat", "edges": [(0, 0)], "num_nodes": 3}, {"mask_type": "heat", "edges": [(0, 3)], "num_nodes": 3}, {"mask_type": "heat", "edges": [(0, 1, 2)], "num_nodes": 3},
     {"mask_type": "heat", "edges": [(0, 1)], "num_nodes": 3, "grid_size": (2, 2)}, {"mask_type": "graph_kernel", "grid_size": (2, 2), "walk_stop": 1.5},
     {"mask_type": "graph_kernel", "grid_size": (2, 2), "walk_sampling": "some"}, {"mask_type": "graph_kernel", "grid_size": (2, 2), "walk_length": 0},
     {"mask_type": "decay", "max_length": 64}, {"mask_type": "heat", "grid_size": (2, 2), "walk_length": 3}, {"grid_size": (2, 2)},
     {"mask_type": "low_rank", "rank": 0}, {"mask_type": "low_rank", "parametrization": "exp_poly"}, {"mask_type": "low_rank", "poly_degree": 3},
     {"rank": 2}, {"num_features": 8}, {"feature_map": "favor", "num_features": 0}, {"masktype": "none"}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="topological"):
        hf_attn.build("topological", num_heads=H, head_dim=D, **options)


def test_lengths_of_roots_are_ignored():
    built, qkv = module("forest"), tokens()
    other = module("forest", edge_lengths=[-1.0, *LENGTHS[1:6], 0.0, *LENGTHS[7:]])
    agree(other(*qkv), built(*qkv), 0)


@pytest.mark.parametrize(
    "mask,n,m,call,error,match",
    [
        ("decay", 5, 12, {}, Unsupported, "N=5 queries and M=12 keys"),
        ("grid", 5, 12, {}, Unsupported, "N=5 queries and M=12 keys"),
        ("grid", 5, 12, {"is_causal": True}, Unsupported, "N=5 queries and M=12 keys"),
        ("toeplitz", 12, 5, {"is_causal": True}, Unsupported, "M=5"),
        ("forest", 12, 12, {"is_causal": True}, Unsupported, "is_causal"),
        ("graph kernel", 12, 12, {"is_causal": True}, Unsupported, "is_causal"),
        ("heat", 12, 12, {"is_causal": True}, Unsupported, "is_causal"),
        ("low rank", 12, 12, {"is_causal": True}, Unsupported, "is_causal"),
        ("low rank", 17, 4, {}, InvalidInput, "max_length=16"),
        ("toeplitz", 17, 17, {}, InvalidInput, "max_length=16"),
        ("toeplitz", 4, 17, {}, InvalidInput, "max_length=16"),
        ("toeplitz exp_table", 1, 13, {"is_causal": True}, InvalidInput, "max_length=12"),
        ("grid", 13, 13, {}, InvalidInput, "0 \\+ 12"),
        ("grid", 12, 12, {"num_prefix_tokens": 1}, InvalidInput, "1 \\+ 12"),
        ("forest", 11, 11, {}, InvalidInput, "0 \\+ 12"),
        ("heat", 11, 11, {"num_prefix_tokens": -1}, InvalidInput, "-1 \\+ 12"),
        ("grid", 12, 12, {"grid": (4, 3)}, InvalidInput, "grid=\\(4, 3\\)"),
        ("heat", 12, 12, {"grid": (2, 6)}, InvalidInput, "grid=\\(2, 6\\)"),
        ("none", 12, 12, {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)}, Unsupported, "attention_mask"),
    ],
)
def test_refused_calls(mask, n, m, call, error, match):
    for run in (module(mask), module(mask).naive):
        with pytest.raises(error, match=f"topological.*{match}"):
            run(*tokens(n, m), **call)


def test_prefix_tokens_of_a_sequence_are_ordinary_tokens():
    for mask in (*SEQUENCES, *LOW_RANK):
        built, qkv = module(mask), tokens()
        assert torch.equal(built(*qkv, num_prefix_tokens=3, grid=(3, 3)), built(*qkv))


def test_capabilities_of_every_mask():
    described = {m: TopologicalAttention.describe(TopologicalOptions.parse(**MASKS[m])) for m in MASKS}
    assert {m for m, c in described.items() if c.causal} == {*SEQUENCES, *GRIDS}
    assert {m for m, c in described.items() if c.decode == "constant state"} == {"none", "decay"}
    assert {m for m, c in described.items() if c.packed} == {*SEQUENCES, *LOW_RANK}
    assert {m for m, c in described.items() if c.prefix_tokens} == set(MASKS) - {*SEQUENCES, *LOW_RANK}
    assert {m for m, c in described.items() if c.grid == "used"} == {*GRIDS, "walks", "heat"}
    assert described["walks"].random and not described["graph kernel"].random


def test_host_defaults():
    def fill(given=(), **host):
        return TopologicalAttention.host_defaults(Host("m", H, D, 0, **host), dict(given))

    vit = {"grid": (14, 10), "num_prefix_tokens": 1}
    assert fill(**vit) == {"mask_type": "block_toeplitz", "grid_size": [14, 10]}
    assert fill({"mask_type": "heat"}, **vit) == {"grid_size": [14, 10]}
    assert fill({"mask_type": "heat", "edges": [], "num_nodes": 140}, **vit) == {}
    assert fill({"mask_type": "tree", "parent": [-1]}, **vit) == {}
    assert fill({"parent": [-1]}, **vit) == {"mask_type": "tree"}
    assert fill(max_length=128) == {"mask_type": "toeplitz", "max_length": 128}
    assert fill({"max_length": 64}, max_length=128) == {"mask_type": "toeplitz"}
    assert fill({"mask_type": "toeplitz"}) == {}
    assert fill(causal=True, max_length=128) == {"mask_type": "decay"}
    assert fill({"max_length": 64}, causal=True) == {"mask_type": "toeplitz"}
    assert fill({"rank": 2}, max_length=128) == {"mask_type": "low_rank", "max_length": 128}
    assert fill({"feature_map": "elu"}, causal=True) == {"mask_type": "decay"}


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mask_type": "heat"}, {"mask_type": "graph_kernel", "walk_sampling": "sampled"},
                                     {"mask_type": "tree", "parent": [(i - 1) // 2 for i in range(36)]}], ids=str)  # fmt: skip
def test_vit_saved_and_reloaded(options, tmp_path):
    from transformers import ViTConfig

    torch.manual_seed(0)
    model = hf_attn.AttnViTModel(hf_attn.AttnViTConfig(**VIT, attn_implementation="topological", attention_options=options)).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "mechanism" in name:
            torch.nn.init.uniform_(parameter)
    pixels = torch.randn(2, 3, 12, 12)
    expected = model(pixels).last_hidden_state
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["attention"]["default"]
    assert stored["mask_type"] == options.get("mask_type", "block_toeplitz")
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.attention == model.config.attention
    torch.testing.assert_close(again(pixels).last_hidden_state, expected, rtol=0, atol=0)
    assert ViTConfig(**VIT).image_size == 12


def test_bert_and_gpt2_take_the_mask_of_their_kind():
    torch.manual_seed(0)
    bert = hf_attn.AttnBertModel(hf_attn.AttnBertConfig(**BERT, attn_implementation="topological")).eval()
    assert bert.config.attention["default"] == {"name": "topological", "mask_type": "toeplitz", "max_length": 64}
    ids = torch.randint(0, 99, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    out = bert(ids, attention_mask=mask).last_hidden_state
    agree(out[1:, :13], bert(ids[1:, :13]).last_hidden_state, 1e-5)

    gpt2 = hf_attn.AttnGPT2LMHeadModel(hf_attn.AttnGPT2Config(**GPT2, attn_implementation="topological")).eval()
    assert gpt2.config.attention["default"] == {"name": "topological", "mask_type": "decay"}
    for options in ({}, {"mask_type": "none"}, {"mask_type": "toeplitz"}):
        gpt2.set_attn_implementation("topological", attention_options=options)
        for parameter in gpt2.transformer.h[0].attn.mechanism.parameters():
            torch.nn.init.uniform_(parameter)
        out = [gpt2.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*out)
