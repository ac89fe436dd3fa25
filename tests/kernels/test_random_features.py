"""Attention by random features: every backend equals the definition, and says what it cannot do."""

import pytest
import torch

from hf_attn.errors import KernelUnavailable
from hf_attn.functional import linear_weights, log_positive
from hf_attn.kernels import random_features

SHAPES = {"bidirectional": (37, 50, False), "causal": (40, 40, True)}


def definition(query, key, value, directions, mask, is_causal, scaling):
    visible = mask[:, None, None].expand(-1, 1, query.shape[2], -1)
    if is_causal:
        visible = visible & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    features = [log_positive(x, directions, scaling) for x in (query, key)]
    return linear_weights(*features, visible) @ value


@pytest.fixture
def case(request):
    queries, keys, is_causal = SHAPES[request.param]
    query, key, value = (torch.randn(2, 2, n, 16, dtype=torch.float64) for n in (queries, keys, keys))
    mask = torch.rand(2, keys) < 0.7
    mask[1] = False
    return (query, key, value, torch.randn(2, 24, 16, dtype=torch.float64)), mask, is_causal


def evaluate(function, tensors, dtype, *arguments, **keywords):
    query, key, value, directions = (x.to(dtype) for x in tensors)
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = function(*inputs, directions, *arguments, **keywords)
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("backend,dtype,tolerance", [("torch", torch.float64, 1e-10), ("triton", torch.float32, 2e-5)])
@pytest.mark.parametrize("case", SHAPES, indirect=True)
def test_backends_equal_the_definition(case, backend, dtype, tolerance):
    if backend == "triton" and not random_features.INTERPRETED:
        pytest.skip("kernels are compiled for a GPU here")
    pytest.importorskip("triton")
    tensors, mask, is_causal = case
    exact = evaluate(definition, tensors, torch.float64, mask, is_causal, 0.25)
    call = {"key_padding_mask": mask, "is_causal": is_causal, "scaling": 0.25, "backend": backend}
    found = evaluate(random_features.random_feature_attention, tensors, dtype, **call)
    for right, ours in zip(exact, found, strict=True):
        assert (right - ours).abs().max() < tolerance


@pytest.mark.parametrize("case", ["causal"], indirect=True)
def test_automatic_choice_on_the_cpu_is_torch_and_refusals_say_why(case):
    (query, key, value, directions), _, _ = case
    request = random_features.Request(query, key, value, directions, None, True, 0.25)
    assert random_features.choose("random_feature_attention", "auto", random_features.BACKENDS, request).name == "torch"
    if not random_features.INTERPRETED:
        return
    refused = {
        "float64": {},
        "no gradient for the directions": {"directions": directions.float().requires_grad_()},
        "as many queries as keys": {"query": query.float()[:, :, :5]},
        "up to 128": {"directions": torch.randn(2, 129, 16)},
    }
    for reason, changes in refused.items():
        if changes:
            changes = {"query": query.float(), "directions": directions.float(), **changes}
        with pytest.raises(KernelUnavailable, match=reason):
            random_features.choose(
                "random_feature_attention", "triton", random_features.BACKENDS, request._replace(**changes)
            )
