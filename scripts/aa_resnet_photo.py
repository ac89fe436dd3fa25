"""What an augmented convolution attends to on a photo: docs/images/aa_resnet.png.

python scripts/aa_resnet_photo.py [--steps 120] [--seed 0] [--output docs/images/aa_resnet.png]

A small AA-ResNet learns, from random crops, which of scikit-learn's two sample photos a crop comes from: no more than
that. Its attention is then drawn over one whole photo, for two query pixels, as the mean over the heads of the last stage.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

from hf_attn import AAResNetConfig, AAResNetForImageClassification
from hf_attn.models.aa_resnet import attention_maps

NAMES, SIDE = ("china.jpg", "flower.jpg"), 128
QUERIES = ((6, 4), (10, 10))
"""(row, column) in the 16 x 16 map of the last stage."""


def photo(name: str) -> Tensor:
    """(3,h,w) in -1..1, the square in the middle."""
    image = torch.tensor(load_sample_image(name)).permute(2, 0, 1).float() / 127.5 - 1
    side, left = image.shape[1], (image.shape[2] - image.shape[1]) // 2
    return image[:, :, left : left + side]


def crops(photos: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Random squares of half the photo's side or more, at SIDE x SIDE, and which photo each is from."""
    images, labels = [], torch.randint(len(photos), (count,))
    for label in labels.tolist():
        whole = photos[label].shape[1]
        side = int(torch.randint(whole // 2, whole + 1, ()))
        top, left = (int(torch.randint(whole - side + 1, ())) for _ in range(2))
        crop = photos[label][None, :, top : top + side, left : left + side]
        images.append(functional.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(images), labels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "aa_resnet.png")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    photos = [photo(name) for name in NAMES]
    config = AAResNetConfig(
        image_size=SIDE, embedding_size=16, hidden_sizes=(32, 64), depths=(1, 2), layer_type="basic", num_labels=2,
        attention_stages=(2,), pooled_stages=(), num_attention_heads=4, min_head_key_dim=8, kappa=0.5, upsilon=0.5,
    )  # fmt: skip
    model = AAResNetForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    right = []
    for _ in track(range(arguments.steps), "training"):
        images, labels = crops(photos, 8)
        out = model(images, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        right.append((out.logits.argmax(1) == labels).double().mean().item())
    print(f"accuracy on the last 20 batches: {sum(right[-20:]) / len(right[-20:]):.3f}")
    draw(model.eval(), photos, arguments.output)
    return 0


def draw(model: AAResNetForImageClassification, photos: list[Tensor], path: Path) -> None:
    """Rows: photos. Columns: the photo, then the weights of each query over it."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(photos), 1 + len(QUERIES))
    for row, whole in zip(grid, photos, strict=True):
        image = functional.interpolate(whole[None], (SIDE, SIDE), mode="bilinear", antialias=True)
        with torch.no_grad():
            weights = list(attention_maps(model, image).values())[-1][0].mean(dim=0)
        side = round(weights.shape[0] ** 0.5)
        pixels = (image[0].permute(1, 2, 0) + 1) / 2
        row[0].imshow(pixels.clamp(0, 1))
        for axes, query in zip(row[1:], QUERIES, strict=True):
            weight = weights[query[0] * side + query[1]].view(1, 1, side, side)
            heat = functional.interpolate(weight, (SIDE, SIDE), mode="bilinear")[0, 0]
            axes.imshow(pixels.mean(dim=2), cmap="gray")
            axes.imshow(heat, cmap="viridis", alpha=0.6)
            scale = SIDE / side
            axes.plot((query[1] + 0.5) * scale, (query[0] + 0.5) * scale, "r+", markersize=9)
        for axes in row:
            axes.set_axis_off()
    figure.suptitle("Attention of the last augmented convolution; + marks the query", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
