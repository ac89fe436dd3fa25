"""Deformable convolution as operator and layer: the invariants of the specification (numbered as there), refusals."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn import functional

import hf_attn
from hf_attn import DeformableConv2d, deform_conv2d, kernels
from hf_attn.errors import InvalidInput, InvalidOption, KernelUnavailable
from hf_attn.kernels import deform


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def case(groups=1, offset_groups=1, stride=1, padding=1, dilation=1, scale=0.0, size=(6, 7)):
    """Arguments of the operator: 8 channels in, 4 out, 3 x 3 taps, offsets of about `scale` pixels."""
    x, weight = draw(2, 8, *size), draw(4, 8 // groups, 3, 3, seed=1)
    rows, columns = ((n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in size)
    offset = draw(2, 18 * offset_groups, rows, columns, seed=2, scale=scale)
    mask = draw(2, 9 * offset_groups, rows, columns, seed=3).sigmoid()
    return x, offset, weight, mask, {"stride": stride, "padding": padding, "dilation": dilation}


def loops(x, offset, weight, mask, stride, padding, dilation):
    """The definition, one number at a time."""
    (batch, channels, height, width), (out, per_group, kernel, _) = x.shape, weight.shape
    offset_groups = offset.shape[1] // 18
    result = x.new_zeros(batch, out, *offset.shape[2:])
    for b, o, oy, ox, c, t in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, out, *offset.shape[2:], per_group, kernel**2))
    ).tolist():
        channel = o // (out // (channels // per_group)) * per_group + c
        tap = channel // (channels // offset_groups) * 9 + t
        y = oy * stride - padding + t // 3 * dilation + offset[b, 2 * tap, oy, ox].item()
        at = ox * stride - padding + t % 3 * dilation + offset[b, 2 * tap + 1, oy, ox].item()
        for a, e in ((int(y // 1) + i, int(at // 1) + j) for i in (0, 1) for j in (0, 1)):
            if 0 <= a < height and 0 <= e < width:
                share = max(0, 1 - abs(y - a)) * max(0, 1 - abs(at - e))
                result[b, o, oy, ox] += weight[o, c, t // 3, t % 3] * mask[b, tap, oy, ox] * share * x[b, channel, a, e]
    return result


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 4)])
def test_01_zero_offsets_are_an_ordinary_convolution(stride, dilation, groups):
    x, offset, weight, _, call = case(groups, stride=stride, dilation=dilation)
    expected = functional.conv2d(x, weight, groups=groups, **call)
    agree(deform_conv2d(x, offset, weight, **call), expected)
    agree(deform_conv2d(x, offset, weight, mask=torch.ones_like(offset[:, ::2]), **call), expected)


def test_02_a_new_v2_layer_is_half_an_ordinary_convolution():
    layer, x = DeformableConv2d(8, 4, padding=1).double(), draw(2, 8, 6, 7)
    torch.nn.init.normal_(layer.bias)
    expected = functional.conv2d(x, layer.weight, padding=1) / 2 + layer.bias[:, None, None]
    agree(layer(x), expected)
    plain = DeformableConv2d(8, 4, padding=1, modulated=False, bias=False).double()
    agree(plain(x), functional.conv2d(x, plain.weight, padding=1))


def test_03_one_row_down_is_the_convolution_of_the_shifted_map():
    x, offset, weight, _, call = case()
    offset[:, ::2] = 1
    shifted = functional.conv2d(x.roll(-1, dims=2), weight, padding=1)
    agree(deform_conv2d(x, offset, weight, **call)[:, :, 1:-2], shifted[:, :, 1:-2])


def test_04_attention_form_is_the_operator():
    x, offset, weight, _, call = case(scale=2)
    moved = offset.unflatten(1, (9, 2))
    y, c = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
    out = 0
    for t in range(9):
        near = [
            (1 - (place - 1 + step + moved[:, t, axis])[..., None].sub(torch.arange(n)).abs()).clamp(min=0)
            for axis, (place, step, n) in enumerate(((y, t // 3, 6), (c, t % 3, 7)))
        ]
        out = out + torch.einsum("oc,bpqy,bpqx,bcyx->bopq", weight[:, :, t // 3, t % 3], *near, x)
    agree(deform_conv2d(x, offset, weight, **call), out)


def test_05_samples_far_outside_are_zero():
    x, offset, weight, _, call = case()
    assert not deform_conv2d(x, offset + 1000, weight, **call).any()


@pytest.mark.parametrize("offset_groups", [1, 2, 4])
@pytest.mark.parametrize("groups, stride, dilation", [(1, 1, 1), (2, 2, 2)])
def test_06_equals_the_loops(offset_groups, groups, stride, dilation):
    x, offset, weight, mask, call = case(groups, offset_groups, stride, dilation, dilation, scale=2, size=(4, 5))
    agree(deform_conv2d(x, offset, weight, mask=mask, **call), loops(x, offset, weight, mask, **call), 1e-11)


def test_07_gradients():
    x, offset, weight, mask, call = case(2, 2, stride=2, scale=2, size=(3, 4))
    inputs = [t.requires_grad_() for t in (x[:1, :, :, :].clone(), offset[:1].clone(), weight, mask[:1].clone())]
    assert torch.autograd.gradcheck(lambda a, b, c, d: deform_conv2d(a, b, c, mask=d, **call), inputs)


def test_rows_and_columns_may_differ():
    x, weight = draw(1, 2, 7, 9), draw(3, 2, 3, 1, seed=1)
    call = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    expected = functional.conv2d(x, weight, **call)
    agree(deform_conv2d(x, draw(1, 6, *expected.shape[2:], scale=0), weight, **call), expected)


def test_half_precision_is_accumulated_in_float32():
    x, offset, weight, mask, call = case(scale=2)
    low = [t.bfloat16() for t in (x, offset, weight, mask)]
    out = deform_conv2d(*low[:3], mask=low[3], **call)
    exact = deform_conv2d(*(t.float() for t in low[:3]), mask=low[3].float(), **call)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


def test_compiles_in_one_piece():
    layer, x = DeformableConv2d(4, 4, padding=1).eval(), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    agree(compiled(x), layer(x), 1e-6)


def test_torchvision_is_used_where_it_is_and_gets_the_arguments_in_its_order(monkeypatch):
    got = {}

    def stand_in(input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
        got.update(locals())
        return input

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", types.SimpleNamespace(deform_conv2d=stand_in))
    x, offset, weight, mask, call = case(stride=2)
    monkeypatch.setitem(kernels._absent, "deform_conv2d", {})
    assert deform.missing_torchvision() is None
    deform_conv2d(x, offset, weight, mask=mask, **call)
    assert got["mask"] is mask and got["stride"] == (2, 2) and got["padding"] == (1, 1) and got["offset"] is offset
    got.clear()
    deform_conv2d(*(t.bfloat16() for t in (x, offset, weight)), mask=mask.bfloat16(), **call)
    assert not got, "half precision is accumulated in float32, in torch"
    mixer = hf_attn.build("deformable", num_heads=2, head_dim=4, offset_groups=2)
    tokens = torch.randn(2, 2, 13, 4)
    mixer(tokens, tokens, tokens, grid=(3, 4), num_prefix_tokens=1)
    assert got["input"].shape == (2, 8, 3, 4) and got["offset"].shape == (2, 36, 3, 4) and got["weight"] is not None


def test_a_backend_that_cannot_run_says_why():
    x, offset, weight, _, call = case()
    agree(deform_conv2d(x, offset, weight, backend="torch", **call), deform_conv2d(x, offset, weight, **call))
    if "torchvision" in kernels.reasons("deform_conv2d"):
        with pytest.raises(KernelUnavailable, match="torchvision"):
            deform_conv2d(x, offset, weight, backend="torchvision", **call)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offset": draw(2, 18, 3, 3)}, "offset must be"),
        ({"offset": draw(2, 20, 6, 7)}, "offset must be"),
        ({"mask": draw(2, 18, 6, 7)}, "mask must be"),
        ({"bias": draw(5)}, "bias must be"),
        ({"weight": draw(4, 3, 3, 3)}, "whole number of groups"),
        ({"hidden_states": draw(8, 6, 7)}, "hidden_states must be"),
        ({"stride": 0}, "stride=0"),
        ({"dilation": 9}, "smaller than the kernel"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    x, offset, weight, mask, call = case()
    with pytest.raises(InvalidInput, match=message):
        deform_conv2d(**{"hidden_states": x, "offset": offset, "weight": weight, "mask": mask, **call, **change})


@pytest.mark.parametrize("change", [{"groups": 3}, {"offset_groups": 3}, {"kernel_size": 0}, {"padding": -1}])
def test_wrong_options_are_refused(change):
    with pytest.raises(InvalidOption, match=next(iter(change))):
        DeformableConv2d(8, 4, **change)
