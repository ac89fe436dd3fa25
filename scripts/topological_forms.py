"""Which form of a topological mask is the fastest, mask by mask and length by length?

python scripts/topological_forms.py [--lengths 196 512 1024 2048 4096] [--output docs/benchmarks/topological_forms]

Three forms give the same numbers: dense (the whole mask), tiled (as many rows at once as pay), and structured (FFT, two
passes over the tree, chunked recurrence, sums over the rank). Each is timed in turns with the dense form, after its
output and the gradient of its values were found equal to it; `auto` is what the mechanism chooses by itself.
"""

import argparse
import csv
import datetime
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

import hf_attn
from hf_attn.bench.timing import Comparison, TooSlow, compare, host_clock
from hf_attn.mechanisms import topological

HEADS, DIM = 4, 64
BUDGET = 10.0
"""Seconds for three pairs of a cell."""
CHOICES = dict(topological.STRUCTURED_FROM)
FORMS: dict[str, tuple[int, float | None]] = {
    "dense": (2**40, None),
    "tiled": (0, math.inf),
    "structured": (0, 0),
    "auto": (512, None),
}
"""Form -> `fft_min_length`, and the length from which the structured form is taken (None: the mechanism's own)."""
MASKS: dict[str, tuple[Callable[[int], dict], bool]] = {
    "toeplitz": (lambda n: {"mask_type": "toeplitz", "max_length": n}, False),
    "toeplitz, causal": (lambda n: {"mask_type": "toeplitz", "max_length": n}, True),
    "block_toeplitz": (lambda n: {"mask_type": "block_toeplitz", "grid_size": (math.isqrt(n),) * 2}, False),
    "tree": (lambda n: {"mask_type": "tree", "parent": [-1, *((i - 1) // 2 for i in range(1, n))]}, False),
    "decay": (lambda n: {"mask_type": "decay"}, False),
    "decay, causal": (lambda n: {"mask_type": "decay"}, True),
    "low_rank, 4 columns": (lambda n: {"mask_type": "low_rank", "max_length": n, "rank": 4}, False),
    "low_rank, 16 columns": (lambda n: {"mask_type": "low_rank", "max_length": n, "rank": 16}, False),
}
"""Label -> options at a length, and whether it is causal. The tree is a heap: node i under node (i - 1) // 2."""


def step(module: torch.nn.Module, qkv: list[Tensor], causal: bool, least: float | None, backward: bool) -> Callable:
    def run() -> tuple[Tensor, ...]:
        topological.STRUCTURED_FROM.update(CHOICES if least is None else dict.fromkeys(CHOICES, least))
        with torch.set_grad_enabled(backward):
            out = module(*qkv, is_causal=causal)
            return (out, torch.autograd.grad(out.sum(), qkv)[2]) if backward else (out,)

    return run


def cell(label: str, length: int, backward: bool, slow: set[str]) -> dict[str, Comparison]:
    """Form -> its times against the dense form's. Forms that take too long are left out and added to `slow`.

    Raises:
        RuntimeError: a form differs from the dense one.
    """
    options, causal = MASKS[label]
    torch.manual_seed(0)
    steps = {}
    for form, (dense_below, least) in FORMS.items():
        module = hf_attn.build(
            "topological", num_heads=HEADS, head_dim=DIM, fft_min_length=dense_below, **options(length)
        )
        steps[form] = module, least
    state = steps["dense"][0].state_dict()
    qkv = [torch.randn(1, HEADS, length, DIM, requires_grad=backward) for _ in range(3)]
    found = {}
    for form, (module, least) in steps.items():
        module.load_state_dict(state)
        steps[form] = step(module, qkv, causal, least, backward)
    expected = steps["dense"]()
    for form, candidate in steps.items():
        if form in slow:
            continue
        for a, b in zip(candidate(), expected, strict=True):
            if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()):
                raise RuntimeError(f"{label} at {length}: {form} differs by {(a - b).abs().max():.2g}")
        if form != "dense":
            try:
                found[form] = compare(steps["dense"], candidate, host_clock, repeats=3, min_seconds=0.2, budget=BUDGET)
            except TooSlow:
                slow.add(form)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[196, 512, 1024, 2048, 4096])
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/topological_forms"))
    arguments = parser.parse_args()
    rows: list[tuple[str, int, str, str, Comparison]] = []
    slow: dict[str, set[str]] = {mask: set() for mask in MASKS}
    cells = [(m, n, b) for m in arguments.masks for n in arguments.lengths for b in (False, True)]
    with Progress() as progress:
        for label, length, backward in progress.track(cells):
            if label == "block_toeplitz" and math.isqrt(length) ** 2 != length:
                length = math.isqrt(length) ** 2
            steps = "forward + backward" if backward else "forward"
            for form, comparison in cell(label, length, backward, slow[label]).items():
                rows.append((label, length, steps, form, comparison))
            progress.print(", ".join(str(x) for x in rows[-1][:3]))
    topological.STRUCTURED_FROM.update(CHOICES)
    write(arguments.output, rows, f"python scripts/topological_forms.py {' '.join(sys.argv[1:])}".strip())
    return 0


def write(path: Path, rows: list[tuple[str, int, str, str, Comparison]], command: str) -> None:
    """CSV, Markdown and picture."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mask", "length", "steps", "form", "ratio", "low", "high", "dense ms", "pairs"])
        for *key, c in rows:
            spread = (f"{x:.3f}" for x in (c.ratio.median, c.ratio.low, c.ratio.high))
            writer.writerow([*key, *spread, f"{c.baseline.median * 1e3:.3f}", c.pairs])
    ratio = {tuple(key): c for *key, c in rows}
    forms = [form for form in FORMS if form != "dense"]
    lines = [
        "# Forms of topological masks",
        "",
        *__doc__.strip().splitlines()[4:],
        "",
        f"Command: `{command}` (torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}, float32, B=1 H={HEADS} "
        f"D={DIM}, {torch.get_num_threads()} CPU threads, {datetime.date.today()}).",
        "",
        "Median time over that of the dense form in the same run, forward / forward + backward; in bold the fastest. Grids are the "
        f"largest squares. A dash: three pairs would have taken over {BUDGET:g} s at this length or a shorter one.",
        "",
        f"| mask | tokens | dense, ms | {' | '.join(forms)} |",
        "|---" * (3 + len(forms)) + "|",
    ]
    for label, length in dict.fromkeys((key[0], key[1]) for key in ratio):
        pairs = {f: [ratio.get((label, length, s, f)) for s in ("forward", "forward + backward")] for f in forms}
        timed = [[p[i] for p in pairs.values() if p[i]] for i in (0, 1)]
        best = [min(1.0, *(pairs[f][i].ratio.median for f in ("tiled", "structured") if pairs[f][i])) for i in (0, 1)]
        dense = [min(c.baseline.median for c in cs) * 1e3 for cs in timed]

        def shown(comparison: Comparison | None, least: float) -> str:
            value = comparison.ratio.median if comparison else math.nan
            return "–" if not comparison else f"**{value:.2f}**" if value == least else f"{value:.2f}"

        cells = [" / ".join(shown(p[i], best[i]) for i in (0, 1)) for p in pairs.values()]
        lines.append(f"| {label} | {length} | {dense[0]:.1f} / {dense[1]:.1f} | {' | '.join(cells)} |")
    lines += ["", "![Time of the forms over that of the dense one](topological_forms.png)", ""]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(key[0] for key in ratio))
    figure = Figure(figsize=(3 * -(-len(labels) // 2), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, label in enumerate(labels):
        axis = figure.add_subplot(2, -(-len(labels) // 2), place + 1)
        for form in ("tiled", "structured"):
            for steps, style in (("forward", "-"), ("forward + backward", "--")):
                line = [(k[1], c.ratio.median) for k, c in ratio.items() if k[0] == label and k[2:] == (steps, form)]
                axis.plot(
                    *zip(*line, strict=True),
                    style,
                    color={"tiled": "C0", "structured": "C1"}[form],
                    label=f"{form}, {steps}",
                )
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set(title=label, xscale="log", yscale="log", xlabel="tokens")
        if not place:
            axis.legend(frameon=False, fontsize=6)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    sys.exit(main())
