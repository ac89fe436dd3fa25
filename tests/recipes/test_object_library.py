"""The Object Library: its rules, its scenes, its pictures, and what it refuses."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.object_library import DIRECTIONS, ObjectLibrary, collect, split_scenes, step, targets
from hf_attn.recipes.object_pictures import colors, masks, render

KINDS = pytest.mark.parametrize("kind", ["shapes", "rush_hour"])


def library(kind="shapes", **fields):
    return ObjectLibrary(**{"kind": kind, "num_objects": 8, "num_scene_objects": 4, **fields})


def episodes(kind="shapes", seed=0, **settings):
    made = library(kind)
    scenes, _ = split_scenes(made, 10, 0, seed=1)
    return made, collect(made, scenes, **{"num_episodes": 40, "num_steps": 12, "seed": seed, **settings})


def plain_step(made, objects, positions, acting, action):
    """One scene, as the rules are told."""
    turn = made.members[objects[acting]] % 4 if made.kind == "rush_hour" else 0
    row, column = (
        positions[acting][0] + DIRECTIONS[(action - turn) % 4][0],
        positions[acting][1] + DIRECTIONS[(action - turn) % 4][1],
    )
    inside = 0 <= row < made.grid_size and 0 <= column < made.grid_size
    if not inside or (row, column) in {tuple(cell) for cell in positions.tolist()}:
        return positions, False
    after = positions.copy()
    after[acting] = row, column
    return after, True


@KINDS
def test_09_steps_follow_the_rules_and_blocked_moves_leave_the_state(kind):
    made, played = episodes(kind, filtered=False)
    for e in range(len(played.objects)):
        for t in range(played.actions.shape[1]):
            thing, action = divmod(int(played.actions[e, t]), 4)
            acting = played.objects[e].tolist().index(thing)
            expected, moved = plain_step(made, played.objects[e], played.positions[e, t], acting, action)
            np.testing.assert_array_equal(played.positions[e, t + 1], expected)
            assert played.moved[e, t] == moved
            assert moved == bool((played.positions[e, t + 1] != played.positions[e, t]).any())
    assert 0.2 < played.moved.mean() < 0.8, "both kinds of moves occurred"


def test_09_actions_are_relative_in_rush_hour_and_absolute_in_shapes():
    np.testing.assert_array_equal(library("shapes").directions(), np.tile([0, 1, 2, 3], (8, 1)))
    relative = library("rush_hour").directions()
    for number in range(8):
        assert relative[number].tolist() == np.roll([0, 1, 2, 3], number % 4).tolist()


@pytest.mark.parametrize(("cell", "action"), [((0, 2), 0), ((2, 4), 1), ((4, 2), 2), ((2, 0), 3)])
def test_09_nothing_leaves_the_grid(cell, action):
    made, objects, start = library(num_scene_objects=1), np.array([[0]]), np.array([[cell]])
    after, moved = step(made, objects, start, np.array([0]), np.array([action]))
    assert not moved[0] and (after == start).all()
    assert step(made, objects, start, np.array([0]), np.array([(action + 2) % 4]))[1][0]


def test_objects_never_share_a_cell():
    _, played = episodes(num_steps=30)
    cells = played.positions[..., 0] * 5 + played.positions[..., 1]
    assert (np.diff(np.sort(cells, axis=-1), axis=-1) > 0).all()
    assert played.positions.min() >= 0 and played.positions.max() < 5


def test_filtered_actions_move_something_nine_times_in_ten_and_more():
    share, usual = (episodes(num_episodes=500, filtered=flag)[1].moved.mean() for flag in (True, False))
    assert share == pytest.approx(0.9 + 0.1 * usual, abs=0.02)


def test_in_a_crowd_the_only_free_moves_are_found():
    made = ObjectLibrary(num_objects=8, num_scene_objects=8, grid_size=3)
    played = collect(made, [range(8)], num_episodes=200, num_steps=5)
    assert targets(made, played.objects, played.positions[:, 0])[1].reshape(200, -1).any(1).all()
    assert played.moved.mean() > 0.85


def test_equal_seeds_are_equal_and_others_are_not():
    first, again, other = (episodes(seed=seed)[1] for seed in (3, 3, 4))
    for name in ("objects", "positions", "actions", "moved"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.actions != other.actions).any()
    made = library()
    np.testing.assert_array_equal(split_scenes(made, 9, 9, 5)[0], split_scenes(made, 9, 9, 5)[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_train", [2, 3, 20])
def test_scenes_are_disjoint_sorted_and_show_every_object(seed, num_train):
    train, unseen = split_scenes(library(), num_train, 40, seed)
    assert len(train) == num_train and len(unseen) == 40
    together = [tuple(scene) for scene in (*train.tolist(), *unseen.tolist())]
    assert len(set(together)) == len(together)
    assert all(list(scene) == sorted(set(scene)) for scene in together)
    assert set(train.ravel().tolist()) == set(range(8))


def test_every_scene_can_be_asked_for():
    train, unseen = split_scenes(library(num_objects=6, num_scene_objects=3), 8, math.comb(6, 3) - 8)
    assert len(train) + len(unseen) == 20


def test_a_cascade_keeps_looks_and_moves_of_the_pool():
    pool = ObjectLibrary("rush_hour", 50, 5)
    made = ObjectLibrary.cascade("rush_hour", 10, pool=50, seed=2)
    members = list(made.members)
    assert len(set(members)) == 10 and members != list(range(10))
    np.testing.assert_array_equal(made.directions(), pool.directions()[members])
    np.testing.assert_array_equal(colors(made), colors(pool)[members])
    np.testing.assert_array_equal(masks(made), masks(pool)[members])


def test_colours_are_those_of_gist_rainbow():
    expected = matplotlib.colormaps["gist_rainbow"](np.arange(40) / 40)[:, :3]
    # matplotlib looks colours up in a table of 256
    np.testing.assert_allclose(colors(ObjectLibrary(num_objects=40)), expected, atol=0.03)
    shuffled = colors(ObjectLibrary(num_objects=40, shuffle_colors=1))
    assert (shuffled != colors(ObjectLibrary(num_objects=40))).any()
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(colors(ObjectLibrary(num_objects=40)), axis=0))


def test_shapes_differ_and_repeat_every_seven():
    found = masks(ObjectLibrary(num_objects=14))
    for i in range(14):
        for j in range(i):
            assert (found[i] == found[j]).all() == (i - j == 7)
    assert (found.reshape(14, -1).mean(1) > 0.15).all()


def test_triangles_point_where_action_0_leads():
    made = ObjectLibrary("rush_hour", num_objects=4, num_scene_objects=1)
    rows = np.linspace(-1, 1, 10)
    for mask, direction in zip(masks(made), made.directions()[:, 0], strict=True):
        centre = np.array([(mask.sum(1) * rows).sum(), (mask.sum(0) * rows).sum()]) / mask.sum()
        # the tip is far from the middle and thin: most of a triangle lies behind, its longest reach before
        along = np.argwhere(mask) - 4.5
        reach = along @ DIRECTIONS[direction]
        assert reach.max() > -reach.min()
        assert abs(centre @ DIRECTIONS[direction][::-1]) < 1e-9, "it is symmetric about its direction"


def test_a_picture_has_each_object_in_its_cell_and_nothing_else():
    made, played = episodes()
    pictures = render(made, played.objects[:, None], played.positions)
    assert pictures.shape == (40, 13, 50, 50, 3) and pictures.dtype == np.float32
    assert pictures.min() == 0 and pictures.max() <= 1
    picture, cells = pictures[7, 5].copy(), played.positions[7, 5]
    for thing, (row, column) in zip(played.objects[7], cells, strict=True):
        block = picture[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
        np.testing.assert_array_equal(block.any(-1), masks(made)[thing])
        np.testing.assert_allclose(block.reshape(-1, 3).max(0), colors(made)[thing], rtol=1e-6)
        block[:] = 0
    assert not picture.any()


def test_moves_change_two_cells_of_a_picture():
    made, played = episodes()
    pictures = render(made, played.objects[:, None], played.positions)
    changed = (pictures[:, 1:] != pictures[:, :-1]).any(-1).reshape(40, 12, 5, 10, 5, 10).any((3, 5)).sum((2, 3))
    np.testing.assert_array_equal(changed, 2 * played.moved)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ObjectLibrary("cubes"), InvalidOption, "kind='cubes'"),
        (lambda: library(num_scene_objects=9), InvalidOption, "num_scene_objects=9"),
        (lambda: library(grid_size=2), InvalidOption, "grid_size"),
        (lambda: library(members=(0, 1)), InvalidOption, "members"),
        (lambda: library(members=tuple(range(1, 9))), InvalidOption, "pool - 1 = 7"),
        (lambda: ObjectLibrary.cascade("shapes", 51), InvalidOption, "num_objects=51"),
        (lambda: split_scenes(library(), 60, 11), InvalidOption, "at most 70"),
        (lambda: split_scenes(library(), 1, 0), InvalidOption, "cannot show 8 objects"),
        (lambda: collect(library(), [[0, 1]], 1, 1), InvalidInput, "scenes"),
        (lambda: collect(library(), [[0, 1, 2, 8]], 1, 1), InvalidInput, "objects"),
        (lambda: collect(library(), [[0, 1, 2, 3]], 1, 0), InvalidInput, "num_steps=0"),
        (lambda: step(library(), np.array([[0]]), np.zeros((1, 1, 2), int), np.array([0]), np.array([4])), InvalidInput, "action"),
        (lambda: step(library(), np.array([[0]]), np.zeros((1, 2, 2), int), np.array([0]), np.array([0])), InvalidInput, "positions"),
        (lambda: render(library(), np.array([0]), np.array([[5, 0]])), InvalidInput, "positions"),
        (lambda: masks(library(), 2), InvalidInput, "cell_size=2"),
    ],
)  # fmt: skip
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
