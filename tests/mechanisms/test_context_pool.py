"""ContextPool: the invariants of its specification (numbered as there), inner mechanisms, decoding, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import BERT, GPT2, VIT, Largest
from safetensors import safe_open
from torch import nn
from torch.nn import functional

import hf_attn
from hf_attn.capabilities import Capabilities, Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.kernels import bands
from hf_attn.mechanisms.context_pool import ContextPool
from hf_attn.module import AttentionModule
from hf_attn.options import Options

B, H, D = 2, 2, 4
GOLDEN = Path(__file__).parents[1] / "golden" / "context_pool"


def module(seed=0, std=0.3, **options):
    """A float64 module with a scattered map; supports of some tokens."""
    torch.manual_seed(seed)
    built = hf_attn.build("context_pool", num_heads=H, head_dim=D, **{"support_ref": 40, **options}).double()
    for parameter in (*built.mapping_in.parameters(), *built.mapping_out.parameters()):
        nn.init.normal_(parameter, std=std)
    return built


def inputs(n, seed=1, grad=False):
    """query, key, value, and the layer's input."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, n, D)] * 3 + [(B, n, H * D)]
    *qkv, hidden = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_(grad) for s in shapes)
    return qkv, hidden


def padding(n):
    """One sample with padding on both sides, one without."""
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, : n // 8] = mask[0, n - n // 5 :] = False
    return mask


def agree(a, b, tolerance=1e-12, rows=None):
    if rows is not None:
        a, b = a.transpose(1, 2)[rows], b.transpose(1, 2)[rows]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def matrix(built, n, **call):
    """R (B,P,N,N), and the value vectors' inputs it was made of."""
    qkv, hidden = inputs(n)
    return built.pooling_matrix(built._call(*qkv, layer_input=hidden, **call))


