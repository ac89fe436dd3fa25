"""The rules of a card's metadata, checked here: the Hub checks them only while a commit is being made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from hf_attn.errors import InvalidInput

RELATIONS = ("adapter", "finetune", "merge", "quantized")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_card(card: str) -> dict[str, Any]:
    """The metadata of a card; `InvalidInput` names the first field that is wrong. A card without metadata has none."""
    import yaml

    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if not found:
        if card.startswith("---"):
            raise _wrong("the metadata", "has no closing line ---")
        return {}
    try:
        data = yaml.safe_load(found.group(1))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _wrong("the metadata", f"is not valid YAML ({error})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _wrong("the metadata", f"must be a mapping, not a {type(data).__name__}")
    for field, value in _numbers(data):
        if not math.isfinite(value):
            raise _wrong(field, f"is {value}, which is not a finite number")
    for field in ("license", "pipeline_tag", "library_name"):
        if data.get(field) is not None and not _identifier(data[field]):
            raise _wrong(field, f"is {data[field]!r}; it must be an identifier of the Hub, such as apache-2.0")
    if data.get("license") == "other" and not data.get("license_name"):
        raise _wrong("license", "is 'other', which needs a license_name")
    for field in ("tags", "metrics"):
        _check_list(data, field, lambda item: isinstance(item, str) and bool(item.strip()), "texts")
    for field in ("datasets", "base_model"):
        _check_list(data, field, is_repo_id, "ids of the Hub, such as owner/name")
    relation = data.get("base_model_relation")
    if relation is not None and (relation not in RELATIONS or not data.get("base_model")):
        raise _wrong(
            "base_model_relation", f"is {relation!r}; it must be one of {', '.join(RELATIONS)}, with a base_model"
        )
    _check_emissions(data.get("co2_eq_emissions"))
    _check_index(data.get("model-index"))
    return data


def check_eval_results(name: str, text: str) -> None:
    """Raise `InvalidInput` where a file of `.eval_results/` does not have the Hub's form."""
    import yaml
    from huggingface_hub import parse_eval_result_entries

    try:
        entries = parse_eval_result_entries(yaml.safe_load(text))
        finite = all(math.isfinite(entry.value) for entry in entries)
    except Exception as error:  # the client's parser fails in many ways on what it does not expect
        raise InvalidInput(f"{name} does not have the Hub's form ({type(error).__name__}: {error}).") from error
    if not finite:
        raise InvalidInput(f"{name} states a result that is not a finite number.")


def is_repo_id(name: Any) -> bool:
    """Whether the Hub takes this as `owner/name`, or as the name of an old repository without an owner."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return True


def _check_list(data: dict[str, Any], field: str, fits: Any, what: str) -> None:
    value = data.get(field)
    if value is None:
        return
    items = value if isinstance(value, list) else [value]
    if not all(fits(item) for item in items):
        raise _wrong(field, f"is {value!r}; it must hold {what}")
    if len({str(item) for item in items}) < len(items):
        raise _wrong(field, f"is {value!r}; something is in it twice")


def _check_emissions(value: Any) -> None:
    amount = value.get("emissions") if isinstance(value, dict) else value
    if value is not None and (isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0):
        raise _wrong("co2_eq_emissions", f"is {value!r}; emissions must be grams of CO2")


def _check_index(value: Any) -> None:
    """`model-index`: a list of models with results, each with a task, a dataset and metrics."""
    if value is None:
        return
    try:
        for model in value:
            if not isinstance(model["name"], str):
                raise TypeError("a name must be text")
            for result in model["results"]:
                kinds = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                for metric in result["metrics"]:
                    kinds.append(metric["type"])
                    if isinstance(metric["value"], bool) or metric["value"] is None:
                        raise TypeError(f"the value of {metric['type']} must be a number")
                if not all(isinstance(kind, str) for kind in kinds):
                    raise TypeError("types and names must be text")
    except (KeyError, TypeError, AttributeError) as error:
        raise _wrong("model-index", f"does not have the Hub's form ({type(error).__name__}: {error})") from error


def _numbers(value: Any, field: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield field, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, field)


def _identifier(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and _IDENTIFIER.fullmatch(item) for item in values)


def _wrong(field: str, rule: str) -> InvalidInput:
    return InvalidInput(f"README.md: {field} {rule}. Correct the lines between the two --- at its top.")
