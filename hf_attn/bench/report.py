"""What a benchmark found: on the terminal, and as CSV, Markdown and PNG, each with the facts it depends on."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_attn.bench.gate import Row
from hf_attn.bench.timing import Spread
from hf_attn.errors import InvalidInput

METHOD = (
    "A time stands only where the candidate was verified in the same process: see the last column. "
    "Baseline and candidate ran in turns; times are medians in ms with quartiles in brackets, and the ratio is the median "
    "of candidate / baseline over the pairs, below 1 where the candidate is faster. "
    "Memory is what one run needs at its peak on top of inputs and parameters, in MiB: on a CPU the growth of the resident "
    "set of a forked child with one thread, on a CUDA device torch's own count."
)


@dataclass(frozen=True)
class Environment:
    """Where and how a benchmark ran. No host name, no folders."""

    command: str
    versions: str
    machine: str
    date: str
    seed: int
    other_load: str = "not measured"

    @classmethod
    def here(cls, command: str, device: str, seed: int) -> Environment:
        """This process, now."""
        import transformers

        import hf_attn

        versions = {
            "hf_attn": hf_attn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return cls(command, ", ".join(f"{n} {v}" for n, v in versions.items()), machine(device), date, seed)

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each fact."""
        return [(name.replace("_", " "), str(value)) for name, value in vars(self).items()]


def machine(device: str) -> str:
    """The class of the machine: the model of the GPU or CPU, and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {cores} CPU cores"
    threads = torch.get_num_threads()
    return f"{processor()}, {cores} cores, {threads} thread{'s' * (threads != 1)}"


def processor() -> str:
    """The model name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class OtherLoad:
    """How many cores other processes keep busy, from the making of this object to `str`: they disturb the times."""

    def __init__(self) -> None:
        self.wall, self.busy = time.perf_counter(), self._busy()

    def __str__(self) -> str:
        seconds, busy = time.perf_counter() - self.wall, self._busy()
        if self.busy is None or busy is None:
            return "not measured: this system has no /proc/stat"
        return f"other processes kept {max(0.0, (busy - self.busy) / seconds):.1f} cores busy on average"

    @staticmethod
    def _busy() -> float | None:
        """Seconds all cores have worked since the machine started, but for this process and its children."""
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        except OSError:
            return None
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


@dataclass(frozen=True)
class Section:
    """Rows of one mode and one kind of pass."""

    mode: str
    work: str
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.mode}, {self.work}"

    def measured(self) -> dict[str, list[Row]]:
        """Label -> its rows with a time, by length."""
        lines: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.case.length):
            if row.time is not None:
                lines.setdefault(row.label, []).append(row)
        return lines

    def crossover(self, label: str) -> int | None:
        """The first measured length from which `label` is faster at every longer one, beyond the quartiles' doubt."""
        found = None
        for row in reversed(self.measured().get(label, [])):
            if row.time is None or row.time.ratio.high >= 1:
                break
            found = row.case.length
        return found


COLUMNS = ("attention", "N", "baseline", "baseline ms", "ms", "ratio", "baseline MiB", "MiB", "verified, or why not")
SHORT = ("attention", "N", "baseline ms", "ms", "ratio", "baseline MiB", "MiB", "verified")
"""Columns of the Markdown file, and of the terminal."""


