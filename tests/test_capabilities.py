"""Every cell of every capability record: what it says yes to works and equals the definition, the rest is refused.

Parametrised over the registry: a new mechanism earns all of this by being registered.
"""

import copy

import pytest
import torch
from helpers import DIM, HEADS, call_of, module_of, part_of

import hf_attn
from hf_attn import Unsupported
from hf_attn.masks import Packing

NAMES = hf_attn.list_mechanisms()
every = pytest.mark.parametrize("name", NAMES)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def padding_masks(length: int, anywhere: bool) -> torch.Tensor:
    """Right, left, both sides and scattered padding, and a wholly padded row; as much on the right, if not `anywhere`."""
    masks = torch.ones(5, length, dtype=torch.bool)
    masks[0, length - 4 :] = False
    masks[1, :5] = False
    masks[2, :2] = masks[2, -3:] = False
    masks[3, 1::3] = False
    masks[4] = False
    return masks if anywhere else masks.sort(dim=1, descending=True).values


@every
def test_efficient_equals_naive_with_gradients(name):
    module = module_of(name)
    (q, k, v), call = call_of(module, requires_grad=True)
    cotangent = torch.randn(2, HEADS, q.shape[2], DIM, dtype=q.dtype)
    gradients = []
    for form in (module, module.naive):
        inputs = [q, k, v, *module.parameters()]
        out = form(q, k, v, **call)
        grads = torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)
        gradients.append((out, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads)]))
    close(gradients[0][0], gradients[1][0])
    for a, b in zip(gradients[0][1], gradients[1][1]):
        close(a, b, 1e-8)


@every
def test_bidirectional(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    if module.capabilities.bidirectional:
        assert torch.isfinite(module(q, k, v, **call)).all()
    else:
        with pytest.raises(Unsupported, match=name):
            module(q, k, v, **call)


@every
def test_causal_with_offset(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    if not module.capabilities.causal:
        with pytest.raises(Unsupported, match=f"{name}.*causal"):
            module(q, k, v, is_causal=True, **call)
        return
    full = module(q, k, v, is_causal=True, **call)
    close(full, module.naive(q, k, v, is_causal=True, **call))
    # the future is invisible, exactly
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, -1], changed_v[:, :, -1] = 7.0, -7.0
    close(module(q, changed_k, changed_v, is_causal=True, **call)[:, :, :-1], full[:, :, :-1], 1e-12)
    if module.capabilities.decode in ("full cache", "constant state"):
        close(module(q[:, :, -4:], k, v, is_causal=True, **call), full[:, :, -4:])
    with pytest.raises(Unsupported, match=f"{name}.*M="):
        module(q, k[:, :, :4], v[:, :, :4], is_causal=True, **call)


@every
def test_cross(name):
    module = module_of(name)
    (q, k, v), call = call_of(module, keys=9)
    if module.capabilities.cross:
        close(module(q, k, v, **call), module.naive(q, k, v, **call))
    else:
        with pytest.raises(ValueError, match=name):
            module(q, k, v, **call)


@every
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_never_matters_and_never_gives_nan(name, is_causal):
    module = module_of(name)
    if is_causal and not module.capabilities.causal:
        pytest.skip("not causal: refused in test_causal_with_offset")
    (q, k, v), call = call_of(module, batch=5)
    call["is_causal"] = is_causal
    masks = padding_masks(q.shape[2], module.capabilities.padding_anywhere)
    out = module(q, k, v, key_padding_mask=masks, **call)
    assert torch.isfinite(out).all()
    assert not out[4].any(), "a query that sees no key gives zeros"
    close(out, module.naive(q, k, v, key_padding_mask=masks, **call))
    noisy_k, noisy_v = k.clone(), v.clone()
    hidden = ~masks[:, None, :, None].expand_as(k)
    noisy_k[hidden], noisy_v[hidden] = 50.0, -50.0
    rows = masks[:, None, :, None]
    close(module(q, noisy_k, noisy_v, key_padding_mask=masks, **call) * rows, out * rows)


@every
@pytest.mark.parametrize("is_causal", [False, True])
def test_padded_equals_truncated_equals_alone(name, is_causal):
    module = module_of(name)
    if not module.capabilities.sequence or (is_causal and not module.capabilities.causal):
        pytest.skip("patches of a grid keep their places; causal is refused elsewhere")
    (q, k, v), call = call_of(module, batch=3)
    call["is_causal"] = is_causal
    length = q.shape[2]
    masks = torch.ones(3, length, dtype=torch.bool)
    masks[1, length - 6 :] = False
    if module.capabilities.padding_anywhere:
        masks[2, :6] = False
    else:
        with pytest.raises(Unsupported, match=f"{name}.*padding_side"):
            module(q, k, v, key_padding_mask=masks.flip(1), **call)
    out = module(q, k, v, key_padding_mask=masks, **call)
    where = module.capabilities.padding_equals_cutting

    def alone(row, tokens):
        return module(*(x[row : row + 1, :, tokens] for x in (q, k, v)), **part_of(call, slice(row, row + 1), tokens))

    if where != "nowhere":
        close(out[1:2, :, : length - 6], alone(1, slice(length - 6)))
    if where == "anywhere":
        close(out[2:3, :, 6:], alone(2, slice(6, None)))
    close(out[:1], alone(0, slice(None)))


@every
def test_fully_padded_rows_have_finite_gradients(name):
    module = module_of(name)
    (q, k, v), call = call_of(module, batch=5, requires_grad=True)
    module(
        q, k, v, key_padding_mask=padding_masks(q.shape[2], module.capabilities.padding_anywhere), **call
    ).square().sum().backward()
    for tensor in (q, k, v, *module.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


@every
def test_packed_equals_alone(name):
    module = module_of(name)
    (q, k, v), call = call_of(module, batch=2)
    if not module.capabilities.packed:
        return  # the bridge refuses: tests/test_bridge.py
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 8, [0] * 9 + [1] * 6])
    packing = Packing.of(segments)
    unpacked = [packing.unpack(x) for x in (q, k, v)]
    given = dict(call)
    if "layer_input" in call:
        given["layer_input"] = packing.unpack(call["layer_input"][:, None])[:, 0]
    out = packing.pack(module(*unpacked, key_padding_mask=packing.key_padding, **given))
    alone = module(q[:1, :, 4:7], k[:1, :, 4:7], v[:1, :, 4:7], **part_of(call, slice(1), slice(4, 7)))
    close(out[:1, :, 4:7], alone)
    for x, y in zip((q, k, v), unpacked):
        close(packing.pack(y), x)


