"""Toeplitz masks on kernel attention: the Triton kernel gives what the definition gives, and says what it cannot do."""

import pytest
import torch
from helpers import DIM, HEADS, qkv

import hf_attn
from hf_attn import kernels
from hf_attn.errors import KernelUnavailable
from hf_attn.kernels import random_features, toeplitz

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not random_features.INTERPRETED, reason="kernels are compiled for a GPU here")
SEQUENCE = {"mask_type": "toeplitz", "max_length": 90}
GRID = {"mask_type": "block_toeplitz", "grid_size": [3, 4]}
CASES = {
    "sequence": (SEQUENCE, {}, (70, 70)),
    "fewer queries": ({**SEQUENCE, "feature_map": "elu"}, {"is_causal": True}, (40, 75)),
    "polynomial": ({**SEQUENCE, "parametrization": "exp_poly"}, {}, (33, 33)),
    "grid": ({**GRID, "parametrization": "abs_table"}, {"grid": (3, 4)}, (12, 12)),
    "grid with prefix": (GRID, {"grid": (3, 4), "num_prefix_tokens": 1}, (13, 13)),
    "causal grid": (GRID, {"grid": (3, 4), "num_prefix_tokens": 2, "is_causal": True}, (14, 14)),
}


def topological(**options):
    """Parameters are drawn, not at their start."""
    module = hf_attn.build("topological", num_heads=HEADS, head_dim=DIM, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.fixture
def used(monkeypatch):
    """Lets "auto" take Triton kernels, and counts the calls that did."""
    calls, plain = [], toeplitz.BACKENDS[0].run
    counted = kernels.Backend("triton", kernels.always, toeplitz._accepts, lambda r: (calls.append(1), plain(r))[1])
    monkeypatch.setattr(toeplitz, "BACKENDS", (counted, *toeplitz.BACKENDS[1:]))
    monkeypatch.setattr(kernels, "_setting", "triton")
    return calls


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_modules_get_what_the_definition_gives(name, used):
    options, call, (queries, keys) = CASES[name]
    module = topological(**options)
    mask = torch.ones(3, keys, dtype=torch.bool)
    mask[0, 4:9] = mask[1] = False
    found = []
    for form, dtype in (("naive", torch.float64), ("forward", torch.float32)):
        module.to(dtype)
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(queries, keys)]
        out = getattr(module, form)(*inputs, key_padding_mask=mask, **call)
        # rows of padded queries may hold anything
        shown = out * mask[:, None, -queries:, None]
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found.append([shown, *torch.autograd.grad(shown, [*inputs, *module.parameters()], cotangent)])
    for right, ours in zip(*found, strict=True):
        assert (right - ours).norm() <= 3e-5 * right.norm()
    assert len(used) == 1


@interpreted
def test_it_compiles_in_one_graph(used):
    module, inputs = topological(**GRID).float(), [x.float() for x in qkv(12)]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, grid=(3, 4)), module(*inputs, grid=(3, 4)))


@interpreted
def test_other_masks_and_features_stay_in_torch(used):
    for options in ({**SEQUENCE, "feature_map": "favor"}, {"mask_type": "decay"}):
        topological(**options).float()(*(x.float() for x in qkv(20)))
    assert not used


def test_automatic_choice_on_the_cpu_is_tiles_and_refusals_say_why():
    x, table = torch.randn(1, 1, 6, 4), torch.rand(1, 11, 1)
    request = toeplitz.Request(x, x, x, table, 1, 0, False, x.clone)
    assert kernels.choose("toeplitz_attention", "auto", toeplitz.BACKENDS, request).name == "tiles"
    if not random_features.INTERPRETED:
        return
    for reason, changes in {"float64": {"query": x.double()}, "up to 128": {"columns": 129}}.items():
        with pytest.raises(KernelUnavailable, match=reason):
            toeplitz.toeplitz_attention(request._replace(**changes), "triton")
