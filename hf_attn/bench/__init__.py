"""Benchmarks that print no time for what was not verified.

    from hf_attn import bench
    report = bench.run(["rfa", "lara:num_landmarks=49"], lengths=[1024, 2048])       # attention alone, against SDPA
    report = bench.run(["softmax", "rfa"], model="bert")                             # whole models, against the stock one
    report = bench.run(["aa_resnet:depth=50"], model="resnet")                       # AA-ResNets, against the ResNet

`run` is all of it. Its parts: a `Workload` sets up, runs and verifies; `measure` makes the `Row` of one `Case`;
`sweep` goes through many; a `Report` prints and writes them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_attn.bench.checks import Mismatch
from hf_attn.bench.gate import Limits, Row, cells, measure, sweep
from hf_attn.bench.images import ResNetWorkload
from hf_attn.bench.memory import Memory, peak_memory
from hf_attn.bench.models import FAMILIES, ModelWorkload, checkpoint, title
from hf_attn.bench.peers import PEERS, PeerWorkload
from hf_attn.bench.report import Environment, OtherLoad, Report
from hf_attn.bench.timing import Comparison, Spread, compare
from hf_attn.bench.units import UNITS, UnitWorkload
from hf_attn.bench.workload import DTYPES, Case, Contest, MechanismWorkload, Workload
from hf_attn.errors import InvalidInput, InvalidOption, UnknownMechanism, Unsupported, near
from hf_attn.kernels import missing_cuda
from hf_attn.registry import list_mechanisms

__all__ = [
    "Case",
    "Comparison",
    "Contest",
    "Limits",
    "MechanismWorkload",
    "Memory",
    "Mismatch",
    "ModelWorkload",
    "PeerWorkload",
    "Report",
    "ResNetWorkload",
    "Row",
    "Spread",
    "UnitWorkload",
    "Workload",
    "cells",
    "compare",
    "measure",
    "parse_name",
    "peak_memory",
    "run",
    "sweep",
]


@dataclass(frozen=True)
class Kind:
    """What a benchmark compares, with its usual sizes.

    Attributes:
        workloads: called with names (None for all), model and layers.
    """

    title: str
    lengths: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    workloads: Callable[[Sequence[str] | None, str | None, int], list[Workload]]


def _attention(names: Sequence[str] | None, model: str | None, layers: int) -> list[Workload]:
    found: list[Workload] = []
    for text in [*list_mechanisms(), *UNITS, *PEERS] if names is None else names:
        name, options = parse_name(text)
        if name in UNITS:
            found.append(UnitWorkload(name, options))
        elif name not in PEERS:
            if name not in list_mechanisms():
                raise UnknownMechanism(name, [*list_mechanisms(), *UNITS, *PEERS])
            found.append(MechanismWorkload(name, options))
        elif options:
            raise InvalidOption(f"{name} is another package: it takes no options here. Give the name alone.")
        else:
            found.append(PeerWorkload(PEERS[name]))
    return found


def _model(names: Sequence[str] | None, model: str | None, layers: int) -> list[Workload]:
    source = model if model in FAMILIES else checkpoint(model or "")
    chosen = list_mechanisms() if names is None else names
    return [ModelWorkload(source, *parse_name(text), layers=layers) for text in chosen]


def _images(names: Sequence[str] | None, model: str | None, layers: int) -> list[Workload]:
    found: list[Workload] = []
    for text in ["aa_resnet"] if names is None else names:
        name, options = parse_name(text)
        if name != "aa_resnet":
            raise UnknownMechanism(name, ["aa_resnet"])
        found.append(ResNetWorkload(options))
    return found


KINDS = {
    "attention": Kind("attention", (512, 1024, 2048, 4096), 1, 4, 64, _attention),
    "model": Kind("whole model", (128,), 4, 12, 64, _model),
    "images": Kind("images, N = side in pixels:", (224,), 1, 8, 20, _images),
}


def run(
    names: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    *,
    model: str | None = None,
    layers: int = 4,
    batch: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    causal: bool | None = None,
    backward: bool = True,
    memory: bool = True,
    repeats: int = 5,
    min_seconds: float = 0.2,
    budget: float = 15.0,
    total: float | None = 540.0,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> Report:
    """Verify, time and report attention mechanisms, alone or in whole models.

    Args:
        names: mechanisms, each with options if wanted (`"rfa:num_features=64,redraw=fixed"`); for attention alone, pairs
            of gated attention units ("gau", "flash_gau") and names of other packages too (see `PEERS`); for a checkpoint
            of hf_attn, "stored" for the mechanisms in it. None: all of them.
        lengths: tokens. Default 512 to 4096 for attention, 128 for models, 224 (pixels) for "resnet".
        model: None compares attention alone with torch's scaled_dot_product_attention (causal with causal). "bert",
            "gpt2", "vit" (built from the sizes, random weights), a folder or a Hub id compares whole models. "resnet"
            compares AA-ResNets, names such as "aa_resnet:depth=34,kappa=0.5", with the ResNet; lengths are sides in pixels.
        layers: layers of a model that is built. A checkpoint ignores it, and heads and head_dim; "resnet" has a depth.
        batch, heads, head_dim: sizes. Default 1, 4, 64 for attention and 4, 12, 64 for models; for "resnet" 1, and heads
            and least key channels a head of the augmented convolutions, 8 and 20.
        dtype: "float64", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        causal: one mode only, True or False; None: every mode a mechanism defines. A model decides itself.
        backward: also forward and backward together.
        memory: also peak memory.
        repeats: pairs of runs in a cell, at least.
        min_seconds: seconds measured in a cell, at least.
        budget: seconds the pairs of a cell may take; a slower cell is skipped, and says so.
        total: seconds after which the remaining cells, the longest ones, are skipped. None: no limit.
        seed: of inputs and parameters.
        output: folder for bench_<kind>.csv, .md and .png; made if it is not there. None: no files.
        console: where the table goes; the terminal by default. The progress bar goes to standard error.

    Returns:
        The report, as printed.

    Raises:
        UnknownMechanism, InvalidOption, InvalidInput, Unsupported: an argument that cannot be used; nothing was run.
    """
    chosen_kind = "attention" if model is None else "images" if model == "resnet" else "model"
    kind = KINDS[chosen_kind]
    sizes: dict[str, Any] = {
        "batch": kind.batch if batch is None else batch,
        "heads": kind.heads if heads is None else heads,
        "head_dim": kind.head_dim if head_dim is None else head_dim,
    }
    if names is not None and (isinstance(names, str) or not names):
        raise InvalidInput(f"names={names!r} must be a list of at least one name, or None for all of them.")
    chosen = list(kind.lengths if lengths is None else lengths)
    _check(chosen, {**sizes, "layers": layers, "repeats": repeats}, dtype, device, causal, model)
    for name, value in (("min_seconds", min_seconds), ("budget", budget), ("total", total)):
        if value is not None and not value >= 0:
            raise InvalidInput(f"{name}={value!r} must be a number of seconds, at least 0.")
    workloads = kind.workloads(names, model, layers)
    folder = None if output is None else _folder(output)
    limits = Limits(repeats, min_seconds, budget, total, memory)
    case = Case(chosen[0], **sizes, dtype=dtype, device=device, seed=seed)
    planned = cells(workloads, chosen, case, causal, backward)

    command = _command(
        names, lengths, model=model and title(model), layers=layers, batch=batch, heads=heads, head_dim=head_dim,
        dtype=dtype, device=device, causal=causal, backward=backward, memory=memory, repeats=repeats,
        min_seconds=min_seconds, budget=budget, total=total, seed=seed,
    )  # fmt: skip
    environment, load = Environment.here(command, device, seed), OtherLoad()
    rows = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(planned))
        steps = sweep(planned, limits)
        for workload, cell in planned:
            progress.update(task, description=f"{workload.label} {cell.length} {cell.mode} {cell.work}")
            rows.append(next(steps))
            progress.advance(task)
    heading = kind.title if model is None else f"{kind.title} {title(model)}"
    report = Report(heading, f"bench_{chosen_kind}", rows, replace(environment, other_load=str(load)))
    if console is None:
        terminal = Console()
        console = terminal if terminal.is_terminal else Console(width=140)
    report.print(console)
    for path in report.write(folder) if folder is not None else ():
        console.print(f"wrote {path}", markup=False, highlight=False)
    return report


def parse_name(text: str) -> tuple[str, dict[str, Any]]:
    """`name:key=value,key=value` as the name and its options; values are read as YAML, lists as [3,5].

    Raises:
        InvalidOption: it does not look like that.
    """
    name, colon, rest = text.partition(":")
    options = {}
    # a comma inside brackets belongs to a list
    for part in re.split(r",(?![^\[]*\])", rest) if colon else ():
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise InvalidOption(f"{text!r} must look like name or name:key=value,key=value.")
        try:
            # 0010 is a choice of terms, and YAML would read an octal number
            options[key.strip()] = value if re.fullmatch(r"0\d+", value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidOption(f"{text!r}: the value of {key} cannot be read ({error}).") from error
    return name, options


def _check(
    lengths: list[int], numbers: dict[str, int], dtype: str, device: str, causal: bool | None, model: str | None
) -> None:
    """Raise for an argument that cannot be used, before anything is run."""
    if not lengths:
        raise InvalidInput("lengths is empty. Give at least one, such as 1024.")
    for name, value in [*(("lengths", length) for length in lengths), *numbers.items()]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name}={value!r} must be an integer of at least 1.")
    if dtype not in DTYPES:
        raise InvalidOption(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}{near(dtype, DTYPES)}.")
    if causal not in (None, True, False):
        raise InvalidOption(f"causal={causal!r} must be None, True or False.")
    if causal is not None and model is not None:
        raise InvalidOption(f"causal={causal!r} with model={model!r}: the model decides. Leave causal out.")
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InvalidOption(f"device={device!r} is no device. Give 'cpu', 'cuda' or 'cuda:1'.") from error
    if kind.type not in ("cpu", "cuda"):
        raise Unsupported("bench", f"device={device!r}: only CPU and CUDA devices can be timed", "Take 'cpu' or 'cuda'")
    if kind.type == "cuda":
        reason = missing_cuda()
        if reason is None and (kind.index or 0) >= torch.cuda.device_count():
            reason = f"there are {torch.cuda.device_count()} CUDA devices"
        if reason is not None:
            raise Unsupported("bench", f"device={device!r}: {reason}", "Take device='cpu'")


def _folder(output: str | os.PathLike[str]) -> str:
    """The output folder, made now: an error after minutes of measuring would lose them."""
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"output={os.fspath(output)!r} cannot be made: {error.strerror}. Give a folder.") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise InvalidInput(f"output={os.fspath(output)!r} cannot be written to. Give another folder.")
    return os.fspath(output)


def _command(names: Sequence[str] | None, lengths: Sequence[int] | None, **arguments: Any) -> str:
    """The command that repeats this run: what differs from the defaults of `run`, without its folders."""
    words = ["python", "scripts/bench.py", *(names or ())]
    if lengths is not None:
        words += ["--lengths", *map(str, lengths)]
    for name, value in arguments.items():
        default = (run.__kwdefaults__ or {})[name]
        if value == default:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", "0" if value is None else str(value)]
    return shlex.join(words)
