"""Deformable convolution: the invariants of the specification (numbered as there), CLS, padding, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import VIT, Largest
from torch.nn import functional

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

B, H, D = 2, 2, 4
C = H * D


def module(seed=0, offsets=0.0, heads=H, dim=D, **options):
    """A float64 module whose offsets are about as large as `offsets`; 0 leaves them at their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("deformable", num_heads=heads, head_dim=dim, **options).double().eval()
    if offsets:
        torch.nn.init.normal_(built.conv_offset.weight, std=offsets / (heads * dim * built.taps) ** 0.5)
        torch.nn.init.normal_(built.conv_offset.bias, std=offsets)
    return built


def shift(built, *offset):
    """The same offset for every tap of every token."""
    taps = built.taps * built.options.offset_groups
    with torch.no_grad():
        built.conv_offset.bias[: taps * len(offset)] = torch.tensor(offset, dtype=torch.float64).repeat(taps)
    return built


def tokens(n, seed=1, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, dtype=torch.float64, generator=generator).requires_grad_(grad) for _ in range(3)]


def as_map(x, rows, columns):
    return x.transpose(2, 3).flatten(1, 2).unflatten(2, (rows, columns))


def as_tokens(x):
    return x.flatten(2).unflatten(1, (H, D)).transpose(2, 3)


def padding(n):
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[:, 0], mask[:, -1] = True, False
    return mask


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size,dilation,groups", list(itertools.product([1, 3, 5], [1, 2], [None, 1, 4])))
def test_01_zero_offsets_are_an_ordinary_convolution(kernel_size, dilation, groups):
    built = module(kernel_size=kernel_size, dilation=dilation, groups=groups, modulated=False)
    q, k, v = tokens(30)
    expected = functional.conv2d(
        as_map(v, 5, 6),
        built.weight,
        padding=dilation * (kernel_size - 1) // 2,
        dilation=dilation,
        groups=groups or H,
    )
    agree(built(q, k, v, grid=(5, 6)), as_tokens(expected))


def test_02_a_new_v2_is_half_an_ordinary_convolution():
    built, (q, k, v) = module(bias=True), tokens(30)
    torch.nn.init.normal_(built.bias)
    expected = functional.conv2d(as_map(v, 5, 6), built.weight / 2, built.bias, padding=1, groups=H)
    agree(built(q, k, v, grid=(5, 6)), as_tokens(expected))


def test_03_an_offset_of_one_row_convolves_the_shifted_map():
    q, k, v = tokens(42)
    down = as_map(module(modulated=False)(q, k, v, grid=(7, 6)), 7, 6)
    shifted = as_map(shift(module(modulated=False), 1.0, 0.0)(q, k, v, grid=(7, 6)), 7, 6)
    agree(shifted[:, :, :-1], down[:, :, 1:])
    right = as_map(shift(module(modulated=False), 0.0, 1.0)(q, k, v, grid=(7, 6)), 7, 6)
    agree(right[..., :-1], down[..., 1:])


@pytest.mark.parametrize("position_2d", [True, False])
@pytest.mark.parametrize("predict_from", ["query", "value", "layer_input"])
def test_04_the_attention_of_each_tap_is_the_operator(position_2d, predict_from):
    built = module(offsets=1.5, position_2d=position_2d, predict_from=predict_from)
    call = {"grid": (5, 6), "layer_input": torch.randn(B, 30, C, dtype=torch.float64)}
    qkv = tokens(30)
    agree(built(*qkv, **call), built.naive(*qkv, **call))


@pytest.mark.parametrize("form", ["forward", "naive"])
def test_05_samples_far_outside_are_zero(form):
    built, qkv = shift(module(), 1000.0, 0.0), tokens(12, grad=True)
    out = (built if form == "forward" else built.naive)(*qkv, grid=(3, 4))
    assert not out.any()
    out.sum().backward()
    assert not qkv[2].grad.any() and not built.conv_offset.bias.grad.any()
    for far in (1e30, -1e30):
        assert not shift(module(), 0.0, far)(*tokens(12), grid=(3, 4)).any()


