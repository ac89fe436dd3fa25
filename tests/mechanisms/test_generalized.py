"""generalized: the invariants of its specification (numbered as there), all sixteen sums, forms, models, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import GPT2, VIT, Largest
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms import generalized
from hf_attn.mechanisms.generalized import GeneralizedAttention

B, H, D, P = 2, 2, 4, 8
BETAS = [f"{n:04b}" for n in range(16)]
WITH_FFT = ["0001", "0011"]
of_betas = pytest.mark.parametrize("beta", BETAS)


def module(beta="1111", seed=0, **options):
    """A float64 module whose parameters are drawn, not at their start."""
    torch.manual_seed(seed)
    options = {"position_dim": P, **options}
    built = hf_attn.build("generalized", num_heads=H, head_dim=D, beta=beta, **options).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def tokens(n, m=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (n, m or n, m or n)
    return [torch.randn(B, H, size, D, dtype=torch.float64, generator=generator) for size in sizes]


def padding(n, seed=2):
    """Each sample has padded and real tokens."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0], mask[:, -1] = True, False
    return mask


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def forms_agree(built, qkv, **call):
    results = []
    qkv = [x.clone().requires_grad_() for x in qkv]
    leaves = [*qkv, *built.parameters()]
    cotangent = torch.randn(qkv[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for form in (built, built.naive):
        out = form(*qkv, **call)
        grads = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
        results.append((out, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]))
    agree(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        agree(a, b, 1e-8)


def logits(built, qkv, **call):
    """log weights of the definition, up to a number for each query."""
    return built.attention_weights(*qkv, **call).log()


@pytest.fixture
def fft(monkeypatch):
    """Every length takes the FFT, and a call that declines it fails."""
    monkeypatch.setattr(generalized, "FFT_FROM", 0)
    monkeypatch.setattr(GeneralizedAttention, "_as_channels", None)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_01_content_with_content_is_softmax(is_causal):
    qkv = tokens(11)
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=is_causal)
    agree(module("1000")(*qkv, is_causal=is_causal), expected)


@pytest.mark.parametrize("beta", BETAS[8:])
def test_02_zero_key_bias_and_projection_are_softmax(beta):
    built, qkv = module(beta), tokens(11)
    for name, parameter in built.named_parameters():
        if name != "position_bias":
            torch.nn.init.zeros_(parameter)
    agree(built(*qkv), torch.nn.functional.scaled_dot_product_attention(*qkv))


def test_03_no_term_is_the_mean_of_the_visible_values():
    q, k, v = tokens(11)
    agree(module("0000")(q, k, v), v.mean(dim=2, keepdim=True).expand_as(v))
    causal = module("0000")(q, k, v, is_causal=True)
    agree(causal, v.cumsum(dim=2) / torch.arange(1, 12)[:, None])
    near = module("0000", spatial_range=1)(q, k, v)
    agree(near[:, :, 5], v[:, :, 4:7].mean(dim=2))
    agree(near[:, :, 0], v[:, :, :2].mean(dim=2))


@pytest.mark.parametrize("beta", ["0000", "0010"])
def test_04_key_content_alone_gives_every_query_the_same(beta):
    built, qkv = module(beta), tokens(11)
    out = built(*qkv)
    agree(out, out[:, :, :1].expand_as(out), 0)
    agree(out, built.naive(*qkv))


@of_betas
def test_05_terms_see_only_what_they_name(beta):
    built, (q, k, v) = module(beta), tokens(11)
    out, other = built(q, k, v), tokens(11, seed=7)
    content, query_position, key_content, _ = built.options.terms
    assert torch.equal(built(other[0], k, v), out) == (not (content or query_position))
    assert torch.equal(built(q, other[1], v), out) == (not (content or key_content))
    q = q.clone().requires_grad_()
    v = v.clone().requires_grad_()
    built(q, k, v).square().sum().backward()
    assert (q.grad is None or not q.grad.any()) == (not (content or query_position))


@pytest.mark.parametrize("options", [{}, {"position_2d": True}], ids=str)
def test_06_position_alone_depends_on_the_displacement_only(options):
    built = module("0001", **options)
    if not options:
        energy = logits(built, tokens(11))
        difference = energy - energy.diagonal(dim1=-2, dim2=-1)[..., None]
        agree(difference[:, :, 1:, 1:], difference[:, :, :-1, :-1])
        return
    energy = logits(built, tokens(20), grid=(4, 5))
    difference = (energy - energy.diagonal(dim1=-2, dim2=-1)[..., None]).unflatten(-1, (4, 5)).unflatten(2, (4, 5))
    agree(difference[:, :, 1:, 1:, 1:, 1:], difference[:, :, :-1, :-1, :-1, :-1])


@pytest.mark.parametrize("beta", ["0001", "1111"])
def test_06_a_shift_of_all_positions_changes_nothing(beta, monkeypatch):
    built, qkv = module(beta), tokens(11)
    expected, places = built(*qkv), built.places
    monkeypatch.setattr(built, "places", lambda call: [place + 1000 for place in places(call)])
    agree(built(*qkv), expected, 1e-11)


@of_betas
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reach", [-1, 0, 2])
def test_07_forms_agree_on_sequences(beta, masked, reach):
    built = module(beta, spatial_range=reach)
    mask = padding(11) if masked else None
    for causal in (False, True):
        forms_agree(built, tokens(11), is_causal=causal, key_padding_mask=mask, scaling=0.7)
    forms_agree(built, tokens(5, 11), is_causal=True, key_padding_mask=mask)


@of_betas
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reach", [-1, 1])
def test_07_forms_agree_on_grids(beta, masked, reach):
    for grid, prefix, stride in (((3, 5), 2, 1), ((4, 3), 0, 2), ((1, 6), 1, 1), ((5, 4), 0, 3)):
        n = prefix + grid[0] * grid[1]
        built = module(beta, position_2d=True, spatial_range=reach, kv_stride=stride)
        mask = padding(n) if masked else None
        forms_agree(built, tokens(n), grid=grid, num_prefix_tokens=prefix, key_padding_mask=mask)


@pytest.mark.parametrize("is_causal", [False, True])
def test_08_one_call_of_sdpa_with_a_bias(is_causal):
    built, (q, k, v) = module("1111"), tokens(9)
    place = torch.arange(9)
    matrix = built.position_proj.weight.unflatten(0, (H, D))
    frequency = torch.tensor([1000 ** (-2 * i / P) for i in range(P // 2)], dtype=torch.float64)
    angle = (place[:, None] - place)[..., None] * frequency
    relative = torch.einsum("nmp,hdp->hnmd", torch.cat((angle.sin(), angle.cos()), -1), matrix)
    bias = D**-0.5 * ((q + built.position_bias[:, None])[:, :, :, None] * relative).sum(-1)
    if is_causal:
        bias = bias.masked_fill(place > place[:, None], -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q + built.key_bias[:, None], k, v, bias)
    agree(built(q, k, v, is_causal=is_causal), expected)


def test_09_causal_key_content_is_a_recurrence():
    built, (q, k, v) = module("0010"), tokens(9)
    top = torch.full((B, H), -math.inf, dtype=torch.float64)
    mass, total, rows = torch.zeros_like(top), torch.zeros(B, H, D, dtype=torch.float64), []
    for t in range(9):
        energy = D**-0.5 * (k[:, :, t] * built.key_bias).sum(-1)
        new = torch.maximum(top, energy)
        decay, weight, top = (top - new).exp(), (energy - new).exp(), new
        mass, total = mass * decay + weight, total * decay[..., None] + weight[..., None] * v[:, :, t]
        rows.append(total / mass[..., None])
    agree(built(q, k, v, is_causal=True), torch.stack(rows, dim=2))


@pytest.mark.parametrize("beta", WITH_FFT)
@pytest.mark.parametrize("masked", [False, True])
def test_09_fft_equals_dense(beta, masked, fft):
    built = module(beta)
    for n, m, causal in ((11, 11, False), (11, 11, True), (5, 11, True), (1, 1, False)):
        mask = padding(m) if masked and m > 1 else None
        forms_agree(built, tokens(n, m), is_causal=causal, key_padding_mask=mask)


def test_09_the_fft_is_declined_where_rounding_would_show(monkeypatch):
    monkeypatch.setattr(generalized, "FFT_FROM", 0)
    built, qkv = module("0011"), tokens(40)
    qkv[1][:, :, -1] = 60 * built.key_bias.detach() / built.key_bias.detach().square().sum(-1, keepdim=True)
    checked = built._call(*qkv, is_causal=True)
    assert built._by_fft(checked) is None, "the last key outweighs all keys that earlier queries see"
    agree(built(*qkv, is_causal=True), built.naive(*qkv, is_causal=True), 1e-10)
    single = [x.float() for x in tokens(300)]
    built.float()
    assert built._by_fft(built._call(*single, is_causal=True)) is not None
    agree(built(*single, is_causal=True), built.naive(*single, is_causal=True), 1e-5)


@of_betas
def test_10_a_decoding_step_equals_its_row(beta):
    built, (q, k, v) = module(beta), tokens(11)
    full = built(q, k, v, is_causal=True)
    for t in range(1, 12):
        row = built(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t], is_causal=True)
        agree(row, full[:, :, t - 1 : t], 1e-11)
    if beta in ("0000", "0010"):
        assert built.capabilities.decode == "constant state"
        state, rows = None, []
        for t in range(11):
            out, state = built.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
            rows.append(out)
        agree(torch.cat(rows, dim=2), full)
        assert sum(x.numel() for x in state.values()) == B * H * (2 + D)


@of_betas
def test_11_a_row_without_keys_is_zero_with_finite_gradients(beta, monkeypatch):
    for first in (10**9, 0):
        monkeypatch.setattr(generalized, "FFT_FROM", first)
        built, qkv = module(beta), [x.requires_grad_() for x in tokens(9)]
        mask = padding(9)
        mask[1] = False
        mask[0, :3] = False
        for causal in (False, True):
            out = built(*qkv, key_padding_mask=mask, is_causal=causal)
            assert out.isfinite().all() and not out[1].any()
            assert bool(out[0, :, :3].any()) != causal
            grads = torch.autograd.grad(out.sum(), [*qkv, *built.parameters()], allow_unused=True)
            assert all(g.isfinite().all() for g in grads if g is not None)


def test_12_a_strided_grid_equals_the_formula_pair_by_pair():
    built, (q, k, v) = module("1111", position_2d=True, kv_stride=2, energy_scale=1.0), tokens(12)
    columns, width = 4, P // 2

    def wave(d):
        angles = [d / 1000 ** (2 * i / width) for i in range(width // 2)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)

    for n in (0, 5, 11):
        energies, values = [], []
        for m in (0, 2, 8, 10):
            dx, dy = n % columns - m % columns, n // columns - m // columns
            r = built.position_proj_x.weight @ wave(dx) + built.position_proj_y.weight @ wave(dy)
            r = r.view(H, D) / 2**0.5
            pair = q[:, :, n] * k[:, :, m] + q[:, :, n] * r + built.key_bias * k[:, :, m] + built.position_bias * r
            energies.append(pair.sum(-1))
            values.append(v[:, :, m])
        expected = (torch.stack(energies, -1).softmax(-1)[..., None] * torch.stack(values, -2)).sum(-2)
        agree(built(q, k, v, grid=(3, 4))[:, :, n], expected)
    weights = built.attention_weights(q, k, v, grid=(3, 4))
    assert weights.shape[-1] == 12 and not weights[..., [1, 3, 4, 5, 6, 7, 9, 11]].any()


# -- options, memory, precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", ["1000", "1010", "0010", "0000"])
@pytest.mark.parametrize("sizes", [(6, 11), (11, 6)])
def test_cross_attention(beta, sizes):
    forms_agree(module(beta), tokens(*sizes), key_padding_mask=padding(sizes[1]))


def test_energy_scale_replaces_the_scaling():
    qkv = tokens(11)
    published, scaled = module("1111", energy_scale=1.0), module("1111")
    agree(published(*qkv, scaling=0.3), scaled(*qkv, scaling=1.0), 0)
    assert (published(*qkv) - scaled(*qkv)).abs().max() > 0.01


def test_the_range_is_a_square_and_prefix_tokens_are_always_visible():
    built = module("1111", position_2d=True, spatial_range=1)
    weights = built.attention_weights(*tokens(21), grid=(4, 5), num_prefix_tokens=1)
    seen = (weights > 0).all(dim=0).all(dim=0)
    assert seen[0].all() and seen[:, 0].all()
    corner, inner = seen[1, 1:].view(4, 5), seen[1 + 6, 1:].view(4, 5)
    assert corner[:2, :2].all() and corner.sum() == 4
    assert inner[:3, :3].all() and inner.sum() == 9


def test_pairs_with_a_prefix_token_have_no_position():
    built = module("0001", position_2d=True)
    energy = logits(built, tokens(14), grid=(3, 4), num_prefix_tokens=2)
    agree(energy[:, :, :2], energy[:, :, :1, :1].expand(-1, -1, 2, 14))
    agree(energy[:, :, :, 0], energy[:, :, :, 1])


@of_betas
def test_padding_of_a_sequence_equals_cutting_it(beta, monkeypatch):
    monkeypatch.setattr(generalized, "FFT_FROM", 0)
    built, qkv, mask = module(beta), tokens(11), torch.ones(B, 11, dtype=torch.bool)
    mask[0, 7:], mask[1, :4] = False, False
    for causal in (False, True):
        out = built(*qkv, key_padding_mask=mask, is_causal=causal)
        agree(out[:1, :, :7], built(*(x[:1, :, :7] for x in qkv), is_causal=causal), 1e-10)
        agree(out[1:, :, 4:], built(*(x[1:, :, 4:] for x in qkv), is_causal=causal), 1e-10)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mode", ["bidirectional", "causal", "grid"])
def test_nothing_of_all_pairs_is_made(beta, mode):
    n = 576
    built = hf_attn.build("generalized", num_heads=1, head_dim=8, beta=beta, position_dim=8, position_2d=mode == "grid")
    qkv = [torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3)]
    call = {"grid": (24, 24)} if mode == "grid" else {"is_causal": mode == "causal"}
    with Largest() as largest:
        built(*qkv, **call).sum().backward()
    assert largest.numel < n * n / 4


@pytest.mark.parametrize("beta", ["1111", "0011", "0010"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_lower_precision(beta, dtype, tolerance):
    built, qkv = module(beta), tokens(300)
    expected = built(*qkv)
    out = built.to(dtype)(*(x.to(dtype) for x in qkv))
    assert out.dtype == dtype
    agree(out.double(), expected, tolerance)


def test_far_places_keep_their_displacements_in_single_precision(monkeypatch):
    built, qkv = module("0101").float(), [x.float() for x in tokens(11)]
    expected, places = built(*qkv), built.places
    monkeypatch.setattr(built, "places", lambda call: [place + 100_000 for place in places(call)])
    agree(built(*qkv), expected, 1e-5)


@pytest.mark.parametrize("beta", ["1111", "0011", "0010"])
def test_large_energies_stay_finite_and_exact(beta):
    built, (q, k, v) = module(beta), tokens(11)
    for causal in (False, True):
        out = built(300 * q, 300 * k, v, is_causal=causal)
        assert out.isfinite().all()
        agree(out, built.naive(300 * q, 300 * k, v, is_causal=causal), 1e-9)


# -- models, parameters, refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stock, options",
    [(ViTForImageClassification, {"config": ViTConfig(**VIT)}), (GPT2LMHeadModel, {"config": GPT2Config(**GPT2)})],
)
def test_a_stock_model_is_unchanged_at_the_start_and_learns(stock, options, tmp_path):
    torch.manual_seed(0)
    model = stock(**options).eval()
    model.save_pretrained(tmp_path)
    inputs = torch.rand(2, 3, 12, 12) if stock is ViTForImageClassification else torch.randint(0, 99, (2, 12))
    expected = model(inputs).logits
    family = {ViTForImageClassification: "AttnViTForImageClassification", GPT2LMHeadModel: "AttnGPT2LMHeadModel"}[stock]
    loaded = getattr(hf_attn, family).from_pretrained(tmp_path, attn_implementation="generalized").eval()
    for ours in (hf_attn.convert(model, "generalized"), loaded):
        agree(ours(inputs).logits, expected, 1e-5)
        mechanism = next(m for m in ours.modules() if isinstance(m, GeneralizedAttention))
        assert mechanism.position_bias.any() and not mechanism.key_bias.any()
        assert mechanism.options.position_2d == (stock is ViTForImageClassification)
        ours(inputs).logits.square().sum().backward()
        assert all(p.weight.grad.any() for p in mechanism.projections()) and mechanism.key_bias.grad.any()


def test_a_new_model_starts_with_all_terms():
    model = hf_attn.AttnGPT2LMHeadModel(hf_attn.AttnGPT2Config(**GPT2, attn_implementation="generalized"))
    mechanism = next(m for m in model.modules() if isinstance(m, GeneralizedAttention))
    assert all(p.any() for p in mechanism.parameters())


def test_state_dict_and_start():
    def shapes(**options):
        built = hf_attn.build("generalized", num_heads=H, head_dim=D, position_dim=P, **options)
        assert built.capabilities.learned == bool(built.state_dict())
        return {n: tuple(t.shape) for n, t in built.state_dict().items()}

    u, v, r = {"key_bias": (H, D)}, {"position_bias": (H, D)}, {"position_proj.weight": (H * D, P)}
    for beta in BETAS:
        b2, b3, b4 = (bit == "1" for bit in beta[1:])
        assert shapes(beta=beta) == (u if b3 else {}) | (v if b4 else {}) | (r if b2 or b4 else {})
    grid = {f"position_proj_{axis}.weight": (H * D, P // 2) for axis in "xy"}
    assert shapes(position_2d=True) == u | v | grid
    torch.manual_seed(0)
    built = hf_attn.build("generalized", num_heads=8, head_dim=64)
    for tensor, bound in ((built.key_bias, 128**-0.5), (built.position_bias, 128**-0.5), (built.position_proj.weight, (3 / 64) ** 0.5)):  # fmt: skip
        assert 0.97 * bound < tensor.abs().max() <= bound and tensor.std() > 0.5 * bound
    built = hf_attn.build("generalized", num_heads=8, head_dim=64, position_2d=True)
    assert 0.97 * (6 / 64) ** 0.5 < built.position_proj_x.weight.abs().max() <= (6 / 64) ** 0.5


@pytest.mark.parametrize(
    "options",
    [{"beta": "11"}, {"beta": 1111}, {"beta": "1112"}, {"position_dim": 7}, {"position_dim": 0}, {"position_2d": 1},
     {"position_dim": 6, "position_2d": True}, {"energy_scale": "1"}, {"energy_scale": math.nan}, {"energy_scale": math.inf},
     {"spatial_range": -2}, {"spatial_range": 1.0}, {"kv_stride": 0}, {"betas": "1111"}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="generalized"):
        module(**options)


@pytest.mark.parametrize(
    "options, call, error, match",
    [
        ({"position_2d": True}, {}, Unsupported, "needs a 2-D token grid"),
        ({"position_2d": True}, {"grid": (3, 5)}, InvalidInput, "3 x 5"),
        ({"position_2d": True}, {"grid": (-3, -4)}, InvalidInput, "at least 1"),
        ({"position_2d": True}, {"grid": (3, 4), "is_causal": True}, Unsupported, "no causal order"),
        ({"kv_stride": 2}, {}, Unsupported, "kv_stride=2 with position_2d=False"),
        ({"kv_stride": 2, "position_2d": True}, {"grid": (1, 11), "num_prefix_tokens": 1}, Unsupported, "kv_stride=2"),
        ({}, {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)}, Unsupported, "attention_mask"),
    ],
)
def test_refused_calls(options, call, error, match):
    with pytest.raises(error, match=f"generalized.*{match}"):
        module(**options)(*tokens(12), **call)


@pytest.mark.parametrize(
    "options", [{"beta": b} for b in BETAS if b[1] == "1" or b[3] == "1"] + [{"beta": "1010", "spatial_range": 2}]
)
def test_positions_of_two_sequences_are_refused(options):
    with pytest.raises(Unsupported, match="generalized.*positions of two sequences are not comparable"):
        module(**options)(*tokens(6, 11))


def test_more_queries_than_keys_are_refused_in_causal_order():
    with pytest.raises(Unsupported, match="generalized.*N=9 queries and M=5 keys"):
        module("1010")(*tokens(9, 5), is_causal=True)


def test_prefix_tokens_without_2d_positions_are_ordinary_tokens():
    built, qkv = module(), tokens(13)
    agree(built(*qkv, grid=(3, 4), num_prefix_tokens=1), built(*qkv), 0)


def test_host_defaults_take_the_grid():
    def fill(given, **host):
        return GeneralizedAttention.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}, grid=(14, 10)) == {"position_2d": True}
    assert fill({"position_2d": False}, grid=(14, 10)) == {} == fill({"position_dim": 6}, grid=(14, 10)) == fill({})
