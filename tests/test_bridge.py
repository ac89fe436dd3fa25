"""The attention function that transformers calls: heads in groups, refused maths, dropout, stock modules."""

import pytest
import torch
from helpers import DIM, GRID, HEADS, call_of, module_of, part_of

import hf_attn
from hf_attn import Unsupported, bridge
from hf_attn.mechanisms.rfa import RandomFeatureAttention

every = pytest.mark.parametrize("name", hf_attn.list_mechanisms())


class Host(torch.nn.Module):
    """An attention module of a model, as the bridge sees it."""

    is_causal = False
    layer_idx = 0

    def __init__(self, mechanism=None):
        super().__init__()
        if mechanism is not None:
            self.mechanism = mechanism


def run(mechanism, query, key, value, mask=None, dropout=0.0, **kwargs):
    return bridge.run(mechanism, Host(mechanism), query, key, value, mask, None, dropout, kwargs)


@every
def test_the_result_is_the_modules_with_heads_after_tokens(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    out, weights = run(module, q, k, v, **call)
    torch.testing.assert_close(out.transpose(1, 2), module(q, k, v, **call), rtol=0, atol=0)
    assert out.is_contiguous() and weights is None


@every
def test_grouped_keys_are_shared_by_their_queries(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    out, _ = run(module, q, k[:, :1], v[:, :1], **call)
    shared = [x[:, :1].repeat_interleave(HEADS, dim=1) for x in (k, v)]
    torch.testing.assert_close(out.transpose(1, 2), module(q, *shared, **call), rtol=0, atol=0)


@every
@pytest.mark.parametrize("keyword", ["softcap", "sinks", "position_bias", "s_aux"])
def test_maths_that_a_mechanism_does_not_define_is_refused(name, keyword):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    with pytest.raises(Unsupported, match=f"{name} in Host.*{keyword}"):
        run(module, q, k, v, **call, **{keyword: torch.zeros(1)})


@every
def test_dropout_acts_or_is_said_once_to_have_no_effect(name, recwarn):
    bridge._warned.clear()
    module = module_of(name).train()
    (q, k, v), call = call_of(module)
    torch.manual_seed(0)
    plain, _ = run(module, q, k, v, **call)
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(run(module, q, k, v, dropout=0.5, **call)[0])
    said = [w for w in recwarn if "no effect" in str(w.message)]
    if module.capabilities.dropout:
        assert not said and not torch.allclose(outs[0], plain)
    else:
        assert len(said) == 1 and name in str(said[0].message)
        torch.testing.assert_close(outs[0], plain, rtol=0, atol=0)


@every
def test_a_dense_mask_is_taken_exactly_or_refused(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    torch.manual_seed(3)
    mask = torch.rand(2, 1, q.shape[2], q.shape[2]) > 0.5
    if module.capabilities.dense_mask:
        out, _ = run(module, q, k, v, mask, **call)
        torch.testing.assert_close(out.transpose(1, 2), module.naive(q, k, v, attention_mask=mask, **call))
    else:
        with pytest.raises(Unsupported, match=name):
            run(module, q, k, v, mask, **call)


@every
def test_packed_rows_are_taken_apart_or_refused(name):
    module = module_of(name)
    (q, k, v), call = call_of(module)
    positions = torch.tensor([[*range(4), *range(11)], [*range(9), *range(6)]])
    if not module.capabilities.packed:
        with pytest.raises(Unsupported, match=f"{name}.*2 in a row"):
            run(module, q, k, v, position_ids=positions[:1], **call)
        return
    out, _ = run(module, q, k, v, position_ids=positions, **call)
    alone = module(q[:1, :, 4:], k[:1, :, 4:], v[:1, :, 4:], **part_of(call, slice(1), slice(4, None)))
    torch.testing.assert_close(out[:1, 4:].transpose(1, 2), alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(Unsupported, match="packed"):
        run(module, q, k, v, position_ids=positions, output_attentions=True, **call)


@every
def test_weights_and_output_come_from_one_draw(name):
    module = module_of(name).train()
    (q, k, v), call = call_of(module)
    if not module.capabilities.attention_weights:
        with pytest.raises(Unsupported, match=f"{name}.*output_attentions"):
            run(module, q, k, v, output_attentions=True, **call)
        return
    out, weights = run(module, q, k, v, output_attentions=True, **call)
    torch.testing.assert_close(out.transpose(1, 2), weights @ v)
    if not module.capabilities.random:
        torch.testing.assert_close(out.transpose(1, 2), module(q, k, v, **call))


def test_a_stock_module_gets_one_mechanism_for_its_life():
    host, q = Host(), torch.randn(1, HEADS, 6, DIM)
    first, second = (bridge.default_mechanism("rfa", RandomFeatureAttention, host, q) for _ in range(2))
    assert first is second
    other = bridge.default_mechanism("rfa", RandomFeatureAttention, Host(), q)
    assert other is not first and torch.equal(other.projection, first.projection), "the draw is fixed by the layer"
    deeper = Host()
    deeper.layer_idx = 3
    assert not torch.equal(
        bridge.default_mechanism("rfa", RandomFeatureAttention, deeper, q).projection, first.projection
    )
    state = torch.random.get_rng_state()
    bridge.default_mechanism("rfa", RandomFeatureAttention, Host(), q)
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers stay as they are"


def test_the_grid_reaches_the_mechanism():
    module = module_of("ripple")
    q = torch.randn(1, HEADS, GRID[0] * GRID[1] + 1, DIM, dtype=torch.float64)
    out, _ = run(module, q, q, q, grid=GRID, num_prefix_tokens=1)
    torch.testing.assert_close(out.transpose(1, 2), module(q, q, q, grid=GRID, num_prefix_tokens=1), rtol=0, atol=0)
    with pytest.raises(Unsupported, match="ripple.*grid"):
        run(module, q, q, q)
