"""Does adaptive pooling help where meaning spans several tokens? A synthetic labelling task, three seeds.

python scripts/context_pool_experiment.py [--seeds 0 1 2] [--output docs/benchmarks/context_pool]

48 tokens of 12 symbols in phrases of 2 to 6; the first token of a phrase is a boundary symbol. The label of a token says
whether the mean symbol of its own phrase is above the middle, and whether that of the next phrase is: 4 classes. Models
are pre-norm transformers with 48 channels and 4 heads, AdamW at 3e-3 with linear decay, 300 steps of 32, 1500 sequences
to train and 300 to test. The task was built to favour local pooling, and 300 steps under-train the plain models.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

import hf_attn

TOKENS, SYMBOLS, WIDTH, HEADS, STEPS, BATCH = 48, 12, 48, 4, 300, 32
ROWS = {
    "no pooling, 2 layers": ("softmax", 2, {}),
    "no pooling, 4 layers": ("softmax", 4, {}),
    "fixed average of 3, 2 layers": ("fixed", 2, {}),
    "context_pool, 2 layers": ("context_pool", 2, {"support_ref": TOKENS}),
}
"""Row -> pooling, layers, options."""


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels (count, 48). Symbol 0 begins a phrase; the others are 1 to 11, and their middle is 6."""
    tokens, labels = torch.zeros(count, TOKENS, dtype=torch.long), torch.zeros(count, TOKENS, dtype=torch.long)
    for tokens_row, labels_row in zip(tokens, labels, strict=True):
        lengths = torch.randint(2, 7, (TOKENS // 2 + 1,), generator=generator).tolist()
        symbols = torch.randint(1, SYMBOLS, (len(lengths), 6), generator=generator)
        above = [(row[: n - 1].double().mean() > SYMBOLS / 2).long() for row, n in zip(symbols, lengths, strict=True)]
        start = 0
        for phrase, length in enumerate(lengths[:-1]):
            stop = min(start + length, TOKENS)
            tokens_row[start + 1 : stop] = symbols[phrase, : stop - start - 1]
            labels_row[start:stop] = 2 * above[phrase] + above[phrase + 1]
            start = stop
            if start == TOKENS:
                break
    return tokens, labels


class Layer(nn.Module):
    """A pre-norm block. `pooling`: "softmax" (none), "fixed" (mean over 3 tokens) or "context_pool"."""

    def __init__(self, pooling: str, options: dict):
        super().__init__()
        self.pooling = pooling
        name = "context_pool" if pooling == "context_pool" else "softmax"
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = hf_attn.build(name, num_heads=HEADS, head_dim=WIDTH // HEADS, **options)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        if self.pooling == "fixed":
            hidden = functional.avg_pool1d(hidden.transpose(1, 2), 3, 1, 1, count_include_pad=False).transpose(1, 2)
        qkv = self.project(hidden).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        given = {"layer_input": hidden} if self.pooling == "context_pool" else {}
        x = x + self.out(self.attention(*qkv, **given).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.second_norm(x))


class Labeller(nn.Module):
    """Embeddings, layers, and a class for every token."""

    def __init__(self, pooling: str, layers: int, options: dict):
        super().__init__()
        self.embedding, self.position = nn.Embedding(SYMBOLS, WIDTH), nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.layers = nn.Sequential(*(Layer(pooling, options) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.position))


def accuracy(row: str, seed: int, steps: int) -> tuple[float, int]:
    """Share of the test tokens that are labelled right, and the number of parameters."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    (tokens, labels), (test, expected) = sequences(1500, generator), sequences(300, generator)
    model = Labeller(*ROWS[row])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randint(len(tokens), (BATCH,))
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens[chosen]).flatten(0, 1), labels[chosen].flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        share = (model(test).argmax(-1) == expected).double().mean().item()
    return share, sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/context_pool"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    sizes = {}
    with Progress() as progress:
        task = progress.add_task("models", total=len(ROWS) * len(arguments.seeds))
        for row in ROWS:
            for seed in arguments.seeds:
                share, sizes[row] = accuracy(row, seed, arguments.steps)
                found[row].append(share)
                progress.advance(task)
    header = ["model", "parameters", *(f"seed {seed}" for seed in arguments.seeds), "mean"]
    table = [
        [row, str(sizes[row]), *(f"{100 * share:.1f}" for share in shares), f"{100 * statistics.mean(shares):.1f}"]
        for row, shares in found.items()
    ]
    none, deep, fixed, adaptive = found.values()
    holds = all(a > f > n and a > d for a, f, n, d in zip(adaptive, fixed, none, deep, strict=True))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    about = __doc__.strip().splitlines()
    lines = [
        "# ContextPool on a labelling task", "", about[0], "", *about[4:], "",
        f"Command: `python scripts/context_pool_experiment.py --seeds {' '.join(map(str, arguments.seeds))} --steps "
        f"{arguments.steps}` (torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}, one CPU thread).",
        "Test accuracy in percent.", "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *table)), "",
        "The direction of the claim (adaptive above fixed above none at equal depth, two adaptive layers above four plain",
        f"ones) {'holds for every seed' if holds else 'does not hold for every seed'}.", "",
    ]  # fmt: skip
    arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
