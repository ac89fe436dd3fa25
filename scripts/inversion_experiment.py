"""Plug-In Inversion on digits: are its pictures recognised by classifiers that had no part in making them?

python scripts/inversion_experiment.py [--seeds 0 1 2] [--steps 50] [--output docs/benchmarks]

Small ViTs are trained on scikit-learn's digits, enlarged to 16 x 16: one is inverted, two others (other seeds, other
widths) and a support vector machine judge the pictures. Judges must be competent: the run stops if one is right on no more
than 0.7 of the test images. Rows leave augmentations out, down to plain optimisation.
"""

import argparse
import csv
import datetime
import platform
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.svm import SVC
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from hf_attn.analysis.inversion import (
    InversionOutput,
    PlugInInversionConfig,
    PlugInInverter,
    draw,
    resize,
    total_variation,
)
from hf_attn.recipes.data import digits

ROWS = {
    "none": {"way": None, "jitter": 0, "color_shift_mean": 0.0, "color_shift_std": 0.0},
    "total variation 0.1": {
        "way": None,
        "jitter": 0,
        "color_shift_mean": 0.0,
        "color_shift_std": 0.0,
        "tv_weight": 0.1,
    },
    "jitter": {"way": None, "color_shift_mean": 0.0, "color_shift_std": 0.0},
    "color shift": {"way": None, "jitter": 0},
    "zoom and centre": {"jitter": 0, "color_shift_mean": 0.0, "color_shift_std": 0.0},
    "Plug-In Inversion (center)": {},
    "Plug-In Inversion (zoom)": {"way": "zoom"},
}
DEFAULTS = {"jitter": 1, "color_shift_mean": 0.5, "color_shift_std": 0.5, "num_copies": 6, "learning_rate": 0.03}
SIDE, COMPETENT = 16, 0.7


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n,3,16,16) from 0 to 1, and labels."""
    rows = digits()[split]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]]) / 255
    return resize(torch.from_numpy(pixels).permute(0, 3, 1, 2), SIDE), torch.tensor(rows["labels"])


def train(seed: int, width: int, pixels: torch.Tensor, labels: torch.Tensor, epochs: int) -> ViTForImageClassification:
    """A ViT of three layers on 4 x 4 patches, which sees its pictures shifted by up to one pixel."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=3, num_attention_heads=4, intermediate_size=2 * width, image_size=SIDE,
        patch_size=4, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(64):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            seen = (pixels[rows].roll(shift, dims=(-2, -1)) - 0.5) / 0.5
            loss = torch.nn.functional.cross_entropy(model(pixel_values=seen).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def probabilities(model: ViTForImageClassification, images: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=(images - 0.5) / 0.5).logits.softmax(dim=-1)


def measure(found: InversionOutput, judges: list[ViTForImageClassification], machine: SVC) -> dict[str, float]:
    """Pictures that the inverted model and the judges take for their class, and their total variation."""
    target = torch.tensor(found.targets)
    judged = [probabilities(judge, found.images) for judge in judges]
    return {
        "own": (found.logits.argmax(-1) == target).float().mean().item(),
        "judge 1": (judged[0].argmax(-1) == target).float().mean().item(),
        "judge 2": (judged[1].argmax(-1) == target).float().mean().item(),
        "machine": float((machine.predict(found.images.flatten(1).numpy()) == target.numpy()).mean()),
        "judge probability": statistics.mean(p.gather(1, target[:, None]).mean().item() for p in judged),
        "total variation": total_variation(found.images).mean().item(),
    }


def experiment(seed: int, steps: int, epochs: int, output: Path) -> list[dict[str, float | str]]:
    (pixels, labels), (tests, truth) = load("train"), load("test")
    own, *judges = (train(10 * seed + i, width, pixels, labels, epochs) for i, width in enumerate((48, 48, 64)))
    machine = SVC().fit(pixels.flatten(1).numpy(), labels.numpy())
    accuracy = [(probabilities(m, tests).argmax(-1) == truth).float().mean().item() for m in (own, *judges)]
    accuracy.append(machine.score(tests.flatten(1).numpy(), truth.numpy()))
    if min(accuracy) <= COMPETENT:
        raise SystemExit(f"seed {seed}: a judge is right on only {min(accuracy):.3f} of the test images: {accuracy}")
    print(f"seed {seed}: test accuracy of the model, the judges and the machine {[round(a, 3) for a in accuracy]}")
    rows: list[dict[str, float | str]] = []
    for name, options in tqdm(ROWS.items(), desc=f"seed {seed}"):
        # one stage of plain optimisation gets as many steps as all seven together
        stages = 7 if options.get("way", "center") else 1
        config = PlugInInversionConfig(**{**DEFAULTS, **options, "steps": steps * 7 // stages, "seed": seed})
        found = PlugInInverter(own, config=config).invert(range(10), progress=False)
        rows.append({"seed": seed, "augmentations": name, **measure(found, judges, machine)})
        if seed == 0 and (name == "none" or name.startswith("Plug-In")):
            slug = {"none": "none", "Plug-In Inversion (center)": "center", "Plug-In Inversion (zoom)": "zoom"}[name]
            draw(found, output / f"inversion_{slug}.png")
    return rows


def report(rows: list[dict[str, float | str]], command: str, steps: int) -> str:
    """The table, means over seeds, and whether the direction holds in each seed."""
    names = [n for n in rows[0] if n not in ("seed", "augmentations")]
    seeds = sorted({row["seed"] for row in rows})

    def value(label: str, name: str, seed: object = None) -> float:
        chosen = [row for row in rows if row["augmentations"] == label and seed in (None, row["seed"])]
        return statistics.mean(float(row[name]) for row in chosen)

    lines = [f"| augmentations | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {label} | {' | '.join(f'{value(label, n):.3f}' for n in names)} |" for label in ROWS]
    verdicts = []
    for label in ("Plug-In Inversion (center)", "Plug-In Inversion (zoom)"):
        for seed in seeds:
            ratio = value(label, "judge probability", seed) / value("none", "judge probability", seed)
            hits = [sum(value(x, f"judge {i}", seed) for i in (1, 2)) / 2 for x in (label, "none")]
            variation = [value(x, "total variation", seed) for x in (label, "none")]
            holds = ratio >= 1.5 and hits[0] > hits[1] and variation[0] < variation[1]
            verdicts.append(
                f"| {label} | {seed} | {ratio:.2f} | {hits[0]:.2f} / {hits[1]:.2f} | {variation[0]:.3f} / {variation[1]:.3f} "
                f"| {'yes' if holds else 'no'} |"
            )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return "\n".join(
        [
            "# Plug-In Inversion on digits\n",
            f"- command: `{command}`",
            f"- seeds: {', '.join(map(str, seeds))}; {versions}; CPU; {datetime.date.today()}",
            f"- {steps} steps in each of seven stages (plain rows: {7 * steps} in one), one picture a class\n",
            "Share of pictures that the inverted model (`own`), two ViTs trained apart from it and a support vector machine take "
            "for the intended class; mean probability that the two ViTs give it; total variation. Means over seeds.\n",
            *lines,
            "\nThe direction to show: against plain optimisation (`none`) at least 1.5 times the judges' probability, more pictures "
            "recognised, lower total variation.\n",
            "| method | seed | probability, times plain | recognised, against plain | total variation, against plain | holds |",
            "|---|---|---|---|---|---|",
            *verdicts,
            "\nSeed 0, plain optimisation and Plug-In Inversion (center, zoom):\n",
            "![Plain optimisation](inversion_none.png)\n",
            "![Plug-In Inversion, center](inversion_center.png)\n",
            "![Plug-In Inversion, zoom](inversion_zoom.png)\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50, help="of each stage")
    parser.add_argument("--epochs", type=int, default=25, help="of the classifiers")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = [
        row for seed in arguments.seeds for row in experiment(seed, arguments.steps, arguments.epochs, arguments.output)
    ]
    with (arguments.output / "inversion.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    command = f"python {' '.join(sys.argv)}"
    (arguments.output / "inversion.md").write_text(report(rows, command, arguments.steps), encoding="utf-8")
    print(report(rows, command, arguments.steps))


if __name__ == "__main__":
    main()
