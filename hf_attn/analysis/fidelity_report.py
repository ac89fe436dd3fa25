"""The report of `hf_attn.analysis.fidelity`: numbers by length and layer, as JSON, tables and one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_attn.errors import InvalidInput


@dataclass(frozen=True)
class LayerFidelity:
    """One attention module against the original's, on the original's layer input.

    Attributes:
        layer: its place among the attention modules, from 0.
        mechanism: its mechanism.
        error: |out - exact| / |exact| over all heads.
        head_error: the same, head by head.
        divergence: Kullback-Leibler divergence of its attention rows from the exact ones in nats, mean over rows, head
            by head. Infinite where it gives no weight to a key that has some. None where one of the two has no rows of
            weights that are distributions.
        distance: total variation distance of the rows, 0 to 1, mean over rows, head by head; None as above.
        hidden_error: |h - exact| / |exact| of the hidden states after the layer, with the errors of earlier layers;
            None where the layers of the model are not its attention modules one by one.
    """

    layer: int
    mechanism: str
    error: float
    head_error: tuple[float, ...]
    divergence: tuple[float, ...] | None
    distance: tuple[float, ...] | None
    hidden_error: float | None


@dataclass(frozen=True)
class LogitsFidelity:
    """One output of logits: mean cosine, share of equal first choices, mean KL divergence (nats) from the original's."""

    name: str
    cosine: float
    top1: float
    divergence: float


@dataclass(frozen=True)
class LengthFidelity:
    """Everything about one length.

    Attributes:
        length: tokens of a row, padding included.
        examples, tokens: how many were measured, padding left out.
        layers: the attention modules in order.
        embedding_cosine: cosine of the mean-pooled last hidden states, mean over examples.
        embedding_worst: its smallest value.
        logits: one entry for each output of logits.
        metric: mean of the metric for the original and for the other model; None without a metric.
    """

    length: int
    examples: int
    tokens: int
    layers: tuple[LayerFidelity, ...]
    embedding_cosine: float
    embedding_worst: float
    logits: tuple[LogitsFidelity, ...] = ()
    metric: tuple[float, float] | None = None

    @property
    def error(self) -> float:
        """Relative error of the attention outputs, mean over layers."""
        return sum(layer.error for layer in self.layers) / len(self.layers)


@dataclass(frozen=True)
class Report:
    """The fidelity of `candidate`, run in `dtype`, to `reference`, run in float64; one entry for each length."""

    reference: str
    candidate: str
    dtype: str
    lengths: tuple[LengthFidelity, ...]

    @property
    def embedding_cosine(self) -> float:
        """Cosine of the embeddings, mean over all examples."""
        total = sum(entry.examples for entry in self.lengths)
        return sum(entry.embedding_cosine * entry.examples for entry in self.lengths) / total

    @property
    def error(self) -> float:
        """Relative error of the attention outputs, mean over lengths and layers."""
        return sum(entry.error for entry in self.lengths) / len(self.lengths)

    def facts(self) -> dict[str, Any]:
        """The report as JSON values; an infinite number becomes the text "inf"."""
        return _json(asdict(self))

    def __str__(self) -> str:
        return f"{self.candidate} ({self.dtype}) against {self.reference} (float64)\n\n{self.table()}"

    def table(self) -> str:
        """Two tables in Markdown: the outputs by length, and layer by layer."""
        first = self.lengths[0]
        outputs = [["length", "examples", "embedding cosine", "smallest"]]
        for found in first.logits:
            outputs[0] += [f"{found.name} cosine", "top-1", "KL"]
        if first.metric:
            outputs[0] += ["metric of the original", "metric"]
        layers = [["length", "layer", "mechanism", "error", "worst head", "row KL", "row distance", "hidden error"]]
        for entry in self.lengths:
            numbers: list[float | None] = [entry.embedding_cosine, entry.embedding_worst]
            for found in entry.logits:
                numbers += [found.cosine, found.top1, found.divergence]
            outputs.append([str(entry.length), str(entry.examples), *map(number, (*numbers, *(entry.metric or ())))])
            for layer in entry.layers:
                rows = (mean(layer.divergence), mean(layer.distance))
                cells = map(number, (layer.error, max(layer.head_error), *rows, layer.hidden_error))
                layers.append([str(entry.length), str(layer.layer), layer.mechanism, *cells])
        return f"{markdown(outputs)}\n\n{markdown(layers)}"

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the report as a PNG; equal reports draw equal files.

        Raises:
            InvalidInput: the file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        heads, layers, lengths = figure.subplots(1, 3)
        _draw_heads(figure, heads, self.lengths[-1])
        _draw_layers(layers, self.lengths)
        _draw_lengths(lengths, self.lengths)
        figure.suptitle(f"{self.candidate} ({self.dtype}) against {self.reference} (float64)")
        try:
            # without the version of matplotlib in it, equal pictures are equal files
            figure.savefig(path, format="png", metadata={"Software": None})
        except OSError as error:
            raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error


def _draw_heads(figure: Any, axes: Any, entry: LengthFidelity) -> None:
    width = max(len(layer.head_error) for layer in entry.layers)
    grid = [[*layer.head_error, *[math.nan] * (width - len(layer.head_error))] for layer in entry.layers]
    image = axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="relative error")
    axes.set(title=f"attention outputs, {entry.length} tokens", xlabel="head", ylabel="layer")


def _draw_layers(axes: Any, entries: Sequence[LengthFidelity]) -> None:
    for index, entry in enumerate(entries):
        axes.plot(
            [layer.error for layer in entry.layers], color=f"C{index}", marker="o", label=f"{entry.length} tokens"
        )
        hidden = [math.nan if layer.hidden_error is None else layer.hidden_error for layer in entry.layers]
        axes.plot(hidden, color=f"C{index}", linestyle=":")
    axes.set(title="error by layer (dotted: hidden states)", xlabel="layer", ylabel="relative error")
    _finish(axes)


def _draw_lengths(axes: Any, entries: Sequence[LengthFidelity]) -> None:
    at = [entry.length for entry in entries]
    axes.plot(at, [entry.embedding_cosine for entry in entries], marker="o", label="embedding, cosine")
    for index, found in enumerate(entries[0].logits):
        axes.plot(at, [entry.logits[index].top1 for entry in entries], marker="o", label=f"{found.name}, top-1")
    axes.set(title="agreement of the outputs", xlabel="tokens", xticks=at)
    axes.set_ylim(top=1.01)
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def mean(values: Sequence[float] | None) -> float | None:
    """The mean of what there is."""
    return sum(values) / len(values) if values else None


def number(value: float | None) -> str:
    """Four digits; a dash where there is no number."""
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown with columns of even width; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value
