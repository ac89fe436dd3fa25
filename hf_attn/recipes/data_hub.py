"""Files, folders and data sets of the Hub, read with `datasets` and brought into the form of the embedded ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported, near
from hf_attn.recipes.arguments import DataArguments
from hf_attn.recipes.data import DATASETS, Source, source

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""How a file is read, by the end of its name."""
READERS = (*sorted({*BUILDERS.values()}), "imagefolder")
"""Readers that can be named as the data set, with dataset_options such as data_files or data_dir."""
ROLES = {
    "text": ("text", "sentence", "content"),
    "image": ("image", "img"),
    "tokens": ("tokens", "words"),
    "labels": ("labels", "label", "ner_tags"),
    "answers": ("answers",),
}
"""Role of a column -> the names it is known by."""
BUFFER = 10_000
"""Examples from which a streamed training split draws the next one."""


def source_of(arguments: DataArguments) -> Source:
    """The data set a recipe names, not loaded yet; what cannot exist is refused.

    Raises:
        InvalidOption, InvalidInput: no such embedded set, option, role, file or folder.
    """
    for role in arguments.columns:
        if role not in ROLES:
            raise InvalidOption(f"columns: unknown role {role!r}{near(role, ROLES)}. Known: {', '.join(ROLES)}.")
    if arguments.holdout < 1:
        raise InvalidOption(f"holdout={arguments.holdout!r} must be at least 1.")
    name, path = arguments.dataset, Path(arguments.dataset).expanduser()
    if name in DATASETS:
        if arguments.streaming:
            raise Unsupported(
                f"data set {name}", "it is small and in memory, so it cannot be streamed", "Set streaming: false"
            )
        return source(name, arguments.dataset_options)
    if not name or not (path.exists() or "/" in name or name in READERS):
        return source(name)
    if "/" in name and not path.exists() and (path.suffix in BUILDERS or name.startswith((".", "/", "~"))):
        raise InvalidInput(f"dataset={name!r}: there is no such file or folder.")
    if path.is_file() and path.suffix not in BUILDERS:
        raise InvalidInput(
            f"dataset={name!r} ends in none of {', '.join(BUILDERS)}, so its format is unknown. Set dataset to a reader "
            f"({', '.join(READERS)}) and dataset_options.data_files to the file."
        )
    title = path.name if path.exists() else name
    return Source(
        name=title,
        title=title,
        origin=f"`{title}`, read with `datasets`",
        task="",
        load=lambda split_seed, **options: load(arguments, split_seed, options),
        split="Splits of the data set; those it lacks were drawn from its training examples",
    )


def load(arguments: DataArguments, split_seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train, validation and test splits with the columns of `ROLES`."""
    import datasets

    name, path = arguments.dataset, Path(arguments.dataset).expanduser()
    options = dict(options)
    if path.is_file():
        options["data_files"], reader = str(path), BUILDERS[path.suffix]
        if path.suffix == ".tsv":
            options.setdefault("sep", "\t")
    else:
        reader = str(path) if path.exists() else name
    try:
        found = datasets.load_dataset(reader, streaming=arguments.streaming, **options)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise InvalidInput(f"dataset={name!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        found = {"train": found}
    splits = {key: in_roles(split, arguments.columns, name) for key, split in found.items()}
    if "train" not in splits:
        raise InvalidInput(f"dataset={name!r} has the splits {', '.join(splits)} but no train split to train on.")
    make = held_out_stream if arguments.streaming else held_out
    return make(splits, split_seed, arguments.holdout)


def in_roles(split: Any, columns: Mapping[str, str], name: str) -> Any:
    """`split` with the columns that have a role, under the role's name."""
    there = split.column_names or list(next(iter(split)))
    chosen = {}
    for role, names in ROLES.items():
        column = columns.get(role) or next((known for known in names if known in there), None)
        if column is not None and column not in there:
            raise InvalidInput(
                f"columns: {role}: {name} has no column {column!r}{near(column, there)}. It has {', '.join(there)}."
            )
        if column is not None:
            chosen[column] = role
    split = split.select_columns(list(chosen))
    split = split.rename_columns({old: new for old, new in chosen.items() if old != new})
    if "labels" in (split.column_names or chosen.values()) and type(split).__name__ == "Dataset":
        split = with_class_names(split)
    return split


def with_class_names(split: Dataset) -> Dataset:
    """Labels that are text become classes, in alphabetical order."""
    from datasets import Value

    if isinstance(split.features["labels"], Value) and split.features["labels"].dtype in ("string", "large_string"):
        return split.class_encode_column("labels")
    return split


def held_out(splits: dict[str, Any], split_seed: int, holdout: int) -> dict[str, Any]:
    """The three splits; a missing one is drawn from the training examples: a tenth, or `holdout` where that is less."""
    splits = {"validation" if key in ("valid", "val", "dev") else key: split for key, split in splits.items()}
    train = splits["train"]
    for key in ("test", "validation"):
        if key not in splits:
            size = min(holdout, len(splits["train"]) // 10)
            if size < 1:
                raise InvalidInput(f"there are {len(train)} training examples, too few to hold some out for {key}.")
            parts = train.train_test_split(size, seed=split_seed)
            train, splits[key] = parts["train"], parts["test"]
    return {"train": train, "validation": splits["validation"], "test": splits["test"]}


def held_out_stream(splits: dict[str, Any], split_seed: int, holdout: int) -> dict[str, Any]:
    """A streamed training split; the others hold the first `holdout` examples of theirs, in memory.

    A split the data lacks gets the next `holdout` training examples, which are then not trained on.
    """
    from datasets import Dataset

    train, kept = splits["train"], {}
    for key in ("validation", "test"):
        rows = list(splits.get(key, train).take(holdout))
        if key not in splits:
            train = train.skip(holdout)
        if not rows:
            raise InvalidInput(f"the stream ends before there are examples for the {key} split. Lower holdout.")
        kept[key] = Dataset.from_list(rows, features=splits["train"].features)
    if train.features is None:
        # a stream of lines does not know its columns before it is read
        train = train.cast(kept["validation"].features)
    return {"train": train.shuffle(seed=split_seed, buffer_size=BUFFER), **kept}


def class_names(splits: Mapping[str, Any]) -> list[str]:
    """Names of the classes of `labels`, single or in lists."""
    from datasets import ClassLabel

    features = splits["train"].features
    feature = features["labels"] if features else None
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature is None or not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise InvalidInput("labels must be classes: ClassLabel, whole numbers from 0, or (not streamed) text.")
    rows = (
        row["labels"]
        for split in splits.values()
        if hasattr(split, "__len__")
        for row in split.select_columns(["labels"])
    )
    largest = max(max(row, default=0) if isinstance(row, list) else row for row in rows)
    return [str(i) for i in range(largest + 1)]
