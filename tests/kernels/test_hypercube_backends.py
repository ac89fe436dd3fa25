"""Backends of hypercube attention: each equals the gathered form, keeps what it lists, and says what it cannot do."""

import pytest
import torch

import hf_attn
from hf_attn import doctor
from hf_attn.errors import InvalidOption, KernelUnavailable
from hf_attn.kernels import hypercube

H, D = 2, 16
interpreted = pytest.mark.skipif(not hypercube.INTERPRETED, reason="kernels are compiled for a GPU here")


def module(backend, **options):
    return hf_attn.build("hypercube", num_heads=H, head_dim=D, **{"block_size": 16, **options}, backend=backend)


def tokens(n, queries=None, dtype=torch.float32):
    return [torch.randn(2, H, m, D, dtype=dtype) for m in (queries or n, n, n)]


def padding(n):
    """Scattered; the second sample is padding throughout."""
    mask = torch.rand(2, n) < 0.6
    mask[1] = False
    return mask


@interpreted
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "block_size"), [(16, 16), (75, 16), (70, 32)])
def test_triton_equals_gathered_with_gradients(n, block_size, causal, masked):
    pytest.importorskip("triton")
    call = {"is_causal": causal, "key_padding_mask": padding(n) if masked else None, "scaling": 0.3}
    qkv = [x.requires_grad_() for x in tokens(n)]
    cotangent = torch.randn(2, H, n, D)
    found = []
    for backend in ("triton", "gathered"):
        out = module(backend, block_size=block_size)(*qkv, **call)
        found.append((out, *torch.autograd.grad((out * cotangent).sum(), qkv)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("outside", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 1, 20])
def test_flex_equals_gathered(queries, causal, masked, outside):
    if queries and not causal:
        pytest.skip("as many queries as keys without causal order")
    call = {"is_causal": causal, "key_padding_mask": padding(150) if masked else None, "scaling": 0.3}
    qkv, options = tokens(150, queries), {"block_size": 8, "num_global_tokens": outside}
    ours, expected = (module(backend, **options)(*qkv, **call) for backend in ("flex", "gathered"))
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=2e-6)


def test_neighbours_are_the_gray_code():
    for places in (1, 2, 5, 8, 27):
        place = torch.arange(places)
        gray = place ^ (place >> 1)
        different = gray[:, None] ^ gray
        expected = different & (different - 1) == 0
        table = hypercube.neighbours(places, torch.device("cpu"))[0]
        assert [sorted(p for p in row if p >= 0) for row in table.tolist()] == [
            row.nonzero().flatten().tolist() for row in expected
        ]


def test_what_is_listed_is_kept_for_a_length():
    hypercube._kept_block_mask.cache_clear()
    for n in (40, 40, 50):
        module("flex")(*tokens(n))
    assert hypercube._kept_block_mask.cache_info()[:2] == (1, 2)


@interpreted
def test_the_table_is_kept_and_can_be_trained_with_after_inference_mode():
    pytest.importorskip("triton")
    hypercube._kept_neighbours.cache_clear()
    with torch.inference_mode():
        module("triton")(*tokens(40))
    qkv = [x.requires_grad_() for x in tokens(40)]
    module("triton")(*qkv).sum().backward()
    assert qkv[0].grad.isfinite().all() and hypercube._kept_neighbours.cache_info()[:2] == (1, 1)


def test_automatic_choice_on_the_cpu_is_gathered(monkeypatch):
    qkv, seen = tokens(40), []
    built = module("auto")
    gathered = type(built)._gathered
    monkeypatch.setattr(type(built), "_gathered", lambda self, call: seen.append(1) or gathered(self, call))
    assert torch.equal(built(*qkv), module("gathered")(*qkv)) and len(seen) == 2


@interpreted
@pytest.mark.parametrize(
    ("options", "call", "changes", "reason"),
    [
        ({"block_size": 8}, {}, {}, "block_size of 16, 32, 64, 128, and it is 8"),
        ({"num_global_tokens": 1}, {}, {}, "no global tokens"),
        ({}, {"dropout": 0.1}, {}, "no dropout"),
        ({}, {"is_causal": True}, {"queries": 3}, "as many queries as keys, and there are 3 and 40"),
        ({}, {}, {"dtype": torch.float64}, "there is torch.float64"),
    ],
)
def test_triton_says_what_it_cannot_do(options, call, changes, reason):
    with pytest.raises(KernelUnavailable, match=f"hypercube_attention: backend 'triton' cannot run: .*{reason}"):
        module("triton", **options)(*tokens(40, **changes), **call)


def test_flex_says_what_it_cannot_do():
    query, key, value = tokens(40)
    with pytest.raises(KernelUnavailable, match="'flex' cannot run: it has no dropout.* Works here: .*gathered"):
        module("flex")(query, key, value, dropout=0.1)
    with pytest.raises(KernelUnavailable, match="no backward pass on a CPU"):
        module("flex")(query.requires_grad_(), key, value)


def test_the_option_and_the_doctor_name_the_backends():
    with pytest.raises(InvalidOption, match="option backend='gatherd' must be one of .*did you mean 'gathered'"):
        module("gatherd")
    listed = [kernel.backend for kernel in doctor.all_kernels() if kernel.operation == "hypercube_attention"]
    assert tuple(listed) == hypercube.BACKENDS == hf_attn.get_mechanism("hypercube").capabilities.backends
