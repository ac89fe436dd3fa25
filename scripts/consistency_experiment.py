"""Do the attention maps of two layers agree once consistency is a loss, and do they still find the object?

python scripts/consistency_experiment.py [--seeds 0 1 2] [--output docs/benchmarks/consistency]

Synthetic 32 x 32 noise; the class is whether a disc of radius 3 to 5 is there, brighter by 1.8 deviations. A network of
four 3 x 3 convolutions (8, 16, 32, 32 channels, BatchNorm, ReLU) is trained 10 epochs on 800 images, then gets attention
on the outputs of blocks 2 (16 x 16) and 3 (8 x 8) and is trained 25 more: attention at 5e-2, blocks 3 and 4, classifier
and witness at 2e-3. alpha weighs the consistency loss. On 300 new images: accuracy; KL between the maps' marginals; average
precision (AP) of the enlarged maps for the pixels of the disc, on images that have one. A run that was stopped goes on.
"""

import argparse
import csv
import datetime
import statistics
import sys
from pathlib import Path

import torch
from rich.progress import Progress
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import hf_attn
from hf_attn.mechanisms.dual_consistency import consistency_loss
from hf_attn.models.dual_consistency import ConsistentClassifier

SIDE, ALPHAS = 32, (0.0, 1.0, 10.0)
COLUMNS = ("accuracy", "KL", "AP fine", "AP coarse", "AP gap", "entropy fine", "entropy coarse")


def images(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B,1,32,32), labels, and masks (B,32,32) of the discs."""
    noise = torch.randn(size, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    radius = 3 + 2 * torch.rand(size, 1, 1, generator=generator)
    centre = 6 + (SIDE - 12) * torch.rand(size, 2, 1, 1, generator=generator)
    place = torch.arange(SIDE)
    far = (place[:, None] - centre[:, 0]) ** 2 + (place - centre[:, 1]) ** 2
    mask = (far <= radius**2) & labels[:, None, None].bool()
    return noise + 1.8 * mask[:, None], labels, mask


def network() -> nn.Sequential:
    """Four blocks, halved between them, and a classifier of the mean."""

    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())

    pool = [nn.MaxPool2d(2) for _ in range(3)]
    return nn.Sequential(
        block(1, 8), pool[0], block(8, 16), pool[1], block(16, 32), pool[2], block(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, loss, number: int, size: int) -> None:
    model.train()
    for _ in range(number):
        for batch in torch.randperm(size).split(64):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
    model.eval()


def fit(alpha: float, seed: int) -> ConsistentClassifier:
    """A classifier with attention, trained in the two steps."""
    torch.manual_seed(seed)
    x, y, _ = images(800, torch.Generator().manual_seed(seed))
    plain = network()
    optimizer = torch.optim.Adam(plain.parameters(), lr=2e-3)
    epochs(plain, optimizer, lambda rows: nn.functional.cross_entropy(plain(x[rows]), y[rows]), 10, len(x))
    mode = "learned" if alpha else "none"
    model = ConsistentClassifier(
        plain, ("2", "4"), (16, 32), ((16, 16), (8, 8)), embed_dim=64, rescale=True, mode=mode, alpha=alpha
    )
    late = [*plain[4:].parameters(), *model.consistency.parameters()]
    groups = [{"params": model.attention.parameters(), "lr": 5e-2}, {"params": late, "lr": 2e-3}]
    epochs(model, torch.optim.Adam(groups), lambda rows: model(x[rows], labels=y[rows]).loss, 25, len(x))
    return model


@torch.no_grad()
def measure(model: ConsistentClassifier) -> dict[str, float]:
    """The columns of the table, on new images."""
    x, y, mask = images(300, torch.Generator().manual_seed(10**6))
    out = model(x)
    logs = [probabilities.clamp(min=torch.finfo(torch.float32).tiny).log() for probabilities in out.maps]
    fine, coarse = (average_precision(probabilities, mask) for probabilities in out.maps)
    # an entropy of 1 is a uniform map
    entropy = [
        -(p * log).sum((1, 2)).mean().item() / torch.tensor(p[0].numel()).log().item() for p, log in zip(out.maps, logs)
    ]
    numbers = (
        (out.logits.argmax(-1) == y).double().mean().item(),
        consistency_loss(*logs, torch.zeros_like(logs[1]), 2).item(),
        fine, coarse, abs(fine - coarse), *entropy,
    )  # fmt: skip
    return dict(zip(COLUMNS, numbers, strict=True))


def average_precision(probabilities: Tensor, mask: Tensor) -> float:
    """Mean over the images with a disc; the map enlarged to pixels by repetition."""
    large = nn.functional.interpolate(probabilities[:, None], size=(SIDE, SIDE))[:, 0]
    pairs = [(m, p) for m, p in zip(mask, large, strict=True) if m.any()]
    return statistics.mean(float(average_precision_score(m.flatten(), p.flatten())) for m, p in pairs)


def draw(path: Path, models: dict[float, ConsistentClassifier]) -> None:
    """Two images with their discs and both maps, a row for each alpha."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y, mask = images(20, torch.Generator().manual_seed(10**6 + 1))
    chosen = [int(i) for i in y.nonzero().flatten()[:2]]
    figure, axes = pyplot.subplots(len(models), 6, figsize=(10, 1.8 * len(models)), layout="constrained")
    for row, (alpha, model) in zip(axes, models.items(), strict=True):
        with torch.no_grad():
            maps = model(x).maps
        row[0].set_ylabel(f"alpha = {alpha:g}")
        for place, image in enumerate(chosen):
            for axis, picture, title in zip(row[3 * place :], (x[image, 0], maps[0][image], maps[1][image]), ("image", "16 x 16", "8 x 8"), strict=False):  # fmt: skip
                axis.imshow(picture, cmap="gray" if title == "image" else "viridis", extent=(0, SIDE, SIDE, 0))
                axis.contour(mask[image].float(), [0.5], colors="red", linewidths=0.8)
                axis.set(xticks=[], yticks=[], title=title if alpha == ALPHAS[0] else "")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/consistency"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path, folder = arguments.output.with_suffix(".csv"), arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(path) if path.exists() else {}
    missing = [(alpha, seed) for seed in arguments.seeds for alpha in ALPHAS if (alpha, seed) not in rows]
    shown = {}
    with Progress() as progress:
        task = progress.add_task("consistency", total=len(missing))
        for alpha, seed in missing:
            model = fit(alpha, seed)
            if seed == arguments.seeds[0]:
                shown[alpha] = model
            rows[alpha, seed] = measure(model)
            progress.print(f"alpha {alpha:g}, seed {seed}: {rows[alpha, seed]}")
            progress.advance(task)
            save(path, rows)
            if len(shown) == len(ALPHAS):
                draw(arguments.output.with_suffix(".png"), shown)
                shown = {}
    write(arguments.output, arguments.seeds, rows)
    return 0


