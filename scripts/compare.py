"""Every mechanism against softmax, trained with the same budget: digits (ViT), and for causal ones also text (GPT-2).

python scripts/compare.py [--tasks digits lm] [--mechanisms NAME ...] [--seeds 0 1 2] [--output docs/benchmarks/compare]

A row is the training of `hf-attn train configs/mechanisms/TASK.yaml --attn_implementation=NAME --seed=SEED` without its
checkpoints. Rows are appended to the CSV as they are finished. The same command run again trains only what is missing,
and what the configuration has changed for.
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import PrinterCallback

import hf_attn
from hf_attn.recipes.arguments import Recipe, read
from hf_attn.recipes.train import make_trainer, measure, prepare

ROOT = Path(__file__).parents[1]
QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is measured on a task, and how far from softmax a mechanism may be.

    Attributes:
        title: for people.
        metric: on the test split.
        form: of the metric as text.
        distance: of a mean to softmax's, positive where it is worse.
        limit: the largest distance that counts as within.
        stated: the limit for people.
    """

    title: str
    metric: str
    form: str
    distance: Callable[[float, float], float]
    limit: float
    stated: str

    def limit_near(self, softmax: float) -> float:
        """The metric at which the limit is reached; the distance is linear in it."""
        return softmax + self.limit / self.distance(softmax + 1, softmax)


