"""How `hf-attn list`, `show` and `doctor` look in a terminal. What they say comes from `tables` and `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from hf_attn import tables
from hf_attn.capabilities import Capabilities
from hf_attn.doctor import Check, Report
from hf_attn.hub.families import capability_rows


def make(stderr: bool = False) -> Console:
    """A console that prints text as it is: brackets in an equation are no markup."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def print_capabilities() -> None:
    """The capability table; in two parts where the terminal is too narrow for one."""
    console = make()
    whole = _capabilities(console, tables.COLUMNS)
    natural = console.measure(whole, options=console.options.update(width=1000)).maximum
    if not console.is_terminal:
        # whoever reads a pipe wants one line a mechanism
        console.width = max(console.width, natural)
    parts = [tables.COLUMNS] if natural <= console.width else [tables.CALLS, tables.MODULE]
    for columns in parts:
        console.print(_capabilities(console, columns))
    for name, modes in tables.derived().items():
        console.print(f"{name}: {', '.join(modes)}: derived from the definition, not in the paper")


def _capabilities(console: Console, columns: Sequence[tables.Column]) -> Table:
    # as narrow as can be, to fit 80 columns in two parts
    table = _table("mechanism", padding=0)
    for column in columns:
        justify: JustifyMethod = "left" if column is tables.COLUMNS[-1] else "center"
        table.add_column(column.title.replace("/", "/\n"), justify=justify)
    for name, cells in tables.rows(columns):
        table.add_row(Text(name, "bold"), *(_tick(console, cell) for cell in cells))
    return table


def print_facts(facts: dict[str, Any]) -> None:
    """What `tables.facts` says about one mechanism."""
    console = make()
    console.print(Text.assemble((facts["name"], "bold"), f": {facts['title']}"))
    console.print(facts["summary"], end="\n\n")
    head = Table.grid(padding=(0, 2))
    head.add_row(Text("paper", "bold"), facts["paper"])
    head.add_row(Text("equation", "bold"), facts["equation"].replace(",  ", "\n"))
    console.print(head)

    options = _table("option", "default", "meaning")
    for option in facts["options"]:
        options.add_row(Text(option["name"], "bold"), str(option["default"]), option["meaning"])
    console.print(options if facts["options"] else "\nIt has no options.")

    chosen = ", ".join(f"{name}={value}" for name, value in facts["chosen"].items())
    can = _table("capability", f"with {chosen}" if chosen else "with default options")
    for cell, value in capability_rows(Capabilities(**facts["capabilities"])):
        can.add_row(cell, _tick(console, value))
    console.print(can)


def print_report(report: Report) -> None:
    """The findings of `hf-attn doctor`."""
    console = make()
    packages = _table("package", "version", "needed", "")
    for package in report.packages:
        missing = "not installed (optional)" if package.optional else "not installed"
        packages.add_row(package.name, package.version or missing, package.needs, _result(package.passed))
    devices = _table("device", "what it is")
    for name, words in report.devices.items():
        devices.add_row(name, words)
    kernels = _table("operation", "kernel", "usable", "why not, or when")
    last = ""
    for kernel in report.kernels:
        when = kernel.reason or ("active" if kernel.active else "only when asked for by name")
        usable = _tick(console, tables.NO if kernel.reason else tables.YES)
        kernels.add_row("" if kernel.operation == last else kernel.operation, kernel.backend, usable, when)
        last = kernel.operation
    for table in (packages, devices, kernels, *(_checks(report, device) for device in report.devices)):
        console.print(table)
    passed = sum(check.passed for check in report.checks)
    number = len({check.mechanism for check in report.checks})
    summary = f"{passed} of {len(report.checks)} checks passed: {number} mechanisms on {', '.join(report.devices)}"
    console.print(Text(summary, "red" if report.failures else "green"))


def _checks(report: Report, device: str) -> Table:
    """One row a mechanism: the worst errors of its modes, in each precision."""
    by_name: dict[str, list[Check]] = {}
    for check in report.checks:
        if check.device == device:
            by_name.setdefault(check.mechanism, []).append(check)
    precisions = list(dict.fromkeys(check.precision for check in report.checks if check.device == device))
    table = _table(f"on {device}", "checked", *(f"{p}\nresult   gradient" for p in precisions), "")
    for name, checks in by_name.items():
        modes = ", ".join(dict.fromkeys(check.mode for check in checks))
        figures = [_worst([check for check in checks if check.precision == precision]) for precision in precisions]
        table.add_row(Text(name, "bold"), modes, *figures, _result(all(check.passed for check in checks)))
    return table


def _worst(checks: list[Check]) -> str:
    """The largest error of the results and of the gradients."""
    pairs = [
        (c.forward_error, c.gradient_error)
        for c in checks
        if c.forward_error is not None and c.gradient_error is not None
    ]
    if len(pairs) < len(checks):
        return "did not run"
    return "  ".join(f"{max(errors):.1e}" for errors in zip(*pairs)) if pairs else ""


def _table(*titles: str, padding: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, padding, 0, 0))
    for title in titles:
        table.add_column(title)
    return table


def _tick(console: Console, cell: str) -> str:
    """A tick and a dash for yes and no, where the terminal can print them."""
    if console.options.ascii_only:
        return cell
    return {tables.YES: "✓", tables.NO: "–"}.get(cell, cell)


def _result(passed: bool) -> Text:
    return Text("ok", "green") if passed else Text("FAILED", "bold red")
