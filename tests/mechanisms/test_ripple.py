"""Ripple attention: the invariants of its specification (numbered as there), the refusals, the forms against each other."""

from __future__ import annotations

import itertools

import pytest
import torch

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms.ripple import RippleAttention, RippleOptions

B, H, D = 2, 2, 4
GRIDS = [(5, 7), (4, 4), (1, 6), (6, 1)]
SCHEMES = ["stick_query", "stick_static", "softmax", "decay", "truncated", "uniform"]
STICKS = SCHEMES[:2]


def module(seed=0, scatter=1.0, **options):
    """A float64 module whose parameters are drawn, not at their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("ripple", num_heads=H, head_dim=D, **{"r_cap": 3, **options}).double()
    built.reset_parameters()  # the start in full precision
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(scatter * torch.randn_like(parameter))
    return built


def twin(built, **options):
    """The same parameters under other options."""
    other = hf_attn.build("ripple", num_heads=H, head_dim=D, **{**built.options.changed(), **options}).double()
    other.load_state_dict(built.state_dict())
    return other


def tokens(n, seed=1, grad=False, batch=B):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, H, n, D, dtype=torch.float64, generator=generator).requires_grad_(grad) for _ in range(3)
    ]


def padding(n, seed=2):
    """Each sample has padded and real tokens."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0], mask[:, -1] = True, False
    return mask


def gradients(form, built, qkv, **call):
    out = form(*qkv, **call)
    rows = call.get("key_padding_mask")
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    weight = weight if rows is None else weight * rows[:, None, :, None]
    leaves = [*qkv, *built.parameters()]
    return out, torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)


def agree(a, b, tolerance=1e-10, rows=None):
    if rows is not None:
        a, b = a.transpose(1, 2)[rows], b.transpose(1, 2)[rows]
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def forms_agree(options, grid, prefix, masked, grads=True):
    built = module(ripple_impl="quadratic", **options)
    n = prefix + (grid[0] * grid[1] if grid else 9)
    qkv = tokens(n, grad=True)
    call = {"grid": grid, "num_prefix_tokens": prefix, "key_padding_mask": padding(n) if masked else None}
    forms = {"naive": (built.naive, built), "quadratic": (built, built)}
    if options.get("ripple_kernel") != "softmax":
        sat = twin(built, ripple_impl="sat")
        forms["sat"] = (sat, sat)
    expected, expected_grads = gradients(*forms.pop("naive"), qkv, **call)
    for form, owner in forms.values():
        out, grad = gradients(form, owner, qkv, **call)
        agree(out, expected, rows=call["key_padding_mask"])
        assert out.isfinite().all()
        for a, b in zip(grad, expected_grads, strict=True):
            if a is not None or b is not None:
                agree(torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b, 1e-8)


# -- the twelve invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid,masked", list(itertools.product(GRIDS, [False, True])))
@pytest.mark.parametrize("tau", [0, 0.05, 0.3, 1])
def test_01_sat_equals_naive(grid, masked, tau):
    for cap, tail in ((1, "share"), (3, "spread"), (9, "share")):
        forms_agree({"r_cap": cap, "tau": tau, "tail": tail}, grid, 1, masked)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("options", [{"ripple_weights": "uniform"}, {}, {"ripple_weights": "stick_static"}], ids=str)
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
def test_02_constant_alpha_and_the_uniform_start_are_linear_attention(options, prefix, impl):
    built = module(scatter=0, r_cap=6, ripple_impl=impl, **options)
    linear = hf_attn.build("rfa", num_heads=H, head_dim=D, feature_map="elu1")
    qkv = tokens(35 + prefix)
    agree(built(*qkv, grid=(5, 7), num_prefix_tokens=prefix), linear(*qkv), 1e-12)


def test_03_a_common_factor_of_alpha_changes_nothing():
    built, qkv = module(ripple_weights="softmax"), tokens(35)
    expected = built(*qkv, grid=(5, 7))
    original = built.log_alpha
    for impl in ("quadratic", "sat"):
        shifted = twin(built, ripple_impl=impl)
        shifted.log_alpha = lambda call: original(call) + 3 * call.query[..., :1]
        agree(shifted(*qkv, grid=(5, 7)), expected, 1e-11)


@pytest.mark.parametrize("impl", ["quadratic", "sat"])
@pytest.mark.parametrize("kernel", ["linear", "softmax"])
def test_04_only_ring_zero_returns_the_values(impl, kernel):
    if (impl, kernel) == ("sat", "softmax"):
        pytest.skip("refused at build")
    built = module(ripple_weights="truncated", r_cap=1, ripple_impl=impl, ripple_kernel=kernel)
    qkv = tokens(35)
    agree(built(*qkv, grid=(5, 7)), qkv[2], 1e-11)


