"""Exact attention: every mask by every backend that runs here, the rule for rows without keys, and the choice."""

from __future__ import annotations

import importlib.machinery
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from hf_attn import kernels
from hf_attn.errors import InvalidOption, KernelUnavailable
from hf_attn.kernels import flash

B, H, N, M, D = 3, 2, 5, 7, 8
SCALE = 0.41
BY = ("auto", "sdpa-flash", "sdpa", "math")
LSE_BY = ("auto", "sdpa-flash", "math")
INF = float("inf")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padding(keys, *real):
    """(B,M) bool from one (start, stop) of the real tokens per sample."""
    place = torch.arange(keys)
    return torch.stack([(place >= start) & (place < stop) for start, stop in real])


def dense(heads, queries, keys, seed=3):
    mask = random(B, heads, queries, keys, seed=seed) > -0.3
    mask[1, :, 2] = False
    mask[0, :, 0] = True
    return mask


def additive(mask, hidden, dtype=torch.float64, bias=False):
    values = random(*mask.shape, seed=5).to(dtype) if bias else torch.zeros(mask.shape, dtype=dtype)
    return values.masked_fill(~mask, hidden)


LOWEST = torch.finfo(torch.float64).min
# name: (N, M, arguments)
CASES = {
    "none": (N, N, {}),
    "cross": (N, M, {}),
    "one query": (1, M, {}),
    "padding right": (N, M, {"key_padding_mask": padding(M, (0, 4), (0, 7), (0, 1))}),
    "padding left": (N, M, {"key_padding_mask": padding(M, (3, 7), (0, 7), (6, 7))}),
    "padding both": (N, M, {"key_padding_mask": padding(M, (1, 5), (2, 7), (0, 6))}),
    "fully padded": (N, M, {"key_padding_mask": padding(M, (1, 5), (0, 0), (0, 6))}),
    "causal": (N, N, {"is_causal": True}),
    "causal offset": (N, M, {"is_causal": True}),
    "causal one query": (1, M, {"is_causal": True}),
    "causal, more queries than keys": (M, N, {"is_causal": True}),
    "causal, padding right": (N, N, {"is_causal": True, "key_padding_mask": padding(N, (0, 3), (0, 5), (0, 1))}),
    "causal, padding left": (N, N, {"is_causal": True, "key_padding_mask": padding(N, (2, 5), (0, 0), (4, 5))}),
    "causal offset, padding": (N, M, {"is_causal": True, "key_padding_mask": padding(M, (4, 7), (0, 0), (0, 5))}),
    "dense": (N, M, {"attention_mask": dense(H, N, M)}),
    "dense, shared by heads": (N, M, {"attention_mask": dense(1, N, M)}),
    "dense, shared by samples": (N, M, {"attention_mask": dense(1, N, M)[1:2]}),
    "dense, padding": (
        N, M, {"attention_mask": dense(1, N, M), "key_padding_mask": padding(M, (4, 7), (0, 7), (0, 0))}
    ),
    "dense, causal": (N, M, {"attention_mask": dense(H, N, M), "is_causal": True}),
    "minus infinity": (N, M, {"attention_mask": additive(dense(1, N, M), -INF)}),
    "lowest": (N, M, {"attention_mask": additive(dense(1, N, M), LOWEST)}),
    "bias": (N, M, {"attention_mask": random(B, H, N, M, seed=7)}),
    "bias, minus infinity": (N, M, {"attention_mask": additive(dense(H, N, M), -INF, bias=True)}),
    "bias, lowest, causal, padding": (
        N, M,
        {
            "attention_mask": additive(dense(H, N, M), LOWEST, bias=True),
            "is_causal": True,
            "key_padding_mask": padding(M, (4, 7), (0, 7), (0, 0)),
        },
    ),
}  # fmt: skip


def inputs(queries, keys, dtype=torch.float64, requires_grad=False):
    tensors = [random(B, H, length, D, seed=seed, dtype=dtype) for seed, length in enumerate((queries, keys, keys))]
    return [t.requires_grad_(requires_grad) for t in tensors]


def cast(arguments, dtype):
    """Additive masks in `dtype`, whose lowest number is the one that hides."""
    mask = arguments.get("attention_mask")
    if mask is None or mask.dtype == torch.bool:
        return arguments
    lowest = mask == LOWEST
    return {**arguments, "attention_mask": mask.to(dtype).masked_fill(lowest, torch.finfo(dtype).min)}