def set_supports(built, start, scatter=0.0):
    """t = start for every token, a scattered by `scatter`."""
    with torch.no_grad():
        built.mapping_out.weight.mul_(scatter)
        built.mapping_out.weight[built.options.pool_heads :] = 0
        built.mapping_out.bias[built.options.pool_heads :] = start


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_pool_gives_the_pooled_hidden_states_of_the_cases(path):
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heads, dim = int(meta["num_heads"]), int(meta["head_dim"])
    built = hf_attn.build("context_pool", num_heads=heads, head_dim=dim, **json.loads(meta["options"])).double()
    built.load_state_dict({n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")})
    pooled = built.pool(tensors["layer_input"], tensors.get("key_padding_mask"), **json.loads(meta["call"]))
    agree(pooled, tensors["pooled_layer_input"], 1e-9)


# -- the invariants ----------------------------------------------------------------------------------------------------

CALLS = [
    ({}, {}),
    ({"max_window": 3}, {"is_causal": True}),
    ({"pool_heads": H}, {"key_padding_mask": padding(20), "num_prefix_tokens": 1}),
    ({"spatial_dims": 2, "max_window": 2}, {"grid": (3, 6), "num_prefix_tokens": 2}),
]
calls = pytest.mark.parametrize("options, call", CALLS, ids=["plain", "causal window", "padding heads", "grid"])


@calls
def test_01_rows_are_convex_weights_and_constants_stay(options, call):
    built = module(**options)
    pooling = matrix(built, 20, **call)
    assert (pooling >= 0).all()
    agree(pooling.sum(-1), torch.ones_like(pooling[..., 0]))
    (q, k, v), hidden = inputs(20)
    mask = call.get("key_padding_mask", torch.ones(B, 20, dtype=torch.bool))
    agree(built(q, k, torch.full_like(v, 2.5), layer_input=hidden, **call), torch.full_like(v, 2.5), rows=mask)


@calls
def test_02_small_supports_pool_nothing(options, call):
    built = module(**options)
    set_supports(built, -40.0, scatter=1.0)
    qkv, hidden = inputs(20)
    mask = call.get("key_padding_mask")
    expected = hf_attn.build("softmax", num_heads=H, head_dim=D)(
        *qkv, key_padding_mask=mask, is_causal=call.get("is_causal", False)
    )
    agree(built(*qkv, layer_input=hidden, **call), expected, rows=mask)


def test_03_large_supports_pool_everything():
    built = module(support_ref=1e9)
    set_supports(built, 20.0, scatter=1.0)
    qkv, hidden = inputs(20)
    logits, _ = built.logits_and_supports(built._call(*qkv, layer_input=hidden))
    agree(built.pool(hidden), (logits.softmax(-1) @ hidden).expand_as(hidden), 1e-10)
    set_supports(built, 20.0, scatter=0.0)
    agree(built.pool(hidden), hidden.mean(1, keepdim=True).expand_as(hidden), 1e-10)


@calls
def test_04_a_constant_added_to_the_logits_changes_nothing(options, call):
    built, (qkv, hidden) = module(**options), inputs(20)
    expected = built(*qkv, layer_input=hidden, **call)
    with torch.no_grad():
        built.mapping_out.bias[: built.options.pool_heads] += 3
    agree(built(*qkv, layer_input=hidden, **call), expected)


@pytest.mark.parametrize("options, call", [CALLS[0], CALLS[1], CALLS[3]], ids=["plain", "causal window", "grid"])
def test_05_pooling_commutes_with_token_wise_affine_maps(options, call):
    """Pooling the projections is projecting the pooled tokens (with one R for all heads)."""
    built, (_, hidden) = module(**options), inputs(20)
    projections = [nn.Linear(H * D, H * D).double() for _ in range(3)]
    pooled = built.pool(hidden, **call)
    qkv = [built._split(p(hidden)) for p in projections]
    softmax = hf_attn.build("softmax", num_heads=H, head_dim=D)
    out = softmax(*(built._split(p(pooled)) for p in projections), is_causal=call.get("is_causal", False))
    agree(built(*qkv, layer_input=hidden, **call), out)


LONG = [
    (150, {}, {}),
    (150, {"max_window": 5}, {}),
    (150, {"max_window": 0}, {}),
    (150, {"max_window": 40, "pool_heads": H, "kernel_size": 5}, {}),
    (150, {"pool_targets": ["value"]}, {}),
    (150, {"max_window": 7, "normalize": False}, {}),
    (150, {"normalize": False}, {}),
    (91, {"spatial_dims": 2, "max_window": 2, "support_ref": 9}, {"grid": (15, 6)}),
    (91, {"spatial_dims": 2, "support_ref": 9}, {"grid": (2, 45)}),
    (100, {"spatial_dims": 2, "support_ref": 9, "pool_heads": H}, {"grid": (33, 3)}),
    (81, {"spatial_dims": 2, "max_window": 3, "support_ref": 9}, {"grid": (1, 80)}),
]


FORMS = [
    (*case, masked, causal)
    for case in LONG
    for masked in (False, True)
    for causal in (False, True)
    # a grid has neither order nor padding, the literal variant no order
    if not (case[2] and (masked or causal)) and not ("normalize" in case[1] and causal)
]


@pytest.mark.parametrize("n, options, call, masked, causal", FORMS, ids=str)
def test_06_the_window_form_equals_the_definition(n, options, call, masked, causal):
    built = module(**options)
    qkv, hidden = inputs(n, grad=True)
    prefix = n - call["grid"][0] * call["grid"][1] if call else 2
    mask = padding(n) if masked else None
    call = {**call, "num_prefix_tokens": prefix, "is_causal": causal, "key_padding_mask": mask, "layer_input": hidden}
    outputs, gradients = [], []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        weight = weight if mask is None else weight * mask[:, None, :, None]
        outputs.append(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), [*qkv, hidden, *built.parameters()]))
    agree(*outputs, 1e-10, rows=mask)
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all()
        agree(a, b, 1e-8)


def test_06_the_window_form_makes_no_square_matrix():
    n = 2000
    (q, k, v), hidden = inputs(n)
    for options in ({}, {"max_window": 16}):
        built = module(std=0.02, **options)
        call = built._call(q, k, v, layer_input=hidden)
        with Largest() as largest, torch.no_grad():
            built._windows(call)(v)
        assert largest.numel < n * n / 8


