"""Train a model family from scratch, check that it reloads to the same numbers, and pack it for the Hub.

    result = train("configs/vit_ripple_digits.yaml", {"seed": 1})
    print(result)

One run: data -> model -> Trainer -> test metrics -> `model/` (weights, config, processor, card, curve) -> reload through
the Auto classes -> `hub/` (what would be uploaded). On several processes, only the first one writes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import HfAttnError, InvalidOption, near
from hf_attn.recipes.arguments import ModelArguments, Recipe, read
from hf_attn.recipes.curve import draw_curve
from hf_attn.recipes.data import Source, source, to_pixels

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

    from hf_attn.hub.pack import Plan

CURVE = "training_curve.png"


class ReloadMismatch(HfAttnError, RuntimeError):
    """A saved model computes other numbers than the trained one."""


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Attributes:
        model_dir: the saved model.
        metrics: accuracy and loss on the validation and test splits.
        reload_difference: largest difference of test logits, trained against reloaded; always 0.
        seconds: wall time of the run.
        plan: the folder packed for the Hub.
    """

    model_dir: Path
    metrics: dict[str, float]
    reload_difference: float
    seconds: float
    plan: Plan

    def __str__(self) -> str:
        numbers = "\n".join(f"{name.replace('_', ' '):<20}{value:.4f}" for name, value in self.metrics.items())
        return (
            f"{numbers}\nreloaded through AutoModelForImageClassification: largest difference of the test logits "
            f"{self.reload_difference:g}\n{self.seconds:.0f} s, saved in {self.model_dir}\n\n{self.plan}"
        )


