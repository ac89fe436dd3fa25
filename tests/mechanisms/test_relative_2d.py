"""relative_2d: the invariants of its specification (numbered as there), smaller grids, memory, models, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import VIT, Largest
from transformers import ViTConfig, ViTForImageClassification

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms.relative_2d import Relative2dAttention, relative_logits

B, H, D = 2, 2, 4
GRIDS = [(3, 5), (4, 4), (5, 2), (1, 6), (6, 1), (1, 1)]
of_grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def module(grid, seed=0, **changes):
    """A float64 module whose tables are drawn, not at their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("relative_2d", num_heads=H, head_dim=D, grid_size=grid, **changes).double()
    for table in built.parameters():
        torch.nn.init.normal_(table)
    return built


def tokens(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, dtype=torch.float64, generator=generator) for _ in range(3)]


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def rel_to_abs(x):
    """(...,L,2L-1) -> (...,L,L): entry (i, j) is column j - i + L - 1. By padding and re-reading, without an index."""
    length = x.shape[-2]
    flat = torch.nn.functional.pad(x, (0, 1)).flatten(-2)
    flat = torch.nn.functional.pad(flat, (0, length - 1))
    return flat.unflatten(-1, (length + 1, 2 * length - 1))[..., :length, length - 1 :]


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5])
def test_01_the_shift_gives_the_matrix_of_displacements(length):
    repeated = torch.arange(1 - length, length).expand(length, -1)
    place = torch.arange(length)
    assert torch.equal(rel_to_abs(repeated), place - place[:, None])


@of_grids
def test_02_relative_logits_equal_the_loops_and_the_shift(grid):
    built, (rows, columns) = module(grid), grid
    q = tokens(rows * columns)[0]
    by_row, by_column = relative_logits(q, built.rel_height, built.rel_width)
    for n in range(rows * columns):
        iy, ix = divmod(n, columns)
        for jy in range(rows):
            agree(by_row[:, :, n, jy], q[:, :, n] @ built.rel_height[jy - iy + rows - 1])
        for jx in range(columns):
            agree(by_column[:, :, n, jx], q[:, :, n] @ built.rel_width[jx - ix + columns - 1])
    patches = q.unflatten(2, grid)
    agree(by_column.unflatten(2, grid), rel_to_abs(patches @ built.rel_width.T))
    turned = rel_to_abs(patches.transpose(2, 3) @ built.rel_height.T).transpose(2, 3)
    agree(by_row.unflatten(2, grid), turned)


@pytest.mark.parametrize("prefix", [0, 2])
def test_03_zero_tables_are_softmax_and_know_no_order(prefix):
    qkv = tokens(15 + prefix)
    start = hf_attn.build("relative_2d", num_heads=H, head_dim=D, grid_size=(3, 5)).double()
    call = {"grid": (3, 5), "num_prefix_tokens": prefix}
    out = start(*qkv, **call)
    agree(out, torch.nn.functional.scaled_dot_product_attention(*qkv))
    order = torch.cat((torch.arange(prefix), prefix + torch.randperm(15)))
    agree(start(*(x[:, :, order] for x in qkv), **call), out[:, :, order])
    drawn = module((3, 5))
    moved = drawn(*(x[:, :, order] for x in qkv), **call)
    assert (moved - drawn(*qkv, **call)[:, :, order]).abs().max() > 0.1, "tables make places matter"


def test_04_relative_logits_of_a_constant_query_depend_on_the_displacement_only():
    built, q = module((4, 5)), tokens(1)[0].expand(-1, -1, 20, -1)
    by_row, by_column = relative_logits(q, built.rel_height, built.rel_width)
    logits = by_row.unflatten(2, (4, 5))[..., :, None] + by_column.unflatten(2, (4, 5))[..., None, :]
    agree(logits[:, :, 1:, 1:, 1:, 1:], logits[:, :, :-1, :-1, :-1, :-1])


