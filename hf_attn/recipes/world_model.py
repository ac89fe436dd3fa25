"""Train and judge object-oriented world models (`hf_attn.models.world_model`) on the Object Library.

Paper: Zhao, Kong, Walters, Wong, ICML 2022 (arXiv 2204.13661).

    observed = symbolic_observations(library, episodes)      # or seen_observations(vision, library, episodes)
    trainer = SafeTrainer(model, arguments, train_dataset=Transitions(observed), optimizers=optimizer_of(...))
    trainer.train()
    rollout_metrics(model, observed_elsewhere)               # Hits@k and MRR after 1 to 10 steps

Shapes: E episodes of T steps, K' slots of size S, K objects of a scene, N of the library, D state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.world_model import (
    SlotAttentionModel,
    WorldModel,
    action_rows,
    equivariance_error,
    ranking_metrics,
)
from hf_attn.recipes.object_library import NUM_ACTIONS, Episodes, ObjectLibrary
from hf_attn.recipes.object_pictures import masks, render

STEPS = (1, 2, 3, 5, 10)
KS = (1, 5, 10)


@dataclass(frozen=True)
class Observations:
    """Episodes as a world model sees them.

    Attributes:
        library: whose objects they show.
        episodes: what happened.
        slots: (E,T+1,K',S).
        places: (E,T+1,K) int64, the slot that holds each object of the scene.
    """

    library: ObjectLibrary
    episodes: Episodes
    slots: Tensor
    places: Tensor


def symbolic_observations(
    library: ObjectLibrary, episodes: Episodes, appearance_size: int = 8, appearance_seed: int = 0, seed: int = 0
) -> Observations:
    """Slots without vision: each object's appearance and cell, and an empty slot, in a random order at every step.

    Args:
        library, episodes: what to observe.
        appearance_size: length of the random vector that stands for an object's looks; S is 2 more.
        appearance_seed: of these vectors: the same for all episodes of one library.
        seed: of the orders.
    """
    count, time, size, _ = episodes.positions.shape
    looks = np.random.default_rng(appearance_seed).standard_normal((library.num_objects, appearance_size))
    slots = np.zeros((count, time, size + 1, appearance_size + 2))
    slots[:, :, :size, :appearance_size] = looks[episodes.objects][:, None]
    slots[:, :, :size, appearance_size:] = episodes.positions / max(library.grid_size - 1, 1)
    order = np.random.default_rng(seed).random((count, time, size + 1)).argsort(-1)
    slots = np.take_along_axis(slots, order[..., None], axis=2)
    places = order.argsort(-1)[..., :size]
    return Observations(library, episodes, torch.from_numpy(slots).float(), torch.from_numpy(places))


def pictures_of(library: ObjectLibrary, episodes: Episodes, cell_size: int = 10) -> Tensor:
    """(E*(T+1),3,side,side) float32 pictures from 0 to 1, episode by episode."""
    pictures = render(library, episodes.objects[:, None], episodes.positions, cell_size)
    return torch.from_numpy(pictures).flatten(0, 1).permute(0, 3, 1, 2)


@torch.no_grad()
def seen_observations(
    vision: SlotAttentionModel, library: ObjectLibrary, episodes: Episodes, batch_size: int = 256, progress: bool = True
) -> Observations:
    """Slots of a trained vision model; an object is in the slot that takes most of its pixels.

    Raises:
        InvalidOption: the model takes pictures of another size.
    """
    side = vision.config.image_size
    if side % library.grid_size:
        raise InvalidOption(f"image_size={side} of the model must be a multiple of grid_size={library.grid_size}.")
    cell = side // library.grid_size
    pictures = pictures_of(library, episodes, cell)
    stamps = torch.from_numpy(masks(library, cell)).float()
    objects = torch.from_numpy(np.repeat(episodes.objects, episodes.positions.shape[1], axis=0))
    cells = torch.from_numpy(episodes.positions).flatten(0, 1)
    slots, places = [], []
    was_training = vision.training
    vision.eval()
    for rows in tqdm(torch.arange(len(pictures)).split(batch_size), desc="slots", disable=not progress):
        out = vision(pictures[rows].to(vision.device))
        grid = library.grid_size
        # (b,K',rows,columns,cell,cell), then those of each object's cell: (b,K,K',cell,cell)
        blocks = out.masks.float().cpu().unflatten(3, (grid, cell)).unflatten(2, (grid, cell)).transpose(3, 4)
        index = torch.arange(len(rows))[:, None]
        own = blocks[index, :, cells[rows, :, 0], cells[rows, :, 1]]
        places.append((own * stamps[objects[rows]][:, :, None]).sum((3, 4)).argmax(-1))
        slots.append(out.slots.float().cpu())
    vision.train(was_training)
    shape = episodes.positions.shape[:2]
    return Observations(library, episodes, torch.cat(slots).unflatten(0, shape), torch.cat(places).unflatten(0, shape))


class Transitions(Dataset):
    """Every step of the episodes, with a negative: half of the time a state of the same objects, else of others.

    An item has slots, next_slots, negative_slots (K',S) and actions (N,4). Negatives are drawn anew by torch's global generator,
    which Trainer seeds and restores.

    Args:
        observed: the observations.
        same: share of negatives with the same objects.
    """

    def __init__(self, observed: Observations, same: float = 0.5):
        if not 0 <= same <= 1:
            raise InvalidOption(f"Transitions: same={same} must be from 0 to 1.")
        self.observed, self.same = observed, same
        self.steps = observed.episodes.actions.shape[1]
        self.slots = observed.slots.flatten(0, 1)
        scene = np.unique(observed.episodes.objects, axis=0, return_inverse=True)[1].reshape(-1)
        self.scene = torch.from_numpy(scene)
        # states in the order of their scenes: those of one scene are a range
        self.order = self.scene.repeat_interleave(self.steps + 1).argsort(stable=True)
        self.counts = self.scene.bincount() * (self.steps + 1)
        self.starts = self.counts.cumsum(0) - self.counts

    def __len__(self) -> int:
        return self.observed.episodes.actions.size

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several items at once, as DataLoader asks for them."""
        episode, step = np.divmod(np.asarray(rows), self.steps)
        state = torch.from_numpy(episode * (self.steps + 1) + step)
        actions = torch.from_numpy(self.observed.episodes.actions[episode, step])
        columns = {
            "slots": self.slots[state],
            "next_slots": self.slots[state + 1],
            "negative_slots": self.slots[self.negatives(self.scene[torch.from_numpy(episode)])],
            "actions": action_rows(actions, self.observed.library.num_objects, NUM_ACTIONS),
        }
        return [dict(zip(columns, item, strict=True)) for item in zip(*columns.values(), strict=True)]

    def negatives(self, scene: Tensor) -> Tensor:
        """A random state for each of the scenes (B)."""
        start, count, total = self.starts[scene], self.counts[scene], len(self.order)
        same = (torch.rand(len(scene)) < self.same) | (count == total)
        draw = torch.rand(len(scene), dtype=torch.float64)
        within = start + (draw * count).long()
        beyond = (draw * (total - count)).long()
        return self.order[torch.where(same, within, beyond + count * (beyond >= start))]


def optimizer_of(model: torch.nn.Module, learning_rate: float, steps: int, warmup: float) -> tuple[Any, Any]:
    """Adam, and the paper's schedule: a linear start over the share `warmup` of the steps; half after each 40 % of them."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    start, period = max(round(warmup * steps), 1), max(round(0.4 * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / start, 1.0) * 0.5 ** (step // period)
    )
    return optimizer, schedule


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`mrr` and `hits@k` of one step, for Trainer (label_names=["next_slots", "negative_slots"])."""
    predicted, target = (torch.as_tensor(p) for p in prediction.predictions[:2])
    return _metrics(predicted, target)


@torch.no_grad()
def rollout_metrics(
    model: WorldModel, observed: Observations, steps: Sequence[int] = STEPS, hard: bool = False
) -> dict[int, dict[str, float]]:
    """`mrr` and `hits@k` of predictions after so many steps from the start of each episode, among those of all episodes.

    Args:
        model: the world model.
        observed: episodes.
        steps: numbers of steps, at most T.
        hard: bind each object to one slot alone.

    Raises:
        InvalidOption: steps outside the episodes.
    """
    longest = observed.episodes.actions.shape[1]
    if not steps or not 1 <= min(steps) <= max(steps) <= longest:
        raise InvalidOption(f"rollout_metrics: steps={tuple(steps)} must be from 1 to {longest}, the episodes' length.")
    slots = observed.slots.to(model.device)
    actions = torch.from_numpy(observed.episodes.actions[:, : max(steps)])
    rows = action_rows(actions, observed.library.num_objects, NUM_ACTIONS).to(model.device)
    objects: Any = model.predict(slots=slots[:, 0], actions=rows, hard=hard).predicted_objects
    found = {}
    for number in steps:
        scene = model.observe(slots=slots[:, number])
        found[number] = _metrics(objects[:, number - 1], model.lift_scene(scene, hard))
    return found


@torch.no_grad()
def binding_accuracy(model: WorldModel, observed: Observations) -> float:
    """Share of the objects of scenes whose largest binding is to the slot that holds them."""
    binding = model.observe(slots=observed.slots.flatten(0, 1).to(model.device)).binding.cpu()
    objects = torch.from_numpy(np.repeat(observed.episodes.objects, observed.slots.shape[1], axis=0))
    chosen = binding.argmax(-1).gather(1, objects)
    return (chosen == observed.places.flatten(0, 1)).double().mean().item()


def separated(observed: Observations) -> float:
    """Share of the observations that have every object in a slot of its own."""
    return (observed.places.sort(-1).values.diff(dim=-1) > 0).all(-1).double().mean().item()


@torch.no_grad()
def model_equivariance(model: WorldModel, observed: Observations, num_orders: int = 16, seed: int = 0) -> float:
    """The largest equivariance error of the transition over random orders of the slots, on the first observations."""
    if num_orders < 1:
        raise InvalidInput(f"num_orders={num_orders} must be at least 1.")
    scene = model.observe(slots=observed.slots[:, 0].to(model.device))
    actions = torch.from_numpy(observed.episodes.actions[:, 0])
    rows = action_rows(actions, observed.library.num_objects, NUM_ACTIONS).to(scene.states)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(num_orders, scene.slots.shape[1], generator=generator).argsort(1).to(model.device)
    return equivariance_error(model.transition, scene.states, model.action_attention(scene.binding, rows), orders)[
        0
    ].item()


def _metrics(predicted: Tensor, target: Tensor) -> dict[str, float]:
    mrr, hits = ranking_metrics(predicted, target, KS)
    return {"mrr": mrr.item(), **{f"hits@{k}": hit for k, hit in zip(KS, hits.tolist(), strict=True)}}
