"""Which of the four terms does attention need: self-attention against encoder-decoder attention, at the scale of minutes.

python scripts/ablate_terms.py [PART ...] [--seeds 0 1 2] [--output docs/benchmarks/terms]

Zhu et al. (ICCV 2019) ask it of `generalized`, whose `beta` switches query x key content (E1), query content x position
(E2), key content (E3) and position (E4). A run that was stopped goes on after its last setting. Parts, each from scratch
with every setting that is defined:
vit: scikit-learn's digits, two layers on 2 x 2 patches, no position embeddings; accuracy on 540 test images.
mlm: a BERT of two layers on characters of Python's own documentation, no position embeddings; accuracy on masked characters
of modules it was not trained on.
seq2seq: digits to words, word by word, with a BART of one layer a side; the setting is that of the encoder-decoder
attention, all self-attention is softmax; accuracy on words of new sequences. The set-up was changed after seeing results: with
weights of 0.02 at the start and 800 steps every setting stayed near guessing; 0.1 and 0.2 were tried with seed 0.
"""

import argparse
import csv
import datetime
import pydoc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from digits_experiments import EXPERIMENTS, tensors
from digits_experiments import accuracy as digits_accuracy
from rich.progress import Progress
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

import hf_attn

BETAS = [f"{number:04b}" for number in range(16)]
POSITION_DIM = 16


@dataclass(frozen=True)
class Part:
    """One task.

    Attributes:
        title: what the table calls it.
        betas: the settings that are defined.
        accuracy: of a model trained with a beta and a seed.
        tokens, channels, heads: sizes of one attention layer, for its operations.
        chance: what guessing gives, about.
    """

    title: str
    betas: list[str]
    accuracy: Callable[[str, int], float]
    tokens: int
    channels: int
    heads: int
    chance: str


def operations(part: Part, beta: str) -> int:
    """Floating point operations of one attention layer on one example, two a multiply-add, in the form that runs.

    Projections that a setting does not read are not counted. The settings without query and position take one mean for
    all queries; the others are attention over the channels of content and of positions.
    """
    content, query_position, key_content, position = (bit == "1" for bit in beta)
    n, c = part.tokens, part.channels
    read = 2 + (content or query_position) + (content or key_content)
    total = read * 2 * n * c * c
    if beta in ("0000", "0010"):
        return total + 2 * n * c * (1 + key_content)
    width = c * (content or key_content) + part.heads * POSITION_DIM * (query_position or position)
    turned = 2 * c * POSITION_DIM * (n if query_position else position)
    return total + turned + 2 * n * n * (width + c)


# -- vit ---------------------------------------------------------------------------------------------------------------


@cache
def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return tensors()


def vit(beta: str, seed: int) -> float:
    row = ("generalized", {"beta": beta, "position_dim": POSITION_DIM})
    return digits_accuracy(EXPERIMENTS["generalized"], row, False, seed, images())


# -- mlm ---------------------------------------------------------------------------------------------------------------

TRAINED = (
    "argparse",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "fractions",
    "logging",
    "random",
    "subprocess",
    "zipfile",
)
UNSEEN = ("json", "shutil", "statistics", "textwrap")
LENGTH, CHARACTERS = 48, 97  # the printable ones of ASCII, one for the others, one for the mask