@pytest.mark.parametrize("options", [{}, {"max_window": 6}, {"pool_heads": H, "kernel_size": 5}], ids=str)
def test_07_a_prefix_does_not_depend_on_what_follows(options):
    built, (qkv, hidden) = module(**options), inputs(70)
    full = built(*qkv, layer_input=hidden, is_causal=True)
    for length in (1, 2, 33, 69):
        part = built(*(x[:, :, :length] for x in qkv), layer_input=hidden[:, :length], is_causal=True)
        agree(part, full[:, :, :length], 1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_window": 6}, {"pool_heads": H, "kernel_size": 5}], ids=str)
def test_08_padding_is_removal(options, causal):
    built, n = module(**options), 70
    qkv, hidden = inputs(n)
    mask = padding(n)
    garbage = [torch.where(mask[:, None, :, None], x, 1e3) for x in qkv]
    padded = built(
        *garbage,
        layer_input=torch.where(mask[..., None], hidden, 1e3),
        key_padding_mask=mask,
        is_causal=causal,
    )
    real = mask[0].nonzero()[:, 0]
    alone = built(*(x[:1, :, real] for x in qkv), layer_input=hidden[:1, real], is_causal=causal)
    agree(padded[:1, :, real], alone, 1e-11)
    agree(padded[1:], built(*(x[1:] for x in qkv), layer_input=hidden[1:], is_causal=causal), 1e-11)


@pytest.mark.parametrize("window", [None, 2])
def test_09_a_transposed_grid_gives_transposed_tokens(window):
    built, (rows, columns) = module(spatial_dims=2, support_ref=9, max_window=window), (5, 9)
    turned = module(spatial_dims=2, support_ref=9, max_window=window)
    with torch.no_grad():
        for layer in (turned.mapping_in, turned.mapping_out):
            layer.weight.copy_(layer.weight.transpose(2, 3).clone())
    _, hidden = inputs(rows * columns)
    pooled = turned.pool(hidden.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2), grid=(columns, rows))
    agree(pooled.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2), built.pool(hidden, grid=(rows, columns)))


@pytest.mark.parametrize("dims", [1, 2])
def test_09_prefix_tokens_are_neither_pooled_nor_sources(dims):
    built, (_, hidden) = module(spatial_dims=dims, support_ref=9), inputs(22)
    call = {"num_prefix_tokens": 2, "grid": (4, 5) if dims == 2 else None}
    pooled = built.pool(hidden, **call)
    agree(pooled[:, :2], hidden[:, :2], 0)
    changed = torch.cat((torch.full_like(hidden[:, :2], 9.0), hidden[:, 2:]), dim=1)
    agree(built.pool(changed, **call)[:, 2:], pooled[:, 2:], 0)
    agree(pooled[:, 2:], built.pool(hidden[:, 2:], grid=call["grid"]))


