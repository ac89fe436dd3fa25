"""Ripple attention as a window and one state: the identity in float64, and the kernel against the definition."""

import pytest
import torch
from helpers import module_of, qkv

from hf_attn import kernels
from hf_attn.errors import KernelUnavailable
from hf_attn.kernels import random_features, rings

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not random_features.INTERPRETED, reason="kernels are compiled for a GPU here")
ROWS, COLUMNS = 5, 7
SCHEMES = [
    {"ripple_weights": "stick_query", "r_cap": 3, "tau": 0.1},
    {"ripple_weights": "stick_static", "r_cap": 2, "tail": "spread"},
    {"ripple_weights": "softmax", "r_cap": 3, "feature_map": "mlp_fourier", "num_features": 6},
    {"ripple_weights": "decay", "r_cap": 2},
    {"ripple_weights": "decay"},
    {"ripple_weights": "truncated", "r_cap": 2},
    {"ripple_weights": "uniform"},
]
schemes = pytest.mark.parametrize("given", SCHEMES, ids=lambda o: "-".join(map(str, o.values())))


def ring_of(rows, columns):
    place = torch.arange(rows * columns)
    row, column = place // columns, place % columns
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())


@schemes
def test_a_window_and_one_state_are_the_definition_in_float64(given):
    module, (query, key, value) = module_of("ripple", **given), qkv(ROWS * COLUMNS)
    call = module._call(query, key, value, grid=(ROWS, COLUMNS))
    alpha = module.log_alpha(call).exp()
    near, beyond = alpha[..., :-1] - alpha[..., -1:], alpha[..., -1:]
    phi_query, phi_key = (module.log_features(x, call).exp() for x in (query, key))
    ring, value = ring_of(ROWS, COLUMNS), torch.nn.functional.pad(value, (0, 1), value=1.0)
    within = torch.zeros(*query.shape[:2], len(ring), len(ring), dtype=torch.float64)
    for r in range(near.shape[-1]):
        within = within + near[..., r : r + 1] * (ring == r)
    sums = (within * (phi_query @ phi_key.mT)) @ value + beyond * (phi_query @ (phi_key.mT @ value))
    torch.testing.assert_close(
        sums[..., :-1] / sums[..., -1:], module.naive(*qkv(ROWS * COLUMNS), grid=(ROWS, COLUMNS))
    )


@interpreted
@schemes
def test_the_kernel_gives_ripple_what_its_definition_gives(given, monkeypatch):
    prefix = 1
    tokens = prefix + ROWS * COLUMNS
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[0, 9:30] = mask[1, :] = False
    cotangent, found = torch.randn(3, tokens, 1, dtype=torch.float64)[:, None] * mask[:, None, :, None], []
    module = module_of("ripple", **given)
    monkeypatch.setattr(kernels, "_setting", "triton")
    assert rings.local(qkv(1)[0].float(), module.num_features)
    call = {"grid": (ROWS, COLUMNS), "num_prefix_tokens": prefix, "key_padding_mask": mask}
    for form, dtype in (("naive", torch.float64), ("forward", torch.float32)):
        module.to(dtype)
        inputs = [x.to(dtype).requires_grad_() for x in qkv(tokens)]
        out = getattr(module, form)(*inputs, **call)
        leaves = [*inputs, *module.parameters()]
        found.append([out * mask[:, None, :, None], *torch.autograd.grad(out, leaves, (cotangent + 0 * out).to(dtype))])
    for right, ours in zip(*found, strict=True):
        assert (right - ours).norm() <= 3e-5 * right.norm().clamp(min=1e-3)


@interpreted
def test_it_compiles_in_one_graph(monkeypatch):
    monkeypatch.setattr(kernels, "_setting", "triton")
    module, inputs = module_of("ripple", r_cap=2).float(), [x.float() for x in qkv(ROWS * COLUMNS)]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs, grid=(ROWS, COLUMNS)), module(*inputs, grid=(ROWS, COLUMNS)))


def test_automatic_choice_on_the_cpu_is_tables_and_refusals_say_why():
    x, alpha = torch.randn(1, 1, 6, 4), torch.rand(1, 1, 6, 2)
    request = rings.Request(x, x, x, alpha, 2, 3, x.clone)
    assert kernels.choose("ring_sums", "auto", rings.BACKENDS, request).name == "tables"
    assert not rings.local(x, 4)
    if not random_features.INTERPRETED:
        return
    for reason, changes in {
        "float64": {"query": x.double()},
        "up to 128": {"value": torch.randn(1, 1, 6, 129)},
    }.items():
        with pytest.raises(KernelUnavailable, match=reason):
            rings.ring_sums(request._replace(**changes), "triton")
