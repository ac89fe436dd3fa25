"""Train a model, from scratch or from a checkpoint, check that it reloads to the same numbers, and pack it for the Hub.

    result = train("configs/vit_ripple_digits.yaml", {"seed": 1})
    print(result)

One run: data -> processor -> model -> Trainer -> test metrics -> `model/` (weights, config, processor, card, curve) ->
reload through the Auto classes -> samples -> `hub/` (what would be uploaded). On several processes, only the first one
writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidOption, PublishFailed, Unsupported
from hf_attn.recipes.arguments import Recipe, read
from hf_attn.recipes.curve import draw_curve
from hf_attn.recipes.data import Source, first_examples
from hf_attn.recipes.data_hub import class_names, source_of
from hf_attn.recipes.families import build_model, check_model, configure, new_model
from hf_attn.recipes.launch import shard_layers, shard_on_cpu
from hf_attn.recipes.reload import ReloadMismatch, check_reload
from hf_attn.recipes.tasks import Setting, Task, longest, task_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    from hf_attn.hub.card import Evaluation
    from hf_attn.hub.pack import Plan
    from hf_attn.hub.upload import Published
    from hf_attn.recipes.language import Sample

__all__ = ["ReloadMismatch", "TrainResult", "check_model", "check_reload", "make_trainer", "prepare", "train"]
CURVE = "training_curve.png"


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Attributes:
        model_dir: the saved model.
        metrics: the task's metrics and the loss on the validation and test splits.
        reload_difference: largest difference of test outputs, trained against reloaded; always 0.
        seconds: wall time of the run.
        plan: the folder packed for the Hub.
        published: where it is, with push_to_hub.
        auto_class: what the model was reloaded through.
        samples: predictions for the first test examples.
    """

    model_dir: Path
    metrics: dict[str, float]
    reload_difference: float
    seconds: float
    plan: Plan
    published: Published | None
    auto_class: str
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        numbers = "\n".join(f"{name.replace('_', ' '):<24}{value:.4f}" for name, value in self.metrics.items())
        shown = "".join(
            f"given:     {sample.given}\nexpected:  {sample.expected}\npredicted: {sample.predicted}\n\n"
            for sample in self.samples
        )
        return (
            f"{shown}{numbers}\nreloaded through {self.auto_class}: largest difference of the test outputs "
            f"{self.reload_difference:g}\n{self.seconds:.0f} s, saved in {self.model_dir}\n\n{self.published or self.plan}"
        )


@dataclass(frozen=True)
class Prepared:
    """Everything a Trainer needs.

    Attributes:
        source: the data set.
        task: with the label smoothing of the recipe in its loss.
        setting: processor, config and names of classes.
        raw: the splits as they were read.
        data: the splits as a model takes them.
        model: to be trained.
    """

    source: Source
    task: Task
    setting: Setting
    raw: dict[str, Any]
    data: dict[str, Any]
    model: PreTrainedModel