@every
@pytest.mark.parametrize("additive", [False, True])
def test_dense_mask(name, additive):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    n = q.shape[2]
    mask = torch.rand(2, 1, n, n) > 0.3
    mask[..., 0, :] = False
    given = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf")) if additive else mask
    if not module.capabilities.dense_mask:
        with pytest.raises(Unsupported, match=f"{name}.*attention_mask"):
            module(q, k, v, attention_mask=given, **call)
        return
    out = module(q, k, v, attention_mask=given, **call)
    close(out, module.naive(q, k, v, attention_mask=given, **call))
    assert not out[:, :, 0].any()


@every
def test_grid(name):
    module = module_of(name)
    (q, k, v), call = call_of(module, on_grid=True)
    rows, columns = call["grid"]
    if module.capabilities.grid == "refused":
        with pytest.raises(Unsupported, match=f"{name}.*grid"):
            module(q, k, v, **call)
        return
    out = module(q, k, v, **call)
    if module.capabilities.grid == "ignored":
        call["grid"] = None
        close(out, module(q, k, v, **call), 0)
        return
    with pytest.raises(ValueError, match=f"{name}.*grid"):
        module(q, k, v, **{**call, "grid": (rows, columns + 1)})
    if not module.capabilities.sequence:
        with pytest.raises(Unsupported, match=f"{name}.*grid"):
            module(q, k, v, **{**call, "grid": None})
    if module.capabilities.prefix_tokens:
        q1, k1, v1 = (torch.cat((x[:, :, :1], x), dim=2) for x in (q, k, v))
        close(module(q1, k1, v1, **call, num_prefix_tokens=1), module.naive(q1, k1, v1, **call, num_prefix_tokens=1))


@every
def test_decode(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    if not module.capabilities.keeps_state:
        with pytest.raises(Unsupported, match=name):
            module.step(q, k, v, None, **call)
        return
    full = module(q, k, v, is_causal=True, **call)
    state, steps, sizes = None, [], set()
    for part in (slice(0, 6), slice(6, 7), slice(7, 12), slice(12, 15)):
        given = part_of(call, slice(None), part)
        out, state = module.step(q[:, :, part], k[:, :, part], v[:, :, part], state, **given)
        steps.append(out)
        sizes.add(sum(t.numel() for t in state.values()))
    close(torch.cat(steps, dim=2), full)
    if module.capabilities.decode == "constant state":
        assert len(sizes) == 1, "the state does not grow"
    if module.capabilities.decode == "growing state":
        assert sum(t.numel() for t in state.values()) < k.numel() + v.numel(), "smaller than a full cache"
    for tensor in state.values():
        assert tensor.shape[0] == len(q), "batch comes first, for beams"


@every
def test_attention_weights(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    if not module.capabilities.attention_weights:
        with pytest.raises(Unsupported, match=f"{name}.*output_attentions"):
            module.attention_weights(q, k, v, **call)
        return
    weights = module.attention_weights(q, k, v, **call)
    assert weights.shape == (2, HEADS, q.shape[2], k.shape[2])
    close(weights @ v, module(q, k, v, **call))


@every
def test_learned_parameters_are_as_recorded(name):
    module = module_of(name)
    assert bool(list(module.parameters())) == module.capabilities.learned
    (q, k, v), call = call_of(module, requires_grad=True)
    module(q, k, v, **call).square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v, *module.parameters()) if t.grad is not None)


