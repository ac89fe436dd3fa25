"""The configuration of a recipe: one flat YAML file, read by HfArgumentParser into three dataclasses.

Every field of `transformers.TrainingArguments` can be set. What is wrong is refused before any work is done.

A file may serve several mechanisms: what `mechanisms` lists under the chosen one comes on top of the rest of the file,
and `{mechanism}` in output_dir stands for its name.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_attn.errors import InvalidInput, InvalidOption, near
from hf_attn.recipes.launch import needs_cpu

if TYPE_CHECKING:
    from transformers import TrainingArguments

REFUSED = {
    "hub_token": "Trainer would pickle it into training_args.bin. Log in with `hf auth login`, or set HF_TOKEN",
}
"""Fields of TrainingArguments that would leak a secret, and what to do instead."""


@dataclass
class ModelArguments:
    """The model to train: a family from scratch, or a pretrained checkpoint."""

    family: str = field(default="vit", metadata={"help": "Family of a model from scratch, such as bert, vit or gpt2."})
    model: str = field(
        default="", metadata={"help": "A pretrained checkpoint (folder or Hub name), in place of family."}
    )
    attn_implementation: str | dict[str, Any] = field(
        default="",
        metadata={
            "help": "A registered mechanism, or a dict from layers to mechanisms. Empty: softmax, or what the checkpoint has."
        },
    )
    attention_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the mechanism."})
    config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the family's config class."})


@dataclass
class DataArguments:
    """The task, the data to train on, and how the data is handed to the model."""

    task: str = field(default="", metadata={"help": "A task of hf_attn.recipes.tasks. Empty: the data set's own."})
    dataset: str = field(
        default="",
        metadata={"help": "An embedded set (digits, pydoc, ...), a file, a folder, or owner/name on the Hub."},
    )
    dataset_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of an embedded set, or keywords of datasets.load_dataset."}
    )
    columns: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Role (text, image, tokens, labels) to the column's name in the data."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read training examples as they are needed (max_steps)."})
    holdout: int = field(
        default=1000,
        metadata={"help": "Most examples held out for validation, and for test, where the data names none."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the train/validation/test split."})
    max_examples: int | None = field(default=None, metadata={"help": "Use only the first examples of every split."})
    tokenizer: str = field(
        default="",
        metadata={"help": "A tokenizer (folder or Hub name). Empty: the checkpoint's, or a new one is trained."},
    )
    vocab_size: int = field(default=2048, metadata={"help": "Most entries of a newly trained tokenizer."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a block of text, or of the longest example."})
    mask_probability: float | None = field(
        default=None, metadata={"help": "Share of tokens (0.15) or image patches (0.6) that a masked task hides."}
    )
    eval_task: str = field(
        default="",
        metadata={"help": "Which task of a data set on the Hub the results are filed under. Empty: its configuration."},
    )
    samples: int = field(default=4, metadata={"help": "Predictions shown at the end of a run."})
    notes: str = field(default="", metadata={"help": "What a reader of the results must know; the card prints it."})


@dataclass
class Recipe:
    """One experiment.

    Attributes:
        name: the name of the output folder; the model is called after it.
        output: the output folder.
        given: every key that was set, as in the file.
    """

    name: str
    output: Path
    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    given: dict[str, Any]


def read(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or in a dict, with `overrides` (dotted keys reach into dicts) on top.

    Raises:
        InvalidInput: a path does not exist or cannot be used.
        InvalidOption: an unknown key, or a value of the wrong type.
        UnknownMechanism: `mechanisms` lists one that is not registered.
    """
    from transformers import HfArgumentParser, TrainingArguments

    path = "the recipe" if isinstance(source, Mapping) else source
    values = dict(source) if isinstance(source, Mapping) else _load(Path(source))
    values = for_mechanism(values, (overrides or {}).get("attn_implementation"))
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    types_of = {name: hint for kind in kinds for name, hint in _hints(kind).items()}
    types_of["resume_from_checkpoint"] = str | bool | None
    for key, value in values.items():
        if key not in types_of:
            raise InvalidOption(
                f"{path}: unknown key {key!r}{near(key, types_of)}. Keys are the fields of ModelArguments, DataArguments "
                "(hf_attn.recipes.arguments) and transformers.TrainingArguments."
            )
        if key in REFUSED and value:
            raise InvalidOption(f"{path}: {key} must not be set: {REFUSED[key]}.")
        values[key] = _checked(key, value, types_of[key])
    output = _output(path, values.get("output_dir"))
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise InvalidInput(
            f"resume_from_checkpoint={resume!r} is not a folder. Give a checkpoint-N folder of a run, or true for the newest."
        )
    forced = {"use_cpu": True} if needs_cpu() else {}
    try:
        model, data, training = HfArgumentParser(typing.cast(Any, kinds)).parse_dict({**values, **forced})
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"{path}: transformers refuses the training arguments: {error}") from error
    if training.push_to_hub:
        from hf_attn.hub.trainer import check_push

        check_push(training)
    return Recipe(name=output.name, output=output, model=model, data=data, training=training, given=values)


