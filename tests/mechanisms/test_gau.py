"""relu2, laplace, softmax_plus: the invariants of the paper's page, the options, the refusals, the memory of the forms."""

import functools
import math

import pytest
import torch
from helpers import DIM, HEADS, Largest, agree, call_of, module_of, qkv

import hf_attn
from hf_attn import Host
from hf_attn.mechanisms import gau

NAMES = ["relu2", "laplace", "softmax_plus"]
every = pytest.mark.parametrize("name", NAMES)
NORMS = ["ref", "length", "valid", "sqrt_s"]


close = functools.partial(agree, tolerance=1e-12)


def masks(keys: int) -> torch.Tensor:
    mask = torch.ones(3, keys, dtype=torch.bool)
    mask[0, -3:] = mask[1, :2] = mask[1, 4] = False
    mask[2] = False
    return mask


def same_with_gradients(module, inputs, **call):
    """The forms agree, outputs to 1e-10 and gradients to 1e-8."""
    leaves, results = [*inputs, *module.parameters()], []
    cotangent = torch.randn_like(inputs[0])
    for form in (module, module.naive):
        out = form(*inputs, **call)
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves)))
    agree(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1]):
        agree(a, b, 1e-8)


# -- the invariants of the paper's page --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "name, options", [*((n, {"quad_norm": m}) for n in NAMES[:2] for m in NORMS), ("softmax_plus", {"n_ref": 9})]
)
def test_01_the_forms_agree(name, options, is_causal, padded, bias, monkeypatch):
    monkeypatch.setattr(gau, "SPAN", 4)  # several spans, the last one short
    if is_causal and options.get("quad_norm") == "length":
        pytest.skip("refused: test_06")
    module = module_of(name, **{"n_ref": 3, **options}, rel_pos_bias=bias, max_position_embeddings=13)
    mask = masks(11) if padded else None
    same_with_gradients(module, qkv(11, requires_grad=True), is_causal=is_causal, key_padding_mask=mask)
    if is_causal or not bias:
        same_with_gradients(module, qkv(6, 11, requires_grad=True), is_causal=is_causal, key_padding_mask=mask)


@every
def test_02_decoding_equals_the_full_pass(name):
    q, k, v = qkv(14)
    module = module_of(name, rel_pos_bias=True, max_position_embeddings=14)
    full = module(q, k, v, is_causal=True)
    for n in range(1, 15):
        close(module(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], is_causal=True), full[:, :, n - 1 : n])


@every
def test_05_changing_a_token_changes_nothing_before_it(name):
    q, k, v = qkv(12)
    module = module_of(name, rel_pos_bias=True)
    before = module(q, k, v, is_causal=True)
    for x in (q, k, v):
        x[:, :, 7:] = 1e4
    assert torch.equal(module(q, k, v, is_causal=True)[:, :, :7], before[:, :, :7])


@pytest.mark.parametrize(
    "name, options", [(n, {"quad_norm": m}) for n in NAMES[:2] for m in ("ref", "valid", "sqrt_s")]
)
def test_06_a_prefix_gives_the_rows_of_the_whole(name, options):
    q, k, v = qkv(12)
    module = module_of(name, **options)
    close(module(q, k, v, is_causal=True)[:, :, :7], module(*(x[:, :, :7] for x in (q, k, v)), is_causal=True))


@pytest.mark.parametrize("name", NAMES[:2])
def test_06_a_prefix_under_the_length_norm_does_not_and_is_refused(name):
    q, k, v = qkv(12)
    whole, prefix = ({"quad_norm": "ref", "n_ref": n} for n in (12, 7))
    rows = module_of(name, **whole)(q, k, v, is_causal=True)[:, :, :7]
    assert (rows - module_of(name, **prefix)(*(x[:, :, :7] for x in (q, k, v)), is_causal=True)).abs().max() > 1e-3
    with pytest.raises(hf_attn.Unsupported, match=f"{name}.*quad_norm='length'.*prefix.*quad_norm='ref'"):
        module_of(name, quad_norm="length")(q, k, v, is_causal=True)


@every
@pytest.mark.parametrize("side", [slice(0, 8), slice(4, 12)])
def test_07_padding_on_either_side_equals_cutting(name, side):
    q, k, v = qkv(12)
    module = module_of(name, rel_pos_bias=True)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[:, side] = True
    for is_causal in (False, True):
        alone = module(*(x[:, :, side] for x in (q, k, v)), is_causal=is_causal)
        close(module(q, k, v, key_padding_mask=mask, is_causal=is_causal)[:, :, side], alone)


def test_08_the_bias_depends_on_the_distance_only():
    module = module_of("relu2", rel_pos_bias=True, max_position_embeddings=9)
    (q, k, v), _ = call_of(module)
    bias = module.bias(module._call(q[:, :, :9], k[:, :, :9], v[:, :, :9]))
    agree(bias, gau.toeplitz(module.rel_bias, 0, 9, 9), 0)
    for i in range(9):
        for j in range(9):
            agree(bias[:, i, j], module.rel_bias[:, j - i + 8], 0)


def test_09_laplace_touches_the_squared_relu():
    x = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    for function in (gau.relu2, gau.laplace):
        close(function(x), torch.full_like(x, 0.5))
        close(torch.autograd.grad(function(x), x)[0], torch.full_like(x, math.sqrt(2)))
    assert 0 < gau.laplace(torch.tensor(0.0)) < 0.0062 < 0.999 < gau.laplace(torch.tensor(3.0)) <= 1


def test_10_no_scores_give_no_output():
    q, k, v = qkv(11)
    assert not module_of("relu2")(torch.zeros_like(q), k, v).any()


