"""The model card of a trained model, made of the registry's records and the run's numbers.

Equal runs make equal cards: nothing here depends on time, machine or folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput
from hf_attn.hub.card_check import check_card, is_repo_id
from hf_attn.hub.families import architecture, attention_of, is_vision, plain

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
_TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
"""Auto class -> the Hub's name of its task."""
_AUTO_CLASSES = {
    "fill-mask": ("fill-mask", "AutoModelForMaskedLM", "AutoTokenizer"),
    "text-generation": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "text-classification": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "token-classification": ("token-classification", "AutoModelForTokenClassification", "AutoTokenizer"),
    "image-classification": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
    "masked-image-modeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling", "AutoImageProcessor"),
}
"""Task of a recipe -> the Hub's name of it, and the Auto classes of model and processor."""


@dataclass(frozen=True)
class Fidelity:
    """How closely a converted model follows its teacher.

    Attributes:
        teacher: what it was compared with.
        data: on what.
        rows: measure and value, as a reader sees them.
        picture: file name of a plot beside the card.
    """

    teacher: str
    data: str
    rows: tuple[tuple[str, str], ...]
    picture: str | None = None


@dataclass(frozen=True)
class Speed:
    """Measured speed. `rows` are (tokens, milliseconds, milliseconds of the baseline)."""

    machine: str
    baseline: str
    command: str
    rows: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Evaluation:
    """One result on a dataset on the Hub; goes into `.eval_results/` as well. `revision` is the dataset's commit."""

    dataset_id: str
    task_id: str
    metric: str
    value: float
    notes: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: name of the model.
        repo_id: `owner/name` on the Hub; None while it is not known.
        config: the model's config, with its `attention`.
        parameters: number of parameters.
        dataset: what it was trained on by a recipe; None for a checkpoint whose training is not known here.
        split_sizes: examples in each split.
        split_seed: seed of the split.
        arguments: the recipe's keys and values.
        metrics: `<split>_<metric>` -> value.
        best_checkpoint: the validation split chose among checkpoints.
        notes: what a reader of the results must know.
        curve: file name of the training curve, beside the card; None for no picture.
        base_model: the checkpoint it was made from: an id on the Hub, or another name.
        license: an id of the Hub's list; None where it is not known.
        linearized: arguments of `linearize`, where it was trained to compute what the base model computes.
        fidelity, speed: measured, or None.
        evaluations: results on datasets of the Hub.
        samples: predictions, each with `given`, `expected` and `predicted`.
        co2: grams of CO2 with their source, in the Hub's form (`emissions`, `source`, ...), where they were measured.
    """

    name: str
    repo_id: str | None
    config: Any
    parameters: int
    dataset: Source | None = None
    split_sizes: dict[str, int] = field(default_factory=dict)
    split_seed: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best_checkpoint: bool = False
    notes: str = ""
    curve: str | None = None
    base_model: str | None = None
    license: str | None = "apache-2.0"
    linearized: dict[str, Any] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    speed: Speed | None = None
    evaluations: tuple[Evaluation, ...] = ()
    co2: dict[str, Any] | None = None
    samples: Sequence[Any] = ()


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with metadata the Hub indexes.

    Raises:
        InvalidInput: a metric is not a finite number, or the config carries no mechanisms.
    """
    from huggingface_hub import ModelCard, ModelCardData

    for name, value in facts.metrics.items():
        if not math.isfinite(value):
            raise InvalidInput(f"metric {name}={value!r} is not a finite number, so a card cannot state it.")
    mechanisms = attention_of(facts.config)
    task, auto_model, auto_processor = usage(facts)
    results = _results(facts)
    known: dict[str, Any] = {
        "license": facts.license,
        "base_model": facts.base_model if facts.base_model and is_repo_id(facts.base_model) else None,
        "co2_eq_emissions": facts.co2,
    }
    if known["base_model"]:
        known["base_model_relation"] = "finetune"
    data = ModelCardData(
        model_name=facts.name,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_attn", *dict.fromkeys(mechanism.name for mechanism in mechanisms)],
        metrics=sorted({result.metric_type for result in results} & {"accuracy", "perplexity"}) or None,
        eval_results=results or None,
        **{name: value for name, value in known.items() if value is not None},
    )
    text: dict[str, Any] = {
        "facts": facts,
        "repo": facts.repo_id or f"ORG/{facts.name}",
        "mechanisms": mechanisms,
        "architecture": architecture(facts.config),
        "settings": settings(facts.arguments or facts.linearized),
        "scores": scores(facts.metrics),
        "versions": versions(),
        "samples": [
            {key: _cell(getattr(sample, key)) for key in ("given", "expected", "predicted")} for sample in facts.samples
        ],
        "auto_model": auto_model,
        "auto_processor": auto_processor,
    }
    card = ModelCard.from_template(data, template_str=template_path().read_text(encoding="utf-8"), **text)
    check_card(str(card))
    return card


