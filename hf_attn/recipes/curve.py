"""The training curve: loss and validation accuracy against epochs, as one picture."""

from __future__ import annotations

import os
from typing import Any


def draw_curve(history: list[dict[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Draw the log of a Trainer as a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: the PNG to write.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        _line(left, history, key, label)
    _line(right, history, "eval_accuracy", "validation")
    left.set_ylabel("cross-entropy loss")
    right.set_ylabel("accuracy")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(title)
    # without the version of matplotlib in it, equal runs draw equal files
    figure.savefig(path, format="png", metadata={"Software": None})


def _line(axes: Any, history: list[dict[str, Any]], key: str, label: str) -> None:
    points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, marker="o", markersize=2.5)