COMPARISONS = {
    "digits": Comparison(
        "digits, ViT", "accuracy", ".3f", lambda mean, softmax: softmax - mean, 0.05,
        "test accuracy at most 0.05 below softmax's",
    ),
    "lm": Comparison(
        "Python documentation, GPT-2", "perplexity", ".2f", lambda mean, softmax: mean / softmax - 1, 0.10,
        "test perplexity at most 10 % above softmax's",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model; `seconds` of CPU time, for training alone.

    Attributes:
        recipe: fingerprint of everything the recipe says.
        value: the task's metric on the test split.
    """

    task: str
    mechanism: str
    seed: int
    recipe: str
    value: float
    parameters: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.task, self.mechanism, self.seed, self.recipe


def recipe_of(task: str, mechanism: str, seed: int, folder: Path) -> Recipe:
    changes = {"attn_implementation": mechanism, "seed": seed, "output_dir": str(folder), **QUIET}
    return read(ROOT / "configs" / "mechanisms" / f"{task}.yaml", changes)


def fingerprint(recipe: Recipe) -> str:
    said = {key: value for key, value in recipe.given.items() if key != "output_dir"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def train(recipe: Recipe, key: tuple[str, str, int, str], metric: str) -> Row:
    prepared = prepare(recipe)
    trainer = make_trainer(recipe, prepared)
    trainer.remove_callback(PrinterCallback)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    value = measure(trainer, prepared)[f"test_{metric}"]
    return Row(*key, round(value, 6), prepared.model.num_parameters(), round(seconds, 2))


def load(path: Path) -> list[Row]:
    """The rows that were finished; the last line may have been cut by a kill."""
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [
        Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(whole.splitlines())
    ]


def save(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def finish(table: Path, wanted: dict[tuple[str, str, int, str], Recipe], metrics: dict[str, str]) -> list[Row]:
    """The rows of `table` after training what is missing: each is appended as soon as it is known.

    Args:
        table: a CSV; rows of the same task, mechanism and seed whose recipe was another one are dropped from it.
        wanted: `Row.key` -> recipe.
        metrics: task -> metric.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = load(table)
    done = {row.key for row in rows}
    missing = [key for key in wanted if key not in done]
    replaced = {key[:3] for key in missing}
    rows = [row for row in rows if row.key[:3] not in replaced]
    save(table, rows)
    for key in (bar := tqdm(missing, desc="models")):
        bar.set_postfix_str(" ".join(map(str, key[:3])))
        rows.append(train(wanted[key], key, metrics[key[0]]))
        with table.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(dataclasses.astuple(rows[-1]))
    return rows


def values_of(rows: list[Row], task: str) -> dict[str, list[float]]:
    """Mechanism -> the metric of every seed, in the order of the register."""
    of_task = sorted((row for row in rows if row.task == task), key=lambda row: row.seed)
    trained = [name for name in hf_attn.list_mechanisms() if any(row.mechanism == name for row in of_task)]
    return {name: [row.value for row in of_task if row.mechanism == name] for name in trained}


def section(task: str, rows: list[Row]) -> list[str]:
    """The table of a task as Markdown."""
    comparison, table = COMPARISONS[task], values_of(rows, task)
    softmax = statistics.mean(table["softmax"])
    seeds = sorted({row.seed for row in rows if row.task == task})
    lines, within = [], 0
    for name, values in table.items():
        of_name = [row for row in rows if (row.task, row.mechanism) == (task, name)]
        mean = statistics.mean(values)
        distance = comparison.distance(mean, softmax)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        within += name != "softmax" and distance <= comparison.limit
        verdict = "" if name == "softmax" else "yes" if distance <= comparison.limit else "**no**"
        by_seed = " ".join(f"{value:{comparison.form}}" for value in values)
        seconds = statistics.mean(row.seconds for row in of_name)
        lines.append(
            f"| `{name}` | {by_seed} | {mean:{comparison.form}} | {spread:{comparison.form}} | {distance:+.3f} | {verdict} "
            f"| {of_name[0].parameters:,} | {seconds:.0f} |"
        )
    settings = yaml.safe_load((ROOT / "configs" / "mechanisms" / f"{task}.yaml").read_text(encoding="utf-8"))
    return [
        f"## {comparison.title}",
        "",
        f"[configs/mechanisms/{task}.yaml](../../configs/mechanisms/{task}.yaml): {settings['max_steps']} steps of "
        f"{settings['per_device_train_batch_size']} examples, learning rate {settings['learning_rate']:g}, the same for all. "
        f"Within: {comparison.stated}. **{within} of {len(table) - 1} mechanisms are within.**",
        "",
        f"| mechanism | test {comparison.metric}, seeds {', '.join(map(str, seeds))} | mean | std | distance | within | parameters | CPU s |",
        "|---|---|---|---|---|:-:|---|---|",
        *lines,
        "",
    ]


def markdown(rows: list[Row], tasks: list[str], arguments: argparse.Namespace) -> str:
    lines = [
        "# Every mechanism trained with softmax's budget",
        "",
        f"Command: `python scripts/compare.py --seeds {' '.join(map(str, arguments.seeds))}` ({datetime.date.today()}, torch "
        f"{torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, hf_attn {hf_attn.__version__}, Python "
        f"{platform.python_version()}, one CPU thread).",
        "",
        "Small models from scratch, with the same data, batches, steps and learning rate for every mechanism. These were chosen "
        "by what softmax reaches with them (test accuracies were seen), so they favour softmax. The options are those of the "
        "configurations and fit the sizes, not the score, with two exceptions on digits: dynamic_conv had 17 taps at first, and "
        "0.556, because [CLS] could not reach most pixels; and context_pool the supports of its default, so small that it was "
        "softmax to the last bit. softmax_plus is softmax at the length it is made for (n_ref). The lengths (65 and 64 tokens) "
        "are far below those the fast mechanisms are for: this shows that they learn, not that they pay. A seed decides "
        "weights, order of the data and random features, not the split.",
        "",
        "distance: of the mean to softmax's, positive where it is worse (accuracy: difference; perplexity: relative). std: over "
        "seeds. CPU s: of training, on a machine that others used too.",
        "",
    ]
    for task in tasks:
        lines += section(task, rows)
    return "\n".join([*lines, "![The metric of every seed, and the stated limit](compare.png)", ""])


def draw(rows: list[Row], tasks: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 5.5), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        comparison, table = COMPARISONS[task], values_of(rows, task)
        softmax = statistics.mean(table["softmax"])
        names = list(table)
        for place, name in enumerate(names):
            axis.plot(table[name], [place] * len(table[name]), "o", color="C0", alpha=0.6, markeredgewidth=0)
            axis.plot(statistics.mean(table[name]), place, "|", color="black", markersize=14)
        axis.axvline(softmax, color="black", linewidth=1, label="softmax, mean")
        axis.axvline(comparison.limit_near(softmax), color="C3", linewidth=1, linestyle="--", label="limit")
        axis.set(
            title=comparison.title, xlabel=f"test {comparison.metric}", yticks=range(len(names)), yticklabels=names
        )
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.legend(loc="best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--mechanisms", nargs="+", help="all that a task's configuration lists by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "compare", help="without suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted: dict[tuple[str, str, int, str], Recipe] = {}
        # seeds outermost: a table of one seed is complete early
        for seed, task in itertools.product(arguments.seeds, arguments.tasks):
            listed = yaml.safe_load((ROOT / "configs" / "mechanisms" / f"{task}.yaml").read_text(encoding="utf-8"))
            for name in listed["mechanisms"]:
                if name in (arguments.mechanisms or listed["mechanisms"]):
                    recipe = recipe_of(task, name, seed, Path(folder))
                    wanted[task, name, seed, fingerprint(recipe)] = recipe
        metrics = {task: comparison.metric for task, comparison in COMPARISONS.items()}
        rows = finish(arguments.output.with_suffix(".csv"), wanted, metrics)
    tasks = [task for task in COMPARISONS if "softmax" in values_of(rows, task)]
    arguments.output.with_suffix(".md").write_text(markdown(rows, tasks, arguments), encoding="utf-8")
    draw(rows, tasks, arguments.output.with_suffix(".png"))
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