def for_mechanism(values: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """`values` of a file as they are for one mechanism: its entry of `mechanisms` on top, its name in output_dir.

    Args:
        values: of the file.
        name: of the mechanism; the file's attn_implementation by default.
    """
    from hf_attn import get_mechanism

    values = dict(values)
    table, name = values.pop("mechanisms", {}), name or values.get("attn_implementation") or "softmax"
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise InvalidOption(f"mechanisms must map names to keys and values, as `lara: {{}}`; it is {table!r}.")
    for listed, entry in table.items():
        get_mechanism(listed)
        if "attn_implementation" in entry:
            raise InvalidOption(f"mechanisms: {listed} must not set attn_implementation: the entry is for {listed}.")
    # a choice by layer has no entry of its own
    for key, value in (table.get(name, {}) if isinstance(name, str) else {}).items():
        _set(values, key, value)
    if isinstance(values.get("output_dir"), str):
        values["output_dir"] = values["output_dir"].replace("{mechanism}", str(name))
    return values


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key=value` words as a dict; values are read as YAML, dots reach into dicts (`--config.hidden_size=32`)."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not (key and equals):
            raise InvalidOption(f"override {argument!r} must look like --learning_rate=0.001.")
        try:
            overrides[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidOption(f"override {argument!r}: the value is not valid YAML ({error}).") from error
    return overrides


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInput(
            f"there is no configuration file {str(path)!r}. Give the path of a YAML file, as in configs/."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} must hold keys and values, such as `dataset: digits`; it holds {values!r}.")
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InvalidOption(f"override {key!r}: {parent} is {inner!r}, not a dict, so it has no {last!r}.")
        # a copy: the caller's dicts stay as they are
        inner = dict(inner)
        values[parent] = inner
        values = inner
    values[last] = value


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _checked(key: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type its field declares. YAML reads 1e-3 as text: a number field takes it as a number."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    if typing.Any in kinds or (type(value) in kinds) or (value is None and type(None) in kinds):
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if isinstance(value, str) and any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
        return value
    expected = " or ".join(sorted(kind.__name__ for kind in kinds if kind is not type(None)))
    raise InvalidOption(f"{key}={value!r} must be of type {expected}; it is a {type(value).__name__}.")


def _output(path: str | os.PathLike[str], output_dir: str | None) -> Path:
    """The output folder, which can be written; it need not exist yet."""
    if not output_dir:
        raise InvalidInput(
            f"{path}: output_dir is missing. Say where the run goes, such as output_dir: runs/{Path(path).stem.replace(' ', '-')}."
        )
    output = Path(output_dir).expanduser().absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"output_dir={output_dir!r} cannot be made: {str(there)!r} is not a folder one can write to."
        )
    return output
