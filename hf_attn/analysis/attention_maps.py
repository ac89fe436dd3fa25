"""Pictures of what a mechanism attends to: its implied weights on a small input, the same for every mechanism.

    draw(patterns("ripple"), "ripple.png")

The input is smooth and random: tokens that stand near each other are alike, on the grid where the mechanism uses one.
A mechanism that looks at content alone sees that as a soft band around the diagonal; what it adds shows against it.
Parameters are drawn, not trained.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn import get_mechanism
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.samples import example_inputs, example_module, example_options, seeded

GRID = (8, 8)
BATCH, HEADS, DIM = 4, 4, 16
REACH = 2.5
"""Distance, in tokens, over which tokens are alike."""
CAPTION = "Smooth random input: near tokens are alike. Parameters drawn, not trained. Mean over samples and heads."


@dataclass(frozen=True)
class Pattern:
    """The implied weights of a mechanism, (N,M), mean over samples and heads.

    Attributes:
        name: the mechanism.
        options: the options that differ from their defaults.
        weights: (N,M) float64.
        is_causal: the future is hidden.
        grid: (rows, columns) of the tokens, where the mechanism used them.
    """

    name: str
    options: dict[str, Any]
    weights: Tensor
    is_causal: bool
    grid: tuple[int, int] | None

    @property
    def query(self) -> int:
        """The token in the middle of the grid, or of the sequence."""
        if self.grid is None:
            return self.weights.shape[0] // 2
        rows, columns = self.grid
        return rows // 2 * columns + columns // 2

    def on_grid(self) -> Tensor:
        """(rows, columns) weights of `query`.

        Raises:
            InvalidInput: the mechanism used no grid.
        """
        if self.grid is None:
            raise InvalidInput(f"{self.name}: its tokens are on no grid, so there is no map of one query.")
        return self.weights[self.query].view(self.grid)


def pattern(name: str, *, is_causal: bool = False, options: Mapping[str, Any] | None = None, seed: int = 0) -> Pattern:
    """The implied weights of mechanism `name` on the small input.

    Args:
        name: a registered mechanism.
        is_causal: hide the future. Tokens are then a sequence, where the mechanism allows that.
        options: on top of the mechanism's example options.
        seed: of the input and of what the mechanism draws.

    Raises:
        Unsupported: it has no attention weights, or no causal form.
        InvalidOption, InvalidInput: the options are wrong or do not fit the input.
    """
    with seeded(seed):
        module = example_module(name, num_heads=HEADS, head_dim=DIM, options=options).double()
        if not module.capabilities.attention_weights:
            raise Unsupported(name, "it has no N x M attention weights to draw", "Its equation says what it computes.")
        on_grid = module.capabilities.grid == "used" and not (is_causal and module.capabilities.sequence)
        (query, _, _), call = example_inputs(module, batch=BATCH, grid=GRID, on_grid=on_grid, dtype=torch.float64)
        grid = call.get("grid")
        tokens = _smooth(grid or (1, query.shape[2]))
    if "layer_input" in call:
        call["layer_input"] = tokens.transpose(1, 2).flatten(2)
    with torch.no_grad():
        weights = module.attention_weights(tokens, tokens, tokens, is_causal=is_causal, **call)
    return Pattern(name, module.options.changed(), weights.mean(dim=(0, 1)), is_causal, grid)


def patterns(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> list[Pattern]:
    """The bidirectional and the causal pattern of a mechanism, as far as they are defined. Arguments of `pattern`."""
    capabilities = get_mechanism(name).module_class.describe(example_options(name, options))
    modes = [causal for causal in (False, True) if (capabilities.causal if causal else capabilities.bidirectional)]
    return [pattern(name, is_causal=causal, options=options, seed=seed) for causal in modes]


def _smooth(grid: tuple[int, int]) -> Tensor:
    """(B,H,N,D) random waves over the places of the grid: neighbours are alike, and all have about the same length."""
    rows, columns = grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    frequency = torch.randn(BATCH, HEADS, 2, DIM, dtype=torch.float64) / REACH
    phase = 2 * math.pi * torch.rand(BATCH, HEADS, 1, DIM, dtype=torch.float64)
    return 2**0.5 * (place @ frequency + phase).cos()


def draw(shown: Sequence[Pattern], path: str | os.PathLike[str]) -> None:
    """Draw patterns of one mechanism as a PNG; equal patterns draw equal files.

    One panel a pattern, queries down and keys across; where there is a grid, one more with the weights of one query.

    Raises:
        InvalidInput: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sum(1 + (entry.grid is not None) for entry in shown)
    figure = Figure(figsize=(4.6 * panels, 4.5), dpi=120, layout="compressed")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    for entry in shown:
        _matrix(figure, next(axes), entry)
        if entry.grid is not None:
            _map(figure, next(axes), entry)
    record = get_mechanism(shown[0].name)
    options = ", ".join(f"{option}={value}" for option, value in shown[0].options.items())
    figure.suptitle(f"{record.title}\n{record.name}{': ' if options else ''}{options}", fontsize="large")
    figure.supxlabel(CAPTION, fontsize="small", color="0.35")
    try:
        # without the version of matplotlib in it, equal pictures are equal files
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error


def _matrix(figure: Any, axes: Any, entry: Pattern) -> None:
    """Queries down, keys across."""
    order = torch.ones_like(entry.weights, dtype=torch.bool)
    _image(figure, axes, entry.weights, order.tril() if entry.is_causal else order)
    axes.set_title("causal (grey: hidden)" if entry.is_causal else "bidirectional", fontsize="medium")
    where = " (row by row)" if entry.grid else ""
    axes.set_xlabel(f"key{where}")
    axes.set_ylabel(f"query{where}")


def _map(figure: Any, axes: Any, entry: Pattern) -> None:
    """The weights of one query at the places of its keys."""
    from matplotlib.ticker import MaxNLocator

    weights = entry.on_grid()
    _image(figure, axes, weights, torch.ones_like(weights, dtype=torch.bool))
    row, column = divmod(entry.query, weights.shape[1])
    axes.plot(column, row, marker="o", markersize=10, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2)
    axes.set_title(f"query at row {row}, column {column} (circle)", fontsize="medium")
    axes.set_xlabel("column of the key")
    axes.set_ylabel("row of the key")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _image(figure: Any, axes: Any, weights: Tensor, visible: Tensor) -> None:
    """`weights` where `visible`, with a colour bar; the few largest may lie beyond its end, so that others show."""
    seen = weights[visible]
    top = max(float(seen.quantile(0.99)), 0.3 * float(seen.max()))
    limits = {"cmap": "viridis", "vmin": 0, "vmax": top}
    if float(seen.min()) < 0:
        # zero in the middle of the colours
        top = max(top, -float(seen.min()))
        limits = {"cmap": "RdBu_r", "vmin": -top, "vmax": top}
    axes.set_facecolor("0.88")
    image = axes.imshow(weights.masked_fill(~visible, float("nan")).numpy(), interpolation="nearest", **limits)
    beyond = "max" if float(seen.max()) > top else "neither"
    figure.colorbar(image, ax=axes, label="weight", extend=beyond, fraction=0.046, pad=0.03)
