"""Tables made from the records: what each mechanism can do, and what its options mean.

`hf-attn list`, `hf-attn show` and the table in README.md come from here. Rewrite the README with
`python scripts/update_readme.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hf_attn import get_mechanism, list_mechanisms
from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput
from hf_attn.options import Options
from hf_attn.samples import example_options

YES, NO = "yes", "no"
BEGIN, END = "<!-- capabilities:begin -->", "<!-- capabilities:end -->"


class Column(NamedTuple):
    """One column of the capability table."""

    title: str
    cell: Callable[[Capabilities], str]
    legend: str


def _flag(name: str) -> Callable[[Capabilities], str]:
    return lambda capabilities: YES if getattr(capabilities, name) else NO


def _grid(capabilities: Capabilities) -> str:
    if capabilities.grid != "used":
        return NO
    return YES if capabilities.sequence else "needed"


def _prefix(capabilities: Capabilities) -> str:
    return "plain" if capabilities.grid == "ignored" else _flag("prefix_tokens")(capabilities)


def _decode(capabilities: Capabilities) -> str:
    short = {"none": NO, "full cache": "cache", "constant state": "state", "growing state": "growing",
             "full state": "cache"}  # fmt: skip
    return short.get(capabilities.decode, capabilities.decode)


def _pays_from(capabilities: Capabilities) -> str:
    """The length alone: its conditions follow in brackets or after a colon."""
    return re.split(r" \(|[:;,]", capabilities.pays_from)[0]


CALLS = (
    Column("bidirectional", _flag("bidirectional"), "every token sees every token"),
    Column("causal", _flag("causal"), "a token sees itself and what came before"),
    Column("padding", _flag("padding"), "a padded token never matters, exactly"),
    Column("packed", _flag("packed"), "several sequences in one row, each as if alone"),
    Column("cross", _flag("cross"), "keys of another sequence"),
    Column("grid", _grid, "rows and columns of tokens are used, or needed in every call"),
    Column("CLS/prefix", _prefix, "tokens before the grid have a place of their own (plain: they are ordinary tokens)"),
    Column(
        "decoding",
        _decode,
        "with the full cache of keys and values, or with a smaller state (growing: with the length)",
    ),
)
"""What a call may be."""
MODULE = (
    Column("learned", _flag("learned"), "has parameters that a stock checkpoint lacks"),
    Column("random", _flag("random"), "something is drawn at random"),
    Column("weights", _flag("attention_weights"), "exact attention weights can be returned"),
    Column("dropout", _flag("dropout"), "attention dropout acts"),
    Column("compile", _flag("compile"), "torch.compile with fullgraph=True"),
    Column("export", _flag("export"), "torch.export"),
    Column(
        "pays from",
        _pays_from,
        "tokens from which it is faster than torch's own attention (on which machine, its page says)",
    ),
)
"""What the module is."""
COLUMNS = CALLS + MODULE


def rows(columns: Sequence[Column] = COLUMNS) -> list[tuple[str, list[str]]]:
    """Every mechanism, in order of registration, with its cells under its example options."""
    records = ((name, get_mechanism(name).capabilities) for name in list_mechanisms())
    return [(name, [column.cell(capabilities) for column in columns]) for name, capabilities in records]


def derived() -> dict[str, tuple[str, ...]]:
    """The modes that follow from a definition but are not in its paper, of the mechanisms that have some."""
    found = {name: get_mechanism(name).capabilities.derived for name in list_mechanisms()}
    return {name: modes for name, modes in found.items() if modes}


def readme_table() -> str:
    """The capability table in Markdown, with its legend; equal records make equal text."""
    ticks = {YES: "✓", NO: "–"}
    lines = [
        f"| mechanism | {' | '.join(column.title for column in COLUMNS)} |",
        f"|---|{':-:|' * (len(COLUMNS) - 1)}---|",
        *(
            f"| [`{name}`](docs/mechanisms/{name}.md) | {' | '.join(ticks.get(cell, cell) for cell in cells)} |"
            for name, cells in rows()
        ),
        "",
        "The tests check every tick and every dash: ✓ works, – is refused or has no effect. A row holds for the mechanism's "
        "example options; `hf-attn show NAME --option KEY=VALUE` tells what others change.",
        "",
        f"{'; '.join(f'**{column.title}**: {column.legend}' for column in COLUMNS)}.",
    ]
    if found := derived():
        modes = "; ".join(f"`{name}`: {', '.join(modes)}" for name, modes in found.items())
        lines += ["", f"Derived from the definition, not in the paper: {modes}."]
    return "\n".join(lines)


def rewrite(text: str) -> str:
    """`text` with the current capability table between the markers `BEGIN` and `END`.

    Raises:
        InvalidInput: the markers are missing, or not once each in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    block, end, after = rest.partition(END)
    if not (begin and end) or any(marker in part for marker in (BEGIN, END) for part in (before, block, after)):
        raise InvalidInput(
            f"the capability table has no place in this text: it must contain the lines {BEGIN!r} and {END!r}, once each, in this order."
        )
    return f"{before}{BEGIN}\n\n{readme_table()}\n\n{END}{after}"


def facts(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of a mechanism in plain values, its capabilities under its example options and `options` on top.

    Raises:
        UnknownMechanism, InvalidOption: there is no such mechanism, or it refuses the options.
    """
    record = get_mechanism(name)
    chosen = example_options(name, options)
    return {
        "name": name,
        "title": record.title,
        "summary": record.summary,
        "paper": record.paper,
        "equation": record.equation,
        "options": [row._asdict() for row in option_rows(record.options_class)],
        "chosen": chosen.changed(),
        "capabilities": dataclasses.asdict(record.module_class.describe(chosen)),
    }


class OptionRow(NamedTuple):
    """One option of a mechanism, as its dataclass declares and documents it."""

    name: str
    default: Any
    meaning: str


def option_rows(options_class: type[Options]) -> list[OptionRow]:
    """The options of a mechanism, in the order of the dataclass. An undocumented one has an empty meaning."""
    meanings = option_meanings(options_class)
    found = []
    for field in dataclasses.fields(options_class):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found.append(OptionRow(field.name, default, meanings.get(field.name, "")))
    return found


def option_meanings(options_class: type[Options]) -> dict[str, str]:
    """Option -> its meaning, read from the `Attributes:` section of the docstring, base classes included.

    An entry is `name: meaning` or `name, name: meaning`; its further lines stand deeper than its first.
    """
    meanings: dict[str, str] = {}
    for base in reversed(options_class.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        indent, names = None, []
        for line in section.splitlines():
            if not line.strip():
                continue
            depth = len(line) - len(line.lstrip())
            if depth == 0:
                break
            indent = depth if indent is None else indent
            entry = re.match(r"([\w, ]+?)(?: \(.*?\))?: *(.*)", line.strip()) if depth == indent else None
            if entry:
                names = [name.strip() for name in entry[1].split(",")]
                meanings |= dict.fromkeys(names, entry[2])
            else:
                meanings |= {name: f"{meanings[name]} {line.strip()}".strip() for name in names}
    return meanings
