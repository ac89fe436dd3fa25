"""scripts/compare.py trains every row once, whatever interrupts it; the training itself is replaced by a counter here."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare as module

    return module


@pytest.fixture
def trained(compare, monkeypatch):
    """Keys of the rows that were trained."""
    keys = []

    def train(recipe, key, metric):
        keys.append(key)
        return compare.Row(*key, value=0.5 + 0.1 * key[2], parameters=10, seconds=1.0)

    monkeypatch.setattr(compare, "train", train)
    return keys


def run(compare, monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", f"--output={folder / 'table'}", *arguments])
    compare.main()


def test_a_finished_row_is_not_trained_again(compare, trained, monkeypatch, tmp_path):
    run(compare, monkeypatch, tmp_path, "--tasks=digits", "--mechanisms", "softmax", "rfa", "--seeds", "0")
    assert [key[1:3] for key in trained] == [("softmax", 0), ("rfa", 0)]
    first = (tmp_path / "table.csv").read_text()
    trained.clear()
    run(compare, monkeypatch, tmp_path, "--tasks=digits", "--mechanisms", "softmax", "rfa", "--seeds", "0", "1")
    assert [key[1:3] for key in trained] == [("softmax", 1), ("rfa", 1)]
    assert (tmp_path / "table.csv").read_text().startswith(first)


def test_a_row_that_a_kill_has_cut_is_trained_again(compare, trained, monkeypatch, tmp_path):
    arguments = ("--tasks=digits", "--mechanisms", "softmax", "rfa", "--seeds", "0")
    run(compare, monkeypatch, tmp_path, *arguments)
    whole = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(whole[:-2])
    trained.clear()
    run(compare, monkeypatch, tmp_path, *arguments)
    assert [key[1] for key in trained] == ["rfa"] and (tmp_path / "table.csv").read_text() == whole


def test_a_row_of_another_recipe_is_replaced(compare, trained, monkeypatch, tmp_path):
    arguments = ("--tasks=digits", "--mechanisms", "softmax", "rfa", "--seeds", "0")
    run(compare, monkeypatch, tmp_path, *arguments)
    rows = compare.load(tmp_path / "table.csv")
    compare.save(tmp_path / "table.csv", [rows[0], compare.Row("digits", "rfa", 0, "older", 0.1, 10, 1.0)])
    trained.clear()
    run(compare, monkeypatch, tmp_path, *arguments)
    assert [key[1] for key in trained] == ["rfa"] and compare.load(tmp_path / "table.csv") == rows


@pytest.mark.parametrize(("task", "within", "beyond"), [("digits", 0.92, 0.88), ("lm", 43.0, 45.0)])
def test_the_limit_is_where_the_verdict_changes(compare, task, within, beyond):
    comparison, softmax = compare.COMPARISONS[task], {"digits": 0.95, "lm": 40.0}[task]
    assert comparison.distance(within, softmax) < comparison.limit < comparison.distance(beyond, softmax)
    assert comparison.distance(comparison.limit_near(softmax), softmax) == pytest.approx(comparison.limit)
    rows = [compare.Row(task, "softmax", 0, "r", softmax, 1, 1.0), compare.Row(task, "rfa", 0, "r", within, 1, 1.0)]
    rows.append(compare.Row(task, "lara", 0, "r", beyond, 1, 1.0))
    table = "\n".join(compare.section(task, rows))
    assert "1 of 2 mechanisms are within" in table
    for name, verdict in (("rfa", "| yes |"), ("lara", "| **no** |")):
        assert verdict in next(line for line in table.splitlines() if f"`{name}`" in line)
