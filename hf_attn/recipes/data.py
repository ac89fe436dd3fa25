"""Data sets the recipes train on, by name: each with train, validation and test splits, ready for a model.

A new data set is one function and one row of `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidOption, Unsupported, near

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

EXAMPLES = 'pip install "hf_attn[examples]"'


@dataclass(frozen=True)
class Source:
    """A data set as recipes and model cards know it.

    Attributes:
        name: its key in `DATASETS`.
        title: its name for people.
        origin: where the data comes from, one sentence.
        task: the task of transformers' pipelines it is for.
        load: called with the split seed; returns raw train, validation and test splits.
    """

    name: str
    title: str
    origin: str
    task: str
    load: Callable[[int], DatasetDict]


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


DATASETS = {
    "digits": Source(
        name="digits",
        title="scikit-learn digits",
        origin="the 1797 handwritten digits (8 x 8 pixels) that scikit-learn ships as load_digits, "
        "from the test part of the UCI Optical Recognition of Handwritten Digits data",
        task="image-classification",
        load=digits,
    ),
}


def source(name: str) -> Source:
    """The data set called `name`; `InvalidOption` names the nearest one otherwise."""
    if name not in DATASETS:
        raise InvalidOption(
            f"no data set is called {name!r}{near(name, DATASETS)}. Known: {', '.join(DATASETS)}. Set dataset in the config."
        )
    return DATASETS[name]


def to_pixels(data: DatasetDict, processor: Any, limit: int | None = None) -> DatasetDict:
    """`data` with `pixel_values` made by an image processor in place of `image`.

    Args:
        data: splits with an `image` column.
        processor: an image processor of transformers.
        limit: use only the first examples of every split.
    """

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"pixel_values": processor(batch["image"], return_tensors="np")["pixel_values"]}

    if limit is not None:
        data = type(data)({name: split.select(range(min(limit, len(split)))) for name, split in data.items()})
    # in memory and never from datasets' cache: another processor must not get the pixels of this one
    mapped = {
        name: split.map(
            process,
            batched=True,
            remove_columns="image",
            desc=f"{name} images",
            keep_in_memory=True,
            load_from_cache_file=False,
        )
        for name, split in data.items()
    }
    return type(data)(mapped).with_format("torch")
