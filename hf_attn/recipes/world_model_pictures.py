"""A picture of what a world model expects: its predictions, as the observations that come nearest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_attn.errors import InvalidInput
from hf_attn.models.world_model import WorldModel, action_rows
from hf_attn.recipes.object_library import NUM_ACTIONS
from hf_attn.recipes.object_pictures import render
from hf_attn.recipes.world_model import Observations


@torch.no_grad()
def nearest_observations(model: WorldModel, observed: Observations, episode: int, num_steps: int) -> np.ndarray:
    """(T) the observations, numbered episode by episode, whose lifted states come nearest to the predictions.

    Args:
        model: predicts `num_steps` steps from the start of an episode.
        observed: the episodes; all their observations are candidates.
        episode: which one.
        num_steps: T.

    Raises:
        InvalidInput: there is no such episode, or it is shorter.
    """
    played = observed.episodes
    if not 0 <= episode < len(played.objects) or not 1 <= num_steps <= played.actions.shape[1]:
        raise InvalidInput(
            f"episode={episode} and num_steps={num_steps} must be below {len(played.objects)}, and from 1 to "
            f"{played.actions.shape[1]}."
        )
    slots = observed.slots.to(model.device)
    actions = torch.from_numpy(played.actions[episode, None, :num_steps])
    rows = action_rows(actions, observed.library.num_objects, NUM_ACTIONS).to(model.device)
    predicted: Any = model.predict(slots=slots[episode, None, 0], actions=rows).predicted_objects
    candidates = model.lift_scene(model.observe(slots=slots.flatten(0, 1)))
    return torch.cdist(predicted[0].flatten(1), candidates.flatten(1)).argmin(1).cpu().numpy()


def draw_rollout(
    models: Mapping[str, WorldModel],
    observed: Observations,
    path: str | os.PathLike[str],
    episode: int = 0,
    num_steps: int = 6,
) -> None:
    """Save a picture: what happened, and below it what each model expects after the first observation.

    An expectation is shown as the observation that comes nearest; its frame is green where it is what happened.

    Args:
        models: title -> model.
        observed: the episodes.
        path: of the PNG.
        episode, num_steps: what to show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    played, time = observed.episodes, observed.episodes.positions.shape[1]
    figure = Figure(figsize=(1.3 * (num_steps + 1), 1.5 * (len(models) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(models) + 1, num_steps + 1, squeeze=False)
    truth = render(observed.library, played.objects[episode], played.positions[episode, : num_steps + 1])
    for t, axis in enumerate(axes[0]):
        axis.imshow(truth[t])
        axis.set_title("start" if t == 0 else _words(observed, episode, t - 1), fontsize=8)
    for row, (title, model) in zip(axes[1:], models.items(), strict=True):
        row[0].set_visible(False)
        row[1].set_ylabel(title, fontsize=8)
        for t, number in enumerate(nearest_observations(model, observed, episode, num_steps)):
            other, when = divmod(int(number), time)
            found = render(observed.library, played.objects[other], played.positions[other, when])
            row[t + 1].imshow(found)
            right = bool((found == truth[t + 1]).all())
            for spine in row[t + 1].spines.values():
                spine.set(color="tab:green" if right else "tab:red", linewidth=3)
    axes[0, 0].set_ylabel("what happened", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def _words(observed: Observations, episode: int, step: int) -> str:
    played = observed.episodes
    thing, action = divmod(int(played.actions[episode, step]), NUM_ACTIONS)
    way = ("up", "right", "down", "left")[observed.library.directions()[thing, action]]
    return f"{thing} {way}" + ("" if played.moved[episode, step] else " (blocked)")
