"""The check that a saved model is the trained one: the same outputs, bit for bit, on the test split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import HfAttnError
from hf_attn.recipes.tasks import TASKS, Setting, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ReloadMismatch(HfAttnError, RuntimeError):
    """A saved model computes other numbers than the trained one."""


def check_reload(
    trained: PreTrainedModel,
    folder: Path,
    raw: Any,
    data: Any,
    batch_size: int,
    task: Task | None = None,
    setting: Setting | None = None,
) -> float:
    """Largest difference of outputs between `trained` and what the Auto classes load from `folder`: 0, or an error.

    Args:
        trained: the model in memory.
        folder: where it was saved, with its processor.
        raw, data: the test split, as read and as the model takes it.
        batch_size: examples at a time.
        task: image classification by default.
        setting: of the run; text tasks need it.
    """
    import torch
    import transformers

    task = task or TASKS["image-classification"]
    collate = task.collator(setting) if setting else transformers.default_data_collator
    # a copy: weights read from a file lie at odd addresses, which changes the rounding of a matrix product
    reloaded = copy.deepcopy(getattr(transformers, task.auto_class).from_pretrained(folder)).to(trained.device)
    difference = 0.0
    for batch in batches(data, batch_size, collate):
        first, second = (output_of(model, batch) for model in (trained, reloaded))
        both_nan = torch.isnan(first) & torch.isnan(second)
        difference = max(difference, (first - second).abs().masked_fill(both_nan, 0.0).max().item())
    if difference != 0:
        raise ReloadMismatch(
            f"the model saved in {folder} computes other outputs than the trained one (largest difference {difference:g} over "
            f"{len(data)} test examples). Do not publish it: some of its weights or options were not saved."
        )
    check = check_images if task.images else check_tokens
    check(folder, raw, data, setting)
    return difference


def batches(data: Any, size: int, collate: Callable[[list[Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The examples in order, in batches."""
    for start in range(0, len(data), size):
        yield collate([data[index] for index in range(start, min(start + size, len(data)))])


def output_of(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Logits, or reconstructed pixels, of a batch; whatever a mechanism draws is drawn from the same seed each time."""
    import torch

    from hf_attn.samples import seeded

    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    model.eval()
    with torch.no_grad(), seeded(0):
        out = model(**inputs)
    return out["logits"] if "logits" in out else out["reconstruction"]


def check_images(folder: Path, raw: Any, data: Any, setting: Setting | None) -> None:
    """Raise where the saved image processor makes other pixels than the one in use."""
    from hf_attn.recipes.images import load_processor

    # another backend of the same processor may differ in the last bits
    pixels = load_processor(str(folder))([raw[0]["image"].convert("RGB")], return_tensors="pt")["pixel_values"]
    if (pixels[0] - data[0]["pixel_values"]).abs().max().item() > 1e-5:
        raise ReloadMismatch(f"the image processor saved in {folder} makes other pixels than the one used in training.")


def check_tokens(folder: Path, raw: Any, data: Any, setting: Setting | None) -> None:
    """Raise where the saved tokenizer makes other tokens than the one in use."""
    from hf_attn.recipes.tokenizer import load_tokenizer, texts_of

    text = next(texts_of(raw))
    if setting and load_tokenizer(str(folder))(text)["input_ids"] != setting.processor(text)["input_ids"]:
        raise ReloadMismatch(f"the tokenizer saved in {folder} makes other tokens than the one used in training.")
