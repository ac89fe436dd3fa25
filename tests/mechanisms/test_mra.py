"""Multi-resolution attention: the invariants of its specification (numbered as there), ties, tiles, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from mra_substitute import Substitute
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mra import modeling_mra

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms import mra
from hf_attn.mechanisms.mra import MultiResolutionAttention

B, H, D = 2, 2, 4
softmax = torch.nn.functional.scaled_dot_product_attention
MODES = pytest.mark.parametrize("mode", ["full", "sparse"])


def module(**options):
    return hf_attn.build("mra", num_heads=H, head_dim=D, **{"block_size": 4, **options}).double()


def tokens(n, m=None, seed=1, grad=False, batch=B, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, H, length, D, dtype=torch.float64, generator=generator) for length in (n, m or n, m or n)
    )
    return [(sharp * q).requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)]


def padding(n, seed=2):
    """Real and padded tokens mixed, one wholly padded block, and more padding in the first sample."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[:, 0], mask[:, 4:8], mask[0, -5:] = True, False, False
    return mask


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def forms_agree(built, qkv, rows=None, **call):
    """Values to 1e-10 and gradients to 1e-8 of the gathered form and the definition."""
    results = []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        results.append((out, torch.autograd.grad((out * weight).sum(), qkv)))
    agree(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.isfinite().all()
        agree(a, b, 1e-8)


def tiling(query, key, sides, numbers, scale):
    """{(side, x, y): logit} of one head without masks, block by block from the paper."""

    def logit(s, x, y):
        return float(scale * query[x * s : (x + 1) * s].mean(0) @ key[y * s : (y + 1) * s].mean(0))

    def rank(s, x, y):
        return logit(s, x, y) - max(logit(s, x, other) for other in range(len(key) // s))

    kept = {}
    there = list(itertools.product(range(len(query) // sides[0]), range(len(key) // sides[0])))
    for side, finer, number in zip(sides, [*sides[1:], None], [*numbers, 0]):
        there.sort()
        split = sorted(there, key=lambda block, s=side: -rank(s, *block))[:number]
        kept |= {(side, *block): logit(side, *block) for block in there if block not in split}
        if finer:
            r = side // finer
            there = [(r * x + i, r * y + j) for x, y in split for i in range(r) for j in range(r)]
    return kept


def from_tiling(query, key, value, blocks, finest_only=False):
    log_weight = torch.full((len(query), len(key)), float("-inf"), dtype=query.dtype)
    for (s, x, y), logit in blocks.items():
        if not finest_only or s == min(side for side, _, _ in blocks):
            log_weight[x * s : (x + 1) * s, y * s : (y + 1) * s] = logit
    return log_weight.softmax(-1).nan_to_num(0) @ value


# -- the twelve invariants ---------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("n,m,masked", [(24, 24, False), (24, 24, True), (13, 22, False), (16, 24, True)])
def test_01_a_full_budget_is_softmax_attention(mode, n, m, masked):
    built, (q, k, v) = module(mode=mode, num_blocks=999), tokens(n, m)
    mask = padding(m) if masked else None
    expected = softmax(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    rows = mask[:, None, :, None] if masked and n == m else torch.ones(1)
    agree(built(q, k, v, key_padding_mask=mask), expected * rows)
    agree(built.naive(q, k, v, key_padding_mask=mask), expected * rows)
    # the gathered form, which forward leaves out here
    call = built._call(q, k, v, key_padding_mask=mask)
    gathered = built._multi_resolution(call, built.options.splits(-(-n // 4), -(-m // 4)))[:, :, :n]
    agree(gathered * rows, expected * rows)


@pytest.mark.parametrize("masked", [False, True])
def test_02_no_budget_is_softmax_over_block_means(masked):
    built, (q, k, v) = module(num_blocks=0), tokens(24)
    mask = padding(24) if masked else torch.ones(B, 24, dtype=torch.bool)
    count = mask.unflatten(1, (6, 4)).sum(-1)[:, None, :, None].double()
    means = [(x * mask[:, None, :, None]).unflatten(2, (6, 4)).sum(3) / count.clamp(min=1) for x in (q, k, v)]
    weight = (D**-0.5 * means[0] @ means[1].mT).exp() * count.mT
    expected = (weight / weight.sum(-1, keepdim=True) @ means[2]).repeat_interleave(4, dim=2)
    agree(built(q, k, v, key_padding_mask=mask if masked else None), expected * mask[:, None, :, None])


@MODES
@pytest.mark.parametrize("options", [{}, {"block_per_row": 1}, {"num_blocks": 3}, {"block_per_row": 2, "prior_first": 1},
    {"block_per_row": 2, "prior_diag": 1}, {"num_blocks": 9, "prior_diag": 3, "prior_first": 2}, {"num_blocks": 5, "selection": "plain"},
    {"block_size": 1, "num_blocks": 60}, {"scales": [8, 4, 1], "budgets": [3, 5]}, {"scales": [8, 4, 2], "budgets": [4, 7]},
    {"scales": [8, 4, 2, 1], "budgets": [5, 9, 11], "selection": "plain", "prior_first": 1}], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "n,m,masked", [(24, 24, False), (24, 24, True), (29, 29, True), (14, 27, False), (16, 30, True)]
)
def test_03_gathered_equals_the_definition(mode, options, n, m, masked):
    built = module(mode=mode, **options)
    if n != m and built.options.prior_diag:
        pytest.skip("refused")
    forms_agree(built, tokens(n, m, grad=True, sharp=2.0), key_padding_mask=padding(m) if masked else None)


@MODES
@pytest.mark.parametrize("sides,numbers", [((4, 1), (7,)), ((8, 4, 1), (4, 6)), ((8, 2), (5,)), ((4, 1), (2,))])
def test_03_both_equal_the_tiling_built_block_by_block(mode, sides, numbers):
    built, (q, k, v) = module(scales=list(sides), budgets=list(numbers), mode=mode), tokens(16, 24)
    for b, h in itertools.product(range(B), range(H)):
        blocks = tiling(q[b, h], k[b, h], sides, numbers, D**-0.5)
        assert sum(s * s for s, _, _ in blocks) == 16 * 24, "the blocks cover the matrix once"
        expected = from_tiling(q[b, h], k[b, h], v[b, h], blocks, finest_only=mode == "sparse")
        agree(built(q, k, v)[b, h], expected)
        agree(built.naive(q, k, v)[b, h], expected)


@pytest.mark.parametrize("number", [0, 1, 7, 20])
@pytest.mark.parametrize("form", ["forward", "naive"])
def test_04_tokens_equal_within_blocks_are_exact_at_any_budget(number, form):
    built, (q, k, v) = module(num_blocks=number), tokens(24)
    q, k = (x[:, :, ::4].repeat_interleave(4, dim=2) for x in (q, k))
    agree(getattr(built, form)(q, k, v), softmax(q, k, v))


@MODES
def test_05_padded_contents_never_matter_and_a_batch_equals_its_rows(mode):
    built, qkv, mask = module(mode=mode, block_per_row=2), tokens(29), padding(29)
    out = built(*qkv, key_padding_mask=mask)
    assert not out.transpose(1, 2)[~mask].any()
    noisy = [torch.where(mask[:, None, :, None], x, 1e3 * torch.randn_like(x)) for x in qkv]
    agree(built(*noisy, key_padding_mask=mask), out)
    for b in range(B):
        alone = built(*(x[b : b + 1] for x in qkv), key_padding_mask=mask[b : b + 1])
        agree(alone, out[b : b + 1])


def test_05_places_up_to_the_next_block_change_nothing():
    built, qkv = module(block_per_row=2), tokens(29)
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=9.0) for x in qkv]
    mask = (torch.arange(32) < 29).expand(B, -1)
    agree(built(*longer, key_padding_mask=mask)[:, :, :29], built(*qkv))


def test_06_coarse_entries_never_exceed_the_mean_exponential_and_fine_ones_are_exact():
    built, (q, k, v) = module(block_per_row=2), tokens(24)
    # (B,H,x,y,i,j)
    weights, exact = (
        x.unflatten(3, (6, 4)).unflatten(2, (6, 4)).transpose(3, 4)
        for x in (built.attention_weights(q, k, v), (D**-0.5 * q @ k.mT).exp())
    )
    coarse = (weights - weights[..., :1]).abs().amax((-1, -2)) < 1e-15
    assert coarse.sum((-1, -2)).eq(36 - 12).all()
    # the normaliser of a row, from the exact entries that every row has
    ratio = (exact / weights).masked_fill(coarse[..., None, None], float("-inf")).amax((3, 5))
    entries = weights * ratio[:, :, :, None, :, None]
    agree(entries[~coarse], exact[~coarse])
    below = entries.mean((-1, -2)) / exact.mean((-1, -2))
    assert (below[coarse] < 1).all()


def test_07_the_blocks_of_several_levels_follow_from_the_budgets():
    built, (q, k, v) = module(scales=[8, 4, 1], budgets=[4, 7]), tokens(16, 24)
    weights = built.attention_weights(q, k, v)
    sizes = []
    for side in (8, 4):
        runs = weights.unflatten(3, (-1, side))
        sizes.append(((runs - runs[..., :1]).abs().amax(-1) < 1e-15).sum((-1, -2)) * side)
    assert (sizes[0] == (2 * 3 - 4) * 64).all(), "entries at side 8"
    assert (sizes[1] - sizes[0] == (4 * 4 - 7) * 16).all(), "entries at side 4"


@MODES
def test_07_splitting_all_of_a_middle_level_is_the_two_level_form(mode):
    q, k, v = tokens(16, 24)
    three = module(scales=[8, 4, 1], budgets=[3, 12], mode=mode)
    agree(three(q, k, v), module(block_size=8, num_blocks=3, mode=mode)(q, k, v))


@MODES
def test_08_moving_whole_key_blocks_changes_nothing(mode):
    built, (q, k, v) = module(mode=mode, block_per_row=2), tokens(24)
    order = torch.randperm(6)
    moved = [x.unflatten(2, (6, 4))[:, :, order].flatten(2, 3) for x in (k, v)]
    agree(built(q, *moved), built(q, k, v))


@pytest.mark.parametrize("selection", ["plain", "row_normalised"])
def test_09_sparse_rows_without_a_chosen_block_are_exactly_zero(selection):
    built, (q, k, v) = module(mode="sparse", num_blocks=4, selection=selection), tokens(24)
    out, weights = built(q, k, v), built.attention_weights(q, k, v)
    has_block = weights.unflatten(2, (6, 4)).sum((3, 4)) > 0
    assert (weights > 0).sum((-1, -2)).eq(4 * 16).all()
    assert not out.unflatten(2, (6, 4))[~has_block].any() and (~has_block).any()
    assert (out.unflatten(2, (6, 4))[has_block] != 0).all()


@MODES
def test_10_rows_sum_to_one_and_stay_among_the_values(mode):
    built, (q, k, v) = module(mode=mode, block_per_row=1), tokens(24)
    agree(built(q, k, torch.ones_like(v)), torch.ones_like(v))
    out = built(q, k, v)
    assert (out <= v.amax(2, keepdim=True)).all() and (out >= v.amin(2, keepdim=True)).all()


@MODES
@pytest.mark.parametrize("priors", [(0, 0), (1, 0), (0, 1), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_11_agrees_with_the_attention_function_of_transformers(mode, priors, masked, monkeypatch):
    monkeypatch.setattr(modeling_mra, "mra_cuda_kernel", Substitute())
    first, diagonal = priors
    built = hf_attn.build(
        "mra", num_heads=H, head_dim=32, num_blocks=40, mode=mode, prior_first=first, prior_diag=diagonal
    ).double()
    # small logits: it adds 1e-6 to counts and to sums relative to a maximum that masked keys may have set
    inputs = [(0.6 * torch.randn(B, H, 256, 32, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    mask = torch.ones(B, 256, dtype=torch.bool)
    if masked:
        mask[0, 150:], mask[1, 97:128] = False, False
    ours = built(*inputs, key_padding_mask=mask if masked else None)
    float_mask = mask.double().repeat_interleave(H, dim=0) if masked else None
    theirs = modeling_mra.mra2_attention(
        *inputs,
        float_mask,
        40,
        mode,
        initial_prior_first_n_blocks=first,
        initial_prior_diagonal_n_blocks=diagonal,
    )
    agree(ours, theirs, 1e-5)
    cotangent = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)):
        agree(a, b, 1e-5)


@MODES
def test_12_a_common_shift_of_the_logits_changes_nothing(mode):
    built, (q, k, v) = module(mode=mode, block_per_row=2), tokens(24)
    shift = torch.randn(B, H, 1, D, dtype=torch.float64)
    q = q - ((q * shift).sum(-1, keepdim=True) - 1.5) / shift.square().sum(-1, keepdim=True) * shift
    agree(built(q, k + shift, v), built(q, k, v))


# -- the choice of blocks ----------------------------------------------------------------------------------------------


def test_on_smooth_tokens_errors_fall_with_the_budget_and_the_coarse_part_helps():
    time = torch.arange(256, dtype=torch.float64) / 256
    waves = torch.randn(2, 1, 1, D, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phases = 2 * torch.pi * torch.outer(time, torch.arange(1, 7, dtype=torch.float64))
    q, k = (waves @ phases.sin().T / 2).transpose(3, 4).expand(2, B, H, 256, D)
    v = tokens(256)[2]
    exact = softmax(q, k, v)

    def error(mode, number):
        out = module(block_size=32, num_blocks=number, mode=mode)(q, k, v)
        return ((out - exact).norm() / exact.norm()).item()

    full, sparse = ([error(mode, number) for number in (8, 16, 24, 32, 48)] for mode in ("full", "sparse"))
    for errors in (full, sparse):
        assert errors == sorted(errors, reverse=True)
    assert all(a < b for a, b in zip(full, sparse, strict=True)), (full, sparse)


def test_among_equal_ranks_the_first_are_chosen():
    rank = torch.randint(0, 4, (5, 3, 40), generator=torch.Generator().manual_seed(4)).double()
    for number in (0, 1, 7, 39, 40):
        chosen = mra._largest(rank, number)
        first = rank.argsort(dim=-1, descending=True, stable=True)[..., :number]
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(2, first, True))
        assert torch.equal(mra._indices(chosen, number), first.sort().values)


def test_a_tied_block_that_is_not_chosen_stays_in_the_coarse_part():
    """The best block of every row has rank zero: with a budget of 2 the choice is among ties."""
    built, (q, k, v) = module(num_blocks=2), tokens(24)
    for b, h in itertools.product(range(B), range(H)):
        blocks = tiling(q[b, h], k[b, h], (4, 1), (2,), D**-0.5)
        assert {x // 4 for s, x, _ in blocks if s == 1} == {0, 1}, "the first two rows"
        agree(built(q, k, v)[b, h], from_tiling(q[b, h], k[b, h], v[b, h], blocks))


def test_one_block_a_row_reaches_every_row():
    q, k, v = tokens(40)
    assert (module(mode="sparse", block_per_row=1)(q, k, v) != 0).all()
    plain = module(mode="sparse", block_per_row=1, selection="plain")(q, k, v)
    assert (plain.unflatten(2, (10, 4)).abs().sum((3, 4)) == 0).any()


def test_priors_are_split_first():
    q, k, v = tokens(24)
    chosen = module(mode="sparse", num_blocks=16, prior_diag=2).attention_weights(q, k, v) > 0
    x = torch.arange(24) // 4
    assert chosen[..., (x[:, None] - x).abs() <= 1].all()
    assert chosen.sum((-1, -2)).eq(16 * 16).all()
    # blocks at the crossing of the first row and column count twice
    chosen = module(mode="sparse", num_blocks=1, prior_first=1).attention_weights(q, k, v) > 0
    assert torch.equal(chosen, ((x[:, None] == 0) & (x == 0)).expand_as(chosen))


@pytest.mark.parametrize("masked_by", ["cross_attention", "length"])
def test_the_mask_of_another_sequence_says_nothing_about_the_queries(masked_by):
    (q, k, v), mask = tokens(24), padding(24)
    cross = module(block_per_row=2, cross_attention=True)
    if masked_by == "length":
        # one more block of masked keys makes N != M
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 4)) for x in (k, v))
        mask = torch.nn.functional.pad(mask, (0, 4))
        cross = module(block_per_row=2)
    out = cross(q, k, v, key_padding_mask=mask)
    assert (out != 0).all()
    agree(out, cross.naive(q, k, v, key_padding_mask=mask))


def test_heads_that_take_turns_change_nothing(monkeypatch):
    built, qkv = module(block_per_row=2), tokens(29)
    expected = built(*qkv, key_padding_mask=padding(29))
    monkeypatch.setattr(mra, "GATHERED", {"cpu": 1})
    agree(built(*qkv, key_padding_mask=padding(29)), expected, 0)


def test_nothing_of_the_size_of_the_matrix_is_made():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, tensor.numel())
            return out

    built, length = module(block_size=32, block_per_row=2), 2048
    qkv = tokens(length, batch=1, grad=True)
    with Largest():
        built(*qkv, key_padding_mask=torch.ones(1, length, dtype=torch.bool)).sum().backward()
    # the products of the two chosen blocks a row
    assert Largest.numbers <= H * length * 2 * 32


def test_extreme_logits_stay_finite():
    built, (q, k, v) = module(block_per_row=2), tokens(24, sharp=2000.0)
    out = built(q, k, v)
    assert out.isfinite().all()
    agree(out, built.naive(q, k, v))


@pytest.mark.parametrize("rows", [1, 24])
def test_a_nan_stays_in_its_rows(rows):
    built, (q, k, v) = module(block_per_row=2), tokens(24)
    q[-1, -1, :rows] = float("nan")
    out, expected = built(q, k, v), built.naive(q, k, v)
    assert out[-1, -1, :rows].isnan().all() and out[:, 0].isfinite().all() and out[0].isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "options", [{"scales": [8, 4, 1], "budgets": [3, 5]}, {"block_per_row": 2, "mode": "sparse"}], ids=str
)
def test_compiled_and_exported_equal_eager(options):
    built, qkv = module(**options), tuple(tokens(29))
    call = {"key_padding_mask": padding(29)}
    expected = built(*qkv, **call)
    torch.compiler.reset()
    agree(torch.compile(built, fullgraph=True, backend="eager")(*qkv, **call), expected, 1e-12)
    agree(torch.export.export(built, qkv, call).module()(*qkv, **call), expected, 1e-12)


# -- tiles -------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tiles_are_blocks_of_reordered_tokens(mode, prefix):
    rows, columns = 6, 8
    built = module(block_size=8, tile=[2, 4], num_blocks=9, mode=mode)
    qkv = tokens(prefix + rows * columns, grad=True)
    call = {"grid": (rows, columns), "num_prefix_tokens": prefix}
    forms_agree(built, qkv, **call)

    order = [
        (i, j)
        for x in range(0, rows, 2)
        for y in range(0, columns, 4)
        for i in range(x, x + 2)
        for j in range(y, y + 4)
    ]
    order = torch.tensor([prefix + i * columns + j for i, j in order])
    plain = module(block_size=8, num_blocks=9, mode=mode, prior_first=min(prefix, 1))
    # the prefix tokens, what fills their block, the tiles
    moved = [
        torch.cat((x[:, :, :prefix], x.new_zeros(B, H, -prefix % 8, D), x[:, :, order]), dim=2).detach() for x in qkv
    ]
    mask = torch.ones(B, moved[0].shape[2], dtype=torch.bool)
    if prefix:
        mask[:, prefix:8] = False
    expected = plain(*moved, key_padding_mask=mask)
    out = built(*qkv, **call)
    agree(out[:, :, order], expected[:, :, -rows * columns :])
    agree(out[:, :, :prefix], expected[:, :, :prefix])


def test_a_prefix_token_is_exact_both_ways():
    # 9 blocks of the prefix token, and 4 others
    built, (q, k, v) = module(tile=[2, 2], num_blocks=13), tokens(17)
    weights = built.attention_weights(q, k, v, grid=(4, 4), num_prefix_tokens=1)
    exact = (D**-0.5 * q @ k.mT).exp()
    agree(weights[:, :, 0], exact[:, :, 0] / exact[:, :, 0].sum(-1, keepdim=True))
    # exact entries of a row have one normaliser: the prefix token's is that of the 4 blocks of 4 x 4
    normaliser = exact / weights
    same = (normaliser - normaliser[..., :1]).abs() < 1e-9
    assert (same[:, :, 1:, 1:].sum((-1, -2)) == 4 * 16).all()


def test_tiles_of_whole_rows_are_the_raster_order():
    qkv = tokens(32)
    agree(module(block_size=8, tile=[1, 8])(*qkv, grid=(4, 8)), module(block_size=8)(*qkv))


def test_without_tiles_grid_and_prefix_tokens_are_ignored():
    qkv = tokens(25)
    agree(module()(*qkv, grid=(4, 6), num_prefix_tokens=1), module()(*qkv), 0)


def test_tiles_compile_and_export():
    built, qkv = module(tile=[2, 2], num_blocks=9), tuple(tokens(17))
    call = {"grid": (4, 4), "num_prefix_tokens": 1}
    torch.compiler.reset()
    agree(torch.compile(built, fullgraph=True, backend="eager")(*qkv, **call), built(*qkv, **call))
    agree(torch.export.export(built, qkv, call).module()(*qkv, **call), built(*qkv, **call))


# -- options and refusals ----------------------------------------------------------------------------------------------


def test_splits_are_capped_at_what_is_there():
    def splits(rows, columns, **options):
        return module(**options).options.splits(rows, columns)

    assert splits(8, 8) == [32] and splits(2, 8) == [8] and splits(2, 3) == [6]
    assert splits(8, 8, num_blocks=3) == [3] and splits(2, 2, num_blocks=9) == [4]
    assert splits(2, 3, scales=[8, 4, 1], budgets=[2, 99]) == [2, 8]


def test_no_state_and_nothing_learned():
    built = module()
    assert not built.state_dict() and not built.capabilities.learned and not built.capabilities.random
    assert not built.capabilities.packed and not built.capabilities.causal


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_per_row": -1}, {"num_blocks": -1}, {"mode": "coarse"}, {"selection": "best"}, {"prior_first": -1},
     {"prior_diag": -1}, {"prior_diag": True}, {"cross_attention": 1}, {"scales": [8, 1]}, {"budgets": [4]}, {"scales": [8, 4, 1], "budgets": [4]},
     {"scales": [8, 4, 1], "budgets": [4, -1]}, {"scales": [8, 3, 1], "budgets": [4, 4]}, {"scales": [8, 8], "budgets": [4]},
     {"scales": [8], "budgets": []}, {"scales": [], "budgets": []}, {"scales": [8, 0], "budgets": [4]}, {"scales": 8, "budgets": 4},
     {"scales": [8, 1.0], "budgets": [4]}, {"tile": [2, 3]}, {"tile": [4]}, {"tile": 4}, {"blocksize": 4}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="mra"):
        module(**options)


@pytest.mark.parametrize(
    "options,lengths,call,error,match",
    [
        ({}, (16, 16), {"is_causal": True}, Unsupported, "causal.*softmax or rfa"),
        ({}, (8, 16), {"is_causal": True}, Unsupported, "causal"),
        ({"prior_diag": 1}, (8, 16), {}, Unsupported, "N=8 queries and M=16 keys with prior_diag=1"),
        ({"tile": [2, 2]}, (16, 16), {}, Unsupported, "no grid was given"),
        ({"tile": [2, 2]}, (16, 8), {"grid": (4, 4)}, Unsupported, "N=16 queries and M=8 keys with tile"),
        ({"tile": [2, 2]}, (18, 18), {"grid": (3, 6)}, Unsupported, "no whole number of tiles"),
        ({"tile": [2, 2]}, (16, 16), {"grid": (0, 4)}, Unsupported, "no whole number of tiles"),
        ({"tile": [2, 2]}, (16, 16), {"grid": (2, 4)}, InvalidInput, "2 x 4"),
        ({"tile": [2, 2]}, (21, 21), {"grid": (4, 4), "num_prefix_tokens": 5}, Unsupported, "num_prefix_tokens=5"),
        ({"tile": [2, 2]}, (16, 16), {"grid": (4, 4), "key_padding_mask": torch.ones(B, 16).bool()}, Unsupported, "padding"),
        ({}, (16, 16), {"attention_mask": torch.ones(1, 1, 16, 16).bool()}, Unsupported, "attention_mask"),
    ],
)  # fmt: skip
def test_refused_calls(options, lengths, call, error, match):
    built = module(**options)
    for form in (built, built.naive):
        with pytest.raises(error, match=f"mra.*{match}"):
            form(*tokens(*lengths), **call)


def test_a_cross_attention_host_keeps_the_mask_off_the_queries():
    def fill(given, **host):
        return MultiResolutionAttention.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}) == {} and fill({}, cross=True) == {"cross_attention": True}
    assert fill({"cross_attention": False}, cross=True) == {}


def test_in_bert_values_and_checkpointed_gradients():
    """Lengths that are no multiple of the block, padding, and the recomputation of layers around that of blocks."""
    config = hf_attn.AttnBertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="mra", attention_options={"block_size": 4, "block_per_row": 2},
    )  # fmt: skip
    model = hf_attn.AttnBertModel(config, add_pooling_layer=False).double().train()
    batch = {"input_ids": torch.randint(0, 40, (2, 27)), "attention_mask": padding(27).long()}

    def run():
        model.zero_grad()
        out = model(**batch).last_hidden_state
        out.square().sin().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = run()
    model.gradient_checkpointing_enable()
    for a, b in zip(run(), plain, strict=True):
        agree(a, b)
    model.gradient_checkpointing_disable()
    for layer in model.encoder.layer:
        mechanism = layer.attention.self.mechanism
        mechanism.attend = mechanism.define
    for a, b in zip(run(), plain, strict=True):
        agree(a, b, 1e-8)
    model.set_attn_implementation("softmax")
    assert (run()[0] - plain[0]).abs().max() > 1e-4
