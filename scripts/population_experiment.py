"""Sixteen small ViTs on digits: trained together, against sixteen runs in sequence; and what exploiting adds.

python scripts/population_experiment.py [--members 16] [--steps 120] [--seeds 0 1 2] [--output docs/benchmarks]

First the time: the sequential run is what a reader would write, transformers' model with its own attention and torch's
fused AdamW, one model after the other on the same batches; the two alternate, so that both see the same machine. Then
whether both end with the same weights in float64. Then population-based training against random search, from the same
learning rates.
"""

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import Trainer, ViTConfig, ViTForImageClassification, set_seed

from hf_attn.recipes.data import digits
from hf_attn.recipes.population_arguments import PopulationArguments, epoch_order
from hf_attn.recipes.population_trainer import PopulationTrainer

SIZES = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 10, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BATCH, TARGET = 16, 0.6
SPACE = {"learning_rate": ("loguniform", 3e-5, 3e-2)}


def load(split: str, dtype: torch.dtype = torch.float32) -> list[dict[str, object]]:
    """Images (1,8,8) from -1 to 1, and labels."""
    rows = digits()[split]
    pixels = [
        torch.from_numpy(np.asarray(image, dtype=np.float32)[None, ..., 0] / 127.5 - 1) for image in rows["image"]
    ]
    return [{"pixel_values": p.to(dtype), "labels": int(label)} for p, label in zip(pixels, rows["labels"])]


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def model(dtype: torch.dtype = torch.float32) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SIZES)).to(dtype)