def train(
    config: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TrainResult | None:
    """Run the recipe in the YAML file, or dict, `config`.

    Args:
        config: keys are the fields of ModelArguments, DataArguments and transformers.TrainingArguments.
        overrides: values on top of the file's; dotted keys reach into dicts.

    Returns:
        The result on the main process, None on the others.

    Raises:
        InvalidOption, InvalidInput, Unsupported, UnknownMechanism: something in the configuration; nothing was trained.
        ReloadMismatch: the saved model is not the trained one.
        PublishFailed: with push_to_hub; the trained model is saved and packed.
    """
    from hf_attn.hub.probe import write_probe

    started = time.perf_counter()
    recipe = read(config, overrides)
    prepared = prepare(recipe)
    trainer = make_trainer(recipe, prepared)
    # a failed push was warned about, and the end of this run publishes again
    with contextlib.suppress(PublishFailed):
        trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    metrics = measure(trainer, prepared)
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
        return None
    trained = whole_model(trainer, prepared, weights)
    folder = recipe.output / "model"
    # the card says that the model reloads to the same numbers, so an earlier run's must not outlive a failed check
    (folder / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder / ".eval_results", ignore_errors=True)
    trained.save_pretrained(folder)
    prepared.setting.processor.save_pretrained(folder)
    write_probe(trained, folder)
    history, names = trainer.state.log_history, prepared.task.objective.names
    draw_curve(history, folder / CURVE, f"{recipe.name}{_examples(prepared)}", names)
    difference = check_reload(
        trained,
        folder,
        prepared.raw["test"],
        prepared.data["test"],
        recipe.training.per_device_eval_batch_size,
        prepared.task,
        prepared.setting,
    )
    samples = tuple(prepared.task.show(trained.eval(), prepared.setting, prepared.raw["test"], prepared.data["test"]))
    write_card(folder, recipe, prepared, trained, metrics, samples)
    plan = pack_run(recipe, folder)
    published = publish_run(recipe, plan) if recipe.training.push_to_hub else None
    seconds = time.perf_counter() - started
    result = TrainResult(folder, metrics, difference, seconds, plan, published, prepared.task.auto_class, samples)
    trainer.accelerator.wait_for_everyone()
    return result


def prepare(recipe: Recipe) -> Prepared:
    """Data, processor and model of a recipe; what can be refused without data is refused first."""
    from transformers import set_seed

    source = source_of(recipe.data)
    if not (recipe.data.task or source.task):
        raise InvalidOption(f"task is missing: {source.name} is not embedded, so the recipe must say what it is for.")
    task = task_named(recipe.data.task or source.task).smoothed(recipe.training.label_smoothing_factor)
    check_model(recipe.model, task)
    if recipe.data.streaming and recipe.training.max_steps < 1:
        raise InvalidOption(
            f"max_steps={recipe.training.max_steps!r} must be set where streaming: true: a stream has no length."
        )
    if recipe.data.streaming and task.images:
        raise Unsupported(f"task {task.name}", "streaming is for text", "Set streaming: false")
    set_seed(recipe.training.seed)

    raw = first_examples(source.load(recipe.data.split_seed, **recipe.data.dataset_options), recipe.data.max_examples)
    task.check_columns(source.name, raw)
    labels = class_names(raw) if task.classes else []
    processor, fields = task.processor(recipe, source, raw)
    config = configure(recipe.model, labels, fields)
    task.check_sizes(config, processor, longest(raw, recipe.data))
    setting = Setting(processor, config, recipe.data, recipe.training.seed, labels)
    data = task.prepare(raw, setting)
    model = build_model(recipe.model, config, task)
    source = dataclasses.replace(source, task=task.name)
    return Prepared(source, task, setting, raw, data, model)


def make_trainer(recipe: Recipe, prepared: Prepared) -> Trainer:
    """A Trainer with the task's loss and metrics."""
    from transformers.trainer_callback import ProgressCallback

    from hf_attn.recipes.progress import LiveLine, Redraw
    from hf_attn.recipes.safe_trainer import SafeTrainer

    arguments = recipe.training
    if arguments.label_names is None:
        arguments.label_names = ["labels"]
    shard_on_cpu(arguments)
    trainer = SafeTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.data["train"],
        eval_dataset=prepared.data["validation"],
        data_collator=prepared.task.collator(prepared.setting),
        compute_loss_func=prepared.task.objective.loss,
        compute_metrics=prepared.task.objective.metrics,
        preprocess_logits_for_metrics=prepared.task.objective.sums,
    )
    shard_layers(trainer)
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LiveLine())
    if hasattr(prepared.data["train"], "redraw"):
        trainer.add_callback(Redraw(prepared.data["train"]))
    return trainer


