"""The world model's functions and layers: the invariants of their page, masks, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from hf_attn.errors import InvalidInput
from hf_attn.models.world_model import (
    SlotAttention,
    TransitionGNN,
    aligned_loss,
    bind_slots,
    lift,
    ranking_metrics,
    slot_actions,
    state_energy,
)

BATCH, OBJECTS, SLOTS, SIZE, STATE, ACTIONS = 2, 5, 4, 6, 3, 4
ORDER = torch.tensor([2, 0, 3, 1])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def binding(objects: int = OBJECTS) -> torch.Tensor:
    return draw(BATCH, objects, SLOTS).softmax(-1)


def bind(slots, mask=None):
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(OBJECTS, n, generator=generator, dtype=torch.float64) for n in (slots.shape[2], OBJECTS))
    return bind_slots(slots, query, key, mask)


def exact(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_01_rows_of_the_binding_sum_to_one():
    exact(bind(draw(BATCH, SLOTS, SIZE)).sum(2), torch.ones(BATCH, OBJECTS).double(), 1e-12)


def test_02_permuted_slots_permute_the_columns():
    slots = draw(BATCH, SLOTS, SIZE)
    exact(bind(slots[:, ORDER]), bind(slots)[:, :, ORDER], 1e-12)
    assert (bind(slots[:, ORDER]) - bind(slots)).abs().max() > 1e-3


@pytest.mark.parametrize(("pseudo_inverse", "tolerance"), [(False, 1e-12), (True, 1e-9)])
def test_03_lifting_does_not_depend_on_the_order_of_slots(pseudo_inverse, tolerance):
    bound, states = binding(), draw(BATCH, SLOTS, STATE)
    expected = lift(bound, states, pseudo_inverse)
    exact(lift(bound[:, :, ORDER], states[:, ORDER], pseudo_inverse), expected, tolerance)
    assert (lift(bound, states[:, ORDER], pseudo_inverse) - expected).abs().max() > 1e-3


def test_04_a_hard_binding_routes_actions_and_adds_those_of_one_slot():
    bound = torch.zeros(1, 3, 2, dtype=torch.float64)
    bound[0, torch.arange(3), torch.tensor([1, 0, 1])] = 1
    actions, eye, zero = draw(1, 3, ACTIONS), torch.eye(ACTIONS).double(), torch.zeros(ACTIONS).double()
    found = slot_actions(bound, actions, eye, torch.ones(ACTIONS).double(), zero, eps=0.0)
    normed = torch.nn.functional.layer_norm(actions, (ACTIONS,))[0]
    exact(found[0], torch.stack([normed[1], normed[0] + normed[2]]), 1e-12)


def test_05_both_lifts_are_equal_for_permutations():
    bound = torch.eye(SLOTS).double()[ORDER].expand(BATCH, -1, -1)
    states = draw(BATCH, SLOTS, STATE)
    exact(lift(bound, states, pseudo_inverse=True), lift(bound, states), 1e-12)
    exact(lift(bound, states), states[:, ORDER], 0)


def test_06_the_graph_network_is_equivariant():
    network = TransitionGNN(STATE, ACTIONS, hidden_size=16).double()
    states, actions = draw(BATCH, SLOTS, STATE), draw(BATCH, SLOTS, ACTIONS)
    exact(network(states[:, ORDER], actions[:, ORDER]), network(states, actions)[:, ORDER], 1e-12)


def test_07_slot_attention_follows_its_initial_slots_and_ignores_the_order_of_inputs():
    module = SlotAttention(7, SIZE, SLOTS, mlp_hidden_size=8).double()
    inputs, slots = draw(BATCH, 9, 7), draw(BATCH, SLOTS, SIZE)
    expected = module(inputs, slots)
    exact(module(inputs, slots[:, ORDER]), expected[:, ORDER], 1e-10)
    exact(module(inputs[:, torch.randperm(9)], slots), expected, 1e-10)


def test_08_perfect_predictions_rank_first():
    states = draw(20, 3, 2)
    mrr, hits = ranking_metrics(states, states)
    assert mrr == 1 and hits.tolist() == [1, 1, 1]


def test_ranks_are_those_of_a_sort():
    predicted, target = draw(12, 2, 2), draw(12, 2, 2)
    ranks = []
    for i in range(12):
        distance = [(predicted[j] - target[i]).square().sum().item() for j in range(12)]
        ranks.append(sorted(range(12), key=distance.__getitem__).index(i) + 1)
    mrr, hits = ranking_metrics(predicted, target, ks=(2, 7))
    assert mrr.item() == pytest.approx(sum(1 / rank for rank in ranks) / 12)
    assert hits.tolist() == pytest.approx([sum(rank <= k for rank in ranks) / 12 for k in (2, 7)])


def test_the_true_prediction_comes_first_among_equal_ones():
    assert ranking_metrics(torch.zeros(4, 2), torch.ones(4, 2))[0] == 1


def test_the_graph_network_is_its_definition():
    network = TransitionGNN(STATE, ACTIONS, hidden_size=16).double()
    states, actions = draw(BATCH, SLOTS, STATE), draw(BATCH, SLOTS, ACTIONS)
    found = network(states, actions)
    for b in range(BATCH):
        for i in range(SLOTS):
            others = [network.edge_mlp(torch.cat([states[b, i], states[b, j]])) for j in range(SLOTS) if j != i]
            exact(network.node_mlp(torch.cat([states[b, i], actions[b, i], sum(others)])), found[b, i], 1e-12)


def test_masked_slots_are_as_if_they_were_not_there():
    slots, mask = draw(BATCH, SLOTS, SIZE), torch.tensor([[True, True, True, False]]).expand(BATCH, -1)
    found = bind(slots, mask)
    exact(found[:, :, :3], bind(slots[:, :3]), 1e-12)
    assert (found[:, :, 3] == 0).all()
    nothing = bind(slots, torch.zeros_like(mask))
    assert (nothing == 0).all()
    network = TransitionGNN(STATE, ACTIONS, hidden_size=16).double()
    states, actions = draw(BATCH, SLOTS, STATE), draw(BATCH, SLOTS, ACTIONS)
    changed = network(states, actions, mask)
    exact(changed[:, :3], network(states[:, :3], actions[:, :3]), 1e-12)
    assert (changed[:, 3] == 0).all()


def test_the_loss_knows_its_own_slot_order_only_through_the_bindings():
    states = [draw(BATCH, SLOTS, STATE) for _ in range(4)]
    bound = [binding() for _ in range(3)]
    loss = aligned_loss(*states, *bound)
    now, after, negative = (torch.randperm(SLOTS) for _ in range(3))
    moved = [state[:, order] for state, order in zip(states, (now, now, after, negative), strict=True)]
    again = aligned_loss(*moved, *(m[:, :, order] for m, order in zip(bound, (now, after, negative), strict=True)))
    exact(again, loss, 1e-12)


def test_the_loss_is_zero_for_right_predictions_and_far_negatives():
    states, bound = draw(BATCH, SLOTS, STATE), torch.eye(SLOTS).double().expand(BATCH, -1, -1)
    assert aligned_loss(states, states + 1, states + 1, states + 100, bound, bound, bound) == 0
    # negatives that equal the state cost the whole hinge
    assert aligned_loss(states, states, states, states, bound, bound, bound, hinge=0.7).item() == pytest.approx(0.7)


def test_bindings_have_no_gradient():
    states = [draw(BATCH, SLOTS, STATE).requires_grad_() for _ in range(4)]
    bound = [binding().requires_grad_() for _ in range(3)]
    aligned_loss(*states, *bound, hinge=100.0).backward()
    assert all(m.grad is None for m in bound)
    assert all(state.grad.abs().sum() > 0 for state in states)


def test_energy_is_its_definition():
    first, second = draw(BATCH, OBJECTS, STATE), draw(BATCH, OBJECTS, STATE)
    expected = [
        sum(math.dist(a, b) ** 2 for a, b in zip(x, y, strict=True)) / OBJECTS / (2 * 0.3**2)
        for x, y in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert state_energy(first, second, 0.3).tolist() == pytest.approx(expected)


def test_initial_slots_are_drawn_around_buffers_that_are_not_trained():
    module = SlotAttention(7, SIZE, SLOTS)
    assert {name for name, _ in module.named_buffers()} == {"slots_mu", "slots_log_sigma"}
    inputs = torch.randn(BATCH, 9, 7)
    one, two = (module(inputs, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == (BATCH, SLOTS, SIZE)
    assert torch.equal(one, two)
    assert not torch.equal(one, module(inputs, generator=torch.Generator().manual_seed(4)))
    noise = torch.randn(BATCH, SLOTS, SIZE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module(inputs, module.slots_mu + module.slots_log_sigma.exp() * noise), one)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(half):
    module = SlotAttention(7, SIZE, SLOTS, mlp_hidden_size=8)
    inputs, slots = torch.randn(BATCH, 9, 7), torch.randn(BATCH, SLOTS, SIZE)
    expected = module(inputs, slots)
    found = module.to(half)(inputs.to(half), slots.to(half))
    assert found.dtype == half
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_the_layers_compile():
    module, network = SlotAttention(7, SIZE, SLOTS, mlp_hidden_size=8), TransitionGNN(STATE, ACTIONS, hidden_size=16)
    inputs, slots = torch.randn(BATCH, 9, 7), torch.randn(BATCH, SLOTS, SIZE)
    states, actions = torch.randn(BATCH, SLOTS, STATE), torch.randn(BATCH, SLOTS, ACTIONS)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs, slots), module(inputs, slots))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(states, actions), network(states, actions))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bind_slots(draw(4, 6), draw(5, 6), draw(5, 5)), "slots"),
        (lambda: bind_slots(draw(2, 4, 6), draw(5, 7), draw(5, 5)), "query_weight"),
        (lambda: bind_slots(draw(2, 4, 6), draw(5, 6), draw(4, 5)), "key_weight"),
        (lambda: bind(draw(2, 4, 6), torch.ones(2, 4)), "slot_mask"),
        (lambda: bind(draw(2, 4, 6), torch.ones(2, 3, dtype=torch.bool)), "slot_mask"),
        (lambda: slot_actions(binding(), draw(2, 4, 4), draw(4, 4), draw(4), draw(4)), "actions"),
        (lambda: slot_actions(binding(), draw(2, 5, 4), draw(4, 3), draw(4), draw(4)), "value_weight"),
        (lambda: slot_actions(binding(), draw(2, 5, 4), draw(4, 4), draw(3), draw(4)), "norm_weight"),
        (lambda: lift(binding(), draw(2, 5, 3)), "states"),
        (lambda: state_energy(draw(2, 5, 3), draw(2, 4, 3)), "second"),
        (lambda: state_energy(draw(2, 5, 3), draw(2, 5, 3), 0.0), "sigma"),
        (lambda: ranking_metrics(draw(3, 2), draw(4, 2)), "predicted"),
        (lambda: ranking_metrics(draw(3, 2) * math.nan, draw(3, 2)), "finite"),
        (lambda: ranking_metrics(draw(3, 2), draw(3, 2), ks=(0,)), "ks"),
        (lambda: SlotAttention(7, 6, 0), "num_slots"),
        (lambda: SlotAttention(7, 6, 4)(torch.ones(2, 9, 6)), "inputs"),
        (lambda: SlotAttention(7, 6, 4)(torch.ones(2, 9, 7), torch.ones(2, 3, 6)), "slots"),
        (lambda: TransitionGNN(3, 0), "action_dim"),
        (lambda: TransitionGNN(3, 4, 8)(torch.ones(2, 4, 3), torch.ones(2, 5, 4)), "actions"),
        (lambda: TransitionGNN(3, 4, 8)(torch.ones(2, 4, 3), torch.ones(2, 4, 4), torch.ones(2, 4)), "slot_mask"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(InvalidInput, match=match):
        call()
