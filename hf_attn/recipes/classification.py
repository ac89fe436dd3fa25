"""Classes for whole texts and for their words: encoding, and predictions as a reader sees them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_attn.recipes.data import mapped
from hf_attn.recipes.language import Sample
from hf_attn.recipes.objectives import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_attn.recipes.tasks import Setting


def sequences(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Texts as input_ids, cut at max_length; the labels stay."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = setting.processor(batch["text"], truncation=True, max_length=setting.data.max_length)
        return {**_inputs(encoded), "labels": batch["labels"]}

    return {name: mapped(split, encode, f"{name} tokens") for name, split in splits.items()}


def words(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Lists of words as input_ids; a word's label goes to its first token, and the others are no targets."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = setting.processor(
            batch["tokens"], is_split_into_words=True, truncation=True, max_length=setting.data.max_length
        )
        labels = []
        for row, tags in enumerate(batch["labels"]):
            places = encoded.word_ids(row)
            before = [None, *places]
            labels.append(
                [IGNORED if word is None or word == last else tags[word] for word, last in zip(places, before)]
            )
        return {**_inputs(encoded), "labels": labels}

    return {name: mapped(split, encode, f"{name} tokens") for name, split in splits.items()}


def _inputs(encoded: Mapping[str, Any]) -> dict[str, Any]:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def show_sequences(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """Texts with their labels, true and predicted."""
    samples = []
    for index in range(min(setting.data.samples, len(data))):
        said = int(_logits(model, data[index]).argmax(-1))
        text = textwrap.shorten(raw[index]["text"], 160)
        samples.append(Sample(text, setting.labels[data[index]["labels"]], setting.labels[said]))
    return samples


def show_words(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """Words with their labels, true and predicted."""
    samples = []
    for index in range(min(setting.data.samples, len(data))):
        example = data[index]
        said = _logits(model, example).argmax(-1).tolist()
        places = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
        samples.append(
            Sample(
                given=" ".join(raw[index]["tokens"][: len(places)]),
                expected=" ".join(setting.labels[example["labels"][place]] for place in places),
                predicted=" ".join(setting.labels[said[place]] for place in places),
            )
        )
    return samples


def _logits(model: PreTrainedModel, example: Mapping[str, Any]) -> torch.Tensor:
    inputs = {key: torch.tensor([value], device=model.device) for key, value in example.items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs).logits[0]