@pytest.mark.parametrize("axis, table", [(2, "rel_height"), (3, "rel_width")])
def test_05_a_flipped_map_with_flipped_tables_gives_the_flipped_result(axis, table):
    built, qkv = module((3, 5)), tokens(15)

    def flip(x):
        return x.unflatten(2, (3, 5)).flip(axis).flatten(2, 3)

    expected = flip(built(*qkv, grid=(3, 5)))
    with torch.no_grad():
        getattr(built, table).copy_(getattr(built, table).flip(0))
    agree(built(*map(flip, qkv), grid=(3, 5)), expected)


# -- the two forms -----------------------------------------------------------------------------------------------------


@of_grids
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("larger", [0, 2])
def test_forms_agree_with_gradients(grid, prefix, masked, larger):
    built = module((grid[0] + larger, grid[1] + larger))
    n = prefix + grid[0] * grid[1]
    qkv = [x.requires_grad_() for x in tokens(n)]
    call = {"grid": grid, "num_prefix_tokens": prefix, "scaling": 0.7}
    if masked:
        call["key_padding_mask"] = torch.rand(B, n, generator=torch.Generator().manual_seed(3)) > 0.4
    cotangent = torch.randn(B, H, n, D, dtype=torch.float64)
    results = []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), [*qkv, *built.parameters()])))
    agree(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        agree(a, b, 1e-8)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (4, 3), (2, 5), (1, 1)], ids=str)
def test_a_smaller_grid_reads_the_central_part_of_the_tables(grid):
    built, small, (rows, columns) = module((4, 5)), module(grid), grid
    with torch.no_grad():
        small.rel_height.copy_(built.rel_height[4 - rows : 3 + rows])
        small.rel_width.copy_(built.rel_width[5 - columns : 4 + columns])
    qkv = tokens(rows * columns)
    agree(built(*qkv, grid=grid), small(*qkv, grid=grid))


def test_pairs_with_a_prefix_token_have_no_relative_term():
    built, qkv = module((3, 5)), tokens(16)
    call = {"grid": (3, 5), "num_prefix_tokens": 1}
    exact = torch.nn.functional.scaled_dot_product_attention(*qkv)
    agree(built(*qkv, **call)[:, :, 0], exact[:, :, 0])
    assert (built(*qkv, **call) - exact)[:, :, 1:].abs().max() > 0.1
    weights = built.attention_weights(*qkv, **call)
    # within a row, the share of a patch against the prefix is its logit against the prefix's
    logit = D**-0.5 * (qkv[0] @ qkv[1].transpose(-1, -2))
    relative = (weights / weights[..., :1]).log() - (logit - logit[..., :1])
    expected = D**-0.5 * sum(
        table.unsqueeze(axis).expand(-1, -1, -1, 3, 5).flatten(3)
        for table, axis in zip(relative_logits(qkv[0][:, :, 1:], *built.parameters()), (-1, -2), strict=True)
    )
    agree(relative[:, :, 1:, 1:], expected, 1e-9)


def test_what_is_padded_never_matters():
    built, qkv = module((3, 5)), tokens(15)
    mask = torch.ones(B, 15, dtype=torch.bool)
    mask[0, 10:], mask[1, ::3] = False, False
    out = built(*qkv, grid=(3, 5), key_padding_mask=mask)
    noisy = [torch.where(mask[:, None, :, None], x, 90.0) for x in qkv]
    agree(built(*noisy, grid=(3, 5), key_padding_mask=mask).transpose(1, 2)[mask], out.transpose(1, 2)[mask])
    # two whole rows of the map are left of the first sample: the same as a map of two rows
    agree(out[:1, :, :10], built(*(x[:1, :, :10] for x in qkv), grid=(2, 5)))


def test_nothing_of_all_pairs_is_made():
    grid, n = (24, 24), 576
    built = hf_attn.build("relative_2d", num_heads=H, head_dim=16, grid_size=grid)
    qkv = [torch.randn(1, H, n, 16, requires_grad=True) for _ in range(3)]
    with Largest() as largest:
        built(*qkv, grid=grid).sum().backward()
    assert largest.numel < n * n


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_lower_precision(dtype, tolerance):
    built, qkv = module((3, 5)), tokens(16)
    call = {"grid": (3, 5), "num_prefix_tokens": 1}
    expected = built(*qkv, **call)
    out = built.to(dtype)(*(x.to(dtype) for x in qkv), **call)
    assert out.dtype == dtype
    agree(out.double(), expected, tolerance)


