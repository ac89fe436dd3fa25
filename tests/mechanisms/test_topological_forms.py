"""The sweep behind the choice between the forms of `topological`: its rules, and that the choice is what was measured."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hf_attn.bench.checks import Mismatch
from hf_attn.mechanisms import topological

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "benchmarks" / "topological_forms.csv"


@pytest.fixture(scope="module")
def sweep():
    path = ROOT / "scripts" / "topological_forms.py"
    spec = importlib.util.spec_from_file_location("topological_forms", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(sweep, length, form, ratio, mode="forward", mask="toeplitz", baseline="dense"):
    return sweep.Row(mask, False, length, 4, mode, form, baseline, ratio)


def test_a_crossover_holds_for_both_passes_and_every_longer_length(sweep):
    rows = []
    for length, forward, backward in ((256, 0.5, 0.5), (512, 0.5, 1.5), (1024, 0.9, 0.9), (2048, 0.5, 0.6)):
        for mode, ratio in (("forward", forward), ("backward", backward)):
            rows += [row(sweep, length, "tiled", 1.0, mode), row(sweep, length, "structured", ratio, mode)]
    assert sweep.crossover(rows, "toeplitz") == 1024
    assert sweep.crossover(rows, "tree") == math.inf, "nothing measured"
    # structured against tiled, not against dense
    rows += [row(sweep, 4096, "tiled", 0.2), row(sweep, 4096, "structured", 0.3)]
    assert sweep.crossover(rows, "toeplitz") == math.inf
    assert sweep.chosen(rows)["toeplitz"] == math.inf, "the larger of both orders, and one was not measured"


def test_a_cell_left_out_is_no_win_and_a_length_left_out_says_nothing(sweep):
    rows = [row(sweep, 512, "tiled", 1.0), row(sweep, 512, "structured", 0.5)]
    assert sweep.crossover(rows, "toeplitz") == 512
    assert sweep.crossover([*rows, row(sweep, 1024, "structured", None)], "toeplitz") == 512, "the time was over"
    too_slow = [*rows, row(sweep, 1024, "tiled", 1.0), row(sweep, 1024, "structured", None)]
    assert sweep.crossover(too_slow, "toeplitz") == math.inf
    later = row(sweep, 8192, "structured", 0.9, baseline="tiled")
    assert sweep.crossover([*too_slow, later], "toeplitz") == 8192


def test_low_rank_counts_in_units_of_the_rank(sweep):
    rows = []
    for label, length in (("low_rank P=4", 512), ("low_rank P=16", 1024)):
        rows += [row(sweep, length, form, r, mask=label) for form, r in (("tiled", 1.0), ("structured", 0.5))]
    assert sweep.chosen(rows)["low_rank"] == 128


def test_what_is_written_is_read_and_applied(sweep, tmp_path):
    rows = []
    for mask in ("toeplitz", "toeplitz causal"):
        rows += [row(sweep, 512, form, ratio, mask=mask) for form, ratio in (("tiled", 1.0), ("structured", 0.5))]
        rows += [row(sweep, 1024, form, ratio, mask=mask) for form, ratio in (("tiled", 1.0), ("structured", None))]
        rows.append(row(sweep, 8192, "structured", 0.9, mask=mask, baseline="tiled"))
    facts = sweep.Environment("python scripts/topological_forms.py", "torch 1", "a CPU", "2026-01-02", 0)
    sweep.write(tmp_path / "forms", rows, facts)
    assert sweep.read(tmp_path / "forms.csv") == rows
    assert (tmp_path / "forms.png").stat().st_size > 1000
    assert "| toeplitz | 8192 keys |" in (tmp_path / "forms.md").read_text()
    copy = tmp_path / "topological.py"
    copy.write_text(Path(topological.__file__).read_text("utf-8"))
    sweep.apply(sweep.chosen(rows), copy)
    line = next(line for line in copy.read_text().splitlines() if line.startswith("STRUCTURED_FROM"))
    found = eval(line.partition("= ")[2], {"math": math})
    assert found.keys() == topological.STRUCTURED_FROM.keys()
    assert found["toeplitz"] == 8192 and found["tree"] == math.inf


def test_a_wrong_form_is_not_timed(sweep):
    made = sweep.Forms(sweep.KINDS[0], 64, 2, torch.float64)
    made.agree("tiled", "naive", 1e-7)
    made.agree("structured", "naive", 1e-7)
    original = made.run
    made.run = lambda form: original(form) * (1.01 if form == "tiled" else 1.0)
    with pytest.raises(Mismatch, match="tiled against naive, output"):
        made.agree("tiled", "naive", 1e-7)


def test_the_choice_is_what_was_measured(sweep):
    assert sweep.chosen(sweep.read(TABLE)) == topological.STRUCTURED_FROM