def whole_model(trainer: Trainer, prepared: Prepared, weights: Mapping[str, Any]) -> PreTrainedModel:
    """The trained model on one process; where it was sharded, a new one with the gathered weights."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        model: Any = new_model(prepared.model.config, prepared.task)
        model.load_state_dict(weights)
        return model
    # without the wrapper that computes in half precision: a model is saved, and used, in its own
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def measure(trainer: Trainer, prepared: Prepared) -> dict[str, float]:
    """The task's metrics and the loss of the trained model on the validation and test splits."""
    metrics: dict[str, float] = {}
    for split in ("validation", "test"):
        found = trainer.evaluate(prepared.data[split], metric_key_prefix=split)
        metrics |= {f"{split}_{name}": found[f"{split}_{name}"] for name in (*prepared.task.objective.names, "loss")}
    return metrics


def _examples(prepared: Prepared) -> str:
    train = prepared.data["train"]
    return f": {len(train)} training examples" if hasattr(train, "__len__") else ""


def write_card(
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    model: PreTrainedModel,
    metrics: dict[str, float],
    samples: tuple[Sample, ...],
) -> None:
    """Write the model card, README.md, and what `evaluations` finds into `.eval_results/`."""
    from hf_attn.hub.card import CardFacts, eval_results, model_card

    sizes = {name: len(split) for name, split in prepared.data.items() if hasattr(split, "__len__")}
    facts = CardFacts(
        name=recipe.name,
        repo_id=recipe.training.hub_model_id,
        config=model.config,
        parameters=model.num_parameters(),
        dataset=prepared.source,
        split_sizes=sizes,
        split_seed=recipe.data.split_seed,
        arguments=without_folders(recipe.given),
        metrics=metrics,
        best_checkpoint=recipe.training.load_best_model_at_end,
        notes=recipe.data.notes,
        curve=CURVE,
        samples=samples,
        evaluations=evaluations(recipe, prepared, metrics),
        base_model=without_folders(recipe.model.model),
        # a checkpoint's license goes on to what is made from it, and is not known here
        license=None if recipe.model.model else "apache-2.0",
    )
    texts = {"README.md": str(model_card(facts)), **eval_results(facts)}
    for path, text in texts.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def evaluations(recipe: Recipe, prepared: Prepared, metrics: dict[str, float]) -> tuple[Evaluation, ...]:
    """The main result, where it is one that others can compare with: the whole test split of a data set on the Hub."""
    from hf_attn.hub.card import Evaluation

    own = str(getattr(prepared.raw["test"], "split", None)) == "test"
    if "/" not in prepared.source.name or not own or recipe.data.max_examples is not None:
        return ()
    options = recipe.data.dataset_options
    revision = str(options.get("revision", ""))
    metric = prepared.task.objective.names[0]
    return (
        Evaluation(
            prepared.source.name,
            recipe.data.eval_task or str(options.get("name", "default")),
            metric,
            metrics[f"test_{metric}"],
            "test split",
            revision if re.fullmatch("[0-9a-f]{40}", revision) else None,
        ),
    )


def without_folders(value: Any) -> Any:
    """Arguments whose paths are names only: a folder of one machine says nothing to a reader."""
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def pack_run(recipe: Recipe, folder: Path) -> Plan:
    """Pack the saved model into `hub/`, beside it."""
    from hf_attn.hub.pack import pack

    return pack(folder, folder.parent / "hub", recipe.training.hub_model_id or f"ORG/{recipe.name}")


def publish_run(recipe: Recipe, plan: Plan) -> Published:
    """Publish what was packed, as push_to_hub asks for."""
    from hf_attn.hub.upload import publish

    arguments = recipe.training
    try:
        return publish(
            plan.folder, plan.repo_id, private=arguments.hub_private_repo, revision=arguments.hub_revision or "main"
        )
    except PublishFailed as error:
        raise PublishFailed(
            error.stage,
            error.reason,
            f"{error.state}. The trained model is in {plan.folder}",
            f"{error.remedy}. To publish it without training again: {plan.command}",
            error.status,
        ) from error