@every
def test_evaluation_is_deterministic_and_a_seed_gives_the_same_module(name):
    mechanism = hf_attn.get_mechanism(name)
    built = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        built.append(hf_attn.build(name, num_heads=HEADS, head_dim=DIM, **mechanism.example).double())
    first, second, other = built
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        close(a, b, 0)
    (q, k, v), call = call_of(first.eval())
    close(first(q, k, v, **call), first(q, k, v, **call), 0)
    if mechanism.capabilities.random:
        drawn = [n for n, _ in first.named_buffers()] or [n for n, _ in first.named_parameters()]
        if drawn:
            assert any((first.state_dict()[n] != other.state_dict()[n]).any() for n in drawn)
            return
        outputs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outputs.append(first.train()(q, k, v, **call))
        close(outputs[0], outputs[1], 0)
        assert (outputs[0] != outputs[2]).any(), "drawn in each forward, so it depends on the seed"


@every
def test_saved_equals_reloaded(name):
    module = module_of(name)
    fresh = copy.deepcopy(module)
    fresh.reset_parameters()
    fresh.load_state_dict(module.state_dict(), strict=True)
    (q, k, v), call = call_of(module)
    close(module(q, k, v, **call), fresh(q, k, v, **call), 0)


@every
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(name, dtype):
    module = module_of(name)
    assert dtype in module.capabilities.dtypes
    (q, k, v), call = call_of(module)
    exact = module.naive(q, k, v, **call)
    low = getattr(torch, dtype)
    converted = {n: x.to(low) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in call.items()}
    out = copy.deepcopy(module).to(low)(q.to(low), k.to(low), v.to(low), **converted)
    assert out.dtype == low
    error = (out.double() - exact).abs().max() / exact.abs().max()
    # a few units in the last place of the inputs' rounding, which the definition sees as well
    assert error < 60 * torch.finfo(low).eps


@every
def test_autocast_keeps_the_precision(name):
    module = module_of(name, torch.float32)
    (q, k, v), call = call_of(module, dtype=torch.float32)
    exact = module(q, k, v, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(q.bfloat16(), k.bfloat16(), v.bfloat16(), **call)
    assert (out.float() - exact).abs().max() / exact.abs().max() < 0.05


@every
@pytest.mark.parametrize("mode", ["plain", "padding", "causal"])
def test_compile_fullgraph(name, mode):
    torch.compiler.reset()  # all mechanisms share one forward, and its recompilations are limited
    module = module_of(name, torch.float32)
    (q, k, v), call = call_of(module, dtype=torch.float32)
    if mode == "causal":
        if not module.capabilities.causal:
            pytest.skip("not causal")
        call["is_causal"] = True
    if mode == "padding":
        call["key_padding_mask"] = padding_masks(q.shape[2], module.capabilities.padding_anywhere)[:2]
    torch.compiler.reset()  # every mechanism shares one forward, and what is compiled of it is limited
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert module.capabilities.compile
    torch.testing.assert_close(compiled(q, k, v, **call), module(q, k, v, **call))


@every
def test_export(name):
    module = module_of(name, torch.float32)
    (q, k, v), call = call_of(module, dtype=torch.float32)
    assert module.capabilities.export
    program = torch.export.export(module, (q, k, v), call)
    torch.testing.assert_close(program.module()(q, k, v, **call), module(q, k, v, **call))


@every
def test_dropout(name):
    module = module_of(name).train()
    (q, k, v), call = call_of(module)
    if not module.capabilities.dropout:
        return  # the bridge warns once: tests/test_bridge.py
    torch.manual_seed(0)
    dropped = module(q, k, v, dropout=0.5, **call)
    torch.manual_seed(0)
    close(dropped, module(q, k, v, dropout=0.5, **call), 0)
    assert (dropped - module(q, k, v, **call)).abs().max() > 0.01


@every
def test_identities_of_every_mechanism(name):
    """Constant values come out unchanged where rows are convex weights, and only there."""
    module = module_of(name)
    (q, k, v), call = call_of(module)
    weighted = module(q, k, torch.full_like(v, 2.5), **call)
    if not module.capabilities.convex:
        assert (weighted - 2.5).abs().max() > 1e-3
    elif module.capabilities.attention_weights:
        close(weighted, torch.full_like(v, 2.5))


@every
def test_wrong_shapes_are_named(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    for arguments, words in (
        ((q[0], k, v), "query, key and value must be"),
        ((q[:, :1], k[:, :1], v[:, :1]), "num_heads=2"),
        ((q, k, v[:, :, :-1]), "do not fit"),
    ):
        with pytest.raises(hf_attn.InvalidInput, match=f"{name}.*{words}"):
            module(*arguments, **call)
    with pytest.raises(hf_attn.InvalidInput, match=f"{name}.*key_padding_mask"):
        module(q, k, v, key_padding_mask=torch.ones(2, q.shape[2]), **call)
    with pytest.raises(hf_attn.InvalidInput, match=f"{name}.*'nose'"):
        module(q, k, v, nose=q, **call)
