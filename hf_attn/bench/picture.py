"""The picture of a benchmark: time and memory against length, log-log, with the length from which a mechanism pays."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.bench.gate import Row

if TYPE_CHECKING:
    from hf_attn.bench.report import Report, Section

Value = Callable[[Row, int], float | None]


def _ms(row: Row, side: int) -> float | None:
    return None if row.time is None else (row.time.baseline, row.time.candidate)[side].median * 1000


def _mib(row: Row, side: int) -> float | None:
    # a logarithmic axis has no zero
    return None if row.memory is None else row.memory[side].mib or None


PANELS: tuple[tuple[str, Value], ...] = (("time, ms", _ms), ("peak memory, MiB", _mib))
"""Label of the axis, and its number for the baseline (0) and the candidate (1)."""


def plain(row: Row) -> str:
    """The baseline's name in the legend, which serves every mode."""
    return row.baseline.removeprefix("causal ")


def draw(report: Report, path: Path) -> None:
    """Draw `report` as a PNG: a line of panels for every mode and pass with times."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = [section for section in report.sections() if section.measured()]
    labels = list(dict.fromkeys(label for section in sections for label in section.measured()))
    styles: dict[str, dict[str, Any]] = {
        label: {"color": colormaps["tab20"](i % 20), "marker": "os^"[i // 20 % 3]} for i, label in enumerate(labels)
    }
    baselines = dict.fromkeys(plain(row) for row in report.rows)
    styles |= {name: {"color": "black", "linestyle": ("-", "--", ":", "-.")[i % 4]} for i, name in enumerate(baselines)}
    height = 3.6 * max(1, len(sections)) + 1.6
    figure = Figure(figsize=(13, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for number, section in enumerate(sections):
        for place, (axis, value) in enumerate(PANELS):
            axes = figure.add_subplot(len(sections), 2, 2 * number + place + 1)
            axes.set_title(section.title, fontsize=10)
            _plot(axes, section, styles, value, stars=place == 0)
            axes.set_xlabel("length, tokens")
            axes.set_ylabel(axis)
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    facts = "\n".join(textwrap.fill(f"{name}: {value}", 170) for name, value in report.environment.facts())
    figure.suptitle(f"{report.title} (star: from here on faster than its baseline)", fontsize=11)
    figure.text(0.01, -0.005, facts, fontsize=7, va="top")
    metadata = {"Title": report.title, "Software": None, "Description": facts}
    figure.savefig(path, format="png", metadata=metadata, bbox_inches="tight")


def _plot(axes: Any, section: Section, styles: dict[str, Any], value: Value, stars: bool) -> None:
    lines = section.measured()
    rows = [row for line in lines.values() for row in line]
    for name in dict.fromkeys(map(plain, rows)):
        points = []
        for length in sorted({row.case.length for row in rows}):
            same = [v for r in rows if (r.case.length, plain(r)) == (length, name) and (v := value(r, 0)) is not None]
            points += [(length, statistics.median(same))] if same else []
        _line(axes, points, name, linewidth=2, **styles[name])
    for label, line in lines.items():
        points = [(row.case.length, v) for row in line if (v := value(row, 1)) is not None]
        _line(axes, points, label, markersize=3.5, linewidth=1.3, **styles[label])
        start = section.crossover(label) if stars else None
        if start is not None:
            axes.plot(start, dict(points)[start], **{**styles[label], "marker": "*", "markersize": 13})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _line(axes: Any, points: list[tuple[int, float]], label: str, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
