"""The training curve: losses and validation metrics against epochs (or steps), as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def draw_curve(
    history: list[dict[str, Any]], path: str | os.PathLike[str], title: str, metrics: Sequence[str] = ("accuracy",)
) -> None:
    """Draw the log of a Trainer as a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: the PNG to write.
        title: above the picture.
        metrics: of the validation split; accuracy is drawn from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5 * (1 + len(metrics)), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, *others = figure.subplots(1, 1 + len(metrics))
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        _line(left, history, key, label)
    left.set_ylabel("loss")
    for axes, metric in zip(others, metrics, strict=True):
        _line(axes, history, f"eval_{metric}", "validation")
        axes.set_ylabel(metric)
        if metric == "accuracy":
            axes.set_ylim(0, 1.02)
    for axes in (left, *others):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=_whole(history)))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(title)
    # without the version of matplotlib in it, equal runs draw equal files
    figure.savefig(path, format="png", metadata={"Software": None})


def _whole(history: list[dict[str, Any]]) -> bool:
    """Whether the run is long enough for whole epochs on the axis."""
    return max((entry.get("epoch", 0) for entry in history), default=0) >= 2


def _line(axes: Any, history: list[dict[str, Any]], key: str, label: str) -> None:
    points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, marker="o", markersize=2.5)
