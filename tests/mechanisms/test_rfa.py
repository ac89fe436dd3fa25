"""RFA: the invariants of its specification (numbered as there), the draw and its redraw policies, the official form."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import CROSS, agree, cross_padding, cross_tokens, normal
from torch.nn import functional

import hf_attn
from hf_attn import functional as shared
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.functional import random_directions

B, H, N, M, D = CROSS
MAPS = ["positive", "relu", "relu-only", "elu1"]


def module(seed=0, **options):
    torch.manual_seed(seed)
    return hf_attn.build("rfa", num_heads=H, head_dim=D, **{"num_features": 6, **options}).double()


def features(built, x, scale=D**-0.5):
    """phi(x) as the specification has it, without logarithms."""
    options = built.options
    if options.feature_map == "elu1":
        return functional.elu(x) + 1
    if options.feature_map == "relu-only":
        return x.relu() + 0.1
    projected = scale**0.5 * torch.einsum("bhnd,hfd->bhnf", x, built.projection)
    if options.feature_map == "relu":
        return (options.num_features**-0.5 * projected).relu() + 1e-3
    return (projected - scale / 2 * x.square().sum(-1, keepdim=True)).exp()


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", MAPS)
def test_01_loops_equal_the_log_space_form(feature_map):
    built, (q, k, v) = module(feature_map=feature_map).eval(), cross_tokens()
    phi_q, phi_k = features(built, q), features(built, k)
    expected = torch.zeros_like(q)
    for b, h, n in itertools.product(range(B), range(H), range(N)):
        weights = torch.stack([phi_q[b, h, n] @ phi_k[b, h, m] for m in range(M)])
        expected[b, h, n] = weights @ v[b, h] / weights.sum()
    agree(built(q, k, v), expected, 1e-12)
    agree(built.naive(q, k, v), expected, 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_01_masked_equals_keys_removed(feature_map):
    built, (q, k, v), mask = module(feature_map=feature_map).eval(), cross_tokens(), cross_padding()
    noisy = [torch.where(mask[:, None, :, None], x, 50.0) for x in (k, v)]
    out = built(q, *noisy, key_padding_mask=mask)
    for b in range(B):
        kept = [x[b : b + 1][:, :, mask[b]] for x in (k, v)]
        agree(out[b : b + 1], built(q[b : b + 1], *kept), 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_01_causal_equals_the_recurrence(feature_map):
    built, (q, k, v) = module(feature_map=feature_map).eval(), cross_tokens(M)
    phi_q, phi_k = features(built, q), features(built, k)
    mass, total, outs = 0, 0, []
    for n in range(M):
        mass = mass + phi_k[:, :, n]
        total = total + phi_k[:, :, n, :, None] * v[:, :, n, None]
        weighted = (phi_q[:, :, n, None] @ total)[:, :, 0]
        outs.append(weighted / (phi_q[:, :, n] * mass).sum(-1, keepdim=True))
    expected = torch.stack(outs, dim=2)
    agree(built(q, k, v, is_causal=True), expected, 1e-12)
    state, steps = None, []
    for n in range(M):
        step, state = built.step(*(x[:, :, n : n + 1] for x in (q, k, v)), state)
        steps.append(step)
    agree(torch.cat(steps, dim=2), expected, 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(
    "call", [{}, {"is_causal": True}, {"key_padding_mask": cross_padding()}], ids=["", "causal", "pad"]
)
def test_04_rows_are_convex_weights(feature_map, call):
    built, (q, k, v) = module(feature_map=feature_map), cross_tokens(M)
    weights = built.eval().attention_weights(q, k, v, **call)
    assert (weights >= 0).all()
    agree(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    constant = v[:, :, :1].expand_as(v)
    agree(built.train()(q, k, constant, **call), constant, 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_06_equal_keys_give_the_mean_of_the_values(feature_map):
    (q, k, v), mask = cross_tokens(), cross_padding()
    out = module(feature_map=feature_map)(q, k[:, :, :1].expand_as(k), v, key_padding_mask=mask)
    mean = (v * mask[:, None, :, None]).sum(dim=2, keepdim=True) / mask.sum(dim=1)[:, None, None, None]
    agree(out, mean.expand_as(out), 1e-12)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_08_many_features_tend_to_softmax_for_short_vectors(orthogonal):
    q, k, v = cross_tokens()
    q, k = q / 2, k / 2
    exact = functional.scaled_dot_product_attention(q, k, v)
    many = module(num_features=200_000, orthogonal=orthogonal).eval()
    assert (many(q, k, v) - exact).abs().max() < 3e-2
    assert (module(num_features=20).eval()(q, k, v) - exact).abs().max() > 3e-2


@pytest.mark.parametrize("feature_map", MAPS)
def test_09_permuting_the_keys_with_their_values_changes_nothing(feature_map):
    built, (q, k, v), order = module(feature_map=feature_map).eval(), cross_tokens(), torch.randperm(M)
    agree(built(q, k[:, :, order], v[:, :, order]), built(q, k, v), 1e-12)


# -- the draw and its policies (invariant 10) --------------------------------------------------------------------------


def test_10_fresh_draws_in_training_only():
    built, qkv = module(redraw="fresh"), cross_tokens()
    before = built.projection.clone()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(built.train()(*qkv))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(built.eval()(*qkv), built(*qkv)), "evaluation never draws"
    assert torch.equal(built.projection, before), "and the buffer stays"
    agree(built(*qkv), built(*qkv, noise=before), 0)


@pytest.mark.parametrize("redraw", ["fixed", "learnable"])
def test_10_fixed_and_learnable_draw_once(redraw):
    built, qkv = module(redraw=redraw), cross_tokens()
    agree(built.train()(*qkv), built.eval()(*qkv), 0)
    assert set(dict(built.named_parameters())) == ({"projection"} if redraw == "learnable" else set())
    assert set(built.state_dict()) == {"projection"}


@pytest.mark.parametrize("feature_map", ["positive", "relu"])
def test_learnable_directions_have_the_gradient_of_the_definition(feature_map):
    built, qkv = module(redraw="learnable", feature_map=feature_map), cross_tokens()
    weight = normal(B, H, N, D)
    efficient, naive = (
        torch.autograd.grad((form(*qkv) * weight).sum(), built.projection)[0] for form in (built, built.naive)
    )
    assert efficient.abs().max() > 1e-4
    agree(efficient, naive, 1e-8)


@pytest.mark.parametrize("given", [False, True])
def test_a_state_keeps_the_directions_it_began_with(given):
    built, (q, k, v), z = module(redraw="fresh").train(), cross_tokens(M), normal(H, 6, D)
    torch.manual_seed(3)
    full = built(q, k, v, is_causal=True, **({"noise": z} if given else {}))
    torch.manual_seed(3)
    state, steps, sizes = None, [], set()
    for part in (slice(0, 6), slice(6, 7), slice(7, M)):
        noise = {"noise": z} if given and part.start != 6 else {}
        step, state = built.step(*(x[:, :, part] for x in (q, k, v)), state, **noise)
        steps.append(step)
        sizes.add(sum(t.numel() for t in state.values()))
        assert all(t.shape[0] == B for t in state.values())
    agree(torch.cat(steps, dim=2), full, 1e-12)
    assert len(sizes) == 1 and (full - built.eval()(q, k, v, is_causal=True)).abs().max() > 1e-3


@pytest.mark.parametrize("features", [3, 4, 10])
def test_the_draw_is_orthogonal_in_blocks_of_d(features):
    built = module(num_features=features)
    for z in (built.projection, built.directions(torch.device("cpu")).double()):
        assert z.shape == (H, features, D)
        gram = z @ z.transpose(-1, -2)
        block = torch.arange(features) // D
        same = (block[:, None] == block) & ~torch.eye(features, dtype=torch.bool)
        assert gram[:, same].abs().max() < 1e-5 if same.any() else True
        assert features <= D or gram[:, block[:, None] != block].abs().max() > 1e-2
    iid = module(num_features=4, orthogonal=False).projection
    assert (iid @ iid.transpose(-1, -2) - torch.diag_embed(iid.square().sum(-1))).abs().max() > 1e-2


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_row_of_the_draw_is_standard_normal(orthogonal):
    z = random_directions(20_000, 4, D, orthogonal).double()
    error = 20_000**-0.5
    for row in z.unbind(1):
        assert row.mean(dim=0).abs().max() < 5 * error
        assert (row.T @ row / 20_000 - torch.eye(D)).abs().max() < 5 * 2**0.5 * error
        assert abs(row.square().sum(-1).var() - 2 * D) < 0.5  # of chi-squared with D degrees of freedom


def test_noise_stands_for_the_directions_of_one_call():
    built, qkv, z = module(), cross_tokens(), normal(H, 6, D)
    other = module(seed=1)
    assert not torch.equal(built.projection, other.projection)
    for mode in (True, False):
        agree(built.train(mode)(*qkv, noise=z), other.train(mode)(*qkv, noise=z), 0)
    agree(built(*qkv, noise=z, scaling=0.3), built(*(x * (0.3 * D**0.5) ** 0.5 for x in qkv[:2]), qkv[2], noise=z))


# -- extremes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("factor", [40, 1500])
def test_long_vectors(feature_map, is_causal, factor):
    built, (q, k, v) = module(feature_map=feature_map).eval(), cross_tokens(M)
    q, k = factor * q, factor * k
    if feature_map == "positive":
        assert built.log_features(built._call(q, k, v))[1].amin() < -1000
    out = built(q, k, v, is_causal=is_causal)
    agree(out, built.naive(q, k, v, is_causal=is_causal), 1e-9)
    assert out.abs().sum(-1).gt(0).all()


def test_a_sample_without_keys_gives_zeros_and_finite_gradients():
    qkv, mask = cross_tokens(M, grad=True), cross_padding()
    mask[1] = False
    for options in ({}, {"official_compat": True}):
        with torch.autograd.set_detect_anomaly(True):  # not on the way back either
            out = module(**options)(*qkv, key_padding_mask=mask)
            grads = torch.autograd.grad(out.square().sum(), qkv)
        assert not out[1].any() and out[0].any()
        assert all(g.isfinite().all() for g in grads)


# -- the official form -------------------------------------------------------------------------------------------------


def official(q, k, v, z, scale, mask=None):
    """The official code's features and normaliser, sample by sample over the real keys."""
    outs = []
    for b in range(B):
        real = slice(None) if mask is None else mask[b]
        query, key, value = q[b], k[b][:, real], v[b][:, real]
        dash_q, dash_k = (scale**0.5 * x @ z.transpose(-1, -2) for x in (query, key))
        diag_q, diag_k = (scale * x.square().sum(-1, keepdim=True) / 2 for x in (query, key))
        ratio = z.shape[1] ** -0.5
        phi_q = ratio * (dash_q - diag_q - dash_q.amax(-1, keepdim=True)).exp() + 1e-4
        phi_k = ratio * (dash_k - diag_k - dash_k.amax((-1, -2), keepdim=True)).exp() + 1e-4
        normaliser = (phi_q * phi_k.sum(dim=1, keepdim=True)).sum(-1, keepdim=True)
        outs.append(phi_q @ (phi_k.transpose(-1, -2) @ value) / normaliser.clamp(min=1e-2))
    return torch.stack(outs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_official_compat_has_the_epsilon_and_the_clamp(masked, factor):
    built, (q, k, v) = module(official_compat=True).eval(), cross_tokens()
    q, k, call = factor * q, factor * k, {"key_padding_mask": cross_padding()} if masked else {}
    expected = official(q, k, v, built.projection, D**-0.5, *call.values())
    noisy = [torch.where(cross_padding()[:, None, :, None], x, 50.0) for x in (k, v)] if masked else (k, v)
    for form in (built, built.naive):
        agree(form(q, *noisy, **call), expected, 1e-12)


def test_official_compat_gradients_and_weights():
    built, qkv = module(official_compat=True, redraw="learnable"), cross_tokens(grad=True)
    mask, weight = cross_padding(), normal(B, H, N, D)
    grads = [
        torch.autograd.grad((form(*qkv, key_padding_mask=mask) * weight).sum(), [*qkv, built.projection])
        for form in (built, built.naive)
    ]
    for a, b in zip(*grads, strict=True):
        agree(a, b, 1e-8)
    weights = built.attention_weights(*qkv, key_padding_mask=mask)
    agree(weights @ qkv[2], built(*qkv, key_padding_mask=mask))
    long = built.attention_weights(4 * qkv[0], 4 * qkv[1], qkv[2]).sum(-1)
    assert long.min() < 0.9 and long.max() < 1 + 1e-12, "the clamp takes mass away"


def test_official_compat_approaches_the_log_space_form_where_epsilon_is_small():
    (q, k, v), z = cross_tokens(), normal(H, 6, D)
    q, k = q / 10, k / 10
    plain, compat = module()(q, k, v, noise=z), module(official_compat=True)(q, k, v, noise=z)
    assert 1e-7 < (plain - compat).abs().max() < 1e-3


@pytest.mark.parametrize("keys", [N, M, 5])
def test_official_compat_refuses_causal_order_and_decoding(keys):
    built = module(official_compat=True)
    assert not built.capabilities.causal and built.capabilities.decode == "none"
    with pytest.raises(Unsupported, match="rfa.*official_compat=True.*future"):
        built(*cross_tokens(keys=keys), is_causal=True)
    with pytest.raises(Unsupported, match="rfa.*official_compat"):
        built.step(*cross_tokens(N, N), None)


# -- options and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"feature_map": "tanh"}, {"num_features": 0}, {"orthogonal": 1}, {"redraw": "never"}, {"official_compat": 1},
     {"official_compat": True, "feature_map": "elu1"}, {"official_compat": True, "feature_map": "relu"}, {"features": 4}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="rfa"):
        module(**options)