@pytest.mark.parametrize("offset_groups", [1, 2, 4])
@pytest.mark.parametrize("modulated,masked,prefix", list(itertools.product([True, False], [True, False], [0, 2])))
@pytest.mark.parametrize("groups", [None, 1, C])
def test_06_both_forms_agree_with_gradients(offset_groups, modulated, masked, prefix, groups):
    built = module(offsets=2.0, offset_groups=offset_groups, modulated=modulated, groups=groups, bias=True, dilation=2)
    qkv, mask = tokens(20 + prefix, grad=True), padding(20 + prefix) if masked else None
    call = {"grid": (4, 5), "num_prefix_tokens": prefix, "key_padding_mask": mask}
    cotangent, results = torch.randn(B, H, 20 + prefix, D, dtype=torch.float64), []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        leaves = [*qkv, *built.parameters()]
        grads = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
        assert (grads[1] is None) == (prefix == 0), "keys are for prefix tokens only"
        results.append([out, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))])
    for efficient, naive in zip(*results):
        agree(efficient, naive, 1e-10)


@pytest.mark.parametrize("position_2d", [True, False])
def test_07_gradcheck(position_2d):
    built = module(offsets=0.7, position_2d=position_2d, bias=True, offset_groups=2, dim=2)
    qkv = [x[:1, :, :, :2].detach().requires_grad_() for x in tokens(6)]
    parameters = dict(built.named_parameters())

    def run(query, value, *values):
        given = dict(zip(parameters, values))
        return torch.func.functional_call(built, given, (query, qkv[1], value), {"grid": (2, 3)})

    assert torch.autograd.gradcheck(run, (qkv[0], qkv[2], *parameters.values()), atol=1e-6)