def train(config: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> TrainResult | None:
    """Run the recipe in the YAML file `config`.

    Args:
        config: keys are the fields of ModelArguments, DataArguments and transformers.TrainingArguments.
        overrides: values on top of the file's; dotted keys reach into dicts.

    Returns:
        The result on the main process, None on the others.

    Raises:
        InvalidOption, InvalidInput, Unsupported, UnknownMechanism: something in the configuration; nothing was done.
        ReloadMismatch: the saved model is not the trained one.
    """
    from transformers import set_seed

    from hf_attn.hub.probe import write_probe

    started = time.perf_counter()
    recipe = read(config, overrides)
    data_source = source(recipe.data.dataset)
    check_model(recipe.model)
    set_seed(recipe.training.seed)

    raw = data_source.load(recipe.data.split_seed)
    model_config = configure(recipe.model, raw["train"].features["labels"].names)
    processor = image_processor(model_config)
    data = to_pixels(raw, processor, recipe.data.max_examples)
    model = build_model(model_config)
    trainer = make_trainer(model, recipe, data)
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    metrics = measure(trainer, data)

    folder = recipe.output / "model"
    weights = trainer.accelerator.get_state_dict(trainer.model)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
        return None
    # the card says that the model reloads to the same numbers, so an earlier run's must not outlive a failed check
    (folder / "README.md").unlink(missing_ok=True)
    trained.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    write_probe(trained, folder)
    draw_curve(trainer.state.log_history, folder / CURVE, f"{recipe.name}: {len(data['train'])} training examples")
    difference = check_reload(trained, folder, raw["test"], data["test"], recipe.training.per_device_eval_batch_size)
    write_card(folder, recipe, data_source, {name: len(split) for name, split in data.items()}, trained, metrics)
    result = TrainResult(folder, metrics, difference, time.perf_counter() - started, pack_run(recipe, folder))
    trainer.accelerator.wait_for_everyone()
    return result


FAMILIES = {"vit": ("AttnViTConfig", "AttnViTForImageClassification")}
"""Family -> its config and model class in `hf_attn`."""


def check_model(arguments: ModelArguments) -> None:
    """Raise for a family, mechanism, option or config field that does not exist or does not fit the others."""
    import torch

    import hf_attn

    if arguments.family not in FAMILIES:
        raise InvalidOption(
            f"family={arguments.family!r} has no training recipe{near(arguments.family, FAMILIES)}. Known: {', '.join(FAMILIES)}."
        )
    known = [f.name for f in dataclasses.fields(getattr(hf_attn, FAMILIES[arguments.family][0]))]
    for key in arguments.config:
        if key not in known:
            raise InvalidOption(f"config: unknown field {key!r}{near(key, known)} of {FAMILIES[arguments.family][0]}.")
    config = configure(arguments, ["0", "1"])
    image_processor(config)
    try:
        # a model without memory: options are checked against the sizes they must fit
        with torch.device("meta"):
            build_model(config)
    except HfAttnError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InvalidOption(f"config: no model can be built with these values: {error}.") from error


def configure(arguments: ModelArguments, labels: list[str]) -> PreTrainedConfig:
    """The config of the model, with the names of the data's labels."""
    from huggingface_hub.errors import StrictDataclassError

    import hf_attn

    config_class = getattr(hf_attn, FAMILIES[arguments.family][0])
    try:
        return config_class(
            **arguments.config,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            attn_implementation=arguments.attn_implementation,
            attention_options=arguments.attention_options,
        )
    except HfAttnError:
        raise
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InvalidOption(f"config: {config_class.__name__} refuses a field: {error}") from error


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised model of the family whose config this is."""
    import hf_attn

    model_class = next(model for name, model in FAMILIES.values() if isinstance(config, getattr(hf_attn, name)))
    return getattr(hf_attn, model_class)(config)


def image_processor(config: PreTrainedConfig) -> Any:
    """The image processor of ViT that scales pictures to what `config` takes, with pixels from -1 to 1."""
    from transformers import ViTImageProcessorPil

    if config.num_channels != 3:
        raise InvalidOption(
            f"config: num_channels={config.num_channels!r} must be 3: pictures are handed over as RGB, also by pipelines."
        )
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_trainer(model: PreTrainedModel, recipe: Recipe, data: Mapping[str, Dataset]) -> Trainer:
    """A Trainer that measures accuracy on the validation split."""
    from transformers import Trainer, default_data_collator

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return Trainer(
        model=model,
        args=recipe.training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )


def measure(trainer: Trainer, data: Mapping[str, Dataset]) -> dict[str, float]:
    """Accuracy and loss of the trained model on the validation and test splits."""
    metrics: dict[str, float] = {}
    for split in ("validation", "test"):
        found = trainer.evaluate(data[split], metric_key_prefix=split)
        metrics |= {f"{split}_{name}": found[f"{split}_{name}"] for name in ("accuracy", "loss")}
    return metrics


def logits_of(model: PreTrainedModel, data: Dataset, batch_size: int) -> torch.Tensor:
    """Logits of every example, in order, on the model's device."""
    import torch

    model.eval()
    with torch.no_grad():
        batches = (batch["pixel_values"].to(model.device, model.dtype) for batch in data.iter(batch_size))
        return torch.cat([model(pixel_values=pixels).logits for pixels in batches])


def check_reload(trained: PreTrainedModel, folder: Path, raw: Dataset, data: Dataset, batch_size: int) -> float:
    """Largest difference of logits between `trained` and what the Auto classes load from `folder`: 0, or an error."""
    from transformers import AutoModelForImageClassification

    # from its own module: transformers 5.17 hides the public name where torchvision is missing
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    # a copy: weights read from a file lie at odd addresses, which changes the rounding of a matrix product
    reloaded = copy.deepcopy(AutoModelForImageClassification.from_pretrained(folder)).to(trained.device)
    difference = (logits_of(trained, data, batch_size) - logits_of(reloaded, data, batch_size)).abs().max().item()
    if difference != 0:
        raise ReloadMismatch(
            f"the model saved in {folder} computes other logits than the trained one (largest difference {difference:g} over "
            f"{len(data)} test examples). Do not publish it: some of its weights or options were not saved."
        )
    # another backend of the same processor may differ in the last bits
    pixels = AutoImageProcessor.from_pretrained(folder)([raw[0]["image"]], return_tensors="pt")["pixel_values"]
    if (pixels[0] - data[0]["pixel_values"]).abs().max().item() > 1e-5:
        raise ReloadMismatch(f"the image processor saved in {folder} makes other pixels than the one used in training.")
    return difference


def write_card(
    folder: Path, recipe: Recipe, data: Source, sizes: dict[str, int], model: PreTrainedModel, metrics: dict[str, float]
) -> None:
    """Write the model card, README.md."""
    from hf_attn.hub.card import CardFacts, model_card

    facts = CardFacts(
        name=recipe.name,
        repo_id=recipe.training.hub_model_id,
        config=model.config,
        parameters=model.num_parameters(),
        dataset=data,
        split_sizes=sizes,
        split_seed=recipe.data.split_seed,
        arguments=recipe.given,
        metrics=metrics,
        best_checkpoint=recipe.training.load_best_model_at_end,
        notes=recipe.data.notes,
        curve=CURVE,
    )
    (folder / "README.md").write_text(str(model_card(facts)), encoding="utf-8")


def pack_run(recipe: Recipe, folder: Path) -> Plan:
    """Pack the saved model into `hub/`, beside it."""
    from hf_attn.hub.pack import pack

    return pack(folder, folder.parent / "hub", recipe.training.hub_model_id or f"ORG/{recipe.name}")
