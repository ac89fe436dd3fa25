"""The Object Library: small worlds that show K of N objects on a grid, for object-oriented world models.

Paper: Zhao, Kong, Walters, Wong, "Toward Compositional Generalization in Object-Oriented World Modeling", ICML 2022
(arXiv 2204.13661).

Two instances. In "shapes" an action is a direction of the grid; in "rush_hour" it is relative to the orientation of the
object, so what an action does depends on which object acts. A move off the grid or into an occupied cell does nothing.

    library = ObjectLibrary("shapes", num_objects=10, num_scene_objects=5)
    train, unseen = split_scenes(library, num_train=100, num_unseen=1, seed=0)
    episodes = collect(library, train, num_episodes=1000, num_steps=10, seed=0)
    pictures = render(library, episodes.objects[:, None], episodes.positions)        # hf_attn.recipes.object_pictures

Shapes: E episodes, T steps, K objects of a scene, N of the library. Cells are (row, column), row 0 on top. Everything random
comes from the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_attn.errors import InvalidInput, InvalidOption

KINDS = ("shapes", "rush_hour")
DIRECTIONS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Up, right, down, left, as (rows, columns)."""
NUM_ACTIONS = len(DIRECTIONS)
FILTERED = 0.9
"""Share of steps whose action is drawn among those that move something."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ObjectLibrary:
    """Which objects there are, and how they look and move.

    Attributes:
        kind: "shapes" or "rush_hour".
        num_objects: N.
        num_scene_objects: K, objects in a scene.
        grid_size: cells along a side.
        members: what each of the N objects is, as numbers in a pool of `pool` objects; empty: the first N of N. Shape,
            orientation and colour follow from the number. See `cascade`.
        pool: number of objects that colours are spread over; None: N.
        shuffle_colors: seed of a permutation of the colours; None: in order.

    Raises:
        InvalidOption: a value outside its rule.
    """

    kind: str = "shapes"
    num_objects: int = 10
    num_scene_objects: int = 5
    grid_size: int = 5
    members: tuple[int, ...] = ()
    pool: int | None = None
    shuffle_colors: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidOption(f"ObjectLibrary: kind={self.kind!r} must be one of {', '.join(KINDS)}.")
        if not 1 <= self.num_scene_objects <= self.num_objects:
            raise InvalidOption(
                f"ObjectLibrary: num_scene_objects={self.num_scene_objects} must be from 1 to "
                f"num_objects={self.num_objects}."
            )
        if self.num_scene_objects >= self.grid_size**2:
            raise InvalidOption(
                f"ObjectLibrary: num_scene_objects={self.num_scene_objects} must leave one of the {self.grid_size**2} "
                "cells free, or nothing can move. Take a larger grid_size."
            )
        members = self.members or tuple(range(self.num_objects))
        pool = self.num_objects if self.pool is None else self.pool
        if len(members) != self.num_objects or len(set(members)) < len(members):
            raise InvalidOption(f"ObjectLibrary: members={members} must be num_objects={self.num_objects} numbers.")
        if not all(0 <= member < pool for member in members):
            raise InvalidOption(f"ObjectLibrary: members={members} must be numbers from 0 to pool - 1 = {pool - 1}.")
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "pool", pool)

    @classmethod
    def cascade(
        cls, kind: str, num_objects: int, num_scene_objects: int = 5, pool: int = 50, seed: int = 0, grid_size: int = 5
    ) -> ObjectLibrary:
        """A library of random members of one pool, so that one vision model serves libraries of every size."""
        if not 1 <= num_objects <= pool:
            raise InvalidOption(f"ObjectLibrary.cascade: num_objects={num_objects} must be from 1 to pool={pool}.")
        drawn = np.random.default_rng(seed).permutation(pool)[:num_objects]
        members = tuple(sorted(int(member) for member in drawn))
        return cls(kind, num_objects, num_scene_objects, grid_size, members, pool)

    def directions(self) -> Integers:
        """(N,4): the direction that each action of each object takes, a row of `DIRECTIONS`."""
        turn = np.array(self.members)[:, None] % 4 if self.kind == "rush_hour" else 0
        return np.broadcast_to((np.arange(NUM_ACTIONS) - turn) % 4, (self.num_objects, NUM_ACTIONS))


@dataclass(frozen=True)
class Episodes:
    """What happened in E episodes of T steps.

    Attributes:
        objects: (E,K) the objects of each scene, ascending.
        positions: (E,T+1,K,2) their cells.
        actions: (E,T) the action as it is stored: 4 * object + action of the object.
        moved: (E,T) whether it changed anything.
    """

    objects: Integers
    positions: Integers
    actions: Integers
    moved: NDArray[np.bool_]


def targets(library: ObjectLibrary, objects: Integers, positions: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """The cell that each action leads to, and whether it is free: (E,K,4,2) and (E,K,4), for objects (E,K).

    Raises:
        InvalidInput: wrong shapes, or objects that the library lacks.
    """
    if objects.ndim != 2 or positions.shape != (*objects.shape, 2):
        raise InvalidInput(f"positions {positions.shape} must be (E,K,2) for objects {objects.shape}, which are (E,K).")
    if objects.size and not 0 <= objects.min() <= objects.max() < library.num_objects:
        raise InvalidInput(f"objects must be numbers from 0 to num_objects - 1 = {library.num_objects - 1}.")
    cells = positions[:, :, None] + DIRECTIONS[library.directions()[objects]]
    inside = ((cells >= 0) & (cells < library.grid_size)).all(-1)
    taken = (cells[:, :, :, None] == positions[:, None, None]).all(-1).any(-1)
    return cells, inside & ~taken


def step(
    library: ObjectLibrary, objects: Integers, positions: Integers, acting: Integers, action: Integers
) -> tuple[Integers, NDArray[np.bool_]]:
    """Positions (E,K,2) after an action in each scene, and whether it moved anything (E).

    Args:
        library: the rules.
        objects, positions: (E,K) and (E,K,2).
        acting: (E) which of the K objects acts.
        action: (E) its action, 0 to 3.

    Raises:
        InvalidInput: wrong shapes, or numbers out of range.
    """
    cells, free = targets(library, objects, positions)
    for name, value, limit in (("acting", acting, objects.shape[1]), ("action", action, NUM_ACTIONS)):
        if value.shape != (len(objects),) or (value.size and not 0 <= value.min() <= value.max() < limit):
            raise InvalidInput(f"{name} must be {len(objects)} numbers from 0 to {limit - 1}.")
    rows = np.arange(len(objects))
    moved = free[rows, acting, action]
    after = positions.copy()
    after[rows[moved], acting[moved]] = cells[rows, acting, action][moved]
    return after, moved


def split_scenes(library: ObjectLibrary, num_train: int, num_unseen: int, seed: int = 0) -> tuple[Integers, Integers]:
    """Different random scenes (n,K), ascending objects: those to train on, which together show every object, and unseen ones.

    The training scenes cover the library by construction (the paper draws again until they do).

    Raises:
        InvalidOption: there are not as many scenes, or too few to train on to show every object.
    """
    size, count = library.num_scene_objects, library.num_objects
    if num_train < 1 or num_unseen < 0 or num_train + num_unseen > math.comb(count, size):
        raise InvalidOption(
            f"split_scenes: num_train={num_train} and num_unseen={num_unseen} must be at least 1 and 0, and together at "
            f"most {math.comb(count, size)}: {count} objects have no more subsets of {size}."
        )
    if num_train * size < count:
        raise InvalidOption(
            f"split_scenes: num_train={num_train} scenes of {size} cannot show {count} objects; take at least "
            f"{-(-count // size)}."
        )
    rng = np.random.default_rng(seed)
    # the first scenes cover a random order of the objects; the rest are any others
    order = rng.permutation(count)
    cover = [order[i : i + size] for i in range(0, count, size)]
    cover[-1] = np.concatenate([cover[-1], rng.permutation(order[: count - len(cover[-1])])[: size - len(cover[-1])]])
    chosen = {tuple(sorted(scene.tolist())): None for scene in cover}
    while len(chosen) < num_train + num_unseen:
        chosen.setdefault(tuple(sorted(rng.choice(count, size, replace=False).tolist())))
    scenes = np.array(list(chosen), dtype=np.int64)
    return scenes[:num_train], scenes[num_train:]


def collect(
    library: ObjectLibrary,
    scenes: Integers | Sequence[Sequence[int]],
    num_episodes: int,
    num_steps: int,
    seed: int = 0,
    filtered: bool = True,
) -> Episodes:
    """Episodes of random scenes, random starts and random actions.

    Args:
        library: the rules.
        scenes: (n,K) scenes to draw from.
        num_episodes, num_steps: E and T.
        seed: of everything drawn.
        filtered: with probability 0.9, an action is drawn among those that move something.

    Raises:
        InvalidInput: no scenes, episodes or steps.
    """
    scenes = np.asarray(scenes, dtype=np.int64)
    if scenes.ndim != 2 or not len(scenes) or scenes.shape[1] != library.num_scene_objects:
        raise InvalidInput(f"scenes {scenes.shape} must be (n, {library.num_scene_objects}), with n of at least 1.")
    if num_episodes < 1 or num_steps < 1:
        raise InvalidInput(f"num_episodes={num_episodes} and num_steps={num_steps} must be at least 1.")
    rng = np.random.default_rng(seed)
    objects = scenes[rng.integers(len(scenes), size=num_episodes)]
    cells = rng.random((num_episodes, library.grid_size**2)).argsort(1)[:, : library.num_scene_objects]
    positions = np.empty((num_episodes, num_steps + 1, library.num_scene_objects, 2), dtype=np.int64)
    positions[:, 0] = np.stack(np.divmod(cells, library.grid_size), axis=-1)
    actions, moved = np.empty((num_episodes, num_steps), dtype=np.int64), np.empty((num_episodes, num_steps), bool)
    for t in range(num_steps):
        free = targets(library, objects, positions[:, t])[1].reshape(num_episodes, -1)
        # drawing among free moves is what drawing again until something moves comes to
        anything = rng.random(num_episodes) >= (FILTERED if filtered else 0.0)
        ticket = np.where(free | anything[:, None], rng.random(free.shape), -1.0).argmax(1)
        acting, action = np.divmod(ticket, NUM_ACTIONS)
        positions[:, t + 1], moved[:, t] = step(library, objects, positions[:, t], acting, action)
        actions[:, t] = objects[np.arange(num_episodes), acting] * NUM_ACTIONS + action
    return Episodes(objects, positions, actions, moved)