@cache
def text(modules: tuple[str, ...]) -> Tensor:
    """Characters (rows, 48) of the documentation of `modules`."""
    words = " ".join(pydoc.render_doc(name, renderer=pydoc.plaintext) for name in modules).split()
    codes = [ord(c) - 32 if 32 <= ord(c) < 127 else 95 for c in " ".join(words)]
    return torch.tensor(codes[: len(codes) // LENGTH * LENGTH]).view(-1, LENGTH)


def masked(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows with a sixth of their characters masked, and which."""
    chosen = torch.rand(rows.shape, generator=generator) < 1 / 6
    return rows.masked_fill(chosen, CHARACTERS - 1), chosen


def mlm(beta: str, seed: int, steps: int = 1000) -> float:
    torch.manual_seed(seed)
    config = hf_attn.AttnBertConfig(
        vocab_size=CHARACTERS, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="generalized", attention_options={"beta": beta, "position_dim": POSITION_DIM},
    )  # fmt: skip
    model = hf_attn.AttnBertForMaskedLM(config)
    positions = model.bert.embeddings.position_embeddings.weight
    torch.nn.init.zeros_(positions)
    positions.requires_grad_(False)
    rows, generator = text(TRAINED), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        given, chosen = masked(batch, generator)
        return torch.nn.functional.cross_entropy(model(given).logits[chosen], batch[chosen])

    train(model, loss, steps)
    rows = text(UNSEEN)[:1000]
    given, chosen = masked(rows, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (model(given).logits.argmax(-1) == rows)[chosen].double().mean().item()


# -- seq2seq -----------------------------------------------------------------------------------------------------------

DIGITS, START, END = 8, 1, 2
FIRST_DIGIT, FIRST_WORD = 3, 13  # tokens: padding, start, end, ten digits, ten words


def sentences(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (B,8) of digits, and their words."""
    numbers = torch.randint(10, (size, DIGITS), generator=generator)
    return numbers + FIRST_DIGIT, numbers + FIRST_WORD


def seq2seq(beta: str, seed: int, steps: int = 400) -> float:
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=FIRST_WORD + 10, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=DIGITS, dropout=0.0, init_std=0.1,
        pad_token_id=0, bos_token_id=START, eos_token_id=END, decoder_start_token_id=START, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    hf_attn.convert(model, {"default": "softmax", "cross": {"name": "generalized", "beta": beta}})
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        digits, words = sentences(64, generator)
        return model(input_ids=digits, labels=words).loss

    train(model, loss, steps)
    digits, words = sentences(1000, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return (model(input_ids=digits, labels=words).logits.argmax(-1) == words).double().mean().item()


def train(model: torch.nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """AdamW with one cycle up to 3e-3; leaves the model in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    model.eval()


# -- tables and picture ------------------------------------------------------------------------------------------------

PARTS = {
    "vit": Part("ViT on digits, self-attention", BETAS, vit, 17, 32, 4, "0.10"),
    "mlm": Part("BERT on characters, self-attention", BETAS, mlm, LENGTH, 48, 4, "0.14 (always a space)"),
    "seq2seq": Part(
        "BART, encoder-decoder attention", ["0000", "0010", "1000", "1010"], seq2seq, DIGITS, 32, 2, "0.10"
    ),
}


def read(path: Path) -> dict[str, list[float]]:
    """beta -> accuracy of each seed."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: [float(number) for number in row[2:]] for row in rows}


def gain(table: dict[str, list[float]], term: int) -> list[float]:
    """What a term adds, for each seed: the mean over the pairs of settings that differ in it alone."""
    pairs = [(b, b[:term] + "0" + b[term + 1 :]) for b in table if b[term] == "1"]
    pairs = [(with_it, without) for with_it, without in pairs if without in table]
    seeds = range(len(next(iter(table.values()))))
    return [statistics.mean(table[a][i] - table[b][i] for a, b in pairs) for i in seeds] if pairs else []


def report(output: Path, seeds: list[int]) -> None:
    """Markdown and picture of all parts whose CSV lies in `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: read(output / f"{name}.csv") for name in PARTS if (output / f"{name}.csv").exists()}
    command = f"python scripts/ablate_terms.py {' '.join(found)} --seeds {' '.join(map(str, seeds))}"
    lines = [
        "# Which terms attention needs", "", *__doc__.strip().splitlines()[4:], "",
        f"Command: `{command}` (torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, "
        f"hf_attn {hf_attn.__version__}, one CPU thread, {datetime.date.today()}).", "",
        "## What each term adds", "",
        "Mean over the pairs of settings that differ in that term alone, and the seeds' least and largest.", "",
        "| part | E1 query x key content | E2 query content x position | E3 key content | E4 position |",
        "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    if absent := [name for name in PARTS if name not in found]:
        at = lines.index("## What each term adds")
        lines[at:at] = [f"Not run here: {', '.join(absent)}.", ""]
    gains = {name: [gain(table, term) for term in range(4)] for name, table in found.items()}
    for name, terms in gains.items():
        cells = [f"{statistics.mean(g):+.3f} [{min(g):+.3f}, {max(g):+.3f}]" if g else "not defined" for g in terms]
        lines.append("| " + " | ".join([PARTS[name].title, *cells]) + " |")
    lines += ["", "![What each term adds, and accuracy against operations](terms.png)", ""]
    for name, table in found.items():
        lines += [f"## {PARTS[name].title}", "", f"Accuracy; guessing gives {PARTS[name].chance}.", ""]
        header = ["beta", "operations of a layer", *(f"seed {seed}" for seed in seeds), "mean"]
        lines += ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
        for beta, values in table.items():
            cells = [beta, f"{operations(PARTS[name], beta):,}", *(f"{v:.3f}" for v in values)]
            lines.append("| " + " | ".join([*cells, f"{statistics.mean(values):.3f}"]) + " |")
        lines.append("")
    (output / "terms.md").write_text("\n".join(lines), encoding="utf-8")

    figure, axes = pyplot.subplots(1, 1 + len(found), figsize=(4 * (1 + len(found)), 3.6), layout="constrained")
    for place, (name, terms) in enumerate(gains.items()):
        for term, values in enumerate(terms):
            if values:
                mean = statistics.mean(values)
                error = [[mean - min(values)], [max(values) - mean]]
                at = term + 0.25 * (place - (len(found) - 1) / 2)
                axes[0].bar(at, mean, 0.22, color=f"C{place}", yerr=error, label=name if not term else None)
    axes[0].set_xticks(range(4), ["E1", "E2", "E3", "E4"])
    axes[0].set_ylabel("accuracy added")
    axes[0].legend(frameon=False)
    for axis, (name, table) in zip(axes[1:], found.items(), strict=True):
        for beta, values in table.items():
            work, mean = operations(PARTS[name], beta) / 1e6, statistics.mean(values)
            axis.plot(work, mean, "o", color="C3" if beta[0] == "1" else "C0")
            axis.annotate(beta, (work, mean), textcoords="offset points", xytext=(3, 3), fontsize=7)
        axis.set(title=PARTS[name].title, xlabel="million operations of a layer", ylabel="accuracy")
    figure.savefig(output / "terms.png", dpi=110)
    print("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/terms"))
    arguments = parser.parse_args()
    chosen = arguments.parts or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    header = ["beta", "operations", *(f"seed {seed}" for seed in arguments.seeds)]
    for name in chosen:
        part, path = PARTS[name], arguments.output / f"{name}.csv"
        rows = [header]
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            if rows[0] != header:
                parser.error(f"{path} holds other seeds; remove it, or choose another --output")
        missing = [beta for beta in part.betas if beta not in [row[0] for row in rows]]
        with Progress() as progress:
            task = progress.add_task(name, total=len(missing) * len(arguments.seeds))
            for beta in missing:
                values = []
                for seed in arguments.seeds:
                    values.append(part.accuracy(beta, seed))
                    progress.advance(task)
                progress.print(f"{name} {beta}: {values}")
                rows.append([beta, operations(part, beta), *(f"{value:.4f}" for value in values)])
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
    report(arguments.output, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
