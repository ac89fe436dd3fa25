"""Publish a small model to a Hub on this machine, with every fault at every stage, and write the table of what happens.

    python scripts/hub_faults.py

Each row is one run with a fault and a second one without. Nothing is timed, and nothing leaves this machine.
"""

import argparse
import csv
import dataclasses
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tqdm import tqdm

import hf_attn
from hf_attn.hub import talk
from hf_attn.hub.pack import Plan, pack

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hub"))

import faults  # noqa: E402
from server import TOKEN, Hub  # noqa: E402

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
OFTEN = {"once": "once", "always": "every time"}


def small_plan(folder: Path) -> Plan:
    torch.manual_seed(0)
    model = hf_attn.AttnBertForMaskedLM(hf_attn.AttnBertConfig(**SIZES, attn_implementation="rfa"))
    model.save_pretrained(folder / "model")
    return pack(folder / "model", folder / "hub", faults.REPO, write_card=True)


def point(hub: Hub) -> None:
    constants.ENDPOINT = hub.url


def examine(plan: Plan) -> list[faults.Outcome]:
    outcomes = []
    cases = [(stage, kind, often) for stage in faults.STAGES for kind in faults.FAULTS for often in OFTEN]
    for stage, kind, often in tqdm(cases, desc="faults"):
        outcomes.append(faults.faulty(plan, stage, kind, often, point))
    for stage in tqdm(faults.STAGES, desc="kill -9"):
        outcomes += [faults.killed(plan, stage, when, point) for when in ("before", "after")]
    return outcomes


def markdown(outcomes: list[faults.Outcome]) -> str:
    """One row a stage and fault; equal first outcomes of `once` and `every time` share their cell."""
    sound = sum(outcome.sound for outcome in outcomes)
    lines = [
        "# What a fault does to a publication",
        "",
        f"Made with `python scripts/hub_faults.py`, hf_attn {hf_attn.__version__}, huggingface_hub "
        f"{huggingface_hub.__version__}, transformers {transformers.__version__}, seed 0, {time.strftime('%Y-%m-%d')}. The server is "
        "`tests/hub/server.py`; how the real Hub words its errors may differ.",
        "",
        "A small model is published to a new repository, with a tag. One request fails, once or every time; then the same "
        "command runs again without the fault. **Whole**: after the first run the branch held either nothing or every file, and "
        "after the second run every file, in exactly one commit, with the tag on it.",
        "",
        f"**{sound} of {len(outcomes)} cases are whole.** 429 came with `Retry-After: 1`.",
        "",
        "| stage | fault | once | every time | second run | whole |",
        "|---|---|---|---|---|:-:|",
    ]
    for stage in faults.STAGES:
        mine = [outcome for outcome in outcomes if outcome.stage == stage]
        for fault in dict.fromkeys(outcome.fault for outcome in mine):
            rows = [outcome for outcome in mine if outcome.fault == fault]
            # a refusal names its stage, which is the row's
            first = {outcome.often: outcome.first.partition(" while ")[0] for outcome in rows}
            second = " / ".join(dict.fromkeys(outcome.second for outcome in rows))
            whole = "yes" if all(outcome.sound for outcome in rows) else "NO"
            name = faults.WORDS.get(fault, fault)
            lines.append(f"| {stage} | {name} | {first['once']} | {first.get('always', '')} | {second} | {whole} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the table")
    arguments = parser.parse_args()
    os.environ["HF_TOKEN"] = TOKEN
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    huggingface_hub.utils.disable_progress_bars()
    # a fault that stays costs half a minute of waiting otherwise
    _http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    talk.pause = lambda _: None
    huggingface_hub.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = examine(small_plan(Path(folder)))
    (arguments.output / "hub_faults.md").write_text(markdown(outcomes), encoding="utf-8")
    with (arguments.output / "hub_faults.csv").open("w", newline="", encoding="utf-8") as file:
        fields = [f.name for f in dataclasses.fields(faults.Outcome) if f.name != "message"]
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, outcomes))
    broken = [outcome for outcome in outcomes if not outcome.sound]
    print(f"{len(outcomes) - len(broken)} of {len(outcomes)} cases are whole")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
