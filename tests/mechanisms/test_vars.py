"""VARS: the invariants of its specification (numbered as there), the refusals, the forms against each other."""

from __future__ import annotations

import pytest
import torch
from helpers import VIT
from torch.nn import functional

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms.vars import VarsAttention, ista, shrink

B, H, D, M = 2, 2, 4, 8
GRID = (4, 6)
KINDS = {
    "dynamic": ({}, 25, {}),
    "unit": ({"unit_norm": True, "num_steps": 2}, 25, {"scaling": 0.7}),
    "learned": ({"learned": True, "sparsity": 0.1}, 25, {}),
    "both": ({"kind": "both", "grid_size": GRID}, 24, {}),
    "both learned": ({"kind": "both", "grid_size": GRID, "learned": True, "num_prefix_tokens": 1}, 25, {"num_prefix_tokens": 1}),
    "both resized": ({"kind": "both", "grid_size": GRID, "num_prefix_tokens": 2}, 17, {"grid": (3, 5), "num_prefix_tokens": 2}),
    "static": ({"kind": "static", "grid_size": GRID, "sparsity": 0.3}, 24, {"grid": GRID}),
    "static odd": ({"kind": "static", "grid_size": (3, 5), "sparsity": 0.2, "num_templates": 2}, 15, {}),
    "static filtered": ({"kind": "static", "grid_size": (1, 8), "sparsity": 0.2, "output_kernel": True}, 8, {}),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def module(seed=0, **options):
    """A float64 module; learned parts are moved off their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("vars", num_heads=H, head_dim=D, **options).double()
    built.reset_parameters()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.add_((0.3 if "scale" in name or "gram" in name else 1.0) * torch.randn_like(parameter))
    return built


def tokens(n, seed=1, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, dtype=torch.float64, generator=generator).requires_grad_(grad) for _ in range(3)]


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def parts(built, qkv, **call):
    """P, G, y and the step of a call, as the efficient form makes them."""
    checked = built._call(*qkv, **call)
    dictionary = built.dictionary(checked)
    gram, target = dictionary.mT @ dictionary, dictionary.mT @ qkv[2]
    return dictionary, gram, target, 1 / (1 + gram.abs().sum(-1).amax(-1))[..., None, None]


@kinds
def test_the_efficient_form_equals_the_definition(kind):
    options, n, call = KINDS[kind]
    built, qkv = module(**options), tokens(n, grad=True)
    gradients = []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
        leaves = [qkv[0], qkv[2], *built.parameters()]
        gradients.append((out, torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)))
    agree(gradients[0][0], gradients[1][0], 1e-10)
    assert gradients[0][0].abs().max() > 0.01, "the code is not all zero"
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            agree(a, b, 1e-8)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "both"])
def test_01_templates_have_unit_length(kind):
    options, n, call = KINDS[kind]
    _, gram, _, _ = parts(module(**options), tokens(n), **call)
    agree(gram.diagonal(dim1=-2, dim2=-1), torch.ones_like(gram[..., 0]))


@pytest.mark.parametrize("kind", ["dynamic", "both"])
def test_02_the_bound_is_above_the_spectral_norm(kind):
    options, n, call = KINDS[kind]
    _, gram, _, step = parts(module(**options), tokens(n), **call)
    assert (1 / step[..., 0, 0] >= 1 + torch.linalg.matrix_norm(gram, ord=2)).all()


@pytest.mark.parametrize("kind", ["dynamic", "both"])
def test_03_without_recurrence_and_sparsity_it_is_kernel_attention(kind):
    options, n, call = KINDS[kind]
    built, qkv = module(**{**options, "sparsity": 0, "num_steps": 0}), tokens(n)
    dictionary = built.dictionary(built._call(*qkv, **call))
    agree(built(*qkv, **call), dictionary @ dictionary.mT @ qkv[2])


def test_04_many_steps_without_sparsity_are_the_least_squares_projection():
    qkv = tokens(25)
    errors = []
    for steps in (5, 500, 50000):
        built = module(sparsity=0, num_steps=steps)
        dictionary = built.dictionary(built._call(*qkv))
        projected = dictionary @ (torch.linalg.pinv(dictionary) @ qkv[2])
        errors.append((built(*qkv) - projected).norm() / projected.norm())
    assert errors[0] > 0.05 and errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "both"])
def test_05_the_energy_never_increases(kind):
    options, n, call = KINDS[kind]
    qkv = tokens(n)
    dictionary, gram, target, step = parts(module(**options), qkv, **call)

    def energy(code):
        return (qkv[2] - dictionary @ code).square().sum((-1, -2)) / 2 + 0.3 * code.abs().sum((-1, -2))

    values = torch.stack([energy(ista(gram, target, 0.3, step, k)) for k in range(40)])
    assert (values.diff(dim=0) <= 1e-12).all() and (values[0] - values[-1] > 0.1).all()


def test_06_the_limit_is_optimal():
    built, qkv = module(), tokens(25)
    _, gram, target, step = parts(built, qkv)
    code = ista(gram, target, 0.3, step, 30000)
    slope = gram @ code - target
    support = code.abs() > 1e-6
    assert support.any() and not support.all()
    agree(slope[support], -0.3 * code.sign()[support], 1e-6)
    assert (slope[~support].abs() <= 0.3 + 1e-6).all()


@pytest.mark.parametrize("kind", ["dynamic", "both", "static"])
@pytest.mark.parametrize("steps", [0, 4])
def test_07_too_much_sparsity_gives_zero(kind, steps):
    options, n, call = KINDS[kind]
    assert not module(**{**options, "sparsity": 1e4, "num_steps": steps})(*tokens(n), **call).any()


@pytest.mark.parametrize("kind", ["dynamic", "learned", "both", "static", "static filtered"])
def test_08_odd_and_homogeneous_in_the_values(kind):
    options, n, call = KINDS[kind]
    q, k, v = tokens(n)
    built = module(**options)
    out = built(q, k, v, **call)
    agree(built(q, k, -v, **call), -out)
    if not options.get("learned"):
        scaled = module(**{**options, "sparsity": 3 * built.sparsity})
        agree(scaled(q, k, 3 * v, **call), 3 * out)


@pytest.mark.parametrize("kind", ["dynamic", "unit", "learned"])
def test_09_permutation_equivariance(kind):
    options, n, call = KINDS[kind]
    built, qkv = module(**options), tokens(n)
    order = torch.randperm(n)
    agree(built(*(x[:, :, order] for x in qkv), **call), built(*qkv, **call)[:, :, order])


@pytest.mark.parametrize("kind", ["dynamic", "unit", "learned"])
def test_10_padding_is_removal(kind):
    options, n, call = KINDS[kind]
    built, qkv = module(**options), tokens(n)
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, 3::2] = False
    padded = [torch.where(mask[:, None, :, None], x, 1e3) for x in qkv]
    out = built(*padded, key_padding_mask=mask, **call)
    agree(out[:1, :, mask[0]], built(*(x[:1, :, mask[0]] for x in qkv), **call))
    agree(out[1:], built(*(x[1:] for x in qkv), **call))
    assert not out[0, :, ~mask[0]].any()


@pytest.mark.parametrize("kind", ["static", "static odd", "static filtered"])
def test_11_circular_shift_equivariance(kind):
    options, n, call = KINDS[kind]
    built, (q, k, v) = module(**options), tokens(n)
    size = options["grid_size"]

    def shift(x):
        return x.unflatten(2, size).roll((1, 3), dims=(2, 3)).flatten(2, 3)

    agree(built(q, k, shift(v), **call), shift(built(q, k, v, **call)), 1e-10)


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 8), (5, 1)])
def test_12_synthesis_is_the_adjoint_of_analysis(size):
    built = module(kind="static", grid_size=size)
    spectrum = built.spectra(built.kernel, torch.float64)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(H * D, *size, dtype=torch.float64, generator=generator)
    code = torch.randn(H * D, 5, *size, dtype=torch.float64, generator=generator)
    analysed = torch.fft.irfft2(spectrum * torch.fft.rfft2(image, norm="ortho")[:, None], s=size, norm="ortho")
    synthesised = (spectrum.conj() * torch.fft.rfft2(code, norm="ortho")).sum(1)
    agree((analysed * code).sum(), (image * torch.fft.irfft2(synthesised, s=size, norm="ortho")).sum(), 1e-10)
    # a spectrum of real kernels survives the way to the maps and back; the raw parameter does not
    agree(torch.fft.rfft2(torch.fft.irfft2(spectrum, s=size)), spectrum, 1e-10)
    raw = torch.view_as_complex(built.kernel.detach())
    assert (torch.fft.rfft2(torch.fft.irfft2(raw, s=size)) - raw).abs().max() > 0.1


def test_13_taking_out_the_column_maximum_changes_nothing_and_long_queries_do_not_overflow():
    built, qkv = module(), tokens(25)
    call = built._call(*qkv)
    plain = functional.normalize(built.log_features(call).exp(), dim=2)
    agree(built.dictionary(call), plain, 1e-10)
    q, k, v = (40 * qkv[0]).float(), qkv[1].float(), qkv[2].float()
    single = module().float()
    dictionary = single.dictionary(single._call(q, k, v))
    agree(dictionary.norm(dim=2), torch.ones(B, H, M), 1e-5)
    agree(single(q, k, v).double(), module()(40 * qkv[0], *qkv[1:]), 1e-5)
    assert functional.normalize(single.log_features(single._call(q, k, v)).exp(), dim=2).norm(dim=2).min() < 0.5


def test_14_the_length_of_a_column_changes_nothing():
    built, qkv = module(), tokens(25)
    expected, original = built(*qkv), built.log_features
    built.log_features = lambda call: original(call) + 3 * torch.arange(M)
    agree(built(*qkv), expected, 1e-11)
    both = module(kind="both", grid_size=GRID)
    expected = both(*tokens(24))
    with torch.no_grad():
        both.static_templates.mul_(torch.arange(1, M + 1))
    agree(both(*tokens(24)), expected)


def test_15_the_learned_recurrence_starts_as_ista_with_a_gelu():
    plain, qkv = module(sparsity=0.1), tokens(25)
    learned = hf_attn.build("vars", num_heads=H, head_dim=D, sparsity=0.1, learned=True).double()
    learned.load_state_dict({**learned.state_dict(), **plain.state_dict()})
    _, gram, target, step = parts(plain, qkv)
    code = ista(gram, target, 0.1, step, 5, smooth=True)
    agree(learned(*qkv), plain.dictionary(plain._call(*qkv)) @ code)
    assert (learned(*qkv) - plain(*qkv)).abs().max() > 1e-3
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    agree(shrink(x, 1.0), torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0]), 0)
    agree(shrink(x, 1.0, smooth=True), x.sign() * functional.gelu(x.abs() - 1), 0)


def test_recurrence_and_moderate_sparsity_remove_noise():
    """Sparse codes of random templates plus noise: more steps help, some sparsity helps, too much hurts."""
    torch.manual_seed(0)
    dictionary = functional.normalize(torch.randn(64, 24, dtype=torch.float64), dim=0)
    clean = dictionary @ (3 * torch.randn(24, 200).double() * (torch.rand(24, 200) < 0.12))
    noisy = clean + 0.4 * torch.randn(64, 200).double()
    gram, target = dictionary.T @ dictionary, dictionary.T @ noisy
    step = 1 / (1 + gram.abs().sum(-1).amax())

    def error(sparsity, steps):
        out = dictionary @ ista(gram, target, sparsity, step, steps)
        return float((out - clean).norm() / clean.norm())

    assert error(0, 5) < 0.8 * error(0, 0)
    assert error(0.6, 5) < 0.8 * error(0.6, 0)
    assert error(0.6, 5) < 0.8 * error(0, 5)
    assert error(0.6, 200) < error(2.0, 200)


# -- parameters, options, refusals -------------------------------------------------------------------------------------


def test_the_queries_are_their_own_keys():
    q, k, v = tokens(25)
    agree(module()(q, k, v), module()(q, 7 * k, v), 0)
    static = module(kind="static", grid_size=GRID)
    q, k, v = tokens(24)
    agree(static(q, k, v), static(3 * q, k, v), 0)


def test_state_dict_and_start():
    def shapes(**options):
        built = hf_attn.build("vars", num_heads=H, head_dim=D, **options)
        assert built.capabilities.learned == bool(list(built.parameters()))
        return built, {n: tuple(t.shape) for n, t in built.state_dict().items()}

    assert shapes()[1] == {"random_matrix": (H, D, 2 * D)}
    assert shapes(template_ratio=3)[1] == {"random_matrix": (H, D, 3 * D)}
    both, found = shapes(kind="both", grid_size=GRID, num_prefix_tokens=1, learned=True)
    assert found == {
        "random_matrix": (H, D, M),
        "static_templates": (H, 25, M),
        "gram_transform": (2 * M, 2 * M),
        "sparsity_scale": (),
        "step_scale": (),
    }
    agree(both.gram_transform.detach(), torch.eye(2 * M), 0)
    assert both.sparsity_scale == both.step_scale == 1
    static, found = shapes(kind="static", grid_size=(8, 6), num_templates=3, output_kernel=True)
    assert found == {"kernel": (H * D, 3, 8, 4, 2), "output_kernel_weight": (H * D, 8, 4, 2)}
    energy = 2 * static.kernel.square().sum((1, 4)) / 8**2
    agree(energy.mean((1, 2)).detach(), torch.ones(H * D), 1e-5)
    assert 0.01 < static.output_kernel_weight.std() < 0.04
    assert static.capabilities.random == "" and both.capabilities.random
    assert not dict(both.named_parameters()).keys() & {"random_matrix"}


def test_defaults_of_lambda_and_steps():
    assert (module().sparsity, module().num_steps) == (0.3, 5)
    static = module(kind="static", grid_size=GRID)
    assert (static.sparsity, static.num_steps) == (3.5, 3)
    given = module(kind="static", grid_size=GRID, sparsity=0, num_steps=0)
    assert (given.sparsity, given.num_steps) == (0, 0)


def test_dead_kernels_give_zeros():
    built, qkv = module(kind="static", grid_size=GRID), tokens(24)
    with torch.no_grad():
        built.kernel[:3] = 0
    out = built(*qkv)
    assert out.isfinite().all() and not out[:, 0, :, :3].any()
    agree(out, built.naive(*qkv), 1e-10)


@pytest.mark.parametrize(
    "options",
    [{"kind": "sparse"}, {"sparsity": -0.1}, {"num_steps": -1}, {"template_ratio": 0}, {"kind": "both"}, {"kind": "static"},
     {"kind": "static", "grid_size": GRID, "learned": True}, {"kind": "static", "grid_size": GRID, "num_prefix_tokens": 1},
     {"kind": "both", "grid_size": (4,)}, {"kind": "both", "grid_size": 4}, {"grid_size": (0, 2)}, {"unit_norm": 1}, {"lamda": 1}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="vars"):
        module(**options)


MASK = torch.ones(B, 24, dtype=torch.bool)


@pytest.mark.parametrize(
    "kind, call, error, match",
    [
        ("dynamic", {"is_causal": True}, Unsupported, "is_causal"),
        ("dynamic", {"scaling": -1.0}, InvalidInput, "scaling=-1.0"),
        ("dynamic", {"attention_mask": torch.ones(1, 1, 24, 24, dtype=torch.bool)}, Unsupported, "attention_mask"),
        ("both", {"key_padding_mask": MASK}, Unsupported, "key_padding_mask.*kind='dynamic'"),
        ("both", {"num_prefix_tokens": 1}, Unsupported, "num_prefix_tokens=1"),
        ("both", {"grid": (4, 5)}, Unsupported, "N=24.*4 x 5"),
        ("both", {"is_causal": True}, Unsupported, "is_causal"),
        ("static", {"key_padding_mask": MASK}, Unsupported, "key_padding_mask"),
        ("static", {"num_prefix_tokens": 4, "grid": (4, 5)}, Unsupported, "num_prefix_tokens=4.*Drop"),
        ("static", {"grid": (6, 4)}, Unsupported, r"grid=\(6, 4\).*4 x 6"),
    ],
)
def test_refused_calls(kind, call, error, match):
    with pytest.raises(error, match=f"vars.*{match}"):
        module(**KINDS[kind][0])(*tokens(24), **call)


def test_both_needs_its_prefix_tokens_and_its_length():
    built = module(kind="both", grid_size=GRID, num_prefix_tokens=1)
    with pytest.raises(Unsupported, match="vars.*num_prefix_tokens=0"):
        built(*tokens(25))
    with pytest.raises(Unsupported, match="vars.*N=24"):
        built(*tokens(24), num_prefix_tokens=1)
    with pytest.raises(Unsupported, match="vars.*N=5 queries"):
        module()(tokens(5)[0], *tokens(7)[1:])


def test_a_model_fills_in_its_grid_and_static_templates_refuse_a_cls_token():
    def fill(given, **host):
        return VarsAttention.host_defaults(Host("m", H, D, 0, **host), given)

    grid = {"grid": (6, 5), "num_prefix_tokens": 1}
    assert fill({}, **grid) == {} and fill({"kind": "both"}) == {}
    assert fill({"kind": "both"}, **grid) == {"grid_size": [6, 5], "num_prefix_tokens": 1}
    assert fill({"kind": "both", "grid_size": (3, 3)}, **grid) == {"num_prefix_tokens": 1}

    def model(kind):
        options = {"kind": kind, "sparsity": 0.1}
        config = hf_attn.AttnViTConfig(**VIT, attn_implementation="vars", attention_options=options)
        return hf_attn.AttnViTForImageClassification(config).eval()

    both = model("both")
    assert both.vit.layers[0].attention.mechanism.static_templates.shape == (4, 37, 16)
    with torch.no_grad():
        larger = both(torch.rand(1, 3, 16, 12), interpolate_pos_encoding=True).logits
    assert larger.isfinite().all()
    with pytest.raises(InvalidOption, match="vars.*num_prefix_tokens=1.*bare grid"):
        model("static")
    with pytest.raises(Unsupported, match="vars.*causal"):
        hf_attn.AttnGPT2Model(hf_attn.AttnGPT2Config(n_embd=32, n_layer=1, n_head=4, attn_implementation="vars"))


@pytest.mark.parametrize("kind", ["both learned", "static filtered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_only_rounds_the_result(kind, dtype):
    options, n, call = KINDS[kind]
    built, qkv = module(**options).to(dtype), [x.to(dtype) for x in tokens(n)]
    out = built(*qkv, **call)
    assert out.dtype == dtype
    expected = built.double().naive(*(x.double() for x in qkv), **call)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < max(torch.finfo(dtype).eps, 2e-5)


@pytest.mark.parametrize("kind", ["both learned", "both resized", "static filtered"])
def test_compiled_and_exported(kind):
    options, n, call = KINDS[kind]
    built, qkv = module(**options), tokens(n)
    expected = built(*qkv, **call)
    agree(torch.compile(built, fullgraph=True, backend="eager")(*qkv, **call), expected)
    agree(torch.export.export(built, tuple(qkv), call).module()(*qkv, **call), expected)