Rows = dict[tuple[float, int], dict[str, float]]


def read(path: Path) -> Rows:
    """(alpha, seed) -> numbers, of a run that was stopped."""
    with path.open(newline="") as file:
        return {
            (float(row["alpha"]), int(row["seed"])): {c: float(row[c]) for c in COLUMNS} for row in csv.DictReader(file)
        }


def save(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["alpha", "seed", *COLUMNS])
        table.writerows(
            [f"{alpha:g}", seed, *(f"{found[c]:.4f}" for c in COLUMNS)] for (alpha, seed), found in rows.items()
        )


def write(output: Path, seeds: list[int], rows: Rows) -> None:
    """The table as Markdown: seeds, and their mean."""
    header = ["alpha", "seed", *COLUMNS]
    table = []
    for alpha in ALPHAS:
        found = [rows[alpha, seed] for seed in seeds]
        table += [[f"{alpha:g}", str(s), *(f"{f[c]:.4f}" for c in COLUMNS)] for s, f in zip(seeds, found, strict=True)]
        table.append([f"{alpha:g}", "mean", *(f"{statistics.mean(f[c] for f in found):.4f}" for c in COLUMNS)])
    command = f"python scripts/consistency_experiment.py --seeds {' '.join(map(str, seeds))}"
    lines = [
        "# Consistent attention", "", *__doc__.strip().splitlines()[:1], "", *__doc__.strip().splitlines()[4:], "",
        f"Command: `{command}` (torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}, one CPU thread, "
        f"{datetime.date.today()}).", "",
        "AP gap is |AP fine - AP coarse|; entropy is relative to that of a uniform map, 1 means no attention at all.", "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *table)), "",
        f"![Maps of both layers at the three weights, seed {seeds[0]}; the disc is outlined]({output.name}.png)", "",
    ]  # fmt: skip
    output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