def reference(query, key, value, key_padding_mask=None, attention_mask=None, is_causal=False):
    """Row by row, over the visible keys only."""
    outputs, sums = [], []
    (batch, heads, queries), keys = query.shape[:3], key.shape[2]
    real = [[True] * keys] * batch if key_padding_mask is None else key_padding_mask.tolist()
    bias, shown = torch.zeros(batch, heads, queries, keys, dtype=query.dtype), None
    if attention_mask is not None:
        mask = attention_mask.expand(batch, heads, -1, -1)
        shown = (mask if mask.dtype == torch.bool else mask > LOWEST / 2).tolist()
        bias = bias if mask.dtype == torch.bool else mask
    for b in range(batch):
        for h in range(heads):
            for n in range(queries):
                last = n + keys - queries if is_causal else keys
                seen = [m for m in range(keys) if real[b][m] and m <= last and (shown is None or shown[b][h][n][m])]
                if not seen:
                    outputs.append(torch.zeros_like(query[b, h, n]))
                    sums.append(query.new_tensor(-INF))
                    continue
                logits = SCALE * key[b, h, seen] @ query[b, h, n] + bias[b, h, n, seen]
                outputs.append(logits.softmax(0) @ value[b, h, seen])
                sums.append(logits.logsumexp(0))
    return torch.stack(outputs).view_as(query), torch.stack(sums).view(batch, heads, queries)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, by):
    queries, keys, arguments = CASES[case]
    tensors = inputs(queries, keys, requires_grad=True)
    out = flash.attention(*tensors, scaling=SCALE, backend=by, **arguments)
    expected, lse = reference(*tensors, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert not out[lse == -INF].any(), "a query without keys gives exact zeros"
    weight = random(*out.shape, seed=9)
    got = torch.autograd.grad((out * weight).sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("by", LSE_BY)
@pytest.mark.parametrize("case", CASES)
def test_lse_equals_the_definition(case, by):
    queries, keys, arguments = CASES[case]
    tensors = inputs(queries, keys)
    out, lse = flash.attention_with_lse(*tensors, scaling=SCALE, backend=by, **arguments)
    expected, sums = reference(*tensors, **arguments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, sums, rtol=1e-10, atol=1e-10)
    assert lse.dtype == torch.float64


@pytest.mark.parametrize("case", CASES)
def test_lse_has_gradients(case):
    queries, keys, arguments = CASES[case]
    tensors = inputs(queries, keys, requires_grad=True)
    out, lse = flash.attention_with_lse(*tensors, scaling=SCALE, **arguments)
    expected, sums = reference(*tensors, **arguments)
    weight, of_sum = random(*out.shape, seed=9), random(*lse.shape, seed=10)
    alive = sums > -INF
    got = torch.autograd.grad((out * weight).sum() + (lse * of_sum)[alive].sum(), tensors)
    wanted = torch.autograd.grad((expected * weight).sum() + (sums * of_sum)[alive].sum(), tensors)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    queries, keys, arguments = CASES[case]
    expected, sums = reference(*inputs(queries, keys), **arguments)
    tensors, single = inputs(queries, keys, torch.float32), cast(arguments, torch.float32)
    for by in BY:
        out = flash.attention(*tensors, scaling=SCALE, backend=by, **single)
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    for by in LSE_BY:
        out, lse = flash.attention_with_lse(*tensors, scaling=SCALE, backend=by, **single)
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(lse.double(), sums, rtol=2e-6, atol=2e-6)
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision(case, dtype):
    queries, keys, arguments = CASES[case]
    tensors, low = inputs(queries, keys, dtype), cast(arguments, dtype)
    mask = low.get("attention_mask")
    exact = dict(arguments)
    if mask is not None and mask.dtype != torch.bool:
        exact["attention_mask"] = mask.double().masked_fill(arguments["attention_mask"] <= LOWEST / 2, -INF)
    expected, sums = reference(*(t.double() for t in tensors), **exact)
    error = {}
    for by in BY:
        out = flash.attention(*tensors, scaling=SCALE, backend=by, **low)
        assert out.dtype == dtype
        error[by] = (out.double() - expected).abs().max()
    slack = torch.finfo(dtype).eps
    assert all(error[by] <= 2 * error["math"] + slack for by in BY), error
    alive = sums > -INF
    for by in LSE_BY:
        _, lse = flash.attention_with_lse(*tensors, scaling=SCALE, backend=by, **low)
        assert lse.dtype == torch.float32
        assert torch.equal(lse > -INF, alive)
        torch.testing.assert_close(lse[alive].double(), sums[alive], rtol=2 * slack, atol=2 * slack)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("arguments", ["padding", "causal", "lowest"])
def test_rows_without_keys_in_long_sequences(by, arguments):
    """Longer than the blocks of torch's CPU kernel, whose first blocks then have no key at all."""
    length = 1100
    real = padding(length, (700, length), (0, 0))
    arguments = {
        "padding": {"key_padding_mask": real},
        "causal": {"key_padding_mask": real, "is_causal": True},
        "lowest": {"attention_mask": additive(real[:, None, None], torch.finfo(torch.float32).min, torch.float32)},
    }[arguments]
    if "attention_mask" in arguments:
        arguments["attention_mask"] = arguments["attention_mask"].expand(-1, -1, length, -1)
    tensors = [random(2, 1, length, D, seed=s, dtype=torch.float32).requires_grad_() for s in range(3)]
    out = flash.attention(*tensors, scaling=SCALE, backend=by, **arguments)
    short = [t[:1, :, 700:] for t in tensors]
    causal = arguments.get("is_causal", False)
    alone = flash.attention(*short, scaling=SCALE, is_causal=causal, backend="math")
    torch.testing.assert_close(out[:1, :, 700:], alone, rtol=2e-6, atol=2e-6)
    assert not out[1].any()
    assert not causal or not out[0, :, :700].any()
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(g.isfinite().all() and not g[1].any() for g in gradients)


@pytest.mark.parametrize("by", ["auto", "sdpa", "math"])
def test_bias_gets_its_gradient(by):
    bias = additive(dense(H, N, M), LOWEST, bias=True)
    tensors = inputs(N, M)
    got, wanted = (bias.clone().requires_grad_() for _ in range(2))
    weight = random(B, H, N, D, seed=9)
    (flash.attention(*tensors, attention_mask=got, scaling=SCALE, backend=by) * weight).sum().backward()
    (reference(*tensors, attention_mask=wanted)[0] * weight).sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-8, atol=1e-8)


def test_no_keys_at_all():
    query, key = random(B, H, N, D), random(B, H, 0, D)
    for by in ("auto", "sdpa", "math"):
        assert torch.equal(flash.attention(query, key, key, scaling=SCALE, backend=by), torch.zeros_like(query))
    out, lse = flash.attention_with_lse(query, key, key, scaling=SCALE)
    assert not out.any() and (lse == -INF).all()


def test_plain_calls_hand_sdpa_no_mask(monkeypatch):
    seen = []

    def spy(query, key, value, mask=None, dropout=0.0, is_causal=False, **rest):
        seen.append((None if mask is None else (mask.dtype, tuple(mask.shape)), is_causal))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for case in ("none", "causal", "causal one query", "padding right", "causal offset", "causal, padding left"):
        queries, keys, arguments = CASES[case]
        flash.attention(*inputs(queries, keys), scaling=SCALE, **arguments)
    boolean = torch.bool
    assert seen == [
        (None, False),
        (None, True),
        (None, False),
        ((boolean, (B, 1, 1, M)), False),
        ((boolean, (1, 1, N, M)), False),
        ((boolean, (B, 1, N, N)), False),
    ]


@pytest.mark.parametrize("by", ["auto", "sdpa", "math"])
def test_dropout(by):
    tensors = inputs(N, M)
    plain = flash.attention(*tensors, scaling=SCALE, backend=by)
    assert torch.equal(flash.attention(*tensors, scaling=SCALE, dropout=0.0, backend=by), plain)

    def draw(seed):
        torch.manual_seed(seed)
        return flash.attention(*tensors, scaling=SCALE, dropout=0.3, backend=by)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(2)
    repeated = [t.repeat(2000, 1, 1, 1) for t in tensors]
    draws = flash.attention(*repeated, scaling=SCALE, dropout=0.3, backend=by).view(2000, *plain.shape)
    error = (draws.mean(0) - plain) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 5
    out, lse = flash.attention_with_lse(*tensors, scaling=SCALE, dropout=0.3)
    assert not torch.equal(out, plain)
    assert torch.equal(lse, flash.attention_with_lse(*tensors, scaling=SCALE, backend="math")[1])


@pytest.mark.parametrize("by", ["auto", "sdpa-flash", "math"])
@pytest.mark.parametrize("case", ["none", "padding right", "causal", "causal offset", "bias, lowest, causal, padding"])
def test_compiles_whole(case, by):
    queries, keys, arguments = CASES[case]
    torch.compiler.reset()

    def call(*tensors):
        return flash.attention(*tensors, scaling=SCALE, backend=by, **arguments)

    def call_lse(*tensors):
        return flash.attention_with_lse(*tensors, scaling=SCALE, **arguments)

    with_lse = ((call_lse, True), (call_lse, False)) if by == "auto" else ()
    for function, requires_grad in ((call, True), *with_lse):
        tensors = inputs(queries, keys, requires_grad=requires_grad)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*tensors), function(*tensors), rtol=0, atol=0)


