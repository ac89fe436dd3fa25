"""Mixed chunk attention: the Triton kernel gives modules and units what torch gives, and says what it cannot do."""

import pytest
import torch
from helpers import module_of, qkv

from hf_attn import kernels
from hf_attn.errors import KernelUnavailable
from hf_attn.kernels import mixed_chunk, random_features
from hf_attn.models.gau_mixed_chunk import FlashGatedAttentionUnit

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not random_features.INTERPRETED, reason="kernels are compiled for a GPU here")
TOKENS, SIZE = 35, 10


@pytest.fixture
def used(monkeypatch):
    """Lets "auto" take Triton kernels, and counts the calls that did."""
    calls = []
    backend = mixed_chunk.BACKENDS[0]
    counted = kernels.Backend("triton", backend.probe, backend.accepts, lambda r: (calls.append(1), backend.run(r))[1])
    monkeypatch.setattr(mixed_chunk, "BACKENDS", (counted, *mixed_chunk.BACKENDS[1:]))
    return calls


def both_ways(module, inputs, monkeypatch, **call):
    """Result and gradients by torch, in float64, and by the kernel, in float32."""
    found = []
    for setting, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        monkeypatch.setattr(kernels, "_setting", setting)
        module.to(dtype)
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = module(*given, **call)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        leaves = [*given, *module.parameters()]
        found.append([out, *torch.autograd.grad(out, leaves, cotangent, allow_unused=True)])
    return zip(*found, strict=True)


def agree(pairs):
    for right, ours in pairs:
        if right is None or ours is None:
            assert right is ours
        else:
            assert (right - ours).norm() <= 2e-5 * right.norm()


def padded():
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[1, 13:] = mask[2] = False
    return mask


@interpreted
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_modules_get_the_same(is_causal, padding, used, monkeypatch):
    given = {"local_attention": "laplace", "rel_pos_bias": True, "offset_scale": True, "linear_norm": "mean"}
    if padding:
        given = {"local_attention": "relu2", "linear_norm": "chunk"}
    module = module_of("mixed_chunk", chunk_size=SIZE, **given)
    call = {"is_causal": is_causal, "key_padding_mask": padded() if padding else None}
    agree(both_ways(module, qkv(TOKENS), monkeypatch, **call))
    assert len(used) == 1


@interpreted
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_units_get_the_same(is_causal, padding, used, monkeypatch):
    given = {"attention_fn": "laplace", "linear_norm": "chunk"} if padding else {"rel_pos_bias": "none"}
    unit = FlashGatedAttentionUnit(12, query_key_dim=8, chunk_size=SIZE, **given)
    x, mask = torch.randn(3, TOKENS, 12), padded() if padding else None
    pairs = list(both_ways(unit, [x], monkeypatch, key_padding_mask=mask, is_causal=is_causal))
    if padding:
        # rows of padded tokens may hold anything, and their gradients did too
        pairs = [tuple(t.masked_fill(~mask[..., None], 0) for t in pairs[0])]
    agree(pairs)
    assert len(used) == 1


@interpreted
def test_the_gate_may_be_of_lower_precision_than_the_values(monkeypatch):
    """As under autocast."""
    unit = FlashGatedAttentionUnit(12, query_key_dim=8, chunk_size=SIZE).float()
    x, found = torch.randn(1, TOKENS, 12), []
    for setting in ("torch", "triton"):
        monkeypatch.setattr(kernels, "_setting", setting)
        with torch.autocast("cpu", dtype=torch.float16):
            out = unit(x)
        loss = 1e4 * (out.float() - x).square().sum()
        found.append([out, *torch.autograd.grad(loss, list(unit.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm()


@interpreted
def test_it_compiles_in_one_graph(used, monkeypatch):
    monkeypatch.setattr(kernels, "_setting", "triton")
    unit = FlashGatedAttentionUnit(12, query_key_dim=8, chunk_size=SIZE)
    x = torch.randn(2, TOKENS, 12)
    found = torch.compile(unit, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, unit(x))
    assert len(used) >= 1


def request(**changes):
    q, k, v = (x.float() for x in qkv(TOKENS))
    plain = mixed_chunk.Request(
        q, k, q, k, v, None, None, None, False, SIZE, "relu2", 1.0, True, 0.0, lambda: v
    )  # fmt: skip
    return plain._replace(**changes)


def test_automatic_choice_on_the_cpu_is_torch_and_refusals_say_why():
    assert kernels.choose("mixed_chunk_attention", "auto", mixed_chunk.BACKENDS, request()).name == "torch"
    if not random_features.INTERPRETED:
        return
    refused = {
        "float64": {"query": request().query.double()},
        "relu2 and laplace, not 'softmax'": {"function": "softmax"},
        "as many queries as keys": {"query": request().query[:, :, :5]},
        "up to 128 numbers": {"query": torch.randn(1, 1, TOKENS, 129)},
        "no dropout": {"dropout": 0.1},
    }
    for reason, changes in refused.items():
        with pytest.raises(KernelUnavailable, match=reason):
            mixed_chunk.mixed_chunk_attention(request(**changes), "triton")