@every
def test_12_bfloat16_stays_near_float32(name):
    q, k, v = (x.float() for x in qkv(64))
    module = module_of(name, torch.float32, n_ref=64)
    out, low = module(q, k, v), module.bfloat16()(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (low.float() - out).norm() / out.norm() < 2e-2


# -- what the options and arguments mean -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:2])
def test_norms_meet_where_their_counts_do(name):
    q, k, v = qkv(12)
    ref, length, valid = (module_of(name, quad_norm=m, n_ref=12)(q, k, v) for m in ("ref", "length", "valid"))
    close(ref, length)
    close(ref, valid)
    # sqrt_s is ref at n_ref = sqrt(D), then a mean over the keys
    halved = module_of(name, quad_norm="ref", n_ref=1)(q / DIM**0.5, k, v) / 12
    close(module_of(name, quad_norm="sqrt_s")(q, k, v), halved)


@every
def test_scaling_acts_relative_to_the_usual_one(name):
    q, k, v = qkv(11)
    module = module_of(name)
    close(module(q, k, v), module(q, k, v, scaling=DIM**-0.5))
    close(module(q, k, v, scaling=3 * DIM**-0.5), module(3 * q, k, v))


def test_softmax_plus_is_softmax_at_the_reference_length_and_sharper_beyond():
    q, k, v = qkv(20)
    close(module_of("softmax_plus", n_ref=20)(q, k, v), module_of("softmax")(q, k, v))
    close(module_of("softmax_plus", n_ref=400)(q, k, v), module_of("softmax")(q / 2, k, v))


def test_softmax_plus_counts_sixteen_keys_at_least():
    q, k, v = qkv(9)
    close(module_of("softmax_plus", n_ref=16)(q, k, v), module_of("softmax")(q, k, v))


@every
def test_a_dense_mask_equals_the_padding_it_holds(name):
    q, k, v = qkv(11)
    module = module_of(name, rel_pos_bias=True)
    dense = masks(11)[:, None, None].expand(-1, 1, 11, -1)
    for is_causal in (False, True):
        padded = module(q, k, v, key_padding_mask=masks(11), is_causal=is_causal)
        close(module(q, k, v, attention_mask=dense, is_causal=is_causal), padded)
        close(module.naive(q, k, v, attention_mask=dense, is_causal=is_causal), padded)


@every
def test_nothing_is_learned_without_the_bias(name):
    assert not hf_attn.build(name, num_heads=HEADS, head_dim=DIM).state_dict()
    module = hf_attn.build(name, num_heads=HEADS, head_dim=DIM, rel_pos_bias=True, max_position_embeddings=4096)
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == {"rel_bias": (HEADS, 8191)}
    assert abs(module.rel_bias.std() - 0.02) < 1e-3


@every
def test_the_model_gives_the_bias_its_length(name):
    defaults = hf_attn.get_mechanism(name).module_class.host_defaults
    host = Host("bert", 4, 8, 0, max_length=64)
    assert defaults(host, {}) == {}
    assert defaults(host, {"rel_pos_bias": True}) == {"max_position_embeddings": 64}
    assert defaults(host, {"rel_pos_bias": True, "max_position_embeddings": 9}) == {}
    image = Host("vit", 4, 8, 0, grid=(6, 7), num_prefix_tokens=1)
    assert defaults(image, {"rel_pos_bias": True}) == {"max_position_embeddings": 43}


# -- refusals ----------------------------------------------------------------------------------------------------------


@every
def test_the_bias_refuses_what_has_no_distance(name):
    module = module_of(name, rel_pos_bias=True, max_position_embeddings=10)
    q, k, v = qkv(6, 9)
    with pytest.raises(hf_attn.Unsupported, match=f"{name}.*rel_pos_bias.*N=6.*M=9"):
        module(q, k, v)
    assert module(q, k, v, is_causal=True).shape == q.shape
    with pytest.raises(hf_attn.Unsupported, match=f"{name}.*11 tokens.*max_position_embeddings=10"):
        module(*qkv(11))


@pytest.mark.parametrize(
    "name, options",
    [
        *((n, o) for n in NAMES[:2] for o in ({"quad_norm": "max"}, {"n_ref": 0}, {"n_ref": 1.5})),
        ("softmax_plus", {"n_ref": 1}),
        ("softmax_plus", {"quad_norm": "ref"}),
        *((n, o) for n in NAMES for o in ({"rel_pos_bias": 1}, {"max_position_embeddings": 0})),
    ],
)
def test_wrong_options_are_named(name, options):
    with pytest.raises(hf_attn.InvalidOption, match=f"{name}.*{next(iter(options))}"):
        hf_attn.build(name, num_heads=HEADS, head_dim=DIM, **options)


# -- the efficient form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_table_of_all_pairs(name, is_causal, monkeypatch):
    monkeypatch.setattr(gau, "SPAN", 16)
    q, k, v = qkv(256, batch=1, requires_grad=True)
    with Largest() as largest:
        module_of(name, quad_norm="valid")(q, k, v, is_causal=is_causal).sum().backward()
    assert largest.numel <= HEADS * 16 * 256


@pytest.mark.parametrize("name", NAMES[:2])
def test_dropout_acts_on_spans_alike(name, monkeypatch):
    q, k, v = qkv(12, requires_grad=True)
    module = module_of(name).train()
    monkeypatch.setattr(gau, "SPAN", 5)
    torch.manual_seed(0)
    out = module(q, k, v, dropout=0.5)
    # linear in the values, so the gradient must use the weights that the forward pass kept
    (gradient,) = torch.autograd.grad(out.sum(), v)
    close((gradient * v).sum(), out.sum())