def test_the_operator_is_its_loop_over_tokens_taps_and_corners():
    built, (q, k, v) = module(offsets=1.5, offset_groups=4, dilation=2), tokens(12)
    rows, columns = 3, 4
    predicted = built.conv_offset(as_map(q, rows, columns))
    value, expected = as_map(v, rows, columns), torch.zeros(B, C, rows, columns, dtype=torch.float64)
    with torch.no_grad():
        for b, y, x, c, t in itertools.product(range(B), range(rows), range(columns), range(C), range(9)):
            group = c // (C // 4)
            dy, dx = (predicted[b, 2 * (group * 9 + t) + i, y, x].item() for i in (0, 1))
            factor = predicted[b, 2 * 4 * 9 + group * 9 + t, y, x].sigmoid()
            at_y, at_x = y - 2 + t // 3 * 2 + dy, x - 2 + t % 3 * 2 + dx
            sample = 0.0
            for i, j in itertools.product((0, 1), (0, 1)):
                a, e = math.floor(at_y) + i, math.floor(at_x) + j
                if 0 <= a < rows and 0 <= e < columns:
                    sample += (1 - abs(at_y - a)) * (1 - abs(at_x - e)) * value[b, c, a, e]
            head = c // D
            expected[b, head * D : (head + 1) * D, y, x] += (
                built.weight[head * D : (head + 1) * D, c % D, t // 3, t % 3] * factor * sample
            )
    agree(built(q, k, v, grid=(rows, columns)), as_tokens(expected))


def test_the_samples_are_those_of_grid_sample():
    built, (q, k, v) = module(offsets=3.0, kernel_size=1, modulated=False, groups=C), tokens(35)
    torch.nn.init.ones_(built.weight)
    predicted = built.conv_offset(as_map(q, 5, 7)).unflatten(1, (1, 2))[:, 0]
    base = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij"))
    place = (base + predicted).flip(1).movedim(1, -1)
    scaled = 2 * place / torch.tensor([6, 4]) - 1
    expected = functional.grid_sample(as_map(v, 5, 7), scaled, align_corners=True)
    agree(built(q, k, v, grid=(5, 7)), as_tokens(expected))


def test_offsets_learn_from_their_start():
    """At offset zero every sample lies on a kink; both forms take the derivative from the right there."""
    built, qkv = module(), tokens(12)
    grads = []
    for form in (built, built.naive):
        out = form(*qkv, grid=(3, 4))
        grads.append(torch.autograd.grad(out.square().sum(), [*built.conv_offset.parameters()]))
    assert all((g != 0).any() for g in grads[0])
    for a, b in zip(*grads):
        agree(a, b)


# -- CLS tokens, padding, the 1-D form ---------------------------------------------------------------------------------


def test_a_prefix_token_pools_by_the_keys_alone():
    built, (q, k, v) = module(offsets=1.0), tokens(14)
    mask = padding(14)
    call = {"grid": (3, 4), "num_prefix_tokens": 2}
    out = built(q, k, v, key_padding_mask=mask, scaling=0.3, **call)
    logits = (0.3 * torch.einsum("hd,bhmd->bhm", built.prefix_bias, k)).masked_fill(~mask[:, None], float("-inf"))
    expected = torch.einsum("bhm,bhmd->bhd", logits.softmax(-1), v)
    agree(out[:, :, 0], expected)
    agree(out[:, :, 1], expected)
    alone = built(*(x[:, :, 2:] for x in (q, k, v)), grid=(3, 4), key_padding_mask=mask[:, 2:])
    agree(out[:, :, 2:], alone)
    same = module(offsets=1.0, prefix_mode="identity")
    agree(same(q, k, v, **call)[:, :, :2], v[:, :, :2])
    assert "prefix_bias" not in same.state_dict()


@pytest.mark.parametrize("position_2d", [True, False])
def test_padded_tokens_are_holes_whatever_they_hold(position_2d):
    built, qkv, mask = module(offsets=1.5, position_2d=position_2d), tokens(20), padding(20)
    noisy = [torch.where(mask[:, None, :, None], x, float("nan")) for x in qkv]
    zeroed = [torch.where(mask[:, None, :, None], x, 0) for x in qkv]
    out = built(*noisy, grid=(4, 5), key_padding_mask=mask)
    agree(out, built(*zeroed, grid=(4, 5)))
    none = torch.zeros_like(mask)
    assert not built(*noisy, grid=(4, 5), key_padding_mask=none).any()


def test_a_position_that_is_not_a_number_spoils_its_own_token_only():
    built, (q, k, v) = module(offsets=1.0, kernel_size=1), tokens(12)
    clean = built(q, k, v, grid=(3, 4))
    q[0, 0, 5] = float("nan")
    out = built(q, k, v, grid=(3, 4))
    assert out[0, :, 5].isnan().all()
    q[0, 0, 5], out[0, :, 5] = 0.0, clean[0, :, 5]
    agree(out, clean)


@pytest.mark.parametrize("real", [slice(0, 8), slice(5, 13)], ids=["right", "left"])
def test_padding_of_a_sequence_equals_cutting_it_off(real):
    built, qkv = module(offsets=2.0, position_2d=False), tokens(13)
    mask = torch.zeros(B, 13, dtype=torch.bool)
    mask[:, real] = True
    agree(built(*qkv, key_padding_mask=mask)[:, :, real], built(*(x[:, :, real] for x in qkv)))


def test_a_sequence_is_a_map_of_one_row():
    line, grid = module(offsets=1.5, position_2d=False, offset_groups=2), module(offset_groups=2)
    with torch.no_grad():
        middle = 1
        grid.weight.zero_()
        grid.weight[:, :, middle] = line.weight
        for target, source in ((grid.conv_offset.weight, line.conv_offset.weight), (grid.conv_offset.bias, line.conv_offset.bias)):  # fmt: skip
            row = target[:, :, middle] if target.dim() == 4 else target
            for group, tap in itertools.product(range(2), range(3)):
                place = group * 9 + middle * 3 + tap
                row[2 * place + 1] = source[group * 3 + tap]
                row[2 * 2 * 9 + place] = source[2 * 3 + group * 3 + tap]
    qkv = tokens(11)
    agree(line(*qkv), grid(*qkv, grid=(1, 11)))
    agree(line(*qkv), line(*qkv, grid=(2, 3), num_prefix_tokens=4))


def test_no_tensor_grows_with_the_square_of_the_length():
    built = module(offsets=1.0).float()
    qkv = [torch.randn(1, H, 32 * 32, D) for _ in range(3)]
    with Largest() as largest, torch.no_grad():
        built(*qkv, grid=(32, 32))
    assert largest.numel <= 1024 * 9 * C


# -- parameters, models, refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,offsets,weight",
    [
        ({}, 27, (8, 4, 3, 3)),
        ({"modulated": False, "kernel_size": 5}, 50, (8, 4, 5, 5)),
        ({"offset_groups": 4, "groups": 1}, 108, (8, 8, 3, 3)),
        ({"position_2d": False}, 6, (8, 4, 3)),
        ({"position_2d": False, "modulated": False}, 3, (8, 4, 3)),
    ],
)
def test_state_dict_and_start(options, offsets, weight):
    built = module(bias=True, **options)
    shapes = {"weight": weight, "bias": (C,), "conv_offset.weight": (offsets, C, *weight[2:]), "conv_offset.bias": (offsets,)}  # fmt: skip
    if built.options.position_2d:
        shapes["prefix_bias"] = (H, D)
    assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == shapes
    assert not built.conv_offset.weight.any() and not built.conv_offset.bias.any() and not built.bias.any()
    bound = math.prod(weight[1:]) ** -0.5
    assert 0.8 * bound < built.weight.abs().max() <= bound
    if built.options.position_2d:
        assert 0 < built.prefix_bias.abs().max() <= (2 * D) ** -0.5


