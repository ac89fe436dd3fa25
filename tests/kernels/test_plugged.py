"""Every Triton kernel is reached by the mechanisms that it is for, through the door, and they still give their definition."""

import importlib
import pkgutil

import pytest
import torch
from helpers import DIM, HEADS, qkv
from torch.utils._python_dispatch import TorchDispatchMode

import hf_attn
import hf_attn.kernels
from hf_attn import kernels
from hf_attn.kernels import random_features
from hf_attn.models.gau_mixed_chunk import FlashGatedAttentionUnit

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not random_features.INTERPRETED, reason="kernels are compiled for a GPU here")
TOKENS, GRID = 24, {"grid": (4, 6)}
PLUGGED = {
    "rfa": ({"redraw": "fixed"}, {}, {"key_bias_attention"}),
    "rfa causal": ({"redraw": "fixed", "num_features": 8}, {"is_causal": True}, {"causal_linear_attention"}),
    "rfa causal elu": ({"feature_map": "elu1"}, {"is_causal": True}, {"causal_linear_attention"}),
    "generalized causal": ({"beta": "0010"}, {"is_causal": True}, {"causal_linear_attention"}),
    "topological causal none": ({"mask_type": "none"}, {"is_causal": True}, {"causal_linear_attention"}),
    "topological causal decay": (
        {"mask_type": "decay", "fft_min_length": 1},
        {"is_causal": True},
        {"causal_linear_attention"},
    ),
    "topological toeplitz": ({"mask_type": "toeplitz", "max_length": 40}, {}, {"toeplitz_sums"}),
    "lara": ({"num_landmarks": 4, "noise_std": "none"}, {}, {"key_bias_attention"}),
    "lara both stages": (
        {"num_landmarks": 4, "noise_std": "none", "mis_type": "mis-bh"},
        {},
        {"key_bias_attention"},
    ),
    "hypercube": ({"block_size": 16}, {}, {"block_sparse_attention"}),
    "mra": ({"block_size": 16, "block_per_row": 1}, {}, {"block_sparse_attention"}),
    "mra sparse": ({"block_size": 16, "block_per_row": 1, "mode": "sparse"}, {}, {"block_sparse_attention"}),
    "mixed_chunk": ({"chunk_size": 16, "local_attention": "relu2"}, {}, {"chunk_local_attention"}),
    "ripple": ({"r_cap": 2}, GRID, {"ring_window_sums"}),
}
"""Mechanism -> options, arguments of the call, and the operators that it has to call."""


class Recorder(TorchDispatchMode):
    """Collects the names of our operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hf_attn":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def padding():
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 13:] = False
    return mask


@interpreted
@pytest.mark.parametrize("name", PLUGGED)
def test_a_mechanism_calls_its_kernel(name, monkeypatch):
    options, call, wanted = PLUGGED[name]
    if name == "topological causal decay":
        monkeypatch.setitem(importlib.import_module("hf_attn.mechanisms.topological").STRUCTURED_FROM, "decay", 1)
    monkeypatch.setattr(kernels, "_setting", "triton")
    module = hf_attn.build(name.split()[0], num_heads=HEADS, head_dim=DIM, **options).eval()
    mask, found = padding(), []
    recorder = Recorder()
    for form, dtype in (("naive", torch.float64), ("forward", torch.float32)):
        module.to(dtype)
        inputs = [x[:2].detach().to(dtype).requires_grad_() for x in qkv(TOKENS)]
        with recorder:
            out = getattr(module, form)(*inputs, key_padding_mask=mask, **call)
        # rows of padded queries may hold anything
        shown = out * mask[:, None, :, None]
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        leaves = [*inputs, *module.parameters()]
        grads = torch.autograd.grad(shown, leaves, cotangent, allow_unused=True)
        found.append([shown, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))])
    assert set(recorder.names) == wanted
    if name == "lara both stages":
        assert len(recorder.names) == 2
    for right, ours in zip(*found, strict=True):
        assert (right - ours).norm() <= 5e-5 * right.norm() + 1e-6


@interpreted
def test_gated_units_call_their_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "_setting", "triton")
    with Recorder() as recorder:
        FlashGatedAttentionUnit(12, query_key_dim=8, chunk_size=16)(torch.randn(2, TOKENS, 12))
    assert recorder.names == ["chunk_local_attention"]


def test_every_kernel_is_plugged():
    ours = set()
    for module in pkgutil.iter_modules(hf_attn.kernels.__path__):
        contents = vars(importlib.import_module(f"hf_attn.kernels.{module.name}"))
        ours |= {x._opoverload._opname for x in contents.values() if isinstance(x, torch.library.CustomOpDef)}
    ours = {name for name in ours if not name.endswith("_backward")}
    assert ours == set().union(*(wanted for *_, wanted in PLUGGED.values()))


def test_no_kernel_of_ours_runs_unless_asked_for():
    for operation in kernels.operations():
        for backend, _ in kernels.backends_of(operation):
            if backend.name == "triton":
                assert not kernels.allowed(backend, "auto") and kernels.allowed(backend, "triton")