@pytest.mark.parametrize("options", [{}, {"max_window": 4, "pool_heads": H}, {"normalize": False}], ids=str)
def test_10_gradcheck_of_logits_and_supports(options, monkeypatch):
    monkeypatch.setattr(bands, "BAND", 4)
    built, (qkv, hidden) = module(**options), inputs(13)
    call = built._call(*qkv, layer_input=hidden)
    logits, support = built.logits_and_supports(call)
    leaves = [x.detach().requires_grad_() for x in (logits, support, qkv[2])]
    assert torch.autograd.gradcheck(lambda a, s, v: built._pooling(call, a, s, None)(v), leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_11_attention_without_scores_and_a_bias_is_pooling(causal):
    built, (qkv, hidden) = module(), inputs(40)
    logits, support = built.logits_and_supports(built._call(*qkv, layer_input=hidden, is_causal=causal))
    place = torch.arange(40)
    bias = logits[:, :, None] - (place[:, None] - place).square() / (2 * support[..., None].square())
    bias = bias.masked_fill(place > place[:, None], float("-inf")) if causal else bias
    zeros = torch.zeros_like(qkv[0])
    expected = functional.scaled_dot_product_attention(zeros, zeros, built._split(hidden), attn_mask=bias)
    agree(built.pool(hidden, is_causal=causal), built._merge(expected))


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_12_the_identity_start_is_the_backbone_bit_for_bit(family):
    config, head = {
        "bert": (hf_attn.AttnBertConfig(**BERT), hf_attn.AttnBertModel),
        "vit": (hf_attn.AttnViTConfig(**VIT), hf_attn.AttnViTModel),
        "gpt2": (hf_attn.AttnGPT2Config(**GPT2), hf_attn.AttnGPT2Model),
    }[family]
    torch.manual_seed(0)
    model = head(config).eval()
    given = torch.rand(2, 3, 12, 12) if family == "vit" else torch.randint(1, 90, (2, 10))
    with torch.no_grad():
        before = model(given).last_hidden_state
        hf_attn.convert(model, {"name": "context_pool", "init_identity": True})
        agree(model(given).last_hidden_state, before, 0)
        hf_attn.convert(model, {"name": "context_pool", "support_ratio": 1.0})
        assert (model(given).last_hidden_state - before).abs().max() > 1e-4


def test_13_interior_tokens_move_with_the_sequence():
    built, (_, hidden) = module(max_window=5), inputs(60)
    agree(built.pool(hidden)[:, 20:40], built.pool(hidden[:, 10:])[:, 10:30])


# -- choices of this implementation ------------------------------------------------------------------------------------


def test_rows_of_the_literal_variant_are_a_part_of_the_softmax():
    pooling = matrix(module(normalize=False, max_window=4), 20)
    assert (pooling.sum(-1) < 1).all() and (pooling.sum(-1) > 0).all()
    whole, windowed = matrix(module(normalize=False), 20), matrix(module(normalize=False, max_window=4), 20)
    agree(torch.where(windowed > 0, whole, 0), windowed)


def test_heads_pool_by_their_own_weights():
    built, (qkv, hidden) = module(pool_heads=H), inputs(20)
    pooling = built.pooling_matrix(built._call(*qkv, layer_input=hidden))
    assert pooling.shape == (B, H, 20, 20) and (pooling[:, 0] - pooling[:, 1]).abs().max() > 0.01
    expected = torch.cat([pooling[:, h] @ hidden[..., h * D : (h + 1) * D] for h in range(H)], dim=-1)
    agree(built.pool(hidden), expected)


def test_weights_that_vanish_in_rounding_are_left_out_and_no_others():
    built, (qkv, hidden) = module(std=0.1), inputs(150)
    call = built._call(*qkv, layer_input=hidden)
    logits, support = built.logits_and_supports(call)
    reach = built._reach(logits, support, None)
    assert 10 < reach < 75
    # the definition's weights beyond the reach are nothing, those just inside are not
    pooling, place = built.pooling_matrix(call), torch.arange(150)
    distance = (place[:, None] - place).abs()
    assert pooling[..., distance > reach].sum() / pooling.sum() < torch.finfo(torch.float64).eps
    assert pooling[..., distance > reach // 2].max() > torch.finfo(torch.float64).eps
    assert built._reach(logits, support * float("nan"), None) >= 150, "not-a-number is no reason to look away"
    assert built._reach(logits, support, torch.zeros(B, 150, dtype=torch.bool)) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_the_weights_of_the_whole_layer(causal):
    for targets in (["query", "key", "value"], ["query", "key"]):
        built, ((q, k, v), hidden) = module(pool_targets=targets), inputs(20)
        call = {"layer_input": hidden, "is_causal": causal, "key_padding_mask": padding(20)}
        weights = built.attention_weights(q, k, v, **call)
        agree(weights @ v, built(q, k, v, **call))


# -- inner mechanisms --------------------------------------------------------------------------------------------------

INNER = [
    ("softmax", {}),
    ("rfa", {}),
    ({"name": "rfa", "num_features": 16, "feature_map": "elu1"}, {}),
    ({"name": "ripple", "allow_1d": True, "r_cap": 3}, {}),
    ({"name": "ripple", "r_cap": 2}, {"grid": (3, 6)}),
    ("vars", {}),
]


@pytest.mark.parametrize("inner, call", INNER, ids=str)
def test_any_mechanism_can_stand_inside(inner, call):
    built = module(inner=inner, spatial_dims=2 if call else 1).eval()
    qkv, hidden = inputs(19 if call else 18)
    call = {**call, "num_prefix_tokens": 1, "layer_input": hidden} if call else {"layer_input": hidden}
    agree(built(*qkv, **call), built.naive(*qkv, **call), 1e-10)
    inside = built.inner
    pool = built._windows(built._call(*qkv, **call))
    del call["layer_input"]
    agree(built(*qkv, layer_input=hidden, **call), inside(*map(pool, qkv), **call))


def test_capabilities_are_those_of_the_inner_mechanism():
    def of(**options):
        return hf_attn.build("context_pool", num_heads=H, head_dim=D, **options).capabilities

    softmax, rfa = of(), of(inner="rfa")
    assert softmax.causal and softmax.packed and softmax.attention_weights and softmax.dropout
    assert not softmax.cross and not softmax.dense_mask and softmax.needs_layer_input and softmax.learned
    assert not rfa.dropout and rfa.random and rfa.attention_weights
    assert (softmax.decode, rfa.decode) == ("full state", "full state")
    assert of(inner="rfa", max_window=8).decode == "constant state"
    assert of(max_window=8).decode == "full state"
    assert not of(normalize=False).causal and of(normalize=False).decode == "none"
    ripple = of(inner={"name": "ripple", "r_cap": 2, "ripple_cls": "none"}, spatial_dims=2)
    assert not ripple.causal and not ripple.sequence and not ripple.padding and not ripple.prefix_tokens
    assert of(inner="vars").attention_weights is False
    for name in ("inner.random_matrix", "mapping_in.weight"):
        assert name in hf_attn.build("context_pool", num_heads=H, head_dim=D, inner="vars").state_dict()


class MeanOfInput(AttentionModule):
    """A mechanism that reads the layer's input: the mean over its tokens."""

    name = "mean_of_input"
    options_class = Options

    @classmethod
    def describe(cls, options):
        return Capabilities(needs_layer_input=True)

    def attend(self, call):
        mean = call.layer_input.mean(1, keepdim=True).expand_as(call.layer_input)
        return mean.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    define = attend


def test_an_inner_mechanism_that_reads_the_layer_input_reads_the_pooled_one(monkeypatch):
    from hf_attn import registry

    record = registry.Mechanism("mean_of_input", "Mean", "none", "mean", MeanOfInput, {})
    monkeypatch.setitem(registry._MECHANISMS, "mean_of_input", record)
    built, (qkv, hidden) = module(inner="mean_of_input"), inputs(20)
    expected = built._split(built.pool(hidden).mean(1, keepdim=True).expand_as(hidden))
    agree(built(*qkv, layer_input=hidden), expected)
    for options in ({"pool_targets": ["key"]}, {"pool_heads": H}):
        with pytest.raises(InvalidOption, match="inner='mean_of_input'"):
            module(inner="mean_of_input", **options)


@pytest.mark.parametrize("inner", ["softmax", "rfa"])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_decoding_step_by_step_is_the_full_pass(inner, window):
    built, n = module(inner=inner, max_window=window, kernel_size=5).eval(), 60
    qkv, hidden = inputs(n)
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, :7] = False
    full = built(*qkv, layer_input=hidden, is_causal=True, key_padding_mask=mask)
    state, steps, sizes = None, [], set()
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 50), slice(50, n)):
        given = {"layer_input": hidden[:, part], "key_padding_mask": mask[:, part]}
        out, state = built.step(*(x[:, :, part] for x in qkv), state, **given)
        steps.append(out)
        sizes.add(sum(t.numel() for t in state.values()))
    agree(torch.cat(steps, dim=2), full, 1e-10, rows=mask)
    assert (len(sizes) == 1) == (built.capabilities.decode == "constant state")
    assert all(t.shape[0] == B for t in state.values())