def test_refused_calls():
    with pytest.raises(InvalidInput, match=r"noise must be \(H,F,D\) = \(2,6,4\)"):
        module()(*cross_tokens(), noise=normal(H, 5, D))
    with pytest.raises(Unsupported, match="rfa.*elu1.*no random features"):
        module(feature_map="elu1")(*cross_tokens(), noise=normal(H, 6, D))
    with pytest.raises(Unsupported, match="rfa.*N=7 queries and M=5 keys"):
        module()(*cross_tokens(keys=5), is_causal=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_chunks_with_one_reference_equal_halving(spread, padded, monkeypatch):
    """Log weights up to the limit of one reference, over several chunks and spans, after a state."""
    torch.manual_seed(1)
    log_query, log_key = (spread * torch.randn(2, 3, 300, 8, dtype=torch.float64) for _ in range(2))
    value, mask = torch.randn(2, 3, 300, 5, dtype=torch.float64), None
    if padded:
        mask = torch.rand(2, 300) > 0.3
        mask[1, :70] = False
    results = []
    for limit in (shared.NARROW, -1.0):
        monkeypatch.setattr(shared, "NARROW", limit)
        leaves = [x.clone().requires_grad_() for x in (log_query, log_key, value)]
        _, state = shared.causal_linear_attention(
            *(x[:, :, :50] for x in leaves), None if mask is None else mask[:, :50]
        )
        out, after = shared.causal_linear_attention(
            *(x[:, :, 50:] for x in leaves), None if mask is None else mask[:, 50:], state
        )
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves), *after.values()])
    assert 0 < (log_key.amax(2) - log_key.amin(2)).max() < 60
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_keys_too_far_apart_for_one_reference_go_by_halving():
    near, far = (
        torch.zeros(1, 1, 1, 4, 2),
        torch.tensor([0.0, -50.0, 0.0, 0.0]).view(1, 1, 1, 4, 1).expand(-1, -1, -1, -1, 2),
    )
    assert shared._narrow(near, near.amax(3)) and not shared._narrow(far, far.amax(3))
    hidden = near.masked_fill(torch.tensor([True, False, False, False]).view(4, 1), float("-inf"))
    assert shared._narrow(hidden, hidden.amax(3)), "hidden keys do not count"
    assert shared._narrow(near - float("inf"), near.amax(3) - float("inf")), "nor does a chunk without keys"
