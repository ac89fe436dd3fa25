"""A model trained with exact attention is switched to mra: how much is lost at each budget, and does training win it back?

python scripts/mra_experiment.py [--seeds 0 1 2] [--output docs/benchmarks/mra_switch]

A BERT of two layers predicts masked characters of Python's own documentation, 128 a row, in 1500 steps of exact attention.
Its copy with mra (blocks of 8, 16 x 16 blocks a layer) is tested as it is, and again after 100 steps more. So is the model
itself after the same 100 steps: what mra has to be compared with. The loss is that of modules it was not trained on.
"""

import argparse
import copy
import csv
import statistics
import sys
from pathlib import Path

import torch
from ablate_terms import CHARACTERS, TRAINED, UNSEEN, masked, text, train
from rich.progress import Progress
from torch import Tensor, nn

import hf_attn

LENGTH, BLOCK, STEPS, MORE = 128, 8, 1500, 100
ROWS: dict[str, dict] = {
    "exact attention": {},
    **{
        f"{title}, {number} blocks a row": {"block_size": BLOCK, "block_per_row": number, "mode": mode}
        for title, mode in (("MRA-2", "full"), ("MRA-2-s", "sparse"))
        for number in (1, 2, 4)
    },
}


def rows(modules: tuple[str, ...]) -> Tensor:
    """Characters (rows, 128)."""
    characters = text(modules).flatten()
    return characters[: len(characters) // LENGTH * LENGTH].view(-1, LENGTH)


def loss_of(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
    given, chosen = masked(batch, generator)
    return nn.functional.cross_entropy(model(given).logits[chosen], batch[chosen])


def fit(model: nn.Module, data: Tensor, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        return loss_of(model, data[torch.randint(len(data), (32,), generator=generator)], generator)

    train(model, loss, steps)


def trained(seed: int, data: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    config = hf_attn.AttnBertConfig(
        vocab_size=CHARACTERS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="softmax",
    )  # fmt: skip
    model = hf_attn.AttnBertForMaskedLM(config)
    fit(model, data, seed, STEPS)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/mra_switch"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, unseen = rows(TRAINED), rows(UNSEEN)[:400]
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in ROWS}

    def test(model: nn.Module) -> float:
        with torch.no_grad():
            return loss_of(model.eval(), unseen, torch.Generator().manual_seed(0)).item()

    with Progress() as progress:
        task = progress.add_task("fits", total=len(arguments.seeds) * (len(ROWS) + 1))
        for seed in arguments.seeds:
            start = trained(seed, data)
            progress.advance(task)
            for label, options in ROWS.items():
                model = copy.deepcopy(start)
                if options:
                    hf_attn.convert(model, {"default": {"name": "mra", **options}})
                before = test(model)
                fit(model, data, seed + 1000, MORE)
                found[label].append((before, test(model)))
                progress.advance(task)
                progress.print(f"seed {seed}, {label}: {before:.3f} -> {found[label][-1][1]:.3f}")
    write(arguments.output, arguments.seeds, found)
    return 0


def write(path: Path, seeds: list[int], found: dict[str, list[tuple[float, float]]]) -> None:
    """CSV and Markdown: losses of every seed, and the gap to exact attention."""
    header = ["attention", *(f"seed {seed} {when}" for seed in seeds for when in ("switched", "trained"))]
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [header, *([label, *(f"{x:.4f}" for pair in p for x in pair)] for label, p in found.items())]
        )
    exact = found["exact attention"]
    lines = [
        "# From exact attention to mra", "", *__doc__.strip().splitlines()[4:], "",
        f"Command: `python scripts/mra_experiment.py --seeds {' '.join(map(str, seeds))}` "
        f"(torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}, one CPU thread).", "",
        "Loss, mean of the seeds; the gap is to exact attention at the same time, with the least and largest of the seeds.", "",
        "| attention | switched | gap | after 100 steps | gap |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for label, pairs in found.items():
        cells = [label]
        for when in (0, 1):
            gaps = [pair[when] - other[when] for pair, other in zip(pairs, exact, strict=True)]
            cells.append(f"{statistics.mean(pair[when] for pair in pairs):.3f}")
            cells.append(f"{statistics.mean(gaps):+.3f} [{min(gaps):+.3f}, {max(gaps):+.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
