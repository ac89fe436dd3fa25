"""World models and their vision as models of transformers: loading, losses, masks, rollouts, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_attn import SlotAttentionModel, WorldModel, WorldModelConfig
from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.world_model import action_rows, aligned_loss, equivariance_error, lift, ranking_metrics
from tests.helpers import agree, normal

BATCH, OBJECTS, SLOTS, SIZE, STATE = 3, 6, 4, 8, 3
TINY = {"num_library_objects": OBJECTS, "num_scene_objects": SLOTS - 1, "slot_size": SIZE, "embedding_dim": STATE,
        "transition_hidden": 16, "mlp_hidden_size": 16, "encoder_channels": (4, 4, 4), "decoder_channels": 8,
        "image_size": 20}  # fmt: skip
ORDER = torch.tensor([2, 0, 3, 1])


def built(seed=0, dtype=torch.float64, cls=WorldModel, **fields):
    torch.manual_seed(seed)
    encoder = "cnn" if cls is SlotAttentionModel else "slots"
    return cls(WorldModelConfig(**{**TINY, "encoder": encoder, **fields})).eval().to(dtype)


def slots_of(seed=0, count=SLOTS):
    return normal(BATCH, count, SIZE, seed=seed)


def acts(*shape, seed=0):
    numbers = torch.randint(0, OBJECTS * 4, shape or (BATCH,), generator=torch.Generator().manual_seed(seed))
    return action_rows(numbers, OBJECTS, 4).double()


def pictures(seed=0):
    return torch.rand(BATCH, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def step(model, **changes):
    given = {"slots": slots_of(0), "next_slots": slots_of(1), "negative_slots": slots_of(2), "actions": acts()}
    return model(**{**given, **changes})


@pytest.mark.parametrize("fields", [{}, {"pseudo_inverse": True}, {"neg_binding": "next"}], ids=str)
def test_the_loss_is_its_definition(fields):
    model = built(**fields)
    out = step(model)
    (now, then, other) = (model.observe(slots=slots_of(i)) for i in range(3))
    agree(out.predicted_states, now.states + model.transition(now.states, model.action_attention(now.binding, acts())))
    negative = then.binding if fields.get("neg_binding") == "next" else other.binding
    expected = aligned_loss(
        now.states, out.predicted_states, then.states, other.states, now.binding, then.binding, negative,
        pseudo_inverse=fields.get("pseudo_inverse", False),
    )  # fmt: skip
    agree(out.loss, expected)
    agree(out.predicted_objects, lift(now.binding, out.predicted_states, fields.get("pseudo_inverse", False)))
    agree(out.next_objects, lift(then.binding, then.states, fields.get("pseudo_inverse", False)))
    assert out.predicted_objects.shape == (BATCH, OBJECTS, STATE)


def test_03_the_loss_does_not_depend_on_the_order_of_slots_in_any_observation():
    model = built()
    moved = step(model, slots=slots_of(0)[:, ORDER], next_slots=slots_of(1)[:, ORDER[ORDER]], negative_slots=slots_of(2)[:, ORDER.argsort()])  # fmt: skip
    agree(moved.loss, step(model).loss, 1e-12)
    agree(moved.predicted_objects, step(model).predicted_objects, 1e-12)
    plain = built(aligned=False)
    assert abs(step(plain, next_slots=slots_of(1)[:, ORDER]).loss - step(plain).loss) > 1e-3


def test_06_the_graph_network_is_equivariant_and_the_mlp_is_not():
    orders = torch.tensor(list(itertools.permutations(range(SLOTS))))
    states, actions = normal(BATCH, SLOTS, STATE, seed=1), normal(BATCH, SLOTS, 4, seed=2)
    largest, mean = equivariance_error(built().transition, states, actions, orders)
    assert mean <= largest < 1e-12
    largest, mean = equivariance_error(built(transition="mlp").transition, states, actions, orders)
    assert largest > mean > 1e-3
    assert equivariance_error(built(transition="mlp").transition, states, actions, orders[:1])[0] == 0


def test_08_a_right_prediction_has_the_first_rank():
    objects = step(built()).next_objects
    mrr, hits = ranking_metrics(objects, objects)
    assert mrr == 1 and hits.tolist() == [1, 1, 1]


def test_actions_reach_the_binding_but_the_loss_does_not():
    model = built(hinge=100.0)
    step(model).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    agree(step(model, actions=torch.zeros_like(acts())).binding, step(model).binding)
    assert not step(model).binding.requires_grad
    # with no weight on the actions' values, nothing tells the binding anything
    model.zero_grad()
    torch.nn.init.zeros_(model.action_attention.project_v.weight)
    step(model).loss.backward()
    assert not model.action_attention.project_q.weight.grad.any()


def test_action_rows_are_one_hot_in_the_row_of_the_object():
    rows = action_rows(torch.tensor([[0, 7], [23, 4]]), OBJECTS, 4)
    assert rows.shape == (2, 2, OBJECTS, 4) and (rows.sum((2, 3)) == 1).all()
    assert rows[0, 1, 1, 3] == 1 and rows[1, 0, 5, 3] == 1 and rows[1, 1, 1, 0] == 1


@pytest.mark.parametrize("transition", ["gnn", "mlp"])
def test_masked_slots_do_not_matter(transition):
    model = built(transition=transition)
    mask = torch.tensor([[True, True, True, False]]).expand(BATCH, -1)
    masks = {"slot_mask": mask, "next_slot_mask": mask, "negative_slot_mask": mask}
    noisy = {name: slots_of(i).index_fill(1, torch.tensor([3]), 7.0) for i, name in enumerate(("slots", "next_slots", "negative_slots"))}  # fmt: skip
    found, other = step(model, **masks), step(model, **masks, **noisy)
    for name in ("loss", "predicted_objects", "next_objects", "binding"):
        agree(other[name], found[name], 1e-12)
    agree(other.predicted_states[:, :3], found.predicted_states[:, :3])
    if transition == "gnn":
        short = {name: slots_of(i)[:, :3] for i, name in enumerate(("slots", "next_slots", "negative_slots"))}
        agree(step(model, **short).loss, found.loss)
        unaligned = built(aligned=False)
        a, b = step(unaligned, **masks).loss, step(unaligned, **masks, **noisy).loss
        agree(a, b)


def test_absent_objects_can_be_left_out_of_the_loss():
    model = built()
    present = torch.tensor([True, False, True, True, False, False]).expand(BATCH, -1)
    out = step(model, object_mask=present, negative_object_mask=present)
    assert not out.predicted_objects[:, 1].any() and out.predicted_objects[:, 0].any()
    now, then = (step(model)[name] for name in ("predicted_objects", "next_objects"))
    positive = ((now - then)[:, present[0]] ** 2).sum((1, 2)) / OBJECTS / 0.5
    far = step(model, object_mask=present, negative_object_mask=present, negative_slots=slots_of(2) * 1e6)
    agree(far.loss, positive.mean())


def test_a_library_of_other_objects_needs_their_identities():
    model = built()
    agree(
        model.observe(slots=slots_of(), identities=torch.eye(OBJECTS)).binding, model.observe(slots=slots_of()).binding
    )
    # a library of two of the objects, in other places
    chosen = torch.eye(OBJECTS)[[4, 1]]
    out = model(slots=slots_of(), actions=acts()[:, [4, 1]], identities=chosen)
    agree(out.binding, step(model).binding[:, [4, 1]])
    with pytest.raises(InvalidInput, match="actions"):
        model(slots=slots_of(), actions=acts()[:, :2])


@pytest.mark.parametrize("hard", [False, True])
def test_rollouts_repeat_the_step_with_the_first_binding(hard):
    model, actions = built(), acts(BATCH, 3)
    out = model.predict(slots=slots_of(), actions=actions, hard=hard)
    assert out.predicted_objects.shape == (BATCH, 3, OBJECTS, STATE)
    binding, states = out.binding, model.observe(slots=slots_of()).states
    if hard:
        assert ((binding == 0) | (binding == 1)).all() and (binding.sum(2) == 1).all()
        assert (binding.argmax(2) == step(model).binding.argmax(2)).all()
    for t in range(3):
        states = states + model.transition(states, model.action_attention(binding, actions[:, t]))
        agree(out.predicted_states[:, t], states)
        agree(out.predicted_objects[:, t], binding @ states)
    if not hard:
        agree(out.predicted_objects[:, 0], step(model, actions=actions[:, 0]).predicted_objects)


def test_lifted_scenes_are_what_predictions_are_compared_with():
    model = built()
    agree(model.lift_scene(model.observe(slots=slots_of(1))), step(model).next_objects)


@pytest.mark.parametrize("cls", [WorldModel, SlotAttentionModel])
def test_saving_and_loading_keeps_everything(cls, tmp_path):
    model = built(cls=cls, dtype=torch.float32, encoder="cnn", deterministic_slots=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    call = {"pixel_values": pictures()} | ({"actions": acts()} if cls is WorldModel else {})
    with torch.no_grad():
        first, second = (m.eval()(**call, return_dict=False) for m in (model, again))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), WorldModelConfig)
    if cls is WorldModel:
        assert type(AutoModel.from_pretrained(tmp_path)) is WorldModel


def test_missing_weights_start_as_torch_starts_them():
    model = built(cls=SlotAttentionModel, dtype=torch.float32)
    kept = {
        n: t for n, t in model.state_dict().items() if "gru" not in n and "slots_mu" not in n and "encoder.0" not in n
    }
    again = SlotAttentionModel.from_pretrained(None, config=model.config, state_dict=kept)
    for name, tensor in kept.items():
        assert torch.equal(again.state_dict()[name], tensor), name
    bound = SIZE**-0.5
    drawn = again.slot_attention.gru.weight_hh.detach()
    assert 0 < drawn.abs().max() <= bound and drawn.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert 0 < again.slot_attention.slots_mu.abs().max() <= (6 / (1 + SIZE)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype, tmp_path):
    model = built(dtype=torch.float32, encoder="cnn", deterministic_slots=True)
    call = {"pixel_values": pictures(0), "next_pixel_values": pictures(1), "negative_pixel_values": pictures(2), "actions": acts()}  # fmt: skip
    expected = model(**call)
    model.save_pretrained(tmp_path)
    found = WorldModel.from_pretrained(tmp_path, dtype=dtype)(**call)
    assert found.predicted_objects.dtype == dtype
    torch.testing.assert_close(found.loss.float(), expected.loss, rtol=0.1, atol=0.1)


def test_the_representation_is_frozen_also_after_loading(tmp_path):
    vision = built(cls=SlotAttentionModel, dtype=torch.float32)
    vision(pictures()).loss.backward()
    assert all(p.grad is not None for n, p in vision.named_parameters())
    model = WorldModel.from_representation(vision, embedding_dim=2, deterministic_slots=True).train()
    model.save_pretrained(tmp_path)
    for made in (model, WorldModel.from_pretrained(tmp_path).train()):
        before = {n: t.clone() for n, t in made.representation.state_dict().items()}
        made(pictures(0), acts(), pictures(1), pictures(2)).loss.backward()
        for name, tensor in made.representation.state_dict().items():
            assert torch.equal(before[name], tensor) and torch.equal(vision.state_dict()[name], tensor), name
        assert not any(p.requires_grad for p in made.representation.parameters())
        assert made.embedding.weight.shape[0] == 2 and made.embedding.weight.grad.any()


def test_slots_are_drawn_anew_unless_they_are_deterministic():
    vision = built(cls=SlotAttentionModel, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.equal(vision(pictures()).slots, vision(pictures()).slots)
        fixed = built(cls=SlotAttentionModel, dtype=torch.float32, deterministic_slots=True)
        assert torch.equal(fixed(pictures()).slots, fixed(pictures()).slots)
        torch.testing.assert_close(fixed(pictures()[1:]).slots, fixed(pictures()).slots[1:])


def test_vision_shares_every_place_and_pixel_among_the_slots():
    vision = built(cls=SlotAttentionModel)
    out = vision(pictures().double())
    assert out.attention.shape == (BATCH, SLOTS, 4, 4) and out.masks.shape == (BATCH, SLOTS, 20, 20)
    agree(out.attention.sum(1), torch.ones(BATCH, 4, 4).double(), 1e-6)
    agree(out.masks.sum(1), torch.ones(BATCH, 20, 20).double())
    agree(out.loss, (out.reconstruction - pictures()).square().mean(), 1e-6)
    start = slots_of()
    seen, moved = vision(pictures().double(), start), vision(pictures().double(), start[:, ORDER])
    agree(moved.slots, seen.slots[:, ORDER], 1e-6)
    agree(moved.reconstruction, seen.reconstruction, 1e-6)
    assert vision(pictures(), return_loss=False).loss is None


def test_vision_learns_one_batch():
    vision = built(cls=SlotAttentionModel, dtype=torch.float32).train()
    optimizer = torch.optim.Adam(vision.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = vision(pictures()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_both_models_compile_in_one_piece():
    model, vision = built(dtype=torch.float32), built(cls=SlotAttentionModel, dtype=torch.float32)
    call = {"slots": slots_of().float(), "actions": acts().float()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**call).predicted_objects, model(**call).predicted_objects)
    start = slots_of().float()
    compiled = torch.compile(vision, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pictures(), start).loss, vision(pictures(), start).loss)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m(slots=slots_of()), "actions are missing"),
        (lambda m: m(actions=acts()), "one of pixel_values and slots"),
        (lambda m: m(pixel_values=pictures(), slots=slots_of(), actions=acts()), "one of pixel_values and slots"),
        (lambda m: m(pixel_values=pictures(), actions=acts()), "encoder='slots'"),
        (lambda m: m(slots=slots_of()[:, :, :5], actions=acts()), "slots"),
        (lambda m: m(slots=slots_of(), actions=acts(), negative_slots=slots_of()), "without a next observation"),
        (lambda m: step(m, negative_slots=slots_of()[:, :, :5]), "negative_slots"),
        (lambda m: step(m, next_slot_mask=torch.ones(BATCH, SLOTS)), "slot_mask"),
        (lambda m: step(m, object_mask=torch.ones(BATCH, SLOTS, dtype=torch.bool)), "object_mask"),
        (lambda m: step(built(aligned=False), object_mask=torch.ones(BATCH, OBJECTS, dtype=torch.bool)), "aligned=False"),
        (lambda m: step(built(neg_binding="next"), negative_object_mask=torch.ones(BATCH, OBJECTS, dtype=torch.bool)), "neg_binding"),
        (lambda m: step(m, identities=torch.eye(4)), "identities"),
        (lambda m: m.predict(slots=slots_of(), actions=acts()), r"\(B,T,N,A\)"),
        (lambda m: step(built(transition="mlp"), slots=slots_of(count=3)), "num_slots=4"),
        (lambda m: built(cls=SlotAttentionModel, encoder="slots"), "has no vision"),
        (lambda m: built(cls=SlotAttentionModel)(pictures()[:, :2]), "pixel_values"),
        (lambda m: action_rows(torch.tensor([24]), OBJECTS, 4), "0 to 23"),
        (lambda m: action_rows(torch.tensor([1.0]), OBJECTS, 4), "int64"),
        (lambda m: equivariance_error(m.transition, normal(1, 4, 3), normal(1, 4, 4), torch.tensor([[0, 1, 1, 2]])), "permutations"),
    ],
)  # fmt: skip
def test_refusals(call, match):
    with pytest.raises(InvalidInput, match=match):
        call(built())


@pytest.mark.parametrize(
    "field",
    [
        {"encoder": "vit"}, {"transition": "rnn"}, {"neg_binding": "other"}, {"num_scene_objects": 7}, {"slot_size": 0},
        {"num_iterations": True}, {"encoder_channels": (4, 4)}, {"image_size": 21}, {"sigma": 0.0}, {"hinge": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_the_config_refuses(field):
    with pytest.raises(InvalidOption, match=f"WorldModelConfig: {next(iter(field))}="):
        WorldModelConfig(**{**TINY, **field})
