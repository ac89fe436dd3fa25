"""Observations, transitions, metrics and pictures of world models on the Object Library."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, default_data_collator

from hf_attn import SlotAttentionModel, WorldModel, WorldModelConfig
from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.world_model import ranking_metrics
from hf_attn.recipes.object_library import ObjectLibrary, collect, split_scenes
from hf_attn.recipes.object_pictures import render
from hf_attn.recipes.safe_trainer import SafeTrainer
from hf_attn.recipes.world_model import (
    Transitions,
    binding_accuracy,
    compute_metrics,
    model_equivariance,
    optimizer_of,
    pictures_of,
    rollout_metrics,
    seen_observations,
    separated,
    symbolic_observations,
)
from hf_attn.recipes.world_model_pictures import draw_rollout, nearest_observations

LIBRARY = ObjectLibrary("rush_hour", num_objects=5, num_scene_objects=3)
SCENES = split_scenes(LIBRARY, 4, 3, seed=0)


def observed(which=0, num_episodes=20, num_steps=6, seed=0):
    played = collect(LIBRARY, SCENES[which], num_episodes, num_steps, seed)
    return symbolic_observations(LIBRARY, played, appearance_size=4, seed=seed)


def built(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {
        "num_library_objects": 5,
        "num_scene_objects": 3,
        "slot_size": 6,
        "embedding_dim": 3,
        "transition_hidden": 32,
    }
    return WorldModel(WorldModelConfig(**{**sizes, "encoder": "slots", **fields})).eval()


def known(observations):
    """A world model that binds every object to its slot: appearances are told apart, and the binding is sharp."""
    model = built()
    looks = torch.zeros(5, 4)
    slots, places = observations.slots.flatten(0, 1), observations.places.flatten(0, 1)
    objects = np.repeat(observations.episodes.objects, observations.slots.shape[1], axis=0)
    for k in range(3):
        looks[objects[:, k]] = slots[torch.arange(len(slots)), places[:, k], :4]
    with torch.no_grad():
        model.action_attention.project_k.weight.copy_(torch.eye(5))
        model.action_attention.project_q.weight.zero_()
        model.action_attention.project_q.weight[:, :4] = 100 * torch.linalg.pinv(looks.T)[:, :4]
    return model


def test_symbolic_slots_hold_looks_and_cells_in_random_order():
    data = observed()
    assert data.slots.shape == (20, 7, 4, 6)
    looks = {}
    for e in range(20):
        for t in range(7):
            for k, thing in enumerate(data.episodes.objects[e]):
                slot = data.slots[e, t, data.places[e, t, k]]
                assert torch.equal(slot[4:] * 4, torch.from_numpy(data.episodes.positions[e, t, k]).float())
                assert torch.equal(looks.setdefault(int(thing), slot[:4]), slot[:4])
            rest = set(range(4)) - set(data.places[e, t].tolist())
            assert not data.slots[e, t, rest.pop()].any() and not rest
    assert len(data.places.flatten(0, 1).unique(dim=0)) == 24, "every order occurs"
    assert separated(data) == 1


def test_transitions_are_the_steps_of_the_episodes():
    data = Transitions(observed())
    assert len(data) == 120
    batch = default_data_collator([data[0], *data.__getitems__([7, 119])])
    for i, (e, t) in enumerate([(0, 0), (1, 1), (19, 5)]):
        assert torch.equal(batch["slots"][i], data.observed.slots[e, t])
        assert torch.equal(batch["next_slots"][i], data.observed.slots[e, t + 1])
        number = int(data.observed.episodes.actions[e, t])
        assert batch["actions"][i].nonzero().tolist() == [list(divmod(number, 4))]


@pytest.mark.parametrize(("same", "share"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_negatives_are_of_the_same_objects_as_often_as_asked(same, share):
    torch.manual_seed(0)
    data = Transitions(observed(), same)
    scene = data.scene.repeat(1000)
    drawn = data.negatives(scene)
    equal = data.scene.repeat_interleave(7)[drawn] == scene
    assert equal.double().mean().item() == pytest.approx(share, abs=0.02)
    for kind in (True, False):
        if (equal == kind).any() and share in (0.5,):
            assert len(drawn[equal == kind].unique()) == 140, "every state is drawn"


def test_with_one_scene_negatives_are_of_the_same_objects():
    played = collect(LIBRARY, SCENES[0][:1], 5, 3)
    data = Transitions(symbolic_observations(LIBRARY, played), same=0.0)
    assert data.negatives(torch.zeros(50, dtype=torch.long)).max() < 20


def test_binding_accuracy_counts_the_objects_of_scenes():
    data = observed()
    assert binding_accuracy(known(data), data) == 1
    # each object counts once: with two of three places taken for others, a third is right
    wrong = dataclasses.replace(data, places=data.places.clone())
    wrong.places[..., :2] = data.places[..., :2].flip(-1)
    assert binding_accuracy(known(data), wrong) == pytest.approx(1 / 3)


@pytest.mark.parametrize("hard", [False, True])
def test_rollouts_are_compared_with_the_observation_of_the_same_time(hard):
    """Where nothing moves in the model and in the episode, prediction and target agree: start against start."""
    data = observed()
    model = known(data)
    with torch.no_grad():
        model.transition.node_mlp[-1].weight.zero_()
        model.transition.node_mlp[-1].bias.zero_()
    still = dataclasses.replace(data, slots=data.slots[:, :1].expand(-1, 7, -1, -1).clone())
    assert rollout_metrics(model, still, (1, 6), hard)[6]["mrr"] == 1
    moving = rollout_metrics(model, data, (1, 6), hard)
    assert moving[6]["mrr"] < 1
    if not hard:
        target = model.lift_scene(model.observe(slots=data.slots[:, 6]))
        start = model.lift_scene(model.observe(slots=data.slots[:, 0]))
        assert moving[6]["mrr"] == pytest.approx(ranking_metrics(start, target)[0].item())


def test_the_equivariance_error_tells_the_transitions_apart():
    data = observed()
    assert model_equivariance(built().double(), dataclasses.replace(data, slots=data.slots.double())) < 1e-12
    assert model_equivariance(built(transition="mlp"), data) > 1e-2


def test_the_schedule_is_that_of_the_paper():
    optimizer, schedule = optimizer_of(built(), 1.0, 100, 0.05)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert (rates[39], rates[40], rates[80], rates[99]) == (1, 0.5, 0.25, 0.25)


def test_trainer_trains_and_judges(tmp_path):
    data, others = Transitions(observed(num_episodes=60)), Transitions(observed(1, num_episodes=10))
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=12, per_device_train_batch_size=32, per_device_eval_batch_size=25, report_to="none",
        disable_tqdm=True, save_strategy="no", label_names=["next_slots", "negative_slots"], use_cpu=True,
    )  # fmt: skip
    model = built(transition_hidden=32)
    trainer = SafeTrainer(
        model, arguments, train_dataset=data, eval_dataset=others, compute_metrics=compute_metrics,
        optimizers=optimizer_of(model, 3e-3, 144, 0.05),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert {"eval_mrr", "eval_hits@1", "eval_hits@5", "eval_hits@10"} < set(after)
    with torch.no_grad():
        out = model.eval()(**default_data_collator(others.__getitems__(range(60))))
    expected = ranking_metrics(out.predicted_objects, out.next_objects)[0].item()
    assert after["eval_mrr"] == pytest.approx(expected, abs=1e-3) and expected > before["eval_mrr"]


def test_vision_says_which_slot_shows_an_object():
    """A model whose masks are given: the slot of an object is the one that takes its pixels."""
    torch.manual_seed(0)
    sizes = {"num_library_objects": 5, "num_scene_objects": 3, "slot_size": 6, "encoder_channels": (4, 4, 4)}
    vision = SlotAttentionModel(WorldModelConfig(**sizes)).train()
    played = collect(LIBRARY, SCENES[0], 4, 2)
    pictures = pictures_of(LIBRARY, played)
    assert pictures.shape == (12, 3, 50, 50)
    np.testing.assert_array_equal(
        pictures[4].permute(1, 2, 0), render(LIBRARY, played.objects[1], played.positions[1, 1])
    )
    plain = vision.decode

    def decode(slots):
        # slot k takes column k of the grid, the last one the rest
        columns = (torch.arange(50) // 10).clamp(max=3)
        masks = torch.nn.functional.one_hot(columns, 4).T[None, :, None].expand(len(slots), -1, 50, -1).float()
        return plain(slots)[0], masks

    vision.decode = decode
    data = seen_observations(vision, LIBRARY, played, batch_size=5, progress=False)
    assert data.slots.shape == (4, 3, 4, 6) and vision.training
    np.testing.assert_array_equal(data.places, played.positions[..., 1].clip(max=3))
    assert separated(data) == (np.diff(np.sort(played.positions[..., 1].clip(max=3)), axis=-1) > 0).all(-1).mean()


def test_a_rollout_is_drawn_as_the_nearest_observations(tmp_path):
    data = observed()
    model = known(data)
    with torch.no_grad():
        model.transition.node_mlp[-1].weight.zero_()
        model.transition.node_mlp[-1].bias.zero_()
    # a model in which nothing moves expects the start
    first = (data.episodes.positions == data.episodes.positions[3, 0]).all((2, 3)) & (data.episodes.objects == data.episodes.objects[3]).all(1)[:, None]  # fmt: skip
    assert set(nearest_observations(model, data, 3, 4)) <= set(first.ravel().nonzero()[0])
    draw_rollout({"still": model, "other": built()}, data, tmp_path / "rollout.png", episode=3, num_steps=4)
    assert (tmp_path / "rollout.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Transitions(observed(), 1.5), InvalidOption, "same=1.5"),
        (lambda: rollout_metrics(built(), observed(), (7,)), InvalidOption, "from 1 to 6"),
        (lambda: model_equivariance(built(), observed(), 0), InvalidInput, "num_orders=0"),
        (lambda: nearest_observations(built(), observed(), 20, 1), InvalidInput, "episode=20"),
        (lambda: nearest_observations(built(), observed(), 0, 7), InvalidInput, "num_steps=7"),
    ],
)  # fmt: skip
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