def test_large_logits_stay_finite_and_exact():
    built, (q, k, v) = module((3, 5)), tokens(15)
    out = built(300 * q, k, v, grid=(3, 5))
    assert out.isfinite().all()
    agree(out, built.naive(300 * q, k, v, grid=(3, 5)), 1e-9)


# -- models, parameters, options, refusals -----------------------------------------------------------------------------


def test_a_stock_vit_is_unchanged_at_the_start_and_learns():
    torch.manual_seed(0)
    stock = ViTForImageClassification(ViTConfig(**VIT)).eval()
    pixels = torch.rand(2, 3, 12, 12)
    expected = stock(pixels).logits
    model = hf_attn.convert(stock, "relative_2d")
    agree(model(pixels).logits, expected, 1e-5)
    tables = [m for m in model.modules() if isinstance(m, Relative2dAttention)]
    assert [tuple(m.rel_height.shape) for m in tables] == [(11, 8), (11, 8)]
    model(pixels).logits.square().sum().backward()
    assert tables[0].rel_height.grad.any() and tables[0].rel_width.grad.any()
    # the classifier reads CLS, whose pairs have no relative term
    assert not tables[1].rel_height.grad.any()


def test_state_dict_and_start():
    built = hf_attn.build("relative_2d", num_heads=H, head_dim=D, grid_size=[3, 5])
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == {"rel_height": (5, D), "rel_width": (9, D)}
    assert not any(t.any() for t in built.state_dict().values())
    # (2 (rows + columns) - 2) D, as the paper counts a layer
    assert sum(p.numel() for p in built.parameters()) == (2 * (3 + 5) - 2) * D


@pytest.mark.parametrize("size", [None, 3, (3,), (3, 5, 1), (0, 5), (3, -1), (3.0, 5), (True, 5), "35"], ids=str)
def test_refused_sizes(size):
    with pytest.raises(InvalidOption, match="relative_2d.*grid_size"):
        module(size)


@pytest.mark.parametrize(
    "call, error, match",
    [
        ({}, Unsupported, "needs a 2-D token grid"),
        ({"grid": (4, 4)}, Unsupported, r"grid=\(4, 4\) is larger than grid_size=\(3, 5\)"),
        ({"grid": (2, 6)}, Unsupported, "larger than grid_size"),
        ({"grid": (3, 4)}, InvalidInput, "3 x 4"),
        ({"grid": (-3, -5)}, InvalidInput, "at least 1"),
        ({"grid": (3, 5), "num_prefix_tokens": 1}, InvalidInput, "16 tokens"),
        ({"grid": (3, 5), "is_causal": True}, Unsupported, "causal"),
        ({"grid": (3, 5), "attention_mask": torch.ones(1, 1, 15, 15, dtype=torch.bool)}, Unsupported, "attention_mask"),
    ],
)
def test_refused_calls(call, error, match):
    with pytest.raises(error, match=f"relative_2d.*{match}"):
        module((3, 5))(*tokens(15), **call)


def test_cross_attention_is_refused():
    q, k, v = tokens(15)
    with pytest.raises(Unsupported, match="relative_2d.*N=15 queries and M=12 keys"):
        module((3, 5))(q, k[:, :, :12], v[:, :, :12], grid=(3, 5))


def test_host_defaults_fill_in_the_grid():
    def fill(given, **host):
        return Relative2dAttention.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}, grid=(14, 10)) == {"grid_size": [14, 10]}
    assert fill({"grid_size": [20, 20]}, grid=(14, 14)) == {}


def test_a_sequence_model_is_refused_for_want_of_a_grid():
    with pytest.raises(Unsupported, match="relative_2d.*needs a 2-D token grid"):
        hf_attn.AttnBertModel(hf_attn.AttnBertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9, attn_implementation="relative_2d"))  # fmt: skip
