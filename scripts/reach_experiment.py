"""How many layers until the first token knows what one random place holds: the reach of an attention graph, learned.

python scripts/reach_experiment.py [--seeds 0 1 2] [--output docs/benchmarks/reach]

64 tokens; one random place holds one of 8 symbols, all others a blank; token 0 must name it. A symbol outside token 0's
reach can only be guessed, so accuracy is bounded by reach + (1 - reach) / 8. An attn_bert with 32 channels and 2 heads,
250 steps of Adam with 128 examples, learning rate 3e-3; accuracy on 2000 new examples.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

import hf_attn
from hf_attn.analysis import named_graph

TOKENS, SYMBOLS, LAYERS = 64, 8, (2, 3, 6)
GRAPHS = {
    "complete": ("softmax", {}, {"name": "complete"}),
    "hypercube": ("hypercube", {"block_size": 1}, {"name": "hypercube"}),
    "window of 7": ("softmax", {}, {"name": "window", "w": 7}),
}
"""Row -> mechanism, options, and the graph it attends along; a window is a mask on exact attention."""


def reach(graph: np.ndarray, layers: int) -> float:
    """Share of the tokens that token 0 can know of after `layers` layers."""
    known = np.zeros(len(graph), dtype=bool)
    known[0] = True
    for _ in range(layers):
        known = graph[known].any(axis=0)
    return float(known.mean())


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,64), and the symbol that each holds somewhere."""
    symbol, place = torch.randint(SYMBOLS, (size,)), torch.randint(TOKENS, (size,))
    tokens = torch.full((size, TOKENS), SYMBOLS)
    tokens[torch.arange(size), place] = symbol
    return tokens, symbol


def accuracy(row: str, layers: int, seed: int) -> float:
    mechanism, options, graph = GRAPHS[row]
    torch.manual_seed(seed)
    config = hf_attn.AttnBertConfig(
        vocab_size=SYMBOLS + 1, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation=mechanism, attention_options=options,
    )  # fmt: skip
    model = hf_attn.AttnBertModel(config, add_pooling_layer=False)
    head = torch.nn.Linear(32, SYMBOLS)
    mask = None
    if graph["name"] == "window":
        mask = torch.from_numpy(named_graph(**graph, n=TOKENS))[None, None]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        given = None if mask is None else mask.expand(len(tokens), -1, -1, -1)
        return head(model(tokens, attention_mask=given).last_hidden_state[:, 0])

    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(250):
        tokens, symbol = batch(128)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(tokens), symbol).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        tokens, symbol = batch(2000)
        return (logits(tokens).argmax(-1) == symbol).double().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/reach"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = ["graph", "layers", "reach", "bound", *(f"seed {seed}" for seed in arguments.seeds), "mean"]
    table = []
    with Progress() as progress:
        task = progress.add_task("reach", total=len(GRAPHS) * len(LAYERS) * len(arguments.seeds))
        for row, (_, _, graph) in GRAPHS.items():
            for layers in LAYERS:
                share = reach(named_graph(**graph, n=TOKENS), layers)
                found = []
                for seed in arguments.seeds:
                    found.append(accuracy(row, layers, seed))
                    progress.advance(task)
                numbers = [share, share + (1 - share) / SYMBOLS, *found, statistics.mean(found)]
                table.append([row, str(layers), *(f"{number:.3f}" for number in numbers)])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    command = f"python scripts/reach_experiment.py --seeds {' '.join(map(str, arguments.seeds))}"
    lines = [
        "# Reach of an attention graph", "", *__doc__.strip().splitlines()[0:1], "", *__doc__.strip().splitlines()[4:], "",
        f"Command: `{command}` (torch {torch.__version__.partition('+')[0]}, hf_attn {hf_attn.__version__}, one CPU thread).",
        "Accuracy above the bound is sampling noise.", "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *table)), "",
    ]  # fmt: skip
    arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