@pytest.mark.parametrize("inner", ["softmax", "rfa"])
def test_a_mask_may_come_late_and_stay_away(inner):
    built, n = module(inner=inner, max_window=4).eval(), 12
    qkv, hidden = inputs(n)
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, 5] = False
    full = built(*qkv, layer_input=hidden, is_causal=True, key_padding_mask=mask)
    state, steps = None, []
    for part in (slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 12)):
        given = {"key_padding_mask": mask[:, part]} if part.start == 5 else {}
        out, state = built.step(*(x[:, :, part] for x in qkv), state, layer_input=hidden[:, part], **given)
        steps.append(out)
    agree(torch.cat(steps, dim=2), full, 1e-10, rows=mask)


def test_gpt2_generates_with_a_constant_state():
    torch.manual_seed(2)
    options = {"inner": "rfa", "max_window": 6}
    config = hf_attn.AttnGPT2Config(**GPT2, attn_implementation="context_pool", attention_options=options)
    model = hf_attn.AttnGPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    prompt = torch.tensor([[5, 17, 42, 9, 61]])
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(prompt, **given), model.generate(prompt, use_cache=False, **given))


# -- parameters, options, refusals -------------------------------------------------------------------------------------


def test_state_dict_and_start():
    built = hf_attn.build("context_pool", num_heads=12, head_dim=64)
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == {
        "mapping_in.weight": (48, 768, 3),
        "mapping_in.bias": (48,),
        "mapping_out.weight": (2, 48, 3),
        "mapping_out.bias": (2,),
    }
    assert torch.equal(built.mapping_out.bias, torch.tensor([0.0, -2.0]))
    assert 0.01 < built.mapping_out.weight.std() < 0.03
    bound = (768 * 3) ** -0.5
    assert 0.9 * bound < built.mapping_in.weight.abs().max() <= bound
    grid = hf_attn.build("context_pool", num_heads=2, head_dim=5, spatial_dims=2, pool_heads=2, kernel_size=5)
    assert grid.mapping_in.weight.shape == (16, 10, 5, 5) and grid.mapping_out.weight.shape == (4, 16, 5, 5)
    assert torch.equal(grid.mapping_out.bias, torch.tensor([0.0, 0.0, -2.0, -2.0]))
    identity = hf_attn.build("context_pool", num_heads=2, head_dim=5, init_identity=True)
    assert torch.equal(identity.mapping_out.bias, torch.tensor([0.0, -12.0]))


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 4}, {"spatial_dims": 3}, {"pool_heads": 3}, {"pool_heads": 0}, {"mapping_dim": 0}, {"max_window": -1},
     {"min_support": 0}, {"support_ref": -1}, {"support_ratio": "0.1"}, {"normalize": 1}, {"pool_targets": []},
     {"pool_targets": ["keys"]}, {"pool_targets": "key"}, {"pool_targets": ["key", "key"]}, {"support_init": None},
     {"init_identity": True, "support_init": -4.0}, {"inner": 3}, {"inner": {"num_features": 3}}, {"inner": "context_pool"},
     {"inner": {"name": "ripple", "r_cap": 2}}, {"windows": 3}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="context_pool"):
        module(**options)