def test_compiles_for_changing_lengths():
    """From the second length on, lengths are symbols, and what SDPA is told must still be plain."""
    torch.compiler.reset()

    def function(x):
        return flash.attention(x, x, x, is_causal=True, scaling=SCALE)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for length in (5, 7, 9, 1):
        x = random(B, H, length, D)
        torch.testing.assert_close(compiled(x), function(x), rtol=0, atol=0)


def test_compiles_before_any_eager_call():
    script = (
        "import torch\nfrom hf_attn.kernels import flash\n"
        "q = torch.randn(1, 2, 4, 8)\n"
        "f = torch.compile(lambda q: flash.attention(q, q, q, scaling=1.0), fullgraph=True, backend='eager')\n"
        "assert torch.equal(f(q), flash.attention(q, q, q, scaling=1.0))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3", "flash-attn-4", "sdpa-cudnn", "sdpa-efficient"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is missing is CUDA")
def test_explicit_request_fails_loudly(name):
    with pytest.raises(KernelUnavailable) as caught:
        flash.attention(*inputs(N, N), scaling=SCALE, backend=name)
    message = str(caught.value)
    assert name in message and ("flash-attn" in message or "CUDA" in message)
    assert message.endswith("Works here: auto, sdpa-flash, sdpa, math.")
    assert name in kernels.reasons("attention")


def test_explicit_request_refused_for_this_call():
    with pytest.raises(KernelUnavailable, match="no dropout.*Works here: auto, sdpa, math"):
        flash.attention(*inputs(N, N), scaling=SCALE, dropout=0.5, backend="sdpa-flash")
    with pytest.raises(KernelUnavailable, match="no gradient"):
        flash.attention_with_lse(*inputs(N, N, requires_grad=True), scaling=SCALE, backend="sdpa-flash")
    with pytest.raises(KernelUnavailable, match="did you mean 'math'"):
        flash.attention(*inputs(N, N), scaling=SCALE, backend="maths")


def test_refusal_inside_torch_is_typed():
    def refuse(request):
        raise RuntimeError("No available kernel. Aborting execution.")

    backend = flash._sdpa_backend("sdpa-flash", torch.nn.attention.SDPBackend.FLASH_ATTENTION, lambda: None, refuse)
    request = flash.Request(*inputs(N, N), None, None, False, SCALE, 0.5)
    with pytest.warns(UserWarning), pytest.raises(KernelUnavailable, match="torch refused"):
        backend.run(request)


@pytest.fixture
def machine(monkeypatch):
    """Install fake flash-attn packages on a machine that claims a GPU; CPU tensors then pass for CUDA ones."""
    calls = []

    def install(*modules, failing=(), capability=(9, 0), tuple_output=()):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(kernels, "on_cuda", lambda tensor: True)
        monkeypatch.setattr(flash, "on_cuda", lambda tensor: True)
        for name in modules:

            def flash_attn_func(q, k, v, softmax_scale=None, causal=False, _name=name, **rest):
                calls.append((_name, tuple(q.shape), tuple(k.shape), softmax_scale, causal, rest))
                q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
                out = reference(q, k, v, is_causal=causal)[0].transpose(1, 2).to(torch.bfloat16) + 1
                return (out, None) if _name in tuple_output else out

            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.flash_attn_func = flash_attn_func
            monkeypatch.setitem(sys.modules, name, module)
        for name in failing:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
            real = kernels.importlib.import_module

            def broken(wanted, _name=name, _real=real):
                if wanted == _name:
                    raise ImportError("undefined symbol: _ZN3c10")
                return _real(wanted)

            monkeypatch.setattr(kernels.importlib, "import_module", broken)
        kernels.probe("attention", flash._ATTENTION)
        return calls

    yield install
    monkeypatch.undo()
    kernels.probe("attention", flash._ATTENTION)


def half(queries, keys):
    return inputs(queries, keys, torch.bfloat16)


@pytest.mark.parametrize("tuple_output", [(), ("flash_attn",)])
@pytest.mark.parametrize("by", ["auto", "flash-attn-2"])
def test_flash_attn_2_is_called(machine, by, tuple_output):
    calls = machine("flash_attn", tuple_output=tuple_output)
    out = flash.attention(*half(N, M), scaling=SCALE, is_causal=True, backend=by)
    assert calls == [("flash_attn", (B, N, H, D), (B, M, H, D), SCALE, True, {})]
    expected = reference(*(t.double() for t in half(N, M)), is_causal=True)[0]
    torch.testing.assert_close(out.double(), expected + 1, rtol=1e-2, atol=1e-2)
    flash.attention(*half(N, M), scaling=SCALE, dropout=0.25, backend=by)
    assert calls[1] == ("flash_attn", (B, N, H, D), (B, M, H, D), SCALE, False, {"dropout_p": 0.25})


def test_the_order_of_automatic_choice(machine):
    calls = machine("flash_attn", "flash_attn_interface", "flash_attn.cute")
    flash.attention(*half(N, N), scaling=SCALE)
    flash.attention(*half(N, N), scaling=SCALE, dropout=0.1)
    flash.attention(*half(N, N), scaling=SCALE, backend="flash-attn-4")
    assert [call[0] for call in calls] == ["flash_attn_interface", "flash_attn", "flash_attn.cute"]
    assert kernels.reasons("attention") == {"flash-attn-3": "it has no dropout, and dropout=0.1"}


def test_automatic_choice_falls_back_and_keeps_the_reason(machine):
    calls = machine("flash_attn", capability=(8, 0))
    mask = padding(M, (0, 4), (0, 7), (0, 1))
    out = flash.attention(*half(N, M), scaling=SCALE, key_padding_mask=mask)
    torch.testing.assert_close(
        out, flash.attention(*half(N, M), scaling=SCALE, key_padding_mask=mask, backend="math"), rtol=2e-2, atol=2e-2
    )
    assert "no mask" in kernels.reasons("attention")["flash-attn-2"]
    flash.attention(*inputs(N, M), scaling=SCALE)
    assert "float64" in kernels.reasons("attention")["flash-attn-2"]
    assert not calls
    with pytest.raises(KernelUnavailable, match="no mask besides causal"):
        flash.attention(*half(N, M), scaling=SCALE, key_padding_mask=mask, backend="flash-attn-2")
    machine("flash_attn", "flash_attn_interface", capability=(7, 5))
    flash.attention(*half(N, M), scaling=SCALE)
    assert "compute capability" in kernels.reasons("attention")["flash-attn-3"] and not calls


def test_an_import_that_fails_is_a_reason(machine):
    machine(failing=["flash_attn"])
    flash.attention(*half(N, M), scaling=SCALE)
    assert "ImportError: undefined symbol: _ZN3c10" in kernels.reasons("attention")["flash-attn-2"]
    with pytest.raises(KernelUnavailable, match="undefined symbol"):
        flash.attention(*half(N, M), scaling=SCALE, backend="flash-attn-2")


def test_torch_only(machine, monkeypatch):
    calls = machine("flash_attn")
    monkeypatch.setattr(kernels, "_setting", "torch")
    flash.attention(*half(N, N), scaling=SCALE)
    assert not calls
    flash.attention(*half(N, N), scaling=SCALE, backend="flash-attn-2")
    assert len(calls) == 1


def test_the_environment_variable():
    assert kernels.setting({}) == "auto"
    assert kernels.setting({"HF_ATTN_KERNELS": "torch"}) == "torch"
    with pytest.raises(InvalidOption, match="HF_ATTN_KERNELS"):
        kernels.setting({"HF_ATTN_KERNELS": "cuda"})


def test_no_backend_at_all():
    nothing = kernels.Backend("one", lambda: "it is not here", lambda request: None, lambda request: request)
    picky = kernels.Backend("two", lambda: None, lambda request: f"it dislikes {request}", lambda request: request)
    kernels.probe("test", (nothing, picky))
    try:
        with pytest.raises(KernelUnavailable, match="two: it dislikes 3; one: it is not here"):
            kernels.choose("test", "auto", (nothing, picky), 3)
        assert kernels.reasons("test") == {"one": "it is not here", "two": "it dislikes 3"}
        assert "test" in kernels.operations()
    finally:
        del kernels._absent["test"], kernels._refused["test"]
