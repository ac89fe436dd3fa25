"""One run of `hf-attn linearize`, or of `hf-attn convert --linearize`: a checkpoint and data in, a folder out that loads like any other checkpoint."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from hf_attn.analysis.outputs import Batch, run
from hf_attn.errors import InvalidInput, InvalidOption, near
from hf_attn.models.loading import load
from hf_attn.recipes.linearize import LinearizeOptions, linearize
from hf_attn.recipes.linearize_data import LENGTHS, batches_for, processor_of
from hf_attn.recipes.linearize_report import LinearizeResult
from hf_attn.recipes.train import ReloadMismatch


@dataclass(frozen=True)
class LinearizePlan:
    """What a YAML file for `hf-attn convert --linearize` says.

    Attributes:
        options: steps, learning rates, seed.
        data, lengths, tokens: see `hf_attn.recipes.linearize_data.batches_for`; `lengths` None: those the model takes.
        examples: held-out texts of each length, or images, to measure on.
    """

    options: LinearizeOptions
    data: str | None = None
    lengths: Sequence[int] | None = None
    tokens: int = 512
    examples: int = 16

    def batches(self, model: PreTrainedModel, source: str) -> tuple[list[Batch], list[Batch]]:
        """To train on, and held-out ones, as far as the model is long enough."""
        most = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS)
        lengths = self.lengths or [length for length in LENGTHS if length <= most] or [most]
        return batches_for(model, source, self.data, lengths, self.tokens, self.examples, self.options.seed)

    def __call__(self, model: PreTrainedModel, attention: dict[str, Any], source: str) -> LinearizeResult:
        """Linearise `model`, whose tokenizer or image processor is in `source`."""
        train, held_out = self.batches(model, source)
        return linearize(model, attention, train, self.options, held_out)

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for a card: without folders."""
        data = {} if self.data is None else {"data": Path(self.data).name}
        lengths = {} if self.lengths is None else {"lengths": list(self.lengths)}
        return {**asdict(self.options), **data, **lengths, "tokens": self.tokens}


def read_plan(path: Path | None, seed: int = 0, data: str | None = None) -> LinearizePlan:
    """The plan in a YAML file, whose keys are the fields of LinearizeOptions without `seed`, and of LinearizePlan.

    Args:
        path: the file; None: the defaults.
        seed: of parameters, draws, split and order.
        data: in place of the file's.

    Raises:
        InvalidInput: the file cannot be read. InvalidOption: an unknown key, or a wrong value.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"--linearize {str(path)!r} is no readable YAML file: {error}.") from error
    values = {} if values is None else values
    stages, rest = ({field.name for field in fields(kind)} for kind in (LinearizeOptions, LinearizePlan))
    known = sorted((stages | rest) - {"seed", "options"})
    if not isinstance(values, dict):
        raise InvalidInput(f"--linearize {str(path)!r} must hold keys and values. Keys: {', '.join(known)}.")
    for key, value in values.items():
        if key not in known:
            raise InvalidOption(f"{path}: unknown key {key!r}{near(key, known)}. Known: {', '.join(known)}.")
        sizes = value if key == "lengths" and isinstance(value, list) and value else [value]
        if key in ("lengths", "tokens", "examples") and not all(type(n) is int and n > 0 for n in sizes):
            raise InvalidOption(f"{path}: {key}={value!r} must be positive integers.")
        if key == "data" and not isinstance(value, str):
            raise InvalidOption(f"{path}: data={value!r} must be a text.")
    options = LinearizeOptions(**{key: value for key, value in values.items() if key in stages}, seed=seed)
    plan = {key: value for key, value in values.items() if key in rest}
    if data is not None:
        plan["data"] = data
    if "lengths" in plan and not isinstance(plan["lengths"], list):
        plan["lengths"] = [plan["lengths"]]
    return LinearizePlan(options, **plan)


def linearize_checkpoint(
    source: str,
    attention: str | dict[str, Any],
    output: str | os.PathLike[str],
    options: LinearizeOptions | None = None,
    data: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = 512,
    examples: int = 16,
) -> LinearizeResult:
    """Linearise the checkpoint `source` and save it, with its tokenizer or image processor and the reports.

    Args:
        source: a folder or a Hub id.
        attention: a mechanism, or a choice by layer, as `hf_attn.convert` takes it.
        output: a folder that is new or empty.
        options: steps, learning rates, seed.
        data, lengths, tokens: see `hf_attn.recipes.linearize_data.batches_for`.
        examples: held-out texts of each length, or images.

    Raises:
        InvalidInput, InvalidOption, Unsupported, UnknownMechanism: something given is wrong; nothing was trained.
        ReloadMismatch: the saved model is not the trained one.
    """
    options, folder = options or LinearizeOptions(), Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"output={str(output)!r} exists and is not an empty folder; give a new one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"output={str(output)!r} cannot be made: {error.strerror or error}.") from error
    model = load(source)
    train, held_out = batches_for(model, source, data, lengths, tokens, examples, options.seed)
    result = linearize(model, attention, train, options, held_out)
    result.model.save_pretrained(folder)
    processor_of(model, source).save_pretrained(folder)
    copy_sentence_modules(Path(source), folder)
    check_reload(result.model, folder, held_out[0])
    result.save(folder)
    return result


def copy_sentence_modules(source: Path, folder: Path) -> None:
    """Copy what sentence-transformers keeps in a folder, so that it loads the new model with the same pooling.

    Parts without a folder of their own, such as the normalisation, have nothing to copy.
    """
    if not (source / "modules.json").is_file():
        return
    parts = json.loads((source / "modules.json").read_text(encoding="utf-8"))
    for name in [part["path"] for part in parts if part["path"] and (source / part["path"]).is_dir()]:
        shutil.copytree(source / name, folder / name)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)


def check_reload(model: PreTrainedModel, folder: Path, batch: Batch) -> None:
    """Raise `ReloadMismatch` unless the model in `folder` computes the last hidden states of `model`, bit for bit."""
    # a copy: weights read from a file lie at odd addresses, which changes the rounding of a matrix product
    reloaded = copy.deepcopy(load(str(folder)))
    reloaded.to(model.device)  # type: ignore[arg-type]
    with torch.no_grad():
        states = [run(each, batch).hidden_states[-1] for each in (model, reloaded)]
    difference = (states[0] - states[1]).abs().max().item()
    if difference != 0:
        raise ReloadMismatch(
            f"the model saved in {folder} computes other hidden states than the trained one (largest difference "
            f"{difference:g}). Do not use it: some of its weights or options were not saved."
        )
