"""Data sets the recipes train on, by name: each with train, validation and test splits, ready for a task.

A new embedded set is one function and one row of `DATASETS`. Files, folders and data sets of the Hub are read by
`hf_attn.recipes.data_hub`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidOption, Unsupported, near
from hf_attn.recipes.data_synthetic import listops, mqar
from hf_attn.recipes.data_text import pydoc

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

EXAMPLES = 'pip install "hf_attn[examples]"'


@dataclass(frozen=True)
class Source:
    """A data set as recipes and model cards know it.

    Attributes:
        name: its key in `DATASETS`, or its name on the Hub.
        title: its name for people.
        origin: where the data comes from, one sentence.
        task: the task it is for where a recipe names none.
        load: called with the split seed and the set's options; returns raw train, validation and test splits.
        tokenizer: what kind of tokenizer is trained on it (see `hf_attn.recipes.tokenizer`).
        split: how the examples were divided, for the card.
    """

    name: str
    title: str
    origin: str
    task: str
    load: Callable[..., Mapping[str, Any]]
    tokenizer: str = "bpe"
    split: str = "Stratified split"


def digits(split_seed: int = 0) -> DatasetDict:
    """The 1797 images of handwritten digits that scikit-learn ships: 1257 to train, 270 to validate, 270 to test.

    Returns:
        Splits with the columns `image` (PIL, 8 x 8, RGB) and `labels` ("0" to "9"), every digit in proportion.
    """
    try:
        from PIL import Image as Picture
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise Unsupported(
            "data set digits", f"the package {error.name} is not installed", f"Install it with: {EXAMPLES}"
        ) from error
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    raw = load_digits()
    train, rest = train_test_split(range(len(raw.target)), test_size=540, stratify=raw.target, random_state=split_seed)
    validation, test = train_test_split(rest, test_size=270, stratify=raw.target[rest], random_state=split_seed)
    # pixels are counts from 0 to 16; colour because image pipelines hand every picture over as RGB
    pixels = (raw.images * 255 / 16).round().astype("uint8")
    features = Features({"image": Image(), "labels": ClassLabel(names=[str(name) for name in raw.target_names])})

    def split(rows: list[int]) -> Dataset:
        images = [Picture.fromarray(pixels[row]).convert("RGB") for row in rows]
        return Dataset.from_dict({"image": images, "labels": raw.target[rows].tolist()}, features=features)

    return DatasetDict(train=split(train), validation=split(validation), test=split(test))


def photos(split_seed: int = 0, patch_size: int = 32) -> DatasetDict:
    """Square patches of the two photos that scikit-learn ships, labelled with the photo they come from.

    Patches of one column of a photo are all in one split, so no split holds a neighbour above or below of another's.

    Args:
        split_seed: which columns go where.
        patch_size: side of a patch in pixels.
    """
    try:
        import numpy as np
        from PIL import Image as Picture
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise Unsupported(
            "data set photos", f"the package {error.name} is not installed", f"Install it with: {EXAMPLES}"
        ) from error
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    if not 8 <= patch_size <= 128:
        raise InvalidOption(f"photos: patch_size={patch_size!r} must be from 8 to 128 pixels.")
    raw = load_sample_images()
    names = [os.path.splitext(os.path.basename(name))[0] for name in raw.filenames]
    features = Features({"image": Image(), "labels": ClassLabel(names=names)})
    parts: dict[str, tuple[list[Any], list[int]]] = {name: ([], []) for name in ("train", "validation", "test")}
    for label, photo in enumerate(raw.images):
        rows, columns = photo.shape[0] // patch_size, photo.shape[1] // patch_size
        held = max(columns // 10, 1)
        for place, column in enumerate(np.random.default_rng((split_seed, label)).permutation(columns)):
            images, labels = parts["validation" if place < held else "test" if place < 2 * held else "train"]
            for row in range(rows):
                y, x = row * patch_size, column * patch_size
                images.append(Picture.fromarray(photo[y : y + patch_size, x : x + patch_size]))
                labels.append(label)
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": images, "labels": labels}, features=features)
            for name, (images, labels) in parts.items()
        }
    )


DATASETS = {
    "digits": Source(
        name="digits",
        title="scikit-learn digits",
        origin="the 1797 handwritten digits (8 x 8 pixels) that scikit-learn ships as load_digits, "
        "from the test part of the UCI Optical Recognition of Handwritten Digits data",
        task="image-classification",
        load=digits,
    ),
    "photos": Source(
        name="photos",
        title="scikit-learn sample photos",
        origin="patches of the two photos that scikit-learn ships as load_sample_images",
        task="masked-image-modeling",
        load=photos,
        split="Split by columns of the photos",
    ),
    "pydoc": Source(
        name="pydoc",
        title="Python's built-in documentation",
        origin="the topics of Python's help() (pydoc_data.topics of the running Python; another version has another text)",
        task="fill-mask",
        load=pydoc,
        split="Split by groups of topics that share no long paragraph",
    ),
    "listops": Source(
        name="listops",
        title="ListOps",
        origin="generated expressions over lists of digits (Nangia and Bowman 2018, in the form of the Long Range Arena)",
        task="text-classification",
        load=listops,
        tokenizer="words",
        split="Different expressions in every split, drawn",
    ),
    "mqar": Source(
        name="mqar",
        title="multi-query associative recall",
        origin="generated key-value pairs and queries (Arora et al., Zoology, arXiv 2312.04927)",
        task="text-generation",
        load=mqar,
        tokenizer="words",
        split="Independent draws",
    ),
}


def source(name: str, options: Mapping[str, Any] | None = None) -> Source:
    """The embedded data set called `name`; `InvalidOption` names the nearest one, or option, otherwise."""
    if name not in DATASETS:
        raise InvalidOption(
            f"no data set is called {name!r}{near(name, DATASETS)}. Known: {', '.join(DATASETS)}. Set dataset in the config "
            "to one of them, to a file or folder, or to owner/name on the Hub."
        )
    known = [key for key in inspect.signature(DATASETS[name].load).parameters if key != "split_seed"]
    for key in options or {}:
        if key not in known:
            raise InvalidOption(
                f"dataset_options: {name} has no option {key!r}{near(key, known)}. Known: {', '.join(known) or 'none'}."
            )
    return DATASETS[name]


def first_examples(data: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """The first `limit` examples of every split; a streamed split is cut, too."""
    if limit is None:
        return dict(data)
    return {
        name: split.select(range(min(limit, len(split))))
        if hasattr(split, "select") and hasattr(split, "__len__")
        else split.take(limit)
        for name, split in data.items()
    }


def mapped(split: Any, function: Callable[..., dict[str, Any]], what: str, remove: list[str] | None = None) -> Any:
    """`split.map` over batches, with a progress bar where the number of examples is known; never from a cache."""
    remove = list(split.column_names) if remove is None else remove
    if not hasattr(split, "__len__"):
        return split.map(function, batched=True, remove_columns=remove)
    # another processor or tokenizer must not get what an earlier one made
    return split.map(
        function, batched=True, remove_columns=remove, desc=what, keep_in_memory=True, load_from_cache_file=False
    )


def to_pixels(data: DatasetDict, processor: Any, limit: int | None = None) -> DatasetDict:
    """`data` with `pixel_values` made by an image processor in place of `image`, and `labels` where there are any.

    Args:
        data: splits with an `image` column.
        processor: an image processor of transformers.
        limit: use only the first examples of every split.
    """

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="np")["pixel_values"]}

    made = {
        name: mapped(split, process, f"{name} images", [c for c in split.column_names if c != "labels"])
        for name, split in first_examples(data, limit).items()
    }
    return type(data)(made).with_format("torch")
