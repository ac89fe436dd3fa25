"""AA-ResNet's direction at the scale of a minute: augmented convolutions on scikit-learn's digits, three seeds.

python scripts/aa_resnet_digits.py [--seeds 0 1 2] [--epochs 25] [--output docs/benchmarks/digits]

Two AugmentedConv2d layers (16 and 32 channels, 4 heads) on the 8 x 8 images, kappa = upsilon from 0 (all convolution) to
1 (all attention), with and without relative positions. 1000 training and 797 test images; Adam, one-cycle rate to 6e-3.
"""

import argparse
import csv
import datetime
import platform
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import nn

import hf_attn
from hf_attn import AugmentedConv2d

ROWS = [(0.0, True), (0.25, True), (0.25, False), (0.5, True), (1.0, True), (1.0, False)]
"""(kappa = upsilon, relative positions)."""
CHECKS = {
    "accuracy(1, relative) > accuracy(1, none) + 0.3": lambda a: a[1.0, True] > a[1.0, False] + 0.3,
    "accuracy(.25, relative) >= accuracy(0) - 0.02": lambda a: a[0.25, True] >= a[0.0, True] - 0.02,
}


def classifier(ratio: float, relative: bool) -> nn.Module:
    """A 1 x 1 stem, two augmented convolutions with BatchNorm and ReLU, the mean, a linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 1)]
    for channels in ((16, 16), (16, 32)):
        layers += [
            AugmentedConv2d(
                *channels,
                kappa=ratio,
                upsilon=ratio,
                num_heads=4,
                feature_size=8,
                relative=relative,
                min_head_key_dim=4,
            ),
            nn.BatchNorm2d(channels[1]),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def accuracy(ratio: float, relative: bool, seed: int, epochs: int) -> tuple[float, int]:
    """Test accuracy after training with `seed`, and the number of parameters."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    model = classifier(ratio, relative)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * 16)
    for _ in range(epochs):
        for batch in torch.randperm(1000).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        found = (model(images[1000:]).argmax(1) == labels[1000:]).double().mean().item()
    return found, sum(p.numel() for p in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/digits"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: list[tuple[float, bool, int, list[float]]] = []
    with Progress() as progress:
        task = progress.add_task("aa_resnet", total=len(ROWS) * len(arguments.seeds))
        for ratio, relative in ROWS:
            found = []
            for seed in arguments.seeds:
                value, parameters = accuracy(ratio, relative, seed, arguments.epochs)
                found.append(value)
                progress.advance(task)
            table.append((ratio, relative, parameters, found))
    write(arguments.output, arguments.seeds, arguments.epochs, table)
    draw(arguments.output / "aa_resnet.png", table)
    return 0


def write(path: Path, seeds: list[int], epochs: int, table: list[tuple[float, bool, int, list[float]]]) -> None:
    """aa_resnet.csv and aa_resnet.md under `path`."""
    path.mkdir(parents=True, exist_ok=True)
    header = ["kappa = upsilon", "positions", "parameters", *(f"seed {seed}" for seed in seeds), "mean"]
    rows = [
        [
            f"{ratio:g}",
            positions(ratio, relative),
            str(count),
            *(f"{a:.3f}" for a in found),
            f"{statistics.mean(found):.3f}",
        ]
        for ratio, relative, count, found in table
    ]
    with (path / "aa_resnet.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    means = {(ratio, relative): statistics.mean(found) for ratio, relative, _, found in table}
    lines = [
        "# Digits: aa_resnet",
        "",
        "Augmented convolutions from all convolution (0) to all attention (1), with and without relative positions.",
        "",
        f"- command: `python scripts/aa_resnet_digits.py --seeds {' '.join(map(str, seeds))} --epochs {epochs}`",
        f"- versions: torch {torch.__version__}, hf_attn {hf_attn.__version__}, python {platform.python_version()}; one CPU thread",
        f"- date: {datetime.date.today()}",
        "",
        "Test accuracy on 797 images; chance is 0.10. The split is drawn with the seed.",
        "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)),
        "",
        *(f"- {claim}: {'holds' if check(means) else 'does not hold'}" for claim, check in CHECKS.items()),
        "",
        "![accuracy](aa_resnet.png)",
        "",
    ]
    (path / "aa_resnet.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def positions(ratio: float, relative: bool) -> str:
    return "" if ratio == 0 else "relative" if relative else "none"


def draw(path: Path, table: list[tuple[float, bool, int, list[float]]]) -> None:
    """Every seed as a dot, the mean as a bar."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [f"{ratio:g}\n{positions(ratio, relative)}" for ratio, relative, _, _ in table]
    axes.bar(labels, [statistics.mean(found) for *_, found in table], color="0.8")
    for place, (*_, found) in enumerate(table):
        axes.plot([place] * len(found), found, "k.", markersize=4)
    axes.set(ylabel="test accuracy", ylim=(0, 1), xlabel="kappa = upsilon, positions")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
