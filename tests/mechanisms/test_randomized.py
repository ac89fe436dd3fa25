"""Randomized attention: the invariants of its specification (numbered as there), the draws, the forms against each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import BERT, CROSS, GPT2, Largest, agree, cross_padding, cross_tokens, normal
from torch.nn import functional
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

B, H, N, M, D = CROSS
PROPOSALS = ["sample", "expected", "uniform"]


def module(**options):
    return hf_attn.build("randomized", num_heads=H, head_dim=D, **options).double()


CALLS = {
    "self": {},
    "causal": {"is_causal": True},
    "causal offset": {"queries": N, "is_causal": True},
    "cross": {"queries": N},
    "cross padding": {"queries": N, "key_padding_mask": cross_padding()},
    "causal padding": {"is_causal": True, "key_padding_mask": cross_padding()},
    "dense": {"attention_mask": normal(B, H, M, M) > -0.5},
    "bias": {"attention_mask": normal(1, 1, M, M).masked_fill(normal(1, 1, M, M, seed=5) > 1, -float("inf"))},
    "bias padding causal": {
        "attention_mask": normal(B, H, M, M),
        "key_padding_mask": cross_padding(),
        "is_causal": True,
    },
}


def prepared(case, grad=False):
    call = dict(CALLS[case])
    return cross_tokens(call.pop("queries", M), grad=grad), call


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("proposal,samples", list(itertools.product(PROPOSALS, [1, 3])))
@pytest.mark.parametrize("training", [False, True])
def test_efficient_equals_naive_with_gradients(case, proposal, samples, training):
    built = module(ra_proposal=proposal, ra_samples=samples).train(training)
    qkv, call = prepared(case, grad=True)
    results = []
    for form in (built, built.naive):
        torch.manual_seed(0)
        out = form(*qkv, **call)
        results.append((out, torch.autograd.grad((out * normal(*out.shape)).sum(), qkv)))
    agree(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        agree(a, b, 1e-8)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("case", CALLS)
def test_04_rows_are_convex_weights(proposal, case):
    built = module(ra_proposal=proposal, ra_samples=2)
    (q, k, v), call = prepared(case)
    weights = built.attention_weights(q, k, v, **call)
    assert (weights >= 0).all()
    agree(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    constant = v[:, :, :1].expand_as(v)
    agree(built(q, k, constant, **call), constant[:, :, : q.shape[2]], 1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_06_equal_keys_give_the_mean_of_the_visible_values(proposal):
    q, k, v = cross_tokens()
    mask = cross_padding()
    out = module(ra_proposal=proposal)(q, k[:, :, :1].expand_as(k), v, key_padding_mask=mask)
    mean = (v * mask[:, None, :, None]).sum(dim=2, keepdim=True) / mask.sum(dim=1)[:, None, None, None]
    agree(out, mean.expand_as(out), 1e-12)


def z_score(bias=None, draws=400_000, **options):
    """The largest distance of the mean over the draws from softmax attention, in standard errors."""
    torch.manual_seed(0)
    built = hf_attn.build("randomized", num_heads=1, head_dim=D, **options).double()
    q, k, v = (normal(1, 1, n, D, seed=s) for s, n in enumerate((1, 5, 5)))
    mask = None if bias is None else bias.expand(1, 1, draws, 5)
    with torch.no_grad():
        out = built(q.expand(1, 1, draws, D), k, v, attention_mask=mask)[0, 0]
    exact = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)[0, 0, 0]
    return ((out.mean(dim=0) - exact).abs() * draws**0.5 / out.std(dim=0)).max()


def test_07_exact_noise_is_unbiased_and_nothing_else_is():
    assert z_score() < 4.5
    assert z_score(noise_std="unit") > 20
    assert z_score(noise_std="none") > 20
    assert z_score(ra_proposal="expected") > 20
    assert z_score(ra_proposal="uniform") > 20


def test_07_samples_average_to_an_eighth_of_the_variance():
    built = [module(ra_samples=s) for s in (1, 8)]
    q, k, v = (x[:1, :1] for x in cross_tokens(1, 5))
    q, k, v = q.expand(B, H, 20_000, D), k.expand(B, H, -1, -1), v.expand(B, H, -1, -1)
    one, eight = (m(q, k, v).var(dim=2).mean() for m in built)
    assert 7 < one / eight < 9


@pytest.mark.parametrize("proposal", ["expected", "uniform"])
def test_09_permuting_the_keys_with_their_values_changes_nothing(proposal):
    built, (q, k, v), order = module(ra_proposal=proposal).eval(), cross_tokens(), torch.randperm(M)
    agree(built(q, k[:, :, order], v[:, :, order]), built(q, k, v), 1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_10_evaluation_is_deterministic_and_a_seed_decides_training(proposal):
    built, qkv = module(ra_proposal=proposal, ra_samples=2), cross_tokens()
    assert torch.equal(built.eval()(*qkv), built(*qkv))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(built.train()(*qkv))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_13_a_bias_in_both_places_stays_unbiased():
    bias = normal(1, 1, 1, 5, seed=7)
    assert z_score(bias) < 4.5
    assert z_score(bias, noise_std="unit") > 20


# -- the draws ---------------------------------------------------------------------------------------------------------


def test_the_index_is_drawn_from_softmax_over_the_visible_keys():
    draws, built = 100_000, hf_attn.build("randomized", num_heads=1, head_dim=D, ra_samples=2).double()
    q, k, v = (normal(1, 1, n, D, seed=s) for s, n in enumerate((1, 6, 6)))
    mask = torch.tensor([[True, True, False, True, True, False]])
    call = built._call(q.expand(1, 1, draws, D), k, v, key_padding_mask=mask)
    index = built.sample_index(call)
    assert index.shape == (1, 1, 2, draws) and (index[:, :, 0] != index[:, :, 1]).any()
    pi = (0.5 * q @ k.transpose(-1, -2)).masked_fill(~mask, -float("inf")).softmax(-1).flatten()
    for drawn in index[0, 0]:
        share = torch.bincount(drawn, minlength=6) / draws
        error = (pi * (1 - pi) / draws).sqrt()
        assert ((share - pi).abs() <= 4.5 * error).all(), "a hidden key has error 0"


@pytest.mark.parametrize("case", CALLS)
def test_hidden_keys_are_never_drawn(case):
    (q, k, v), call = prepared(case)
    built = module(ra_samples=50)
    checked = built._call(q, k, v, **call)
    weights = hf_attn.build("softmax", num_heads=H, head_dim=D).attention_weights(q, k, v, **call)
    if "padding causal" in case:  # softmax takes a mask that holds everything
        weights = torch.where(built.attention_weights(q, k, v, **call) > 0, 1.0, 0.0)
    drawn = weights[:, :, None].expand(-1, -1, 50, -1, -1).gather(-1, built.sample_index(checked)[..., None])
    assert (drawn > 0).all()


def test_evaluation_is_expected_without_noise_unless_something_is_given():
    built, qkv = module(ra_samples=3).eval(), cross_tokens()
    plain = built(*qkv)
    assert built.directions(built._call(*qkv)).shape[2] == 1, "the same sample three times is wasted work"
    agree(plain, module(ra_proposal="expected", noise_std="none").train()(*qkv), 1e-12)
    index = torch.randint(M, (B, H, 3, N))
    for given in ({"noise": normal(B, H, 3, N, D)}, {"key_index": index}):
        assert (built(*qkv, **given) - plain).abs().max() > 1e-3
    noisy = module(noise_at_eval=True).eval()
    assert not torch.equal(noisy(*qkv), noisy(*qkv))


def test_noise_and_index_that_are_given_are_used_and_nothing_is_drawn():
    qkv, index, noise = cross_tokens(), torch.randint(M, (B, H, 2, N)), normal(B, H, 2, N, D)
    built = module(ra_samples=2)
    agree(built(*qkv, noise=noise, key_index=index), built.eval()(*qkv, noise=noise, key_index=index), 0)
    quiet = module(ra_samples=2, noise_std="none")
    agree(quiet(*qkv, key_index=index), built(*qkv, noise=0 * noise, key_index=index), 1e-12)
    assert not torch.equal(built(*qkv, key_index=index), built(*qkv, key_index=index))
    unit, scaled = module(ra_samples=2, noise_std="unit"), {"scaling": 0.25, "key_index": index}
    agree(unit(*qkv, noise=2 * noise, **scaled), built(*qkv, noise=noise, **scaled), 1e-12)


def test_uniform_centres_on_the_mean_of_the_keys_each_query_sees():
    built = module(ra_proposal="uniform", noise_std="none").eval()
    for case in ("causal offset", "causal padding", "dense", "cross padding"):
        (q, k, v), call = prepared(case)
        checked = built._call(q, k, v, **call)
        visible = checked.visible().expand(B, H, q.shape[2], -1)
        directions = built.directions(checked).squeeze(2)
        for b, h, n in itertools.product(range(B), range(H), range(q.shape[2])):
            agree(directions[b, h, n], q[b, h, n] + k[b, h, visible[b, h, n]].mean(dim=0), 1e-12)


# -- masks, extremes, cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_padding_equals_removing_the_keys(proposal):
    built, (q, k, v), mask = module(ra_proposal=proposal).eval(), cross_tokens(), cross_padding()
    noisy = [torch.where(mask[:, None, :, None], x, 50.0) for x in (k, v)]
    out = built(q, *noisy, key_padding_mask=mask)
    for b in range(B):
        kept = [x[b : b + 1][:, :, mask[b]] for x in (k, v)]
        agree(out[b : b + 1], built(q[b : b + 1], *kept), 1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_queries_without_keys_give_zeros_and_finite_gradients(proposal):
    built, qkv = module(ra_proposal=proposal, ra_samples=2), cross_tokens(M, grad=True)
    mask, shown = cross_padding(), torch.ones(1, 1, M, M, dtype=torch.bool)
    mask[1], shown[..., 3, :] = False, False
    for call in ({"key_padding_mask": mask}, {"attention_mask": shown}, {"key_padding_mask": mask, "is_causal": True}):
        for form in (built, built.naive):
            out = form(*qkv, **call)
            assert not (out[1] if "key_padding_mask" in call else out[:, :, 3]).any() and out[0].any()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), qkv))


def test_the_same_noise_causal_with_fewer_queries_is_the_end_of_the_full_call():
    built, qkv = module(ra_samples=2), cross_tokens(M)
    noise, index = normal(B, H, 2, M, D), torch.zeros(B, H, 2, M, dtype=torch.int64)
    full = built(*qkv, noise=noise, key_index=index, is_causal=True)
    last = built(qkv[0][:, :, -4:], *qkv[1:], noise=noise[..., -4:, :], key_index=index[..., -4:], is_causal=True)
    agree(last, full[:, :, -4:], 1e-12)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_long_vectors(proposal):
    built, (q, k, v) = module(ra_proposal=proposal), cross_tokens()
    noise, index = normal(B, H, 1, N, D), torch.randint(M, (B, H, 1, N))
    given = {"noise": noise, **({"key_index": index} if proposal == "sample" else {})}
    for factor in (40, 1500):
        out = built(factor * q, factor * k, v, **given)
        agree(out, built.naive(factor * q, factor * k, v, **given), 1e-9)
        assert out.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("proposal", ["expected", "uniform"])
def test_no_matrix_of_all_pairs_is_stored_with_gradients_either(proposal):
    built, qkv = module(ra_proposal=proposal), cross_tokens(256, 256, grad=True)
    with Largest() as largest:
        built(*qkv).sum().backward()
    assert largest.numel <= B * H * 256 * 8


# -- options, refusals, models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"ra_proposal": "mean"}, {"ra_samples": 0}, {"ra_samples": 1.0}, {"noise_std": "half"}, {"noise_at_eval": 1},
     {"samples": 2}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="randomized"):
        module(**options)


@pytest.mark.parametrize(
    "options,call,error,match",
    [
        ({}, {"noise": normal(B, H, 2, N, D)}, InvalidInput, r"noise must be \(B,H,S,N,D\) = \(2, 2, 1, 7, 4\)"),
        ({}, {"key_index": torch.zeros(B, H, 1, M, dtype=torch.int64)}, InvalidInput, "key_index must be int64"),
        ({}, {"key_index": torch.zeros(B, H, 1, N)}, InvalidInput, "float32"),
        ({}, {"key_index": torch.full((B, H, 1, N), M)}, InvalidInput, "from 0 to 10"),
        ({}, {"key_index": torch.full((B, H, 1, N), -1)}, InvalidInput, "from 0 to 10"),
        ({"ra_proposal": "uniform"}, {"key_index": torch.zeros(B, H, 1, N, dtype=torch.int64)}, Unsupported, "uniform"),
    ],
)
def test_refused_calls(options, call, error, match):
    with pytest.raises(error, match=match):
        module(**options)(*cross_tokens(), **call)


def test_decoding_needs_a_full_cache():
    with pytest.raises(Unsupported, match="randomized.*full cache"):
        module().step(*cross_tokens(M), None)


def test_models_take_it_by_name_and_generation_with_a_cache_equals_the_full_pass():
    bert = BertModel(BertConfig(**BERT, attn_implementation="randomized")).eval()
    ids, mask = torch.randint(1, 99, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    hidden = bert(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[:1, :7], bert(ids[:1, :7]).last_hidden_state)

    gpt2 = hf_attn.convert(GPT2LMHeadModel(GPT2Config(**GPT2)), "randomized").eval()
    full = gpt2(ids).logits
    first = gpt2(ids[:, :8], use_cache=True)
    rest = gpt2(ids[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), full)
