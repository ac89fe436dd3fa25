"""Files, folders and streams: columns by role, missing splits, and what cannot be read."""

import json

import pytest
import yaml

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.arguments import DataArguments
from hf_attn.recipes.data import photos
from hf_attn.recipes.data_hub import class_names, source_of
from hf_attn.recipes.train import train
from tests.recipes.test_tasks import BERT, VIT, written

ROWS = [{"sentence": f"number {i} is {'even' if i % 2 == 0 else 'odd'}", "stars": i % 2, "rest": i} for i in range(60)]


def read(dataset, **changes):
    arguments = DataArguments(dataset=str(dataset), **changes)
    return source_of(arguments).load(arguments.split_seed, **arguments.dataset_options)


def write(folder, kind: str):
    from datasets import Dataset

    data, path = Dataset.from_list(ROWS), folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n".join(row["sentence"] for row in ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_a_file_is_read_by_its_name_and_split(kind, tmp_path):
    data = read(write(tmp_path, kind), columns={} if kind == "txt" else {"labels": "stars"})
    assert {name: len(split) for name, split in data.items()} == {"train": 48, "validation": 6, "test": 6}
    texts = [text for split in data.values() for text in split["text"]]
    assert sorted(texts) == sorted(row["sentence"] for row in ROWS)
    assert data["train"].column_names == (["text"] if kind == "txt" else ["text", "labels"])


def test_splits_of_the_data_are_kept(tmp_path):
    path = str(write(tmp_path, "csv"))
    data = read("csv", dataset_options={"data_files": {"train": path, "test": path, "dev": path}})
    assert {name: len(split) for name, split in data.items()} == {"train": 60, "validation": 60, "test": 60}


def test_the_split_follows_its_seed(tmp_path):
    path = write(tmp_path, "jsonl")
    first, again, other = read(path), read(path), read(path, split_seed=1)
    assert first["test"]["text"] == again["test"]["text"] != other["test"]["text"]
    assert len(read(path, holdout=2)["test"]) == 2


def test_labels_that_are_text_become_classes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(i), "label": ["no", "yes"][i % 2]}) + "\n" for i in range(40)))
    data = read(path)
    assert class_names(data) == ["no", "yes"] and set(data["train"]["labels"]) == {0, 1}


def test_whole_numbers_are_classes_too(tmp_path):
    assert class_names(read(write(tmp_path, "csv"), columns={"labels": "stars"})) == ["0", "1"]


def test_a_stream_holds_examples_out_and_trains(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"this is line {i} of a text that is read as it is needed" for i in range(300)))
    data = read(path, streaming=True, holdout=20)
    assert len(data["validation"]) == len(data["test"]) == 20
    trained_on = {row["text"] for row in data["train"]}
    assert len(trained_on) == 260
    assert not trained_on & {*data["validation"]["text"], *data["test"]["text"]}
    recipe = {"family": "bert", "config": BERT, "task": "fill-mask", "max_length": 24, "vocab_size": 270}
    source = {"dataset": str(path), "streaming": True, "holdout": 20, "max_examples": 200}
    result = train(written(tmp_path, **recipe, **source))
    sizes = (result.model_dir / "README.md").read_text().partition("with seed 0: ")[2].partition(".")[0]
    assert result.reload_difference == 0 and " validation, " in sizes and "train" not in sizes, "a stream has no length"
    with pytest.raises(InvalidOption, match="max_steps=-1 must be set"):
        train(written(tmp_path, **{**recipe, **source, "max_steps": -1}))


def test_a_folder_of_images_trains_a_classifier(tmp_path):
    for name, split in photos().items():
        for index, row in enumerate(split.select(range(0, len(split), 10))):
            place = tmp_path / "images" / name / f"class{row['labels']}"
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{index}.png")
    recipe = {"family": "vit", "config": VIT, "task": "image-classification", "dataset": str(tmp_path / "images")}
    result = train(written(tmp_path, **recipe))
    assert result.samples[0].expected in ("class0", "class1")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"columns": {"text": "sentense"}}, InvalidInput, "did you mean 'sentence'"),
        ({"dataset_options": {"split": "nothing"}}, InvalidInput, "cannot be read"),
        ({"dataset": "nowhere.xyz"}, InvalidOption, "or to owner/name on the Hub"),
        ({"dataset": "./nowhere.csv"}, InvalidInput, "no such file"),
        ({"holdout": 0}, InvalidOption, "holdout=0"),
    ],
)
def test_refused(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read(**{"dataset": write(tmp_path, "csv"), **changes})


def test_a_file_of_unknown_format_is_refused(tmp_path):
    path = tmp_path / "rows.xyz"
    path.write_text("a")
    with pytest.raises(InvalidInput, match="its format is unknown"):
        read(path)


@pytest.mark.parametrize("case", ["own split", "no test split", "cut", "file"])
def test_a_result_on_the_hub_is_filed_where_others_can_compare(case, tmp_path, monkeypatch):
    import datasets

    whole = datasets.Dataset.from_list(ROWS, split="train")
    test = datasets.Dataset.from_list(ROWS[:7], split="test")
    held = {"train": whole} if case == "no test split" else {"train": whole, "test": test}
    read = datasets.load_dataset
    fake = lambda path, **rest: datasets.DatasetDict(held) if path == "someone/stars" else read(path, **rest)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", fake)
    recipe = {
        "task": "text-classification", "family": "bert", "config": BERT, "vocab_size": 300, "columns": {"labels": "stars"},
        "dataset": "someone/stars", "dataset_options": {"name": "odd", "revision": "a" * 40}, "max_examples": None,
    }  # fmt: skip
    if case == "cut":
        recipe["max_examples"] = 6
    if case == "file":
        recipe |= {"dataset": str(write(tmp_path, "csv")), "dataset_options": {}}
    result = train(written(tmp_path, **recipe))
    found = result.model_dir / ".eval_results" / "someone__stars.yaml"
    assert found.is_file() == (case == "own split")
    if case == "own split":
        (entry,) = yaml.safe_load(found.read_text())
        assert entry["dataset"] == {"id": "someone/stars", "task_id": "odd", "revision": "a" * 40}
        assert entry["value"] == round(result.metrics["test_accuracy"], 4) and entry["notes"] == "accuracy, test split"
        assert (result.plan.folder / ".eval_results" / "someone__stars.yaml").read_bytes() == found.read_bytes()
        card = (result.model_dir / "README.md").read_text()
        (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
        kinds = [metric["type"] for each in model["results"] for metric in each["metrics"]]
        assert sorted(kinds) == ["accuracy", "loss"] and "| `someone/stars` | odd | accuracy |" in card
        train(written(tmp_path, **{**recipe, "eval_task": "even"}))
        assert yaml.safe_load(found.read_text())[0]["dataset"]["task_id"] == "even"
        train(written(tmp_path, **{**recipe, "max_examples": 6}))
        assert not found.exists()
