"""The model card of a trained model, made of the registry's records and the run's numbers.

Equal runs make equal cards: nothing here depends on time, machine or folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hf_attn.recipes.data import Source

TEMPLATE = "template.md.jinja"
_ABOUT_THE_RUN = (
    "output",
    "logging",
    "save",
    "hub",
    "push",
    "report",
    "run_name",
    "resume",
    "disable_tqdm",
    "dataloader",
)
"""Arguments, by how their names begin, that say where a run went (or have a place of their own), not what was trained."""
_AUTO_CLASSES = {
    "fill-mask": ("AutoModelForMaskedLM", "AutoTokenizer", "fill-mask"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer", "text-classification"),
    "token-classification": ("AutoModelForTokenClassification", "AutoTokenizer", "token-classification"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "image-classification"),
    "masked-image-modeling": ("AutoModelForMaskedImageModeling", "AutoImageProcessor", "image-feature-extraction"),
}
"""Task -> Auto class of the model and of its processor, and the pipeline that the Hub files it under."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: name of the model.
        repo_id: `owner/name` on the Hub; None while it is not known.
        config: the model's config, with its `attention`.
        parameters: number of parameters.
        dataset: what it was trained on.
        split_sizes: examples in each split.
        split_seed: seed of the split.
        arguments: the recipe's keys and values.
        metrics: `<split>_<metric>` -> value.
        best_checkpoint: the validation split chose among checkpoints.
        notes: what a reader of the results must know.
        curve: file name of the training curve, beside the card; None for no picture.
        samples: predictions, each with `given`, `expected` and `predicted`.
        base_model: the checkpoint that training started from; empty for a model from scratch.
    """

    name: str
    repo_id: str | None
    config: Any
    parameters: int
    dataset: Source
    split_sizes: dict[str, int]
    split_seed: int
    arguments: dict[str, Any]
    metrics: dict[str, float]
    best_checkpoint: bool
    notes: str
    curve: str | None
    samples: Sequence[Any] = ()
    base_model: str = ""


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with metadata the Hub indexes.

    Raises:
        InvalidInput: a metric is not a finite number, or the config carries no mechanisms.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    for name, value in facts.metrics.items():
        if not math.isfinite(value):
            raise InvalidInput(f"metric {name}={value!r} is not a finite number, so a card cannot state it.")
    mechanisms = mechanisms_of(facts.config)
    task = facts.dataset.task
    auto_model, auto_processor, pipeline = _AUTO_CLASSES[task]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=facts.dataset.name,
            dataset_name=facts.dataset.title,
            dataset_split="test",
            metric_type=name.removeprefix("test_"),
            metric_value=round(value, 4),
        )
        for name, value in facts.metrics.items()
        if name.startswith("test_")
    ]
    data = ModelCardData(
        model_name=facts.name,
        library_name="transformers",
        license="apache-2.0",
        pipeline_tag=pipeline,
        tags=["hf_attn", *dict.fromkeys(mechanism["name"] for mechanism in mechanisms)],
        metrics=sorted({result.metric_type for result in results} & {"accuracy", "perplexity"}),
        eval_results=results,
    )
    text: dict[str, Any] = {
        "facts": facts,
        "repo": facts.repo_id or f"ORG/{facts.name}",
        "mechanisms": mechanisms,
        "architecture": architecture(facts.config),
        "settings": settings(facts.arguments),
        "scores": scores(facts.metrics),
        "versions": versions(),
        "samples": [
            {key: _cell(getattr(sample, key)) for key in ("given", "expected", "predicted")} for sample in facts.samples
        ],
        "auto_model": auto_model,
        "auto_processor": auto_processor,
    }
    return ModelCard.from_template(data, template_str=template_path().read_text(encoding="utf-8"), **text)


def template_path() -> Path:
    """The Jinja template: beside this file in an installed wheel, in model_cards/ in the repository."""
    here = Path(__file__).resolve()
    places = (here.with_name(TEMPLATE), here.parents[2] / "model_cards" / TEMPLATE)
    for place in places:
        if place.is_file():
            return place
    raise InvalidInput(f"the card template {TEMPLATE} is missing from this installation. Install hf_attn again.")


def mechanisms_of(config: Any) -> list[dict[str, Any]]:
    """For every mechanism in `config.attention`: its layers, record, options and capabilities, in order."""
    from hf_attn import get_mechanism

    attention = getattr(config, "attention", None)
    if not attention:
        raise InvalidInput(f"a {type(config).__name__} carries no attention mechanisms. Use a model of hf_attn.")
    found = []
    for layers, entry in attention.items():
        record = get_mechanism(entry["name"])
        options = record.options_class.parse(**{key: value for key, value in entry.items() if key != "name"})
        capabilities = record.module_class.describe(options)
        everywhere = "all layers" if len(attention) == 1 else "all other layers"
        found.append(
            {
                "name": record.name,
                "layers": everywhere if layers == "default" else f"layers {layers}",
                "record": record,
                "options": [(f.name, _plain(getattr(options, f.name))) for f in fields(options)],
                "capabilities": capability_rows(capabilities),
                "derived": list(capabilities.derived),
                "unverified": "no official code" in record.paper,
            }
        )
    return found


def capability_rows(capabilities: Capabilities) -> list[tuple[str, str]]:
    """Name and value of every cell, as a reader sees them."""
    return [(f.name.replace("_", " "), _plain(getattr(capabilities, f.name))) for f in fields(capabilities)]


def architecture(config: Any) -> list[tuple[str, str]]:
    """The sizes of the model."""
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
        "num_channels", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    return [(name.replace("_", " "), _plain(value)) for name in names if (value := getattr(config, name, None))]


def settings(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """The arguments that decide what was trained."""
    return [
        (name, _plain(value)) for name, value in sorted(_flat(arguments).items()) if not name.startswith(_ABOUT_THE_RUN)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def scores(metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Split, metric and value."""
    return [(*name.split("_", 1), f"{value:.4f}") for name, value in metrics.items()]


def versions() -> list[tuple[str, str]]:
    """The packages the numbers were made with."""
    import torch
    import transformers

    import hf_attn

    return [
        ("hf_attn", hf_attn.__version__),
        ("transformers", transformers.__version__),
        ("torch", torch.__version__.partition("+")[0]),
    ]


def _cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)
