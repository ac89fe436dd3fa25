"""softmax: the baseline equals torch's own attention, whatever the backend and the mask."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DIM, HEADS, call_of, module_of

import hf_attn
from hf_attn.errors import InvalidOption, KernelUnavailable
from hf_attn.kernels import flash, reasons

RUNS_ON_CPU = ["auto", "sdpa", "sdpa-flash", "math"]


@pytest.mark.parametrize("backend", RUNS_ON_CPU)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(backend, is_causal):
    module = module_of("softmax", backend=backend)
    (q, k, v), _ = call_of(module)
    torch.testing.assert_close(
        module(q, k, v, is_causal=is_causal), F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    )


@pytest.mark.parametrize("backend", RUNS_ON_CPU)
def test_additive_biases_are_added(backend):
    module = module_of("softmax", backend=backend)
    (q, k, v), _ = call_of(module)
    bias = torch.randn(2, HEADS, q.shape[2], q.shape[2], dtype=q.dtype)
    expected = ((DIM**-0.5 * q @ k.transpose(-1, -2) + bias).softmax(-1)) @ v
    torch.testing.assert_close(module(q, k, v, attention_mask=bias), expected)
    torch.testing.assert_close(module.naive(q, k, v, attention_mask=bias), expected)


def test_scaling_multiplies_the_logits():
    module = module_of("softmax")
    (q, k, v), _ = call_of(module)
    torch.testing.assert_close(module(q, k, v, scaling=0.7), module(q * 0.7 * DIM**0.5, k, v))
    torch.testing.assert_close(module(q, k, v, scaling=0.0), v.mean(2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_long_vectors(logit):
    module = module_of("softmax")
    q = torch.zeros(1, HEADS, 3, DIM, dtype=torch.float64)
    q[..., 0] = logit
    k = torch.zeros_like(q)
    k[:, :, 1, 0] = 1.0
    v = torch.randn_like(q)
    expected = v[:, :, 1:2].expand_as(v) if logit > 0 else v[:, :, ::2].mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(module(q, k, v), expected)


@pytest.mark.parametrize("backend", ["flash-attn-2", "flash-attn-3", "flash-attn-4", "sdpa-cudnn"])
def test_a_backend_asked_for_by_name_fails_loudly_without_a_gpu(backend):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    module = module_of("softmax", torch.float32, backend=backend)
    (q, k, v), _ = call_of(module, dtype=torch.float32)
    with pytest.raises(KernelUnavailable, match=f"{backend}.*Works here: auto"):
        module(q, k, v)
    assert backend in reasons("attention"), "doctor can say why"


def test_an_unknown_backend_is_refused_when_the_module_is_built():
    with pytest.raises(InvalidOption, match="softmax.*'flash-attn-5'.*did you mean 'flash-attn-"):
        hf_attn.build("softmax", num_heads=1, head_dim=8, backend="flash-attn-5")
    assert set(hf_attn.get_mechanism("softmax").capabilities.backends) == set(flash.BACKENDS)


def test_the_log_sum_exp_merges_parts_of_the_keys():
    """What block-sparse mechanisms need: attention over the whole is the parts weighed by their log-sum-exps."""
    q, k, v = (torch.randn(2, HEADS, 9, DIM, dtype=torch.float64) for _ in range(3))
    whole, _ = flash.attention_with_lse(q, k, v, scaling=0.3)
    parts = [flash.attention_with_lse(q, k[:, :, s], v[:, :, s], scaling=0.3) for s in (slice(0, 4), slice(4, 9))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    torch.testing.assert_close(sum(w[..., None] * out for w, (out, _) in zip(weights, parts)), whole)
