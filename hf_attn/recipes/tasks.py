"""The tasks a recipe can train, as a table: what each needs from the data, minimises, measures and shows.

A further task is one row of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput, InvalidOption, near
from hf_attn.recipes import classification, images, language
from hf_attn.recipes.arguments import DataArguments, Recipe
from hf_attn.recipes.data import Source
from hf_attn.recipes.families import configure
from hf_attn.recipes.objectives import CrossEntropy, PixelError
from hf_attn.recipes.tokenizer import load_tokenizer, texts_of, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """What a task may need beside the data.

    Attributes:
        processor: the tokenizer or image processor.
        config: of the model.
        data: the recipe's data arguments.
        seed: the recipe's seed.
        labels: names of the classes.
    """

    processor: Any
    config: PreTrainedConfig
    data: DataArguments
    seed: int
    labels: list[str]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: as in a recipe; where there is one, the name of the pipeline.
        title: for people.
        auto_class: the Auto class of its models.
        pipeline: the pipeline that a model card names.
        columns: the columns it needs; alternatives are different tuples.
        prepare: raw splits to examples a model takes.
        objective: loss and metrics.
        show: predictions for the first test examples.
        classes: the labels are names of classes.
        images: the input is images, not text.
    """

    name: str
    title: str
    auto_class: str
    pipeline: str
    columns: tuple[tuple[str, ...], ...]
    prepare: Callable[[Mapping[str, Any], Setting], dict[str, Any]]
    objective: CrossEntropy | PixelError
    show: Callable[[PreTrainedModel, Setting, Any, Any], list[language.Sample]]
    classes: bool = False
    images: bool = False

    def check_config(self, config: PreTrainedConfig) -> None:
        """Raise where a model of this config cannot take the task's input."""
        if self.images:
            images.check_channels(config)

    def processor(self, recipe: Recipe, source: Source, raw: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The image processor or tokenizer, and the fields of a config from scratch that it decides."""
        if self.images:
            if recipe.model.model:
                return images.load_processor(recipe.model.model), {}
            return images.image_processor(configure(recipe.model, [], {})), {}
        if name := recipe.data.tokenizer or recipe.model.model:
            processor = load_tokenizer(name)
        elif source.tokenizer == "words":
            # a generated language: its words are known, also those that training examples happen to lack
            processor = train_tokenizer(chain.from_iterable(map(texts_of, raw.values())), "words", None)
        else:
            processor = train_tokenizer(texts_of(raw["train"]), source.tokenizer, recipe.data.vocab_size)
        special = {f"{role}_token_id": getattr(processor, f"{role}_token_id") for role in ("pad", "bos", "eos")}
        length = longest(raw, recipe.data)
        return processor, {"vocab_size": len(processor), "max_position_embeddings": length, **special}

    def check_sizes(self, config: PreTrainedConfig, processor: Any, length: int) -> None:
        """Raise where the tokenizer makes tokens, or `max_length` positions, that the model does not know."""
        if self.images:
            return
        if len(processor) > config.vocab_size:
            raise InvalidOption(
                f"the tokenizer has {len(processor)} entries, but config.vocab_size={config.vocab_size}. Leave vocab_size out "
                "of config, or name the tokenizer that belongs to the model."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise InvalidOption(
                f"max_length={length} is more than the {positions} positions of the model. Set max_length: {positions}."
            )

    def check_columns(self, name: str, splits: Mapping[str, Any]) -> None:
        """Raise where the data lacks a column."""
        for split, data in splits.items():
            there = data.column_names or []
            if not any(set(needed) <= set(there) for needed in self.columns):
                wanted = ", or ".join(" and ".join(needed) for needed in self.columns)
                raise InvalidInput(
                    f"task {self.name} needs the columns {wanted}; the {split} split of {name} has {', '.join(there)}. "
                    "Name the right columns with `columns: {role: name}`, or set task to what the data is for."
                )

    def collator(self, setting: Setting) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Examples to a batch."""
        if self.images:
            from transformers import default_data_collator

            return default_data_collator
        return language.Pad(setting.processor.pad_token_id)

    def smoothed(self, smoothing: float) -> Task:
        """The task with label smoothing in its loss."""
        return replace(self, objective=replace(self.objective, smoothing=smoothing)) if smoothing else self


TASKS = {
    task.name: task
    for task in (
        Task(
            name="fill-mask",
            title="masked language modelling",
            auto_class="AutoModelForMaskedLM",
            pipeline="fill-mask",
            columns=(("text",), ("tokens", "answers")),
            prepare=language.masked,
            objective=CrossEntropy(perplexity=True),
            show=language.show_masked,
        ),
        Task(
            name="text-generation",
            title="causal language modelling",
            auto_class="AutoModelForCausalLM",
            pipeline="text-generation",
            columns=(("text",), ("tokens", "answers")),
            prepare=language.causal,
            objective=CrossEntropy(shift=True, perplexity=True),
            show=language.show_text,
        ),
        Task(
            name="text-classification",
            title="sequence classification",
            auto_class="AutoModelForSequenceClassification",
            pipeline="text-classification",
            columns=(("text", "labels"),),
            prepare=classification.sequences,
            objective=CrossEntropy(),
            show=classification.show_sequences,
            classes=True,
        ),
        Task(
            name="token-classification",
            title="token classification",
            auto_class="AutoModelForTokenClassification",
            pipeline="token-classification",
            columns=(("tokens", "labels"),),
            prepare=classification.words,
            objective=CrossEntropy(),
            show=classification.show_words,
            classes=True,
        ),
        Task(
            name="image-classification",
            title="image classification",
            auto_class="AutoModelForImageClassification",
            pipeline="image-classification",
            columns=(("image", "labels"),),
            prepare=images.pixels,
            objective=CrossEntropy(),
            show=images.show_classes,
            classes=True,
            images=True,
        ),
        Task(
            name="masked-image-modeling",
            title="masked image modelling",
            auto_class="AutoModelForMaskedImageModeling",
            pipeline="image-feature-extraction",
            columns=(("image",),),
            prepare=images.hidden_patches,
            objective=PixelError(),
            show=images.show_patches,
            images=True,
        ),
    )
}


def longest(raw: Mapping[str, Any], data: DataArguments) -> int:
    """Tokens of the longest example: max_length, or what a generated set of tokens has."""
    if "answers" in (raw["train"].column_names or ()):
        return max(len(row) for split in raw.values() for row in split["tokens"])
    return data.max_length


def task_named(name: str) -> Task:
    """The task called `name`; `InvalidOption` names the nearest one otherwise."""
    if name not in TASKS:
        raise InvalidOption(
            f"no task is called {name!r}{near(name, TASKS)}. Known: {', '.join(TASKS)}. Set task in the config."
        )
    return TASKS[name]