def together(members: int, steps: int, data: list, rates: list[float], dtype: torch.dtype) -> PopulationTrainer:
    arguments = PopulationArguments(
        "runs/population", population_size=members, max_steps=steps, per_device_train_batch_size=BATCH,
        weight_decay=0.05, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    trainer = PopulationTrainer(lambda: model(dtype), arguments, data, hyperparameters={"learning_rate": rates})
    trainer.train()
    return trainer


def one(member: int, steps: int, data: list, rate: float, dtype: torch.dtype, fused: bool) -> ViTForImageClassification:
    """The run of one member alone."""
    set_seed(member)
    made = model(dtype).train()
    decayed = Trainer.get_decay_parameter_names(None, made)
    groups = [
        {"params": [p for n, p in made.named_parameters() if (n in decayed) == yes], "weight_decay": 0.05 * yes}
        for yes in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, rate, fused=fused)
    pixels, labels = torch.stack([row["pixel_values"] for row in data]), torch.tensor([row["labels"] for row in data])
    per_epoch = -(-len(data) // BATCH)
    for step in range(steps):
        if step % per_epoch == 0:
            order = epoch_order(member, step // per_epoch, len(data))
        rows = order[step % per_epoch * BATCH :][:BATCH]
        made(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return made


def rates_of(members: int) -> list[float]:
    return torch.logspace(-4, -2, members, dtype=torch.float64).tolist()


def measure(members: int, steps: int, repeats: int) -> list[dict[str, object]]:
    """Seconds of both ways, which alternate."""
    data, rates, rows = load("train"), rates_of(members), []
    together(members, 3, data, rates, torch.float32)
    one(0, 3, data, rates[0], torch.float32, fused=True)
    for repeat in tqdm(range(repeats), desc="timing"):
        start = time.perf_counter()
        together(members, steps, data, rates, torch.float32)
        middle = time.perf_counter()
        for i in range(members):
            one(i, steps, data, rates[i], torch.float32, fused=True)
        end = time.perf_counter()
        rows.append({"part": "time", "repeat": repeat, "together": middle - start, "in sequence": end - middle})
    return rows


def difference(members: int, steps: int) -> float:
    """The largest difference of a weight between the two ways, in float64."""
    data, rates = load("train", torch.float64), rates_of(members)
    trainer = together(members, steps, data, rates, torch.float64)
    largest = 0.0
    for i in range(members):
        expected = one(i, steps, data, rates[i], torch.float64, fused=False).state_dict()
        for name, tensor in trainer.members.model(i).state_dict().items():
            largest = max(largest, (tensor - expected[name]).abs().max().item())
    return largest


def search(seed: int, steps: int, members: int = 8) -> list[dict[str, object]]:
    """Validation decides in population-based training; the test accuracy of every member at the end is reported."""
    train, validation, test = load("train"), load("validation"), load("test")
    rows: list[dict[str, object]] = []
    for name, every in (("random search", 0), ("exploit", steps // 4)):
        arguments = PopulationArguments(
            "runs/population", population_size=members, max_steps=steps, per_device_train_batch_size=BATCH, space=SPACE,
            weight_decay=0.05, lr_scheduler_type="constant", exploit_every=every, metric_for_best_model="accuracy",
            seed=1000 * seed, disable_tqdm=True,
        )  # fmt: skip
        trainer = PopulationTrainer(model, arguments, train, validation, compute_metrics=accuracy)
        trainer.train()
        best = trainer.best_member()
        final = PopulationTrainer(
            [trainer.members.model(i) for i in range(members)], arguments, test, test, compute_metrics=accuracy
        )
        accuracies = [row["eval_accuracy"] for row in final.evaluate()]
        scores = sorted(accuracies)
        row = {"part": "search", "method": name, "seed": seed, "chosen": accuracies[best], "best": scores[-1]}
        rows.append({**row, "median": statistics.median(scores), "worst": scores[0]})
    return rows


def draw(times: list[dict[str, object]], found: list[dict[str, object]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ways = ("in sequence", "together")
    medians = [statistics.median(float(row[way]) for row in times) for way in ways]
    left.barh(ways, medians, color=["0.6", "C0"])
    left.axvline(TARGET * medians[0], color="0.3", linestyle=":", label=f"{TARGET} of the sequence")
    left.set(xlabel="seconds (median)", title="The same runs")
    left.legend(frameon=False)
    for x, method in enumerate(("random search", "exploit")):
        for row in (row for row in found if row["method"] == method):
            at = x + 0.15 * (int(row["seed"]) - 1)
            right.plot([at, at], [row["worst"], row["best"]], color=f"C{x}")
            right.plot(at, row["median"], "o", color=f"C{x}")
    right.set_xticks([0, 1], ["random search", "exploit and explore"])
    right.set(ylabel="test accuracy", title="Worst, median and best member; a line a seed")
    figure.savefig(path, dpi=140)


def report(times: list, largest: float, check: tuple[int, int], found: list, arguments: argparse.Namespace) -> str:
    medians = {way: statistics.median(row[way] for row in times) for way in ("together", "in sequence")}
    ratio = statistics.median(row["together"] / row["in sequence"] for row in times)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines = [
        "# A population of small ViTs on digits\n",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- {versions}; CPU, {torch.get_num_threads()} thread(s); {datetime.date.today()}",
        f"- seeds: members 0 to {arguments.members - 1}; search {', '.join(map(str, arguments.seeds))}\n",
        "![Seconds, and accuracy of the members](population.png)\n",
        "## Time\n",
        f"{arguments.members} ViTs (width 32, 2 layers, 17 tokens), {arguments.steps} steps of {BATCH} images, float32. In "
        "sequence: transformers' sdpa attention and torch's fused AdamW. Both include making the models. The ways alternate.\n",
        "| repeat | together, s | in sequence, s | ratio |",
        "|---|---|---|---|",
        *(
            f"| {r['repeat']} | {r['together']:.2f} | {r['in sequence']:.2f} | {r['together'] / r['in sequence']:.3f} |"
            for r in times
        ),
        f"| median | {medians['together']:.2f} | {medians['in sequence']:.2f} | {ratio:.3f} |\n",
        f"Target: a ratio of at most {TARGET}: {'met' if ratio <= TARGET else 'not met'}.\n",
        f"Largest difference of any weight after {check[1]} steps of {check[0]} members, in float64: {largest:.1e} (target "
        f"1e-12: {'met' if largest <= 1e-12 else 'not met'}).\n",
        "## Exploit and explore against random search\n",
        f"8 ViTs, learning rates log-uniform from 3e-5 to 3e-2, {arguments.search_steps} steps, the same draws for both; three "
        "rounds of exploiting. Test accuracy; `chosen` is the member that is best on the validation images.\n",
        "| method | seed | chosen | best | median | worst |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['method']} | {r['seed']} | {r['chosen']:.3f} | {r['best']:.3f} | {r['median']:.3f} | {r['worst']:.3f} |"
            for r in found
        ),
        "\nDirection to show, in each seed: the worst member not worse than in random search, the best not lower by more than "
        ".02.\n",
    ]
    for seed in arguments.seeds:
        plain, exploit = (
            next(r for r in found if r["method"] == method and r["seed"] == seed)
            for method in ("random search", "exploit")
        )
        holds = exploit["worst"] >= plain["worst"] and exploit["best"] >= plain["best"] - 0.02
        lines.append(f"- seed {seed}: {'holds' if holds else 'does not hold'}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120, help="of a timed run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check-steps", type=int, default=5, help="of the comparison in float64")
    parser.add_argument("--search-steps", type=int, default=320)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the search")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    largest = difference(arguments.members, arguments.check_steps)
    times = measure(arguments.members, arguments.steps, arguments.repeats)
    found = [row for seed in tqdm(arguments.seeds, desc="search") for row in search(seed, arguments.search_steps)]
    rows = [*times, {"part": "difference", "difference": largest}, *found]
    with (arguments.output / "population.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    draw(times, found, arguments.output / "population.png")
    text = report(times, largest, (arguments.members, arguments.check_steps), found, arguments)
    (arguments.output / "population.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
