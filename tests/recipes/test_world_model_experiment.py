"""The committed configuration of the world model experiment runs, writes its tables, and goes on where it stopped."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("slots", ["symbolic", "pixels"])
def test_the_experiment_runs_small(slots, tmp_path, monkeypatch):
    settings = yaml.safe_load((ROOT / "configs" / "world_model.yaml").read_text(encoding="utf-8"))
    settings["episodes"] = {"train": 12, "evaluation": 10, "steps": 10}
    for part, name in (("symbolic", "training"), ("pixels", "training"), ("pixels", "vision_training")):
        settings[part][name]["num_train_epochs"] = 1
    config, output = tmp_path / "small.yaml", tmp_path / "tables"
    config.write_text(yaml.safe_dump(settings))
    words = [slots, "--seeds", "3", "--config", str(config), "--output", str(output), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["scripts/world_model_experiment.py", *words])
    script = str(ROOT / "scripts" / "world_model_experiment.py")
    runpy.run_path(script, run_name="__main__")
    rows = list(csv.DictReader((output / "world_model.csv").open()))
    assert len(rows) == 6 and {row["kind"] for row in rows} == {"shapes", "rush_hour"}
    assert all(float(row["equivariance"]) < 1e-5 for row in rows if "MLP" not in row["variant"])
    text = (output / "world_model.md").read_text(encoding="utf-8")
    assert f"| {slots} | rush_hour | 3 |" in text and f"world_model_{slots}_shapes.png" in text
    assert (output / f"world_model_{slots}_shapes.png").stat().st_size > 5000
    # a finished table is not made again
    lost = output / f"world_model_{slots}_shapes.png"
    lost.unlink()
    runpy.run_path(script, run_name="__main__")
    assert not lost.exists() and list(csv.DictReader((output / "world_model.csv").open())) == rows