def test_a_vision_model_starts_saves_and_takes_other_image_sizes(tmp_path):
    config = hf_attn.AttnViTConfig(**VIT, attn_implementation="deformable", attention_options={"predict_from": "layer_input"})  # fmt: skip
    model = hf_attn.AttnViTModel(config).eval()
    mechanism = model.get_submodule(next(n for n, m in model.named_modules() if getattr(m, "name", "") == "deformable"))
    assert not mechanism.conv_offset.weight.any() and mechanism.weight.any()
    torch.nn.init.normal_(mechanism.conv_offset.weight)
    model.save_pretrained(tmp_path)
    again = hf_attn.AttnViTModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        agree(model(pixels).last_hidden_state, again(pixels).last_hidden_state, 0)
        larger = model(torch.randn(1, 3, 16, 12), interpolate_pos_encoding=True).last_hidden_state
    assert larger.shape == (1, 49, 32) and larger.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 2}, {"kernel_size": 0}, {"dilation": 0}, {"groups": 3}, {"groups": 0}, {"offset_groups": 5},
     {"modulated": 1}, {"predict_from": "key"}, {"prefix_mode": "mean"}, {"position_2d": False, "prefix_mode": "none"}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="deformable"):
        module(**options)


@pytest.mark.parametrize(
    "options,call,error,match",
    [
        ({}, {}, Unsupported, "no grid"),
        ({}, {"grid": (2, 3)}, InvalidInput, "2 x 3"),
        ({}, {"grid": (-2, -4)}, InvalidInput, "at least 1"),
        ({}, {"grid": (2, 4), "is_causal": True}, Unsupported, "is_causal"),
        ({"position_2d": False}, {"is_causal": True}, Unsupported, "is_causal"),
        ({"prefix_mode": "none"}, {"grid": (1, 7), "num_prefix_tokens": 1}, Unsupported, "num_prefix_tokens=1"),
        ({"predict_from": "layer_input"}, {"grid": (2, 4)}, Unsupported, "no layer_input"),
        ({"predict_from": "layer_input"}, {"grid": (2, 4), "layer_input": torch.zeros(B, 7, C)}, InvalidInput, "2, 8, 8"),
        ({}, {"grid": (2, 4), "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, Unsupported, "attention_mask"),
    ],
)  # fmt: skip
def test_refused_calls(options, call, error, match):
    with pytest.raises(error, match=f"deformable.*{match}"):
        module(**options)(*tokens(8), **call)


def test_cross_attention_is_refused():
    q, k, v = tokens(8)
    with pytest.raises(Unsupported, match="deformable.*N=6 queries and M=8 keys"):
        module(position_2d=False)(q[:, :, :6], k, v)