def usage(facts: CardFacts) -> tuple[str | None, str, str]:
    """Task, Auto class and Auto processor of the model."""
    if facts.dataset is not None:
        return _AUTO_CLASSES[facts.dataset.task]
    from hf_attn.models.loading import model_classes

    named = str((getattr(facts.config, "architectures", None) or [""])[0])
    autos = [auto for auto, model in model_classes(facts.config).items() if model.__name__ in (named, f"Attn{named}")]
    auto = next((name for name in autos if name in _TASKS), autos[0] if autos else "AutoModel")
    return _TASKS.get(auto), auto, "AutoImageProcessor" if is_vision(facts.config) else "AutoTokenizer"


def checkpoint_card(folder: Path, config: Any, repo_id: str, **known: Any) -> ModelCard:
    """The card of a saved checkpoint about which only the folder is known; `known` are further fields of `CardFacts`."""
    from safetensors import safe_open

    parameters = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    values: dict[str, Any] = {"license": None, **known}
    return model_card(CardFacts(repo_id.rpartition("/")[2], repo_id, config, parameters, **values))


def eval_results(facts: CardFacts) -> dict[str, str]:
    """Path -> text of the files in which the Hub reads results now (`model-index` in the card is its older form)."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files: dict[str, list[Any]] = {}
    for result in facts.evaluations:
        entry = EvalResultEntry(
            result.dataset_id,
            result.task_id,
            round(result.value, 4),
            dataset_revision=result.revision,
            notes=f"{result.metric}, {result.notes}" if result.notes else result.metric,
        )
        files.setdefault(result.dataset_id.replace("/", "__"), []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        for name, entries in files.items()
    }


def _results(facts: CardFacts) -> list[Any]:
    """The `model-index` entries."""
    from huggingface_hub import EvalResult

    task = usage(facts)[0] or "feature-extraction"
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset.name,
            dataset_name=facts.dataset.title,
            dataset_split="test",
            metric_type=name.removeprefix("test_"),
            metric_value=round(value, 4),
        )
        for name, value in facts.metrics.items()
        if facts.dataset is not None and name.startswith("test_")
    ]
    return measured + [
        EvalResult(
            task_type=task,
            dataset_type=result.dataset_id,
            dataset_name=f"{result.dataset_id}, {result.task_id}",
            metric_type=result.metric,
            metric_value=round(result.value, 4),
        )
        for result in facts.evaluations
        if facts.dataset is None or result.dataset_id != facts.dataset.name
    ]


def template_path() -> Path:
    """The Jinja template: beside this file in an installed wheel, in model_cards/ in the repository."""
    here = Path(__file__).resolve()
    places = (here.with_name(TEMPLATE), here.parents[2] / "model_cards" / TEMPLATE)
    for place in places:
        if place.is_file():
            return place
    raise InvalidInput(f"the card template {TEMPLATE} is missing from this installation. Install hf_attn again.")


def settings(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """The arguments that decide what was trained."""
    return [
        (name, plain(value)) for name, value in sorted(_flat(arguments).items()) if not name.startswith(_ABOUT_THE_RUN)
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