@pytest.mark.parametrize(
    "inner, match", [("sofmax", "did you mean 'softmax'"), ({"name": "rfa", "features": 2}, "rfa.*'features'")]
)
def test_options_of_the_inner_mechanism_are_checked(inner, match):
    with pytest.raises(ValueError, match=match):
        module(inner=inner)


@pytest.mark.parametrize(
    "options, call, error, match",
    [
        ({}, {"layer_input": None}, Unsupported, "layer_input is missing"),
        ({}, {"layer_input": torch.zeros(B, 7, H * D)}, InvalidInput, "layer_input must be"),
        ({}, {"layer_input": torch.zeros(B, 8, H)}, InvalidInput, "layer_input must be"),
        ({}, {"grid": (2, 4)}, Unsupported, "grid=.*spatial_dims=2"),
        ({}, {"num_prefix_tokens": 8}, InvalidInput, "num_prefix_tokens=8"),
        ({}, {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, Unsupported, "attention_mask"),
        ({"normalize": False}, {"is_causal": True}, Unsupported, "normalize=False"),
        ({"spatial_dims": 2}, {}, Unsupported, "grid"),
        ({"spatial_dims": 2}, {"grid": (2, 3)}, InvalidInput, "2 x 3"),
        ({"spatial_dims": 2}, {"grid": (2, 4), "is_causal": True}, Unsupported, "is_causal"),
        ({"spatial_dims": 2}, {"grid": (2, 4), "key_padding_mask": torch.ones(B, 8, dtype=torch.bool)}, Unsupported, "key_padding_mask"),
        ({"inner": "vars"}, {"is_causal": True}, Unsupported, "causal"),
    ],
)  # fmt: skip
def test_refused_calls(options, call, error, match):
    qkv, hidden = inputs(8)
    with pytest.raises(error, match=f"context_pool.*{match}"):
        module(**options)(*qkv, **{"layer_input": hidden, **call})


def test_other_refusals():
    built, ((q, k, v), hidden) = module(), inputs(8)
    for causal in (False, True):
        with pytest.raises(Unsupported, match="context_pool.*N=3 queries and M=8 keys"):
            built(q[:, :, :3], k, v, layer_input=hidden, is_causal=causal)
    with pytest.raises(InvalidInput, match="context_pool.*layer_input"):
        built.pool(hidden[..., 1:])
    with pytest.raises(Unsupported, match="context_pool.*num_prefix_tokens=1"):
        built.step(q, k, v, None, layer_input=hidden, num_prefix_tokens=1)
    fixed = module(inner={"name": "rfa", "feature_map": "elu1"})
    with pytest.raises(Unsupported, match="rfa.*noise"):
        fixed(q, k, v, layer_input=hidden, noise=torch.zeros(1))


def test_a_model_fills_in_the_reference_length_and_the_grid():
    def fill(given, **host):
        return ContextPool.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}, max_length=512) == {"support_ref": 512}
    assert fill({}, grid=(14, 10), num_prefix_tokens=1) == {"spatial_dims": 2, "support_ref": 14}
    assert fill({"support_ref": 7, "spatial_dims": 1}, grid=(14, 10)) == {}
    filled = fill({"inner": {"name": "ripple", "tau": 0.1}}, grid=(6, 6), num_prefix_tokens=1)
    assert filled["inner"] == {"name": "ripple", "tau": 0.1, "r_cap": 5}
    config = hf_attn.AttnViTConfig(**VIT, attn_implementation="context_pool", attention_options={"inner": "ripple"})
    model = hf_attn.AttnViTModel(config).eval()
    assert model.config.attention["default"]["inner"] == {"name": "ripple", "r_cap": 5}
    with torch.no_grad():
        assert model(torch.rand(1, 3, 12, 12)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("options", [{"max_window": 5}, {"pool_heads": H, "max_window": 3}, {"inner": "rfa"}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_compiled_and_exported_windows(options, causal):
    built, (qkv, hidden) = module(**options).eval(), inputs(80)
    call = {"layer_input": hidden, "is_causal": causal}
    expected = built(*qkv, **call)
    torch.compiler.reset()
    agree(torch.compile(built, fullgraph=True, backend="eager")(*qkv, **call), expected)
    agree(torch.export.export(built, tuple(qkv), call).module()(*qkv, **call), expected)
    mask = padding(80)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    loss = compiled(*qkv, key_padding_mask=mask, **call).square().sum()
    grads = torch.autograd.grad(loss, [*built.mapping_in.parameters()])
    loss = built(*qkv, key_padding_mask=mask, **call).square().sum()
    for a, b in zip(grads, torch.autograd.grad(loss, [*built.mapping_in.parameters()]), strict=True):
        agree(a, b, 1e-10)


@pytest.mark.parametrize("options", [{}, {"max_window": 5, "pool_heads": H}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(options, dtype):
    built = module(**options).to(dtype)
    qkv, hidden = inputs(70)
    qkv, hidden = [x.to(dtype) for x in qkv], hidden.to(dtype)
    out = built(*qkv, layer_input=hidden)
    assert out.dtype == dtype
    expected = built.double().naive(*(x.double() for x in qkv), layer_input=hidden.double())
    # R, the pooled tokens and the result are each rounded once
    assert (out.double() - expected).abs().max() < 6 * torch.finfo(dtype).eps * expected.abs().max()
