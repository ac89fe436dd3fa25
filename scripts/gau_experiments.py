"""The ablation and the comparison of gated attention units at the scale of minutes: perplexity, and time per step.

python scripts/gau_experiments.py PART [--seeds 0 1 2] [--models ...] [--steps N] [--output docs/benchmarks/gau]

Parts: synthetic and pydoc compare FLASH-Quad, FLASH, its local part alone and its linear part alone; baselines compares
both with Transformer++ and MC-TFM++ of as many parameters; time measures steps against length. Results of a run are
added to results.json in the output folder, and the page and pictures are made anew from all of it.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import hf_attn
from hf_attn.bench.report import OtherLoad

Fields = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One comparison of causal language models.

    Attributes:
        claim: the direction the paper's page asks for.
        data: seed -> training and validation sequences (S,N).
        fields: of every config.
        models: label -> further fields, and which part of the units works.
        beside: a part with the same data and training, and its models that belong into the table.
    """

    claim: str
    data: Callable[[int], tuple[Tensor, Tensor]]
    fields: Fields
    models: dict[str, tuple[Fields, str]]
    steps: int
    batch: int
    learning_rate: float = 3e-3
    beside: tuple[str, tuple[str, ...]] = ("", ())


UNITS: dict[str, tuple[Fields, str]] = {
    "FLASH-Quad": ({"attention": "quadratic"}, "both"),
    "FLASH": ({"attention": "mixed_chunk"}, "both"),
    "local part only": ({"attention": "mixed_chunk"}, "local"),
    "linear part only": ({"attention": "mixed_chunk", "rel_pos_bias": "none"}, "linear"),
}
AGAINST: dict[str, tuple[Fields, str]] = {
    "FLASH-Quad": ({"attention": "quadratic"}, "both"),
    "FLASH": ({"attention": "mixed_chunk"}, "both"),
    "Transformer++": ({"attention": "quadratic", "block": "transformer"}, "both"),
    "MC-TFM++": ({"attention": "mixed_chunk", "block": "transformer"}, "both"),
}
SYMBOLS, TOPICS = 24, 4


def synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """768 + 64 sequences of 128 symbols: a Markov chain whose table is rolled by the hidden topic of the sequence."""
    generator = torch.Generator().manual_seed(1000 + seed)
    table = (2.5 * torch.randn(SYMBOLS, SYMBOLS, generator=generator)).softmax(dim=-1)
    tables = torch.stack([table.roll(SYMBOLS // TOPICS * topic, dims=1) for topic in range(TOPICS)])
    topic = torch.randint(TOPICS, (832,), generator=generator)
    tokens = [torch.randint(SYMBOLS, (832,), generator=generator)]
    for _ in range(127):
        tokens.append(tables[topic, tokens[-1]].multinomial(1, generator=generator)[:, 0])
    sequences = torch.stack(tokens, dim=1)
    return sequences[:768], sequences[768:]


def pydoc(seed: int) -> tuple[Tensor, Tensor]:
    """The bytes of Python's help texts in rows of 512; every tenth topic is for validation, whatever the seed."""
    from pydoc_data.topics import topics

    rows = []
    for held_out in (False, True):
        text = "".join(topics[name] for i, name in enumerate(sorted(topics)) if (i % 10 == 9) is held_out)
        data = torch.tensor(list(text.encode()), dtype=torch.long)
        rows.append(data[: len(data) // 512 * 512].view(-1, 512))
    return rows[0], rows[1]


SMALL: Fields = {
    "vocab_size": SYMBOLS, "hidden_size": 64, "num_hidden_layers": 3, "query_key_dim": 32, "chunk_size": 16,
    "max_position_embeddings": 128, "norm_type": "scale_norm",
}  # fmt: skip
BYTES: Fields = {
    "vocab_size": 256, "hidden_size": 96, "num_hidden_layers": 4, "query_key_dim": 48, "chunk_size": 64,
    "max_position_embeddings": 512, "norm_type": "scale_norm",
}  # fmt: skip
PARTS = {
    "synthetic": Part(
        "mixed about equal to quadratic, both better than the local part only, that better than the linear part only",
        synthetic,
        SMALL,
        UNITS,
        steps=250,
        batch=24,
    ),
    "pydoc": Part(
        "the same on text: bytes of Python's help texts",
        pydoc,
        BYTES,
        UNITS,
        steps=300,
        batch=6,
    ),
    "baselines": Part(
        "units against transformers of as many parameters, after as many steps, whichever way it falls",
        pydoc,
        BYTES,
        {label: AGAINST[label] for label in ("Transformer++", "MC-TFM++")},
        steps=300,
        batch=6,
        beside=("pydoc", ("FLASH-Quad", "FLASH")),
    ),
}


def config_of(fields: Fields) -> hf_attn.GauConfig:
    """A config; a transformer gets half as many layers, and a feed-forward layer that makes it as large as the units."""
    if fields.get("block") != "transformer":
        return hf_attn.GauConfig(**fields)
    units = hf_attn.GauModel(hf_attn.GauConfig(**{**fields, "block": "gau"}))
    dim = fields["hidden_size"]
    kept = {k: v for k, v in fields.items() if k != "query_key_dim"}
    kept |= {"num_hidden_layers": fields["num_hidden_layers"] // 2, "num_attention_heads": max(1, dim // 32)}
    base = hf_attn.GauModel(hf_attn.GauConfig(**kept, intermediate_size=1))
    missing = units.num_parameters() - base.num_parameters()
    wide = 1 + round(missing / kept["num_hidden_layers"] / (3 * dim + 2))
    return hf_attn.GauConfig(**kept, intermediate_size=wide)


def model_of(part: Part, label: str, seed: int) -> hf_attn.GauForCausalLM:
    """A fresh model; "local" and "linear" alone have the other part's copies at zero for good."""
    torch.manual_seed(seed)
    fields, works = part.models[label]
    model = hf_attn.GauForCausalLM(config_of({**part.fields, **fields}))
    silent = {"both": slice(0, 0), "local": slice(2, 4), "linear": slice(0, 2)}[works]
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "beta")) and works != "both":
            parameter.data[silent] = 0
            mask = torch.ones_like(parameter)
            mask[silent] = 0
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


def losses(model: hf_attn.GauForCausalLM, rows: Tensor) -> Tensor:
    """(S,N-1) negative log-likelihoods of the rows, in nats."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part, use_cache=False).logits for part in rows.split(16)])
    model.train()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def train(part: Part, label: str, seed: int, steps: int) -> Fields:
    """Train one model; its perplexities and curves."""
    rows, held_out = part.data(seed)
    model = model_of(part, label, seed).train()
    # a decayed weight that has to stay at zero does
    optimizer = torch.optim.AdamW(model.parameters(), lr=part.learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    generator = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    validation: list[tuple[int, float]] = []
    started = time.perf_counter()
    recent: list[float] = []
    for step, batch in enumerate(tqdm(batches(rows, part.batch, steps, generator), label, steps, leave=False), start=1):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % max(1, steps // 25) == 0:
            curve.append((step, statistics.mean(recent)))
            recent = []
        if step % max(1, steps // 5) == 0:
            validation.append((step, losses(model, held_out[:64]).mean().item()))
    found = losses(model, held_out)
    return {
        "perplexity": math.exp(found.mean()),
        "second half": math.exp(found[:, found.shape[1] // 2 :].mean()),
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - started,
        "training": curve,
        "validation": validation,
    }


def batches(rows: Tensor, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of an epoch in random order, and then of the next."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[:size]]
        order = order[size:]


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def timed(longest: int) -> Fields:
    """Seconds of a training step by model and length, and of a forward pass of FLASH: medians of 3 runs in turns."""
    fields = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "norm_type": "scale_norm"}
    found: Fields = {label: {} for label in [*AGAINST, "FLASH, forward"]}
    for length in tqdm([n for n in LENGTHS if n <= longest], "lengths"):
        models = {
            label: hf_attn.GauForCausalLM(
                config_of({**fields, **extra, "max_position_embeddings": length, "query_key_dim": 64})
            )
            for label, (extra, _) in AGAINST.items()
            if length <= 8192 or extra["attention"] == "mixed_chunk"
        }
        tokens = torch.randint(256, (1, length))
        runs: dict[str, list[float]] = {label: [] for label in found}
        for _ in range(4):
            for label, model in models.items():
                runs[label].append(clock(model, tokens, backward=True))
            runs["FLASH, forward"].append(clock(models["FLASH"], tokens, backward=False))
        for label, seconds in runs.items():
            if seconds:
                # the first run allocates
                found[label][str(length)] = statistics.median(seconds[1:])
    return found


def clock(model: hf_attn.GauForCausalLM, tokens: Tensor, backward: bool) -> float:
    """Seconds of a training step, or of a forward pass."""
    started = time.perf_counter()
    if backward:
        model(tokens, labels=tokens).loss.backward()
    else:
        with torch.no_grad():
            model(tokens, use_cache=False)
    return time.perf_counter() - started


# -- the page ----------------------------------------------------------------------------------------------------------


def write_page(folder: Path, results: Fields) -> None:
    """README.md, results.csv and the pictures, from all results so far."""
    lines = ["# Gated attention units: ablation, comparison, time", ""]
    lines += ["Made by `scripts/gau_experiments.py`; every table names its command. One CPU thread.", ""]
    lines += ["The recipes in full, with curves and samples: [recipes.md](recipes.md).", ""]
    rows = [["part", "model", "seed", "perplexity", "second half", "parameters", "seconds"]]
    for name in (n for n in PARTS if n in results):
        part, run = PARTS[name], results[name]
        other = results.get(part.beside[0], {"models": {}})["models"]
        models = {**{label: other[label] for label in part.beside[1] if label in other}, **run["models"]}
        order = [*part.beside[1], *part.models]
        models = {label: models[label] for label in order if label in models}
        seeds = sorted({seed for model in run["models"].values() for seed in model}, key=int)
        lines += [f"## {name}", "", f"What the page asks for: {part.claim}.", ""]
        sizes = ", ".join(f"{k} {v}" for k, v in part.fields.items())
        lines += [
            f"{sizes}; AdamW, learning rate {part.learning_rate:g} with linear decay, tuned for no model, batches of {part.batch}."
        ]
        lines += [f"Command: `python scripts/gau_experiments.py {name} --seeds {' '.join(seeds)}`{run['made']}", ""]
        lines += ["Validation perplexity, in brackets that of the second half of the rows.", ""]
        lines += [f"| model | parameters | {' | '.join(f'seed {s}' for s in seeds)} | mean |"]
        lines += [f"|---|---|{'---|' * len(seeds)}---|"]
        for label, model in models.items():
            cells = [
                f"{model[s]['perplexity']:.2f} ({model[s]['second half']:.2f})" if s in model else "" for s in seeds
            ]
            shown = [model[s] for s in seeds if s in model]
            means = (statistics.mean(m[key] for m in shown) for key in ("perplexity", "second half"))
            count = next(iter(model.values()))["parameters"]
            lines += [f"| {label} | {count} | {' | '.join(cells)} | {'{:.2f} ({:.2f})'.format(*means)} |"]
            rows += [
                [
                    name,
                    label,
                    s,
                    *(f"{m[k]:.4g}" for k in ("perplexity", "second half")),
                    m["parameters"],
                    f"{m['seconds']:.0f}",
                ]
                for s, m in model.items()
            ]
        if any(s not in model for model in models.values() for s in seeds):
            lines += ["", "An empty cell was not run; means are over the seeds that were."]
        lines += ["", f"![Loss against step]({name}.png)", ""]
        draw_curves(folder / f"{name}.png", models)
    if "time" in results:
        lines += [
            "## time",
            "",
            "Milliseconds of a training step on one row: 4 units or 2 blocks, 128 channels, causal.",
        ]
        lines += [
            f"Command: `python scripts/gau_experiments.py time{results['time']['flags']}`{results['time']['made']}",
            "",
        ]
        times = results["time"]["seconds"]
        lengths = [str(n) for n in LENGTHS if str(n) in times["FLASH"]]
        lines += [f"| model | {' | '.join(lengths)} |", f"|---|{'---|' * len(lengths)}"]
        for label, run in times.items():
            lines += [f"| {label} | {' | '.join(f'{1e3 * run[n]:.0f}' if n in run else '' for n in lengths)} |"]
        lines += ["", "Microseconds a token:", ""]
        lines += [f"| model | {' | '.join(lengths)} |", f"|---|{'---|' * len(lengths)}"]
        for label, run in times.items():
            shares = (f"{1e6 * run[n] / int(n):.0f}" if n in run else "" for n in lengths)
            lines += [f"| {label} | {' | '.join(shares)} |"]
        lines += ["", "![Time of a step against length](time.png)", ""]
        draw_times(folder / "time.png", times)
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "results.csv").write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")


def figure_of(columns: int) -> tuple[Any, Any]:
    """A figure without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_curves(path: Path, models: Fields) -> None:
    """Training and validation loss against the step, means over the seeds."""
    figure, axes = figure_of(2)
    for axis, key in zip(axes, ("training", "validation"), strict=True):
        for label, seeds in models.items():
            curves = [run[key] for run in seeds.values()]
            steps = [step for step, _ in curves[0]]
            axis.plot(steps, [statistics.mean(c[i][1] for c in curves) for i in range(len(steps))], label=label)
        axis.set_xlabel("step")
        axis.set_ylabel(f"{key} loss, nats a token")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def draw_times(path: Path, times: Fields) -> None:
    """Seconds a step, and microseconds a token, against length; all axes are logarithmic."""
    figure, axes = figure_of(2)
    for axis, name in zip(axes, ("seconds a step", "microseconds a token"), strict=True):
        for label, run in times.items():
            values = [t if axis is axes[0] else 1e6 * t / int(n) for n, t in run.items()]
            axis.plot([int(n) for n in run], values, label=label, marker="o", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks([int(n) for n in times["FLASH"]], list(times["FLASH"]), fontsize="small")
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def made(steps: int | None) -> str:
    """What a reader needs beside the command: steps, versions, date."""
    import transformers

    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    after = f"{steps} steps, " if steps else ""
    return f" ({after}{versions}, hf_attn {hf_attn.__version__}, Python {platform.python_version()}, {date})."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "time"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--models", nargs="+", help="train only these models of the part; the others keep their results"
    )
    parser.add_argument("--steps", type=int, help="training steps; those of the part by default")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest row of part time")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/gau"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stored = arguments.output / "results.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}

    def keep() -> None:
        stored.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_page(arguments.output, results)

    if arguments.part == "time":
        load = OtherLoad()
        seconds = timed(arguments.longest)
        flags = "" if arguments.longest == LENGTHS[-1] else f" --longest {arguments.longest}"
        results["time"] = {"seconds": seconds, "flags": flags, "made": f"{made(None)} Meanwhile {load}."}
        keep()
        return 0
    part = PARTS[arguments.part]
    steps = arguments.steps or part.steps
    chosen = arguments.models or list(part.models)
    if unknown := [label for label in chosen if label not in part.models]:
        parser.error(f"part {arguments.part} has no model {unknown[0]!r}; it has {', '.join(part.models)}")
    run = results.setdefault(arguments.part, {"models": {}})
    run["made"] = made(steps)
    for seed in arguments.seeds:
        for label in chosen:
            done = train(part, label, seed, steps)
            run["models"].setdefault(label, {})[str(seed)] = done
            print(
                f"{arguments.part}, {label}, seed {seed}: {done['perplexity']:.3f} ({done['second half']:.3f}), {done['seconds']:.0f} s",
                flush=True,
            )
            keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
