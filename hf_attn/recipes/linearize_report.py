"""What `hf_attn.recipes.linearize` returns: the model, the fidelity at every stage, the losses; as JSON, table, picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.analysis.fidelity_report import Report, markdown, number
from hf_attn.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LinearizeResult:
    """What a run produced.

    Attributes:
        model: a copy of the given model with its new attention, trained, in evaluation mode.
        stages: the fidelity to the original on held-out data "before", "after transfer", "after distillation"; without
            the stages that were skipped, and empty where no data was held out.
        transfer_losses: squared relative error of the attention outputs, mean over layers, step by step.
        distill_losses: loss of the second stage, step by step.
        seconds: wall time of both stages, without the measuring.
    """

    model: PreTrainedModel
    stages: dict[str, Report]
    transfer_losses: tuple[float, ...]
    distill_losses: tuple[float, ...]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The result as JSON values, without the model."""
        return {
            "attention": self.model.config.attention,
            "seconds": round(self.seconds, 1),
            "stages": {name: report.facts() for name, report in self.stages.items()},
            "transfer_losses": list(self.transfer_losses),
            "distill_losses": list(self.distill_losses),
        }

    def __str__(self) -> str:
        steps = f"{len(self.transfer_losses)} + {len(self.distill_losses)} steps, {self.seconds:.0f} s"
        return f"{self.table()}\n\n{steps}" if self.stages else steps

    def table(self) -> str:
        """One row a stage and length, in Markdown."""
        if not self.stages:
            return ""
        first = next(iter(self.stages.values())).lengths[0]
        rows = [["stage", "length", "attention error", "embedding cosine", "smallest"]]
        for found in first.logits:
            rows[0] += [f"{found.name} top-1", "KL"]
        for name, report in self.stages.items():
            for entry in report.lengths:
                numbers = [entry.error, entry.embedding_cosine, entry.embedding_worst]
                for found in entry.logits:
                    numbers += [found.top1, found.divergence]
                rows.append([name, str(entry.length), *map(number, numbers)])
        return markdown(rows)

    def save(self, folder: Path) -> None:
        """Write `linearize.json`, `linearize.md` and `linearize.png` into `folder`."""
        (folder / "linearize.json").write_text(json.dumps(self.facts(), indent=1) + "\n", encoding="utf-8")
        (folder / "linearize.md").write_text(f"{self}\n", encoding="utf-8")
        self.draw(folder / "linearize.png")

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw losses and fidelity as a PNG.

        Raises:
            InvalidInput: the file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        transfer, distill, layers, outputs = figure.subplots(1, 4)
        for axes, losses, title in (
            (transfer, self.transfer_losses, "attention transfer"),
            (distill, self.distill_losses, "distillation"),
        ):
            axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
            if losses:
                axes.plot(range(1, len(losses) + 1), losses, linewidth=0.9)
            else:
                axes.text(0.5, 0.5, "skipped", transform=axes.transAxes, ha="center")
        for name, report in self.stages.items():
            layers.plot([layer.error for layer in report.lengths[-1].layers], marker="o", label=name)
            lengths = [entry.length for entry in report.lengths]
            outputs.plot(lengths, [entry.embedding_cosine for entry in report.lengths], marker="o", label=name)
        layers.set(title="attention outputs, longest", xlabel="layer", ylabel="relative error")
        outputs.set(title="embeddings", xlabel="tokens", ylabel="cosine to the original")
        for axes in (layers, outputs):
            axes.grid(alpha=0.3)
            if self.stages:
                axes.legend(frameon=False, fontsize="small")
        try:
            figure.savefig(path, format="png", metadata={"Software": None})
        except OSError as error:
            raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error