@dataclass(frozen=True)
class Report:
    """The rows of a benchmark and its environment.

    Attributes:
        title: what was compared.
        name: stem of the files `write` makes.
    """

    title: str
    name: str
    rows: Sequence[Row]
    environment: Environment

    def sections(self) -> list[Section]:
        """The rows by mode and work, labels in their order, lengths ascending."""
        order = list(dict.fromkeys(row.label for row in self.rows))
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (order.index(row.label), row.case.length)):
            groups.setdefault((row.case.mode, row.case.work), []).append(row)
        # keys sort as: bidirectional before causal, forward before forward+backward
        return [Section(*key, groups[key]) for key in sorted(groups)]

    def findings(self) -> list[str]:
        """One line for every label: from which length it is faster than its baseline."""
        lines = []
        for section in self.sections():
            for label, rows in section.measured().items():
                start = section.crossover(label)
                shortest, longest = rows[0].case.length, rows[-1].case.length
                first = " (the shortest measured)" if start == shortest else ""
                what = f"not faster up to {longest}" if start is None else f"faster from {start}{first} to {longest}"
                lines.append(f"{label}, {section.title}: {what}")
        return lines

    def print(self, console: Console) -> None:
        """Tables and findings on a terminal."""
        for section in self.sections():
            table = Table(title=f"{self.title}: {section.title}", box=box.SIMPLE_HEAD, title_justify="left")
            for column in SHORT:
                text = column in (SHORT[0], SHORT[-1])
                table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
            for row in section.rows:
                if row.time is not None:
                    table.add_row(*map(escape, short(row)))
            if table.row_count:
                console.print(table)
            else:
                console.print(f"{self.title}: {section.title}", style="italic", markup=False)
            for row in section.rows:
                if row.time is None:
                    line = f"  {row.label} {row.case.length or 'all'}: {row.status}: {row.note}"
                    console.print(line, style=_STYLES[row.status], markup=False, highlight=False)
            console.print()
        for line in (*self.findings(), "", METHOD, "", *(f"{n}: {v}" for n, v in self.environment.facts())):
            console.print(line, markup=False, highlight=False)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write `<name>.csv`, `.md` and `.png` into `folder`, which is made; returns their paths.

        Raises:
            InvalidInput: the folder cannot be written to.
        """
        folder = Path(folder)
        paths = [folder / f"{self.name}.{kind}" for kind in ("csv", "md", "png")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, write in zip(paths, (self._write_csv, self._write_markdown, self._draw), strict=True):
                write(path)
        except OSError as error:
            raise InvalidInput(f"output={str(folder)!r} cannot be written: {error.strerror}. Give a folder.") from error
        return paths

    def _write_csv(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in self.environment.facts())
            records = [record(row) for section in self.sections() for row in section.rows]
            writer = csv.DictWriter(file, list(records[0]) if records else ["attention"])
            writer.writeheader()
            writer.writerows(records)

    def _write_markdown(self, path: Path) -> None:
        lines = [f"# {self.title}", "", *(f"- {n}: {_code(n, v)}" for n, v in self.environment.facts()), "", METHOD, ""]
        for section in self.sections():
            lines += [f"## {section.title}", "", _line(COLUMNS), _line("---" for _ in COLUMNS)]
            lines += [_line(cell.replace("|", r"\|") for cell in cells(row)) for row in section.rows]
            lines.append("")
        lines += ["## From which length it pays", "", *(f"- {line}" for line in self.findings()), ""]
        lines += ["Faster means: the upper quartile of the ratio is below 1.", ""]
        path.write_text("\n".join(lines), encoding="utf-8")

    def _draw(self, path: Path) -> None:
        from hf_attn.bench.picture import draw

        draw(self, path)


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    name = f"{row.label.partition(':')[0]} ({row.options})" if row.options else row.label
    length = str(row.case.length or "all")
    if row.time is None:
        return [name, length, row.baseline, "", "", "", "", "", f"{row.status}: {row.note}"]
    memory = ["", ""] if row.memory is None else [str(found) for found in row.memory]
    times = [_spread(spread, 1000) for spread in (row.time.baseline, row.time.candidate)]
    return [name, length, row.baseline, *times, _spread(row.time.ratio), *memory, row.note]


def short(row: Row) -> list[str]:
    """A row with a time as text, in the order of SHORT: the quartiles of the ratio alone."""
    _, length, _, baseline, time, ratio, *rest = cells(row)
    return [row.label, length, baseline.partition(" ")[0], time.partition(" ")[0], ratio, *rest]


def record(row: Row) -> dict[str, Any]:
    """A row as the columns of the CSV; what was not measured is empty."""
    case = row.case
    values: dict[str, Any] = {
        "attention": row.label,
        "options": row.options,
        "mode": case.mode,
        "pass": case.work,
        "length": case.length or "all",
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "device": case.device,
        "status": row.status,
        "note": row.note,
        "baseline": row.baseline,
        "pairs": row.time.pairs if row.time else "",
    }
    for name, factor in (("baseline", 1000), ("candidate", 1000), ("ratio", 1)):
        spread = getattr(row.time, name, None)
        unit = "" if name == "ratio" else "_ms"
        for part, suffix in (("median", ""), ("low", "_q1"), ("high", "_q3")):
            values[f"{name}{unit}{suffix}"] = "" if spread is None else f"{getattr(spread, part) * factor:.6g}"
    for name, memory in zip(("baseline", "candidate"), row.memory or (None, None), strict=True):
        values[f"{name}_mib"] = "" if memory is None or memory.mib is None else f"{memory.mib:.6g}"
        values[f"{name}_mib_note"] = memory.reason if memory is not None else ""
    return values


_STYLES = {"skipped": "dim", "refused": "bold red"}


def _spread(spread: Spread, factor: float = 1) -> str:
    median, low, high = (_number(value * factor) for value in (spread.median, spread.low, spread.high))
    return f"{median} [{low}-{high}]"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value
