"""What the recurrence and the sparsity of vars do to a noisy photo, without any training.

python scripts/vars_denoising.py [--noise 0.2] [--sparsity 0 3] [--steps 0 5 50] [--output docs/images/vars_denoising.png]

Patches of 8 x 8 pixels are sequences of 64 tokens, their colours the values, the places of the pixels (times 3, in
patch widths) the queries. Templates are then random smooth bumps, drawn once; patches overlap by half and are averaged,
and their mean colour is left alone. The photos are the two that scikit-learn ships, a crop of each.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional

import hf_attn

PATCH, CROP, DIM = 8, 160, 16
PLACES = {"china": (200, 240), "flower": (100, 230)}
"""Photo -> top and left of its crop."""


def photos() -> dict[str, Tensor]:
    """(3,160,160) colours from 0 to 1."""
    from sklearn.datasets import load_sample_image

    images = {name: torch.tensor(load_sample_image(f"{name}.jpg")).permute(2, 0, 1) / 255 for name in PLACES}
    return {name: images[name][:, y : y + CROP, x : x + CROP] for name, (y, x) in PLACES.items()}


def queries() -> Tensor:
    """(64,D): the places of a patch's pixels."""
    place = (torch.arange(PATCH**2)[:, None] // torch.tensor([PATCH, 1]) % PATCH) / PATCH
    # the module divides queries by the fourth root of their dimension
    return functional.pad(3 * DIM**0.25 * (place - place.mean(0)), (0, DIM - 2))


def reconstruct(photo: Tensor, sparsity: float, steps: int) -> Tensor:
    """(3,h,w): every patch rebuilt from the templates."""
    torch.manual_seed(0)
    module = hf_attn.build("vars", num_heads=1, head_dim=DIM, sparsity=sparsity, num_steps=steps).eval()
    cut = {"kernel_size": PATCH, "stride": PATCH // 2}
    patches = functional.unfold(photo[None], **cut)[0].T.unflatten(1, (3, -1)).transpose(1, 2)[:, None]
    mean = patches.mean(2, keepdim=True)
    query = queries().expand(len(patches), 1, -1, -1)
    with torch.no_grad():
        # 20 times unit colours: the default lambda is meant for values of unit size
        out = module(query, query, functional.pad(20 * (patches - mean), (0, DIM - 3)))[..., :3] / 20 + mean
    columns = out[:, 0].transpose(1, 2).flatten(1).T[None]
    size = photo.shape[1:]
    return functional.fold(columns, size, **cut)[0] / functional.fold(torch.ones_like(columns), size, **cut)[0]


def decibel(image: Tensor, photo: Tensor) -> float:
    """Peak signal to noise ratio; more is better."""
    return -10 * (image - photo).square().mean().log10().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.2, help="standard deviation, colours go from 0 to 1")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 5, 50])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 3.0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/vars_denoising.png"))
    arguments = parser.parse_args()
    settings = [(sparsity, steps) for sparsity in arguments.sparsity for steps in arguments.steps]
    rows = []
    for name, photo in track(photos().items(), description="photos"):
        noisy = photo + arguments.noise * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
        images = [("photo", photo), ("noisy", noisy)]
        images += [(f"lambda {a:g}, K {k}", reconstruct(noisy, a, k)) for a, k in settings]
        rows.append([(label, image, decibel(image, photo)) for label, image in images])
        print(name, *(f"| {label}: {value:.1f} dB" for label, _, value in rows[-1][1:]))
    draw(arguments.output, rows)
    return 0


def draw(path: Path, rows: list) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * len(rows[0]), 2.05 * len(rows)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    for axes_row, row in zip(figure.subplots(len(rows), len(rows[0])), rows, strict=True):
        for axes, (label, image, value) in zip(axes_row, row, strict=True):
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set_axis_off()
            axes.set_title(label if label == "photo" else f"{label}\n{value:.1f} dB", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
