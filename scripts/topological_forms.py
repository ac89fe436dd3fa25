"""The dense, tiled and structured forms of topological masks, timed against each other; the choice follows the table.

python scripts/topological_forms.py --apply

B = 1, H = 1, D = 64, relu features. The structured form is the FFT (toeplitz, block_toeplitz), the chunked recurrence
(decay), the two passes (tree), or the sums over the rank (low_rank); graph_kernel and heat have none. Tiled and
structured form run in turns with the dense one; a ratio is the median over the pairs, below 1 where the form is faster
than dense. Before a form is timed, its output and gradients are compared with those of the dense one, and
every form with the definition in float64. Forms that take ten times as long get one pair. Beyond 4096 keys, where the
dense form needs too much memory, the structured form is timed against the tiled one, forward; only where it had not won
before, and took less than four times as long at half the length: twice the length can at best halve that.

A crossover is the least measured length from which the structured form beats the tiled one, forward and backward, at
every longer length; for low_rank in units of the rank P. `STRUCTURED_FROM` of the mechanism holds the largest over the
rows of a mask; `--apply` writes it there.
"""

import argparse
import csv
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import hf_attn
from hf_attn.bench.checks import Mismatch, finite, scattered, within
from hf_attn.bench.report import Environment, OtherLoad
from hf_attn.bench.timing import TooSlow, compare, host_clock
from hf_attn.bench.workload import forward_step, gradient_step
from hf_attn.mechanisms import topological

LENGTHS = (196, 256, 512, 1024, 2048, 4096, 8192, 16384)
LONG = 4096
"""Longest length of the dense form, in keys; of graphs, whose mask has to be built, a quarter."""
HEADS, HEAD_DIM, SLOW = 1, 64, 10.0
FIELDS = ("mask", "causal", "length", "heads", "pass", "form", "baseline", "ratio", "low", "high", "seconds", "note")
MODULE = Path(topological.__file__)


@dataclass(frozen=True)
class Kind:
    """A line of the table: a mask and the order of the call."""

    mask: str
    causal: bool = False
    rank: int = 1

    @property
    def label(self) -> str:
        return self.mask + (f" P={self.rank}" if self.mask == "low_rank" else "") + " causal" * self.causal

    def options(self, length: int) -> dict[str, Any]:
        rows = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
        columns = length // rows
        # first column down, then along each row: a spanning tree of the grid
        parent = [node - 1 if node % columns else node - columns for node in range(length)]
        given = {
            "toeplitz": {"max_length": length},
            "block_toeplitz": {"grid_size": (rows, columns)},
            "low_rank": {"max_length": length, "rank": self.rank},
            "tree": {"parent": [-1, *parent[1:]]},
            "heat": {"grid_size": (rows, columns)},
            "graph_kernel": {"grid_size": (rows, columns)},
        }
        return {"mask_type": self.mask, **given.get(self.mask, {})}

    @property
    def structured(self) -> bool:
        return self.mask in topological.STRUCTURED_FROM


KINDS = (
    Kind("decay"), Kind("decay", True), Kind("low_rank", rank=4), Kind("low_rank", rank=16), Kind("tree"),
    Kind("graph_kernel"), Kind("heat"), Kind("toeplitz"), Kind("toeplitz", True), Kind("block_toeplitz"),
    Kind("block_toeplitz", True),
)  # fmt: skip
"""The slowest last, where the time may be over."""


@dataclass(frozen=True)
class Row:
    """One timed form. `ratio` is to `baseline`, and empty where the cell was left out; `note` says why."""

    mask: str
    causal: bool
    length: int
    heads: int
    mode: str
    form: str
    baseline: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        return ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in vars(self).values()]


