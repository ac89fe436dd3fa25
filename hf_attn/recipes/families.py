"""From a recipe to a model: a family from scratch, or a pretrained checkpoint with another mechanism.

A further family is one row of `FAMILIES`, if its classes are registered with transformers' Auto classes.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from hf_attn.errors import HfAttnError, InvalidInput, InvalidOption, Unsupported, near
from hf_attn.recipes.arguments import ModelArguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_attn.recipes.tasks import Task

FAMILIES = {"bert": "AttnBertConfig", "vit": "AttnViTConfig", "gpt2": "AttnGPT2Config", "gau": "GauConfig"}
"""Family -> its config class in `hf_attn`. Any other model type of transformers works too if `convert` takes it."""


def check_model(arguments: ModelArguments, task: Task | None = None) -> None:
    """Raise for a family, mechanism, option or config field that does not exist or does not fit the others.

    Args:
        arguments: of the recipe.
        task: what the model is for; image classification by default.
    """
    import torch

    from hf_attn.recipes.tasks import TASKS

    task = task or TASKS["image-classification"]
    if arguments.model and arguments.config:
        raise InvalidOption(
            "config is for a model from scratch: a checkpoint (model: ...) has its own. Leave one of the two out."
        )
    if not arguments.model:
        config_class = family_config(arguments.family)
        known = [f.name for f in dataclasses.fields(config_class)] + list(config_class.attribute_map)
        for key in arguments.config:
            if key not in known:
                raise InvalidOption(f"config: unknown field {key!r}{near(key, known)} of {config_class.__name__}.")
    config = configure(arguments, ["0", "1"] if task.classes else [], {})
    check_task(config, task)
    task.check_config(config)
    try:
        # a model without memory: options are checked against the sizes they must fit
        with torch.device("meta"):
            model = new_model(config, task)
            if arguments.model:
                give_mechanism(model, arguments)
    except HfAttnError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InvalidOption(f"config: no model can be built with these values: {error}.") from error


def configure(arguments: ModelArguments, labels: list[str], fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of the model.

    Args:
        arguments: of the recipe.
        labels: names of the classes; empty for tasks without.
        fields: what the data decides, such as vocab_size; the recipe's own fields come first.
    """
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
        if labels
        else {}
    )
    if arguments.model:
        return pretrained_config(arguments.model, names)
    from hf_attn.models.configuration import AttnConfigMixin

    config_class = family_config(arguments.family)
    known = {*config_class.attribute_map, *(f.name for f in dataclasses.fields(config_class))}
    fields = {key: value for key, value in fields.items() if key in known}
    mechanism: dict[str, Any] = {
        "attn_implementation": arguments.attn_implementation or "softmax",
        "attention_options": arguments.attention_options,
    }
    if not issubclass(config_class, AttnConfigMixin):
        if arguments.attn_implementation or arguments.attention_options:
            raise Unsupported(
                f"family {arguments.family}",
                "it has attention of its own, which attn_implementation cannot replace",
                "Choose it with fields of config, and leave attn_implementation and attention_options out",
            )
        mechanism = {}
    return _refusing(
        config_class.__name__, lambda: config_class(**{**fields, **names, **arguments.config}, **mechanism)
    )


def family_config(family: str) -> Any:
    """The config class of a family, or `InvalidOption` with the nearest one."""
    import hf_attn
    from hf_attn.models.configuration import GENERATED

    if family in FAMILIES:
        return getattr(hf_attn, FAMILIES[family])
    try:
        return hf_attn.register_family(family)
    except Unsupported:
        known = [*FAMILIES, *GENERATED]
        raise InvalidOption(
            f"family={family!r} has no training recipe{near(family, known)}. Known: {', '.join(known)}, and other model types "
            "of transformers."
        ) from None


def pretrained_config(name: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of a checkpoint."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **fields)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"model={name!r} cannot be loaded: {error}. Give a folder made by save_pretrained, or a Hub name."
        ) from error


def check_task(config: PreTrainedConfig, task: Task) -> None:
    """Raise where transformers has no model of this type for the task."""
    import transformers

    auto = getattr(transformers, task.auto_class)
    if type(config) not in auto._model_mapping:
        raise Unsupported(
            f"task {task.name}",
            f"{task.auto_class} has no model of type {config.model_type!r}",
            f"Families for it: {', '.join(family for family in FAMILIES if type(family_config(family)()) in auto._model_mapping)}",
        )


def new_model(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """A freshly initialised model for the task."""
    import transformers

    # a copy: building a model fills options in, and a second model must not start from those
    return getattr(transformers, task.auto_class).from_config(copy.deepcopy(config))


def build_model(arguments: ModelArguments, config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """The model to train: new, or loaded and given the mechanism that the recipe names."""
    import transformers

    if not arguments.model:
        return new_model(config, task)
    auto = getattr(transformers, task.auto_class)
    try:
        model = auto.from_pretrained(arguments.model, config=config, ignore_mismatched_sizes=task.classes)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"model={arguments.model!r} cannot be loaded with {task.auto_class}: {error}") from error
    give_mechanism(model, arguments)
    return model


def give_mechanism(model: PreTrainedModel, arguments: ModelArguments) -> None:
    """Convert a loaded model to the mechanism a recipe names; a model of hf_attn keeps its own where none is named."""
    from hf_attn import convert

    has_one = bool(getattr(model.config, "attention", None))
    if arguments.attn_implementation or not has_one:
        convert(model, arguments.attn_implementation or "softmax", **arguments.attention_options)
    elif arguments.attention_options:
        raise InvalidOption("attention_options belong to a mechanism. Set attn_implementation as well.")


def _refusing(name: str, make: Any) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make()
    except HfAttnError:
        raise
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InvalidOption(f"config: {name} refuses a field: {error}") from error
