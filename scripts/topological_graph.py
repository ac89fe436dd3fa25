"""Node classification on a generated graph: graph-kernel attention against plain kernel attention.

python scripts/topological_graph.py [--seed 0] [--nodes 240] [--epochs 150]

The graph is a stochastic block model; every node carries a noisy direction of its class. One attention layer reads all
nodes at once, is trained on a few labelled ones, and is tested on the rest. The two runs differ in `mask_type` alone.
"""

import argparse
import time

import torch
from torch import Tensor, nn

import hf_attn


def stochastic_block_model(nodes: int, classes: int, inside: float, across: float) -> tuple[Tensor, list[list[int]]]:
    """Labels (n,) and edges; a pair of nodes is joined with probability `inside` a class or `across` classes."""
    labels = torch.arange(nodes) % classes
    chance = torch.where(labels[:, None] == labels, inside, across)
    joined = (torch.rand(nodes, nodes) < chance).triu(1)
    return labels, joined.nonzero().tolist()


class NodeClassifier(nn.Module):
    """One attention layer over all nodes, beside a linear path, and a linear head."""

    def __init__(self, features: int, classes: int, heads: int, dim: int, options: dict):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(features, heads * dim)
        self.projections = nn.Linear(heads * dim, 3 * heads * dim)
        self.attention = hf_attn.build("topological", num_heads=heads, head_dim=dim, **options)
        self.head = nn.Linear(heads * dim, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(nn.functional.elu(self.inputs(x)))
        query, key, value = self.projections(x)[None].unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.attention(query, key, value).transpose(1, 2).flatten(2)[0]
        return self.head(self.dropout(x + attended))


def accuracy(seed: int, options: dict, args: argparse.Namespace) -> float:
    """Test accuracy after training with these attention options; data and start depend on the seed alone."""
    torch.manual_seed(seed)
    labels, edges = stochastic_block_model(args.nodes, args.classes, args.inside, args.across)
    directions = torch.randn(args.classes, args.features)
    x = directions[labels] + args.noise * torch.randn(args.nodes, args.features)
    order = torch.randperm(args.nodes)
    train, test = order[: args.labelled * args.classes], order[args.labelled * args.classes :]
    if options["mask_type"] == "graph_kernel":
        options = {**options, "edges": edges, "num_nodes": args.nodes}
    torch.manual_seed(seed)
    model = NodeClassifier(args.features, args.classes, args.heads, 8, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(args.epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x)[train], labels[train]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model.eval()(x)[test].argmax(-1) == labels[test]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    for name, default in (("nodes", 240), ("classes", 4), ("features", 16), ("labelled", 10), ("heads", 4), ("epochs", 150)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("inside", 0.08), ("across", 0.01), ("noise", 3.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    args = parser.parse_args()
    runs = {
        "plain (mask_type none)": {"mask_type": "none"},
        "GKAT, exact walks": {"mask_type": "graph_kernel"},
        "GKAT, sampled walks": {"mask_type": "graph_kernel", "walk_sampling": "sampled"},
    }
    print("| attention | " + " | ".join(f"seed {seed}" for seed in args.seed) + " | mean |")
    print("|---" * (len(args.seed) + 2) + "|")
    start = time.perf_counter()
    for name, options in runs.items():
        found = [accuracy(seed, options, args) for seed in args.seed]
        print(f"| {name} | " + " | ".join(f"{a:.3f}" for a in found) + f" | {sum(found) / len(found):.3f} |")
    print(f"\ntest accuracy, {args.labelled * args.classes} labelled nodes of {args.nodes}; {time.perf_counter() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
