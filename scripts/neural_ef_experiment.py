"""Do trained networks find the eigenfunctions of a kernel? Against the exact ones, three kernels, three seeds.

python scripts/neural_ef_experiment.py [--seeds 0 1 2] [--steps 6000] [--layer 1] [--output docs/benchmarks/neural_ef]

A seed draws the points, the networks and, for the third kernel, the model. Training uses all points in every step.

- rbf: exp(-|x - x'|^2 / 2) on 512 points uniform on [-2, 2];
- polynomial: (x x' + 1.5)^4 on 512 points uniform on [-1, 1], whose rank is 5;
- attention: exp(k . k' / sqrt(D)) over the keys of the first head of a small ViT (layer 1 of 2) that was trained on the
  digits for 300 steps, at 1024 tokens of 64 digits the model was not trained on. Layer 1 was chosen after a trial of
  2000 steps with seed 0, where 3 of its functions reached the limits and 2 of layer 2's (`--layer 2`).
"""

import argparse
import csv
import datetime
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import hf_attn
from hf_attn.analysis.neural_ef import polynomial_spectrum
from hf_attn.analysis.neural_ef_fit import Exact, Spectrum, draw, exact_spectrum, fit
from hf_attn.analysis.neural_ef_kernels import attention_kernel, polynomial, rbf

KERNELS = ("rbf", "polynomial", "attention")
POINTS, TOKENS, HELD_OUT, FUNCTIONS = 512, 1024, 64, 5
ERROR, COSINE = 0.05, 0.99
"""What the first five functions of rbf have to reach: relative error of the eigenvalue, |cosine|."""


@dataclass
class Run:
    """One kernel with one seed."""

    kernel: str
    seed: int
    found: Spectrum
    exact: Exact
    seconds: float

    def errors(self) -> Tensor:
        wanted = self.exact.eigenvalues[:FUNCTIONS]
        return (self.found.eigenvalues.double() - wanted).abs() / wanted


def digits_model(seed: int) -> tuple[torch.nn.Module, Tensor, float]:
    """A ViT trained on digits, the images it has not seen, and its accuracy there."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    raw = load_digits()
    images, labels = torch.tensor(raw.images).float()[:, None] / 8 - 1, torch.tensor(raw.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    size = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**size, **width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(HELD_OUT, len(images), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(pixel_values=images[:HELD_OUT]).logits.argmax(-1) == labels[:HELD_OUT]
    return model, images[:HELD_OUT], right.double().mean().item()


def problem(name: str, seed: int, layer: int) -> tuple[Tensor, object, str]:
    """Points, kernel and a remark."""
    uniform = 2 * torch.rand(POINTS, 1, generator=torch.Generator().manual_seed(seed)) - 1
    if name == "rbf":
        return 2 * uniform, rbf(), ""
    if name == "polynomial":
        return uniform, polynomial(), ""
    model, images, accuracy = digits_model(seed)
    given = attention_kernel(model, {"pixel_values": images}, layer=layer - 1, head=0)
    return given.inputs[:TOKENS], given.kernel, f"accuracy of the ViT {accuracy:.3f}"


def measured(name: str, seed: int, arguments: argparse.Namespace) -> Run:
    inputs, kernel, remark = problem(name, seed, arguments.layer)
    start = time.perf_counter()
    found = fit(inputs, kernel, functions=FUNCTIONS, steps=arguments.steps, seed=seed, progress=True)
    seconds = time.perf_counter() - start
    run = Run(name, seed, found, exact_spectrum(inputs, kernel, functions=FUNCTIONS), seconds)
    print(f"{name}, seed {seed}, {seconds:.0f} s. {remark}\n{found.table(run.exact)}\n", flush=True)
    return run


def joined(values: Tensor, digits: str = ".4g") -> str:
    return " ".join(f"{float(value):{digits}}" for value in values)


def report(runs: list[Run], arguments: argparse.Namespace) -> str:
    import transformers

    header = ["kernel", "seed", "learned", "exact", "largest error", "cosines", "converged", "seconds"]
    rows = [
        [
            run.kernel, str(run.seed), joined(run.found.eigenvalues), joined(run.exact.eigenvalues),
            f"{100 * run.errors().max():.2f} %", joined(run.found.cosines(run.exact), ".4f"),
            f"{int(run.found.converged.sum())} of {FUNCTIONS}", f"{run.seconds:.0f}",
        ]
        for run in runs
    ]  # fmt: skip
    verdicts = []
    for name in dict.fromkeys(run.kernel for run in runs):
        chosen = [run for run in runs if run.kernel == name]
        held = [int(((run.errors() < ERROR) & (run.found.cosines(run.exact) > COSINE)).sum()) for run in chosen]
        verdicts.append(
            f"- {name}: {', '.join(map(str, held))} of {FUNCTIONS} functions are within {100 * ERROR:.0f} % of the exact "
            f"eigenvalue with a cosine above {COSINE}."
        )
    limit = joined(polynomial_spectrum(1.5, 4))
    return "\n".join([
        "# Learned and exact eigenfunctions", "", *(line for line in __doc__.splitlines() if "python scripts" not in line), "",
        f"Command: `python scripts/neural_ef_experiment.py --seeds {' '.join(map(str, arguments.seeds))} --steps "
        f"{arguments.steps} --layer {arguments.layer}` ({datetime.date.today()}, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}, hf_attn {hf_attn.__version__}, one CPU thread). Exact: eigh of the kernel matrix on "
        "the same points, in float64. Times are wall-clock, on a machine that others used too.", "",
        "By seed, in the order above:", "", *verdicts, "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)), "",
        f"The polynomial kernel's eigenvalues under the uniform distribution itself are {limit}.", "",
        "`converged` needs no exact reference: off-diagonality below 0.05, residual below 0.1, eigenvalues in order.", "",
        "![The rbf functions](neural_ef.png)", "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--layer", type=int, choices=[1, 2], default=1, help="of the ViT")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/neural_ef"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measured(name, seed, arguments) for name in KERNELS for seed in arguments.seeds]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["kernel", "seed", "function", "learned", "exact", "cosine", "off_diagonal", "residual", "converged"]
        )
        for run in runs:
            columns = (run.found.eigenvalues, run.exact.eigenvalues, run.found.cosines(run.exact))
            columns += (run.found.off_diagonal, run.found.residual)
            for j, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                numbers = [f"{value:.6g}" for value in values]
                writer.writerow([run.kernel, run.seed, j + 1, *numbers, bool(run.found.converged[j])])
    text = report(runs, arguments)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(runs[0].found, arguments.output.with_suffix(".png"), runs[0].exact, f"{runs[0].kernel}, seed {runs[0].seed}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