class Forms:
    """One mask at one length, with its three forms on the same tensors."""

    def __init__(self, kind: Kind, length: int, heads: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        built = hf_attn.build("topological", num_heads=heads, head_dim=HEAD_DIM, **kind.options(length))
        self.module: Any = scattered(built).to(dtype)
        shape = (4, 1, heads, length, HEAD_DIM)
        *self.inputs, self.cotangent = torch.randn(shape, dtype=dtype).unbind(0)
        self.leaves = [x.requires_grad_() for x in (*self.inputs, *self.module.parameters())]
        self.causal = kind.causal

    def run(self, form: str) -> Tensor:
        """The output of a form; "naive" is the definition."""
        if form == "naive":
            return self.module.naive(*self.inputs, is_causal=self.causal)
        # shadows the method that chooses
        self.module.form = lambda keys: form
        return self.module(*self.inputs, is_causal=self.causal)

    def step(self, form: str, backward: bool) -> Any:
        if not backward:
            return forward_step(lambda: self.run(form))
        return gradient_step(lambda: self.run(form), self.leaves, self.cotangent)

    def agree(self, form: str, expected: str, tolerance: float, backward: bool = True) -> float:
        """How often the time of `expected` the form took; output and gradients agree, relative to their largest number.

        Raises:
            Mismatch: they do not.
        """
        results, seconds = [], []
        for step in (self.step(form, backward), self.step(expected, backward)):
            seconds.append(host_clock(lambda step=step: results.append(step())))
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            what = f"{form} against {expected}, " + ("output" if i == 0 else f"gradient {i}")
            finite([a, b], what)
            within(a, b, tolerance * max(b.abs().max().item(), 1e-3), what)
        return seconds[0] / seconds[1]


def measure(kind: Kind, length: int, limits: argparse.Namespace) -> list[Row]:
    """The rows of one mask at one length."""
    dense = length <= LONG
    baseline, modes = ("dense", ("forward", "backward")) if dense else ("tiled", ("forward",))
    forms = (("tiled", "structured") if dense else ("structured",))[: 1 + kind.structured]
    rows, made = [], Forms(kind, length, HEADS)
    for form in forms:
        empty = [Row(kind.label, kind.causal, length, HEADS, mode, form, baseline) for mode in modes]
        try:
            slow = made.agree(form, baseline, 1e-3, backward=dense) > SLOW
        except Mismatch as error:
            rows += [replace(row, note=str(error)) for row in empty]
            continue
        for row in empty:
            steps = (made.step(name, row.mode == "backward") for name in (baseline, form))
            often = {"repeats": 1, "min_seconds": 0.0} if slow else {"repeats": limits.repeats, "min_seconds": 0.1}
            try:
                spent = compare(*steps, host_clock, budget=limits.budget, **often)
            except TooSlow as error:
                rows.append(replace(row, note=str(error)))
                continue
            ratio, seconds = spent.ratio, spent.candidate.median
            rows.append(replace(row, ratio=ratio.median, low=ratio.low, high=ratio.high, seconds=seconds))
    return rows


def gate() -> None:
    """Every form against the definition, in float64 at 64 tokens."""
    for kind in KINDS:
        made = Forms(kind, 64, 2, torch.float64)
        for form in ("dense", "tiled", "structured")[: 2 + kind.structured]:
            made.agree(form, "naive", 1e-7)


def against_tiled(rows: list[Row], label: str) -> dict[int, float]:
    """Length -> time of the structured form over that of the tiled one, the larger of the passes.

    Infinity where the structured form alone was left out; no entry where the tiled one was, too.
    """
    found: dict[int, float] = {}
    for row in (row for row in rows if row.mask == label and row.form == "structured"):
        tiled = [r.ratio for r in rows if (r.mask, r.length, r.mode, r.form) == (label, row.length, row.mode, "tiled")]
        other = 1.0 if row.baseline == "tiled" else next(iter(tiled), None)
        if other is not None:
            ratio = math.inf if row.ratio is None else row.ratio / other
            found[row.length] = max(ratio, found.get(row.length, 0.0))
    return found


def crossover(rows: list[Row], label: str) -> float:
    """Least length from which the structured form of a line beats the tiled one at every longer length; or infinity."""
    least, ratios = math.inf, against_tiled(rows, label)
    for length in sorted(ratios, reverse=True):
        if ratios[length] >= 1:
            break
        least = length
    return least


def chosen(rows: list[Row]) -> dict[str, float]:
    """Mask type -> crossover, of low_rank per unit of rank; the largest over the lines of a mask."""
    found: dict[str, list[float]] = {}
    for kind in (kind for kind in KINDS if kind.structured):
        found.setdefault(kind.mask, []).append(crossover(rows, kind.label) / kind.rank)
    return {mask: max(values) for mask, values in found.items()}


def literal(crossovers: dict[str, float]) -> str:
    """The Python line of `STRUCTURED_FROM`."""
    entries = (f'"{mask}": {"math.inf" if math.isinf(n) else round(n)}' for mask, n in crossovers.items())
    return "STRUCTURED_FROM = {" + ", ".join(entries) + "}"


def read(path: Path) -> list[Row]:
    """The rows of a written table."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    numbers = ("ratio", "low", "high", "seconds")
    return [
        Row(
            line["mask"], line["causal"] == "True", int(line["length"]), int(line["heads"]), line["pass"], line["form"],
            line["baseline"], *(float(line[name]) if line[name] else None for name in numbers), line["note"],
        )
        for line in lines
    ]  # fmt: skip


def write(output: Path, rows: list[Row], facts: Environment) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([FIELDS, *(row.cells() for row in rows)])
    rows = read(output.with_suffix(".csv"))
    lengths = sorted({row.length for row in rows})
    table = [["mask", "form", *(f"N = {n}" for n in lengths)], ["---"] * (2 + len(lengths))]
    for label, form in dict.fromkeys((row.mask, row.form) for row in rows):
        cells = []
        for n in lengths:
            found = [row for row in rows if (row.mask, row.form, row.length) == (label, form, n)]
            shown = ["-" if row.ratio is None else f"{row.ratio:.2f}" for row in found]
            cells.append(" / ".join(shown) + " of tiled" * any(row.baseline == "tiled" for row in found))
        table.append([label, form, *cells])
    said = [["mask", "structured from"], ["---", "---"]]
    for kind in (kind for kind in KINDS if kind.structured):
        least = crossover(rows, kind.label)
        said.append([kind.label, "no length measured" if math.isinf(least) else f"{least:.0f} keys"])
    notes = [f"- {row.mask}, {row.form}, N = {row.length}, {row.mode}: {row.note}" for row in rows if row.note]
    doc = __doc__.strip().splitlines()
    text = ["# Forms of topological masks", "", *doc[4:], ""]
    text += [f"{name.capitalize()}: {value}  " for name, value in facts.facts()]
    text += ["", "Time over that of the dense form, forward / forward and backward:", ""]
    text += ["| " + " | ".join(row) + " |" for row in table]
    text += ["", "Where the structured form takes over:", "", *("| " + " | ".join(row) + " |" for row in said)]
    text += ["", "So `" + literal(chosen(rows)) + "`.", ""]
    text += (["Left out:", "", *notes, ""] if notes else []) + [
        f"![Time over dense, against length]({output.name}.png)",
        "",
    ]
    output.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    draw(output.with_suffix(".png"), rows)


def draw(path: Path, rows: list[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(row.mask for row in rows))
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for number, label in enumerate(labels):
            for form, style in (("tiled", ":"), ("structured", "-")):
                shown = [r for r in rows if (r.mask, r.form, r.mode, r.baseline) == (label, form, mode, "dense")]
                points = [(row.length, row.ratio) for row in shown if row.ratio is not None]
                if points:
                    name = label if form == "structured" or label in ("graph_kernel", "heat") else None
                    axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=f"C{number}", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(
            xscale="log", yscale="log", xlabel="keys", title="forward" if mode == "forward" else "forward + backward"
        )
        ticks = sorted({row.length for row in rows if row.baseline == "dense"})
        axes.set_xticks(ticks, map(str, ticks), fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time over the dense form\n(solid structured, dotted tiled)")
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, format="png", metadata={"Software": None})


def apply(crossovers: dict[str, float], path: Path = MODULE) -> None:
    """Write the crossovers into the mechanism."""
    text, changed = re.subn(
        r"^STRUCTURED_FROM = \{.*?\}", literal(crossovers), path.read_text("utf-8"), flags=re.M | re.S
    )
    if changed != 1:
        raise RuntimeError(f"{path.name} has {changed} assignments of STRUCTURED_FROM instead of one.")
    path.write_text(text, "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="keys; beyond 4096 without dense form")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs, at least")
    parser.add_argument(
        "--budget", type=float, default=6.0, help="seconds for the pairs of a cell; slower ones are left out"
    )
    parser.add_argument("--seconds", type=float, default=220.0, help="seconds for everything; what remains is left out")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/topological_forms"), help="without suffix")
    parser.add_argument("--apply", action="store_true", help="write the crossovers into the mechanism")
    arguments = parser.parse_args()
    start, load, rows = time.monotonic(), OtherLoad(), []
    gate()
    planned = [(kind, n) for n in sorted(set(arguments.lengths)) for kind in KINDS if n <= LONG // 4 or kind.structured]
    for kind, length in track(planned, description="masks"):
        if length > LONG and not 1 <= list(against_tiled(rows, kind.label).values() or [math.inf])[-1] < 4:
            continue
        if time.monotonic() - start > arguments.seconds:
            row = Row(
                kind.label, kind.causal, length, HEADS, "forward", "structured" if kind.structured else "tiled", "dense"
            )
            rows.append(replace(row, note=f"the {arguments.seconds:g} s of the sweep were over"))
            continue
        rows += measure(kind, length, arguments)
    facts = Environment.here("python " + " ".join([sys.argv[0], *sys.argv[1:]]), "cpu", 0)
    write(arguments.output, rows, replace(facts, other_load=str(load)))
    print(arguments.output.with_suffix(".md").read_text("utf-8"))
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.apply:
        apply(chosen(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