@pytest.mark.parametrize("scheme", STICKS)
def test_05_tau_off_and_no_cap_keep_every_stick(scheme):
    built, qkv = module(ripple_weights=scheme, r_cap=6), tokens(35)
    nearly = twin(built, tau=1e-300)
    agree(nearly(*qkv, grid=(5, 7)), built(*qkv, grid=(5, 7)), 1e-12)


@pytest.mark.parametrize("scheme", [*STICKS, "softmax"])
def test_06_weights_of_the_rings_sum_to_one(scheme):
    built = module(ripple_weights=scheme, r_cap=6)
    alpha = built.log_alpha(built._call(*tokens(35), grid=(5, 7))).exp()
    assert (alpha >= 0).all()
    agree(alpha.sum(-1), torch.ones_like(alpha[..., 0]), 1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
def test_07_flips_and_transposition_commute(scheme, impl):
    built, qkv = module(ripple_weights=scheme, ripple_impl=impl), tokens(16)
    moves = [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)]
    expected = built(*qkv, grid=(4, 4)).unflatten(2, (4, 4))
    for move in moves:
        moved = [move(x.unflatten(2, (4, 4))).flatten(2, 3) for x in qkv]
        agree(built(*moved, grid=(4, 4)), move(expected).flatten(2, 3), 1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", ["linear", "softmax"])
def test_08_one_row_is_the_sequence_and_causal_equals_its_prefixes(scheme, kernel):
    built = module(ripple_weights=scheme, ripple_kernel=kernel, allow_1d=True)
    qkv = tokens(11)
    agree(built(*qkv), built(*qkv, grid=(1, 11)), 1e-12)
    causal = built(*qkv, is_causal=True)
    agree(built.naive(*qkv, is_causal=True), causal, 1e-11)
    for t in range(1, 12):
        first = [x[:, :, :t] for x in qkv]
        agree(built(*first, is_causal=True), causal[:, :, :t], 1e-11)
        agree(built(*first)[:, :, -1], causal[:, :, t - 1], 1e-11)
    changed = [torch.cat((x[:, :, :-1], 100 * x[:, :, -1:]), dim=2) for x in qkv]
    assert torch.equal(built(*changed, is_causal=True)[:, :, :-1], causal[:, :, :-1])


def test_08_causal_recurrence_with_a_window_of_rings():
    built = module(ripple_weights="stick_static", allow_1d=True)
    q, k, v = tokens(11)
    features_q, features_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    alpha = built.log_alpha(built._call(q, k, v)).exp()[0, :, 0]
    tail = torch.zeros(B, H, D, D + 1, dtype=torch.float64)
    pairs, out = [], []
    for t in range(11):
        pairs.insert(
            0, features_k[:, :, t, :, None] * torch.nn.functional.pad(v[:, :, t], (0, 1), value=1.0)[:, :, None]
        )
        if len(pairs) > 3:
            tail = tail + pairs.pop()
        state = alpha[:, 3, None, None] * tail + sum(alpha[:, r, None, None] * pair for r, pair in enumerate(pairs))
        y = (features_q[:, :, t, None] @ state)[:, :, 0]
        out.append(y[..., :D] / y[..., D:])
    agree(built(q, k, v, is_causal=True), torch.stack(out, dim=2), 1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
def test_09_constant_values_come_out(scheme, impl):
    built = module(ripple_weights=scheme, ripple_impl=impl, ripple_cls="learned")
    q, k, v = tokens(36)
    v = v[:, :, :1].expand_as(v)
    agree(built(q, k, v, grid=(5, 7), num_prefix_tokens=1), v, 1e-12)


def test_10_positive_features_tend_to_the_softmax_kernel():
    torch.manual_seed(0)
    qkv = [x / 4 for x in tokens(12)]
    exact = module(ripple_kernel="softmax")
    many = hf_attn.build(
        "ripple", num_heads=H, head_dim=D, r_cap=3, feature_map="positive", num_features=50_000
    ).double()
    many.load_state_dict({**exact.state_dict(), "projection": many.projection})
    agree(many(*qkv, grid=(3, 4)), exact(*qkv, grid=(3, 4)), 1e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_11_uniform_with_the_softmax_kernel_is_sdpa(masked):
    built, qkv = module(ripple_weights="uniform", ripple_kernel="softmax"), tokens(37)
    mask = padding(37) if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        *qkv, attn_mask=None if mask is None else mask[:, None, None]
    )
    agree(built(*qkv, grid=(5, 7), num_prefix_tokens=2, key_padding_mask=mask), expected, 1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prefix,masked", list(itertools.product([0, 1, 2], [False, True])))
def test_12_values_and_gradients_of_all_forms_agree(scheme, prefix, masked):
    options = {"ripple_weights": scheme, "ripple_cls": "learned"}
    for grid, cap in (((3, 4), 2), ((5, 7), 2), ((4, 4), 8)):
        forms_agree({**options, "r_cap": cap}, grid, prefix, masked)
    forms_agree({**options, "ripple_kernel": "softmax"}, (3, 4), prefix, masked)
    if not prefix:
        forms_agree({**options, "allow_1d": True}, None, 0, masked)


# -- feature maps, padding, extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["elu1", "mlp_fourier", "positive"])
def test_feature_maps(feature_map):
    forms_agree({"feature_map": feature_map, "num_features": 6}, (3, 5), 1, True)


def test_uncapped_decay_in_all_forms():
    forms_agree({"ripple_weights": "decay", "r_cap": None}, (5, 7), 1, False)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
def test_a_wholly_padded_sample_gives_zeros_and_finite_gradients(scheme, impl):
    built, qkv = module(ripple_weights=scheme, ripple_impl=impl), tokens(13, grad=True)
    mask = padding(13)
    mask[1] = False
    call = {"grid": (3, 4), "num_prefix_tokens": 1, "key_padding_mask": mask}
    for form in (built, built.naive):
        out = form(*qkv, **call)
        assert (out[1] == 0).all()
        grads = torch.autograd.grad(out.sum(), [*qkv, *built.parameters()], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_of_a_sequence_equals_cutting_it(scheme, impl, left):
    built, qkv = module(ripple_weights=scheme, ripple_impl=impl, allow_1d=True, r_cap=12), tokens(11)
    mask = torch.ones(B, 11, dtype=torch.bool)
    real = slice(4, 11) if left else slice(0, 7)
    mask[:] = False
    mask[:, real] = True
    agree(built(*qkv, key_padding_mask=mask)[:, :, real], built(*(x[:, :, real] for x in qkv)), 1e-10)
    noisy = [torch.where(mask[:, None, :, None], x, 50.0) for x in qkv]
    agree(built(*noisy, key_padding_mask=mask), built(*qkv, key_padding_mask=mask), 1e-10, rows=mask)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", ["linear", "softmax"])
def test_long_vectors_neither_overflow_nor_lose_a_row(scheme, kernel):
    built = module(ripple_weights=scheme, ripple_kernel=kernel, r_cap=1 if scheme == "truncated" else 3)
    qkv = [x * f for x, f in zip(tokens(36), (1500, 1500, 1), strict=True)]
    call = {"grid": (5, 7), "num_prefix_tokens": 1}
    agree(built(*qkv, **call), built.naive(*qkv, **call), 1e-9)
    assert built(*qkv, **call).abs().sum(-1).gt(0).all()


def test_a_larger_grid_than_the_tables_hold_takes_turns(monkeypatch):
    monkeypatch.setattr("hf_attn.mechanisms.ripple.SAT_NUMBERS", 1)
    forms_agree({}, (5, 7), 1, True)


def test_auto_takes_the_tables_for_many_tokens(monkeypatch):
    built, qkv = module(r_cap=2), tokens(35)
    expected = built(*qkv, grid=(5, 7))
    monkeypatch.setattr("hf_attn.mechanisms.ripple.SAT_FROM", {"inference": 0, "training": 0})
    monkeypatch.setattr(RippleAttention, "_quadratic", None)
    agree(built(*qkv, grid=(5, 7)), expected)


def test_the_implied_weights_are_those_of_the_definition():
    built, qkv = module(ripple_cls="learned"), tokens(36)
    call = {"grid": (5, 7), "num_prefix_tokens": 1}
    weights = built.attention_weights(*qkv, **call)
    agree(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-12)
    agree(weights @ qkv[2], built(*qkv, **call))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("impl", ["quadratic", "sat"])
def test_lower_precision(dtype, tolerance, impl):
    built, qkv = module(ripple_impl=impl, feature_map="mlp_fourier"), tokens(36)
    call = {"grid": (5, 7), "num_prefix_tokens": 1}
    expected = built(*qkv, **call)
    out = built.to(dtype)(*(x.to(dtype) for x in qkv), **call)
    assert out.dtype == dtype
    agree(out.double(), expected, tolerance)


# -- parameters, options, refusals -------------------------------------------------------------------------------------


def test_state_dict_and_start():
    shapes = {
        "stick_query": {"ring_query": (H, 3, D), "ring_bias": (H, 3)},
        "stick_static": {"ring_bias": (H, 3)},
        "softmax": {"ring_query": (H, 4, D), "ring_bias": (H, 4)},
        "decay": {"decay_logit": (H,)},
        "truncated": {},
        "uniform": {},
    }
    for scheme, expected in shapes.items():
        built = hf_attn.build("ripple", num_heads=H, head_dim=D, ripple_weights=scheme, r_cap=3)
        assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == expected
        assert built.capabilities.learned == bool(expected)
    built = hf_attn.build(
        "ripple", num_heads=H, head_dim=D, r_cap=3, feature_map="mlp_fourier", num_features=6, ripple_cls="learned"
    )
    assert set(built.state_dict()) == {
        "ring_query",
        "ring_bias",
        "cls_logit",
        "feature.freq",
        "feature.proj.weight",
        "feature.proj.bias",
    }
    agree(built.ring_bias, -torch.tensor([3.0, 2.0, 1.0]).log().expand(H, 3), 1e-6)
    assert (built.feature.proj.bias == 0).all() and 0.005 < built.feature.freq.std() < 0.04
    local = hf_attn.build("ripple", num_heads=H, head_dim=D, r_cap=3, ripple_init="local")
    assert (local.ring_bias == 0).all() and (local.ring_query == 0).all()
    decay = hf_attn.build("ripple", num_heads=H, head_dim=D, ripple_weights="decay")
    assert (decay.decay_logit == 2).all()
    drawn = hf_attn.build("ripple", num_heads=H, head_dim=D, r_cap=3, feature_map="positive", num_features=7)
    assert drawn.projection.shape == (H, 7, D) and drawn.capabilities.random
    with torch.device("meta"):
        assert RippleAttention(H, D, RippleOptions(r_cap=3, feature_map="mlp_fourier")).ring_query.is_meta


@pytest.mark.parametrize(
    "options",
    [{"r_cap": None}, {"r_cap": 0}, {"r_cap": None, "ripple_weights": "truncated"}, {"ripple_weights": "decay", "tau": 0.1},
     {"ripple_weights": "uniform", "tail": "spread"}, {"tau": -0.1}, {"tau": 2}, {"feature_map": "mlp_fourier", "num_features": 5},
     {"ripple_impl": "sat", "ripple_kernel": "softmax"}, {"ripple_cls": "maybe"}, {"allow_1d": 1}, {"rcap": 3}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="ripple"):
        module(**options)


def test_odd_head_dim_is_no_default_of_fourier_features():
    with pytest.raises(InvalidOption, match="head_dim=5"):
        hf_attn.build("ripple", num_heads=H, head_dim=5, r_cap=3, feature_map="mlp_fourier")


@pytest.mark.parametrize(
    "options,call,error,match",
    [
        ({}, {}, Unsupported, "needs a 2-D token grid"),
        ({"allow_1d": True}, {"grid": (2, 4), "is_causal": True}, Unsupported, "causal"),
        ({"allow_1d": True, "tau": 0.2}, {"is_causal": True}, Unsupported, "tau=0.2"),
        ({"allow_1d": True, "tail": "spread"}, {}, Unsupported, "spread"),
        ({"ripple_cls": "none"}, {"grid": (1, 7), "num_prefix_tokens": 1}, Unsupported, "ripple_cls='none'"),
        ({}, {"grid": (2, 3)}, InvalidInput, "2 x 3"),
        ({}, {"grid": (-2, -4)}, InvalidInput, "at least 1"),
        (
            {},
            {"grid": (2, 4), "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
            Unsupported,
            "attention_mask",
        ),
    ],
)
def test_refused_calls(options, call, error, match):
    with pytest.raises(error, match=match):
        module(**options)(*tokens(8), **call)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_is_refused(causal):
    q, k, v = tokens(8)
    with pytest.raises(Unsupported, match="N=5 queries and M=8 keys"):
        module(allow_1d=True)(q[:, :, :5], k, v, is_causal=causal)


def test_prefix_tokens_without_a_grid_are_ordinary_tokens():
    built, qkv = module(allow_1d=True, ripple_cls="none"), tokens(8)
    assert torch.equal(built(*qkv, num_prefix_tokens=2), built(*qkv))


def test_host_defaults_fill_in_the_cap():
    def fill(given, **host):
        return RippleAttention.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}, grid=(14, 10)) == {"r_cap": 13} and fill({}, grid=(1, 1)) == {"r_cap": 1}
    assert fill({}, max_length=512) == {"r_cap": 16} and fill({}, max_length=9) == {"r_cap": 8}
    assert fill({"r_cap": 2}, grid=(14, 14)) == {} and fill({"ripple_weights": "uniform"}, grid=(4, 4)) == {}
