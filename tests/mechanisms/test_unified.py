"""unified: four settings of one formula equal the mechanisms and torch's convolution."""

import pytest
import torch
from torch.nn import functional

import hf_attn
from hf_attn.errors import InvalidInput
from hf_attn.mechanisms.convolutions import deform_conv2d
from hf_attn.mechanisms.unified import band_weights, tap_weights, unified_attention

B, H, D, C = 2, 2, 3, 6


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def agree(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("beta", [f"{n:04b}" for n in range(16)])
def test_transformer_attention(beta):
    module = hf_attn.build("generalized", num_heads=H, head_dim=D, beta=beta, position_dim=8).double()
    x, q, k, v, o = draw(B, 7, C), draw(C, C), draw(C, C), draw(H * D, C), draw(C, H * D)
    heads = [(x @ w.T).unflatten(2, (H, D)).transpose(1, 2) for w in (q, k, v)]
    direct = module(*heads).transpose(1, 2).flatten(2) @ o.T
    weights = module.attention_weights(*heads)
    agree(unified_attention(x, weights, v.view(H, D, C), o.view(C, H, D).transpose(0, 1)), direct)


@pytest.mark.parametrize("kernel_size, dilation", [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_regular_convolution(kernel_size, dilation):
    x, weight = draw(B, C, 4, 5), draw(7, C, kernel_size, kernel_size)
    direct = functional.conv2d(x, weight, padding=dilation * (kernel_size - 1) // 2, dilation=dilation)
    weights = tap_weights((4, 5), kernel_size, dilation, dtype=torch.float64)
    assert set(weights.unique().tolist()) == {0, 1}
    found = unified_attention(x.flatten(2).transpose(1, 2), weights, out_proj=weight.flatten(2).permute(2, 0, 1))
    agree(found, direct.flatten(2).transpose(1, 2))
    direct = functional.conv1d(x.flatten(2), weight[:, :, 0], padding="same", dilation=dilation)
    weights = tap_weights((20,), kernel_size, dilation, dtype=torch.float64)
    found = unified_attention(x.flatten(2).transpose(1, 2), weights, out_proj=weight[:, :, 0].permute(2, 0, 1))
    agree(found, direct.transpose(1, 2))


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution(modulated):
    x, weight, offset = draw(B, C, 4, 5), draw(7, C, 3, 3), 2 * draw(B, 9, 20, 2)
    factor = torch.rand(B, 9, 20, dtype=torch.float64) if modulated else None
    mask = None if factor is None else factor.unflatten(2, (4, 5))
    interleaved = offset.transpose(2, 3).reshape(B, 18, 4, 5)
    direct = deform_conv2d(x, interleaved, weight, mask=mask, padding=1)
    weights = tap_weights((4, 5), 3, offset=offset, factor=factor)
    found = unified_attention(x.flatten(2).transpose(1, 2), weights, out_proj=weight.flatten(2).permute(2, 0, 1))
    agree(found, direct.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kernel_size", [1, 4, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_convolution(kernel_size, causal):
    module = hf_attn.build("dynamic_conv", num_heads=H, head_dim=D, kernel_size=kernel_size).double()
    query, value = draw(B, H, 9, D), draw(B, H, 9, D)
    direct = module(query, query, value, is_causal=causal).transpose(1, 2).flatten(2)
    kernel = module.weight_linear(query.transpose(1, 2).flatten(2)).unflatten(2, (H, -1)).transpose(1, 2).softmax(-1)
    weights = band_weights(kernel, kernel_size - 1 if causal else (kernel_size - 1) // 2)
    # W' picks the channels of a head, W puts them back
    pick = torch.eye(H * D, dtype=torch.float64).view(H, D, H * D)
    found = unified_attention(value.transpose(1, 2).flatten(2), weights, pick, pick.transpose(1, 2))
    agree(found, direct)


@pytest.mark.parametrize(
    "call",
    [
        lambda: unified_attention(draw(B, 7, C), draw(B, H, 5, 6)),
        lambda: unified_attention(draw(B, 7, C), draw(3, H, 5, 7)),
        lambda: unified_attention(draw(B, 7, C), draw(B, H, 5, 7), draw(H, D, D)),
        lambda: unified_attention(draw(B, 7, C), draw(B, H, 5, 7), draw(H, D, C), draw(H, C, C)),
        lambda: tap_weights((4, 5), 2),
        lambda: tap_weights((4, 5), 3, offset=draw(B, 9, 19, 2)),
        lambda: tap_weights((4, 5), 3, factor=draw(B, 8, 20)),
        lambda: band_weights(draw(B, H, 5, 3), 3),
    ],
)
def test_refused_shapes(call):
    with pytest.raises(InvalidInput, match="must be"):
        call()
