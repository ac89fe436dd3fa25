"""Pictures of the Object Library: coloured shapes on black, drawn with numpy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hf_attn.errors import InvalidInput
from hf_attn.recipes.object_library import DIRECTIONS, Integers, ObjectLibrary

SHAPES = 7
"""Circle, triangles that point in four directions, square, pentagon."""
RAINBOW = (
    (0.0, 0.03, 0.215, 0.4, 0.586, 0.77, 0.954, 1.0),
    ((1, 0, 0.16), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0.75)),
)
"""Stops of matplotlib's gist_rainbow, and their colours."""
_RADIUS = 0.45
"""Of the circle around a shape, in cells."""


def colors(library: ObjectLibrary) -> NDArray[np.float64]:
    """(N,3) red, green, blue of every object, 0 to 1."""
    pool = library.pool or library.num_objects
    order = np.arange(pool)
    if library.shuffle_colors is not None:
        order = np.random.default_rng(library.shuffle_colors).permutation(pool)
    places = order[list(library.members)] / pool
    stops, values = RAINBOW
    return np.stack([np.interp(places, stops, channel) for channel in zip(*values, strict=True)], axis=-1)


def masks(library: ObjectLibrary, cell_size: int = 10) -> NDArray[np.bool_]:
    """(N,cell,cell): the pixels of each object within its cell.

    A triangle points where action 0 takes a Rush Hour object of that orientation: up, left, down or right.
    """
    if cell_size < 3:
        raise InvalidInput(f"cell_size={cell_size} must be at least 3 pixels, or shapes look alike.")
    centre = (np.arange(cell_size) + 0.5) / cell_size - 0.5
    pixels = np.stack(np.meshgrid(centre, centre, indexing="ij"), axis=-1)
    shapes = [_shape(library.kind, member, pixels) for member in library.members]
    return np.stack(shapes)


def render(library: ObjectLibrary, objects: Integers, positions: Integers, cell_size: int = 10) -> NDArray[np.float32]:
    """(..., side, side, 3) pictures from 0 to 1, side = grid_size * cell_size, of objects (...,K) at cells (...,K,2).

    Leading axes of `objects` and `positions` broadcast.

    Raises:
        InvalidInput: wrong shapes, or objects or cells out of range.
    """
    objects, positions = np.asarray(objects), np.asarray(positions)
    if positions.ndim < 2 or positions.shape[-1] != 2:
        raise InvalidInput(f"positions {positions.shape} must be (...,K,2).")
    shape = np.broadcast_shapes(objects.shape, positions.shape[:-1])
    objects, positions = np.broadcast_to(objects, shape), np.broadcast_to(positions, (*shape, 2))
    for name, value, limit in (("objects", objects, library.num_objects), ("positions", positions, library.grid_size)):
        if value.size and not 0 <= value.min() <= value.max() < limit:
            raise InvalidInput(f"{name} must be numbers from 0 to {limit - 1}.")
    stamps = (masks(library, cell_size)[..., None] * colors(library)[:, None, None]).astype(np.float32)
    batch, side = math.prod(shape[:-1]), library.grid_size
    canvas = np.zeros((batch, side, side, cell_size, cell_size, 3), dtype=np.float32)
    scene = np.repeat(np.arange(batch), shape[-1])
    row, column = positions.reshape(-1, 2).T
    canvas[scene, row, column] = stamps[objects.reshape(-1)]
    pictures = canvas.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * cell_size, side * cell_size, 3)
    return pictures.reshape(*shape[:-1], *pictures.shape[1:])


def _shape(kind: str, member: int, pixels: NDArray[np.float64]) -> NDArray[np.bool_]:
    number = member % SHAPES
    if kind == "rush_hour":
        return _triangle(member % 4, pixels)
    if number == 0:
        return np.hypot(pixels[..., 0], pixels[..., 1]) <= _RADIUS
    if number <= 4:
        return _triangle(number - 1, pixels)
    if number == 5:
        return np.abs(pixels).max(-1) <= _RADIUS * 0.8
    return _polygon(5, (-1.0, 0.0), pixels)


def _triangle(orientation: int, pixels: NDArray[np.float64]) -> NDArray[np.bool_]:
    row, column = DIRECTIONS[-orientation % 4]
    return _polygon(3, (float(row), float(column)), pixels)


def _polygon(corners: int, towards: tuple[float, float], pixels: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A regular polygon with one corner in the direction `towards` (row, column)."""
    angles = math.atan2(*towards) + 2 * math.pi * (np.arange(corners) + 0.5) / corners
    # inside is within the distance of the sides along all their normals
    normals = np.stack([np.sin(angles), np.cos(angles)])
    return (pixels @ normals).max(-1) <= _RADIUS * math.cos(math.pi / corners)
