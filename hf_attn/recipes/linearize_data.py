"""Batches to linearise and to compare models with: texts cut to several lengths, or images.

train, held_out = batches_for(model, folder, "pydoc", lengths=(64, 128, 256))
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.analysis.outputs import Batch
from hf_attn.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PYDOC, DIGITS = "pydoc", "digits"
"""Data that needs no download: Python's own documentation, and the images that scikit-learn ships."""
LENGTHS = (64, 128, 256)
HELD_OUT = 0.2
"""Part of the texts or images that is held out."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def batches_for(
    model: PreTrainedModel,
    source: str,
    data: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = 512,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on, and held-out ones, for a model of texts or of images.

    Args:
        model: the model.
        source: folder or Hub id of its tokenizer or image processor.
        data: a text file, "pydoc", a folder of images, or "digits"; by default pydoc for texts, digits for images.
        lengths: tokens of a passage; longer ones than the model takes are refused. Images have one length.
        tokens: tokens of a batch; an image counts as 64.
        limit: held-out passages of each length, or images, at most.
        seed: of the split and the order.

    Raises:
        InvalidInput: the data, the tokenizer or the image processor cannot be read.
        Unsupported: the model takes neither tokens nor images.
    """
    processor = processor_of(model, source)
    if model.main_input_name == "pixel_values":
        train, held_out = split(images_of(data or DIGITS), seed)
        size = max(1, tokens // 64)
        return image_batches(train, processor, size), image_batches(held_out[:limit], processor, size)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        raise InvalidInput(f"lengths={list(lengths)}: the model takes {most} tokens at most; give shorter lengths.")
    train, held_out = split(texts_of(data or PYDOC), seed)
    return (
        text_batches(train, processor, lengths, tokens, seed=seed),
        text_batches(held_out, processor, lengths, tokens, limit, seed),
    )


def processor_of(model: PreTrainedModel, source: str) -> Any:
    """The tokenizer, or the image processor, in a folder or of a Hub id, whichever `model` needs.

    Raises:
        InvalidInput: there is none. Unsupported: the model takes neither tokens nor images.
    """
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise Unsupported(
            type(model).__name__, f"it takes {model.main_input_name}", "Make the batches yourself, and call the library"
        )
    try:
        if model.main_input_name == "pixel_values":
            # from its own module: transformers 5.17 hides the public name where torchvision is missing
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(source)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{source!r} has no tokenizer or image processor that can be loaded: {error}") from error


def texts_of(data: str | os.PathLike[str]) -> list[str]:
    """The texts of "pydoc", Python's own documentation; or of a file, whose paragraphs (between empty lines) are texts.

    Raises:
        InvalidInput: there is no such file, or no text in it.
    """
    if str(data) == PYDOC:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(data)
    if not path.is_file():
        raise InvalidInput(
            f"data={str(data)!r} is no file. Give a text file, or {PYDOC!r} for Python's own documentation."
        )
    try:
        texts = [text.strip() for text in path.read_text(encoding="utf-8").split("\n\n")]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"data={str(data)!r} is not UTF-8 text: {error}.") from error
    texts = [text for text in texts if text]
    if not texts:
        raise InvalidInput(f"data={str(data)!r} holds no text.")
    return texts


def split(items: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Shuffled items to train on, and a fifth to hold out, at least one each."""
    if len(items) < 2:
        raise InvalidInput(
            f"{len(items)} text or image cannot be split into training and held-out data; give two or more."
        )
    shuffled = random.Random(seed).sample(list(items), len(items))
    held_out = max(1, round(HELD_OUT * len(items)))
    return shuffled[held_out:], shuffled[:held_out]


def text_batches(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    tokens: int = 512,
    limit: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Every text cut into passages of each length, special tokens included, in batches of about `tokens` tokens.

    The last passage of a text is shorter, and padded; without a padding token it is left out.

    Args:
        lengths: tokens of a passage.
        tokens: tokens of a batch, at least one passage.
        limit: passages of each length at most.
        seed: of the order in which passages meet in batches.

    Raises:
        InvalidInput: a length the tokenizer cannot cut to, or no passage at all.
    """
    import torch

    if not tokenizer.is_fast:
        raise InvalidInput(
            f"{type(tokenizer).__name__} cannot cut texts into passages; use a fast tokenizer (tokenizer.json)."
        )
    batches: list[Batch] = []
    for length in lengths:
        if length <= tokenizer.num_special_tokens_to_add():
            raise InvalidInput(
                f"length {length} leaves no room besides the tokenizer's special tokens; give longer lengths."
            )
        padding: dict[str, Any] = {"padding": "max_length"} if tokenizer.pad_token is not None else {}
        cut = tokenizer(list(texts), truncation=True, max_length=length, return_overflowing_tokens=True, **padding)
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in cut]
        rows = [row for row, ids in enumerate(cut["input_ids"]) if len(ids) == length]
        rows = random.Random(seed).sample(rows, len(rows))[:limit]
        size = max(1, tokens // length)
        batches += [
            {name: torch.tensor([cut[name][row] for row in rows[start : start + size]]) for name in names}
            for start in range(0, len(rows), size)
        ]
    if not batches:
        raise InvalidInput(
            f"no text has {min(lengths)} tokens, and the tokenizer has no padding token; give shorter lengths."
        )
    return batches


def images_of(data: str | os.PathLike[str]) -> list[tuple[Any, int | None]]:
    """Pictures (PIL, RGB) with their labels: those of "digits", or of the files in a folder, which have no labels.

    Raises:
        InvalidInput: there is no such folder, or no picture in it.
    """
    if str(data) == DIGITS:
        from hf_attn.recipes.data import digits

        return [(row["image"], row["labels"]) for part in digits().values() for row in part]
    from PIL import Image

    folder = Path(data)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not paths:
        raise InvalidInput(
            f"data={str(data)!r} is no folder with pictures ({', '.join(IMAGES)}). Give one, or {DIGITS!r}."
        )
    return [(Image.open(path).convert("RGB"), None) for path in paths]


def image_batches(images: Sequence[tuple[Any, int | None]], processor: Any, size: int) -> list[Batch]:
    """`pixel_values`, and `labels` where every picture has one, in batches of `size` pictures."""
    import torch

    batches: list[Batch] = []
    for start in range(0, len(images), size):
        pictures, labels = zip(*images[start : start + size])
        batch = {"pixel_values": processor(list(pictures), return_tensors="pt")["pixel_values"]}
        if None not in labels:
            batch["labels"] = torch.tensor(labels)
        batches.append(batch)
    return batches
