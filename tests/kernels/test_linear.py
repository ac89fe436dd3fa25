"""A linear layer by another kernel gives the numbers of the layer, and stands aside where more than a product happens."""

import pytest
import torch
from torch import nn

from hf_attn.kernels import linear as module
from hf_attn.kernels.linear import linear


@pytest.fixture
def calls(monkeypatch):
    """How often the convolution was taken."""
    made, convolve = [], torch.nn.functional.conv2d
    monkeypatch.setattr(module.functional, "conv2d", lambda *a: made.append(1) or convolve(*a))
    return made


@pytest.mark.parametrize("shape", [(1, 512), (4, 160), (3, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_the_layer_and_its_gradients(shape, bias, calls):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(*shape, 24, requires_grad=True)
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn(*shape, 40)
    for strided in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        found, expected = linear(layer, strided), layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (found, expected))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert len(calls) == 2 * torch.backends.mkldnn.is_available()


class Doubled(nn.Linear):
    """A stand-in, as adapters and quantised layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_whatever_is_more_than_a_product_is_called(calls):
    x = torch.randn(1, 512, 24)
    stand_in, hooked, plain = Doubled(24, 40), nn.Linear(24, 40), nn.Linear(24, 40)
    hooked.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(linear(stand_in, x), stand_in(x)) and torch.equal(linear(hooked, x), torch.zeros(1))
    for few in (x[:, :500], x[:, :100]):
        assert torch.equal(linear(plain, few), plain(few))
    assert linear(plain.double(), x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(plain.float(), x).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: linear(plain, x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), plain(x))
    assert not calls
