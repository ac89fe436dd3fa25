"""The capability table and the meanings of options: made from the records, complete, the same every time."""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import hf_attn
from hf_attn import tables
from hf_attn.errors import InvalidInput, InvalidOption, UnknownMechanism
from hf_attn.options import Options

ROOT = Path(__file__).parents[2]
NAMES = hf_attn.list_mechanisms()


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_meaning(name):
    options_class = hf_attn.get_mechanism(name).options_class
    rows = tables.option_rows(options_class)
    assert [row.name for row in rows] == options_class.names()
    for row in rows:
        assert len(row.meaning) > 3, f"{options_class.__name__} does not say what {row.name} means"
    extra = set(tables.option_meanings(options_class)) - set(options_class.names())
    assert not extra, f"{options_class.__name__} documents what is no option"


@dataclasses.dataclass(frozen=True)
class Shared(Options):
    """Shared.

    Attributes:
        rate, floor: numbers: any,
            and: as many as you like.
        kept (int): from the base.

    Raises:
        InvalidOption: never.
    """

    rate: float = 1.0
    floor: float = 0.0
    kept: int = 3


@dataclasses.dataclass(frozen=True)
class Special(Shared):
    """Special.

    Attributes:
        floor: another meaning.
        size: rows and columns.
    """

    mechanism: ClassVar[str] = "special"

    size: tuple = dataclasses.field(default_factory=lambda: (3, 5))
    silent: bool = False


def test_meanings_are_read_from_the_docstring_and_its_base_classes():
    assert tables.option_meanings(Shared) == {
        "rate": "numbers: any, and: as many as you like.",
        "floor": "numbers: any, and: as many as you like.",
        "kept": "from the base.",
    }
    assert tables.option_rows(Special) == [
        ("rate", 1.0, "numbers: any, and: as many as you like."),
        ("floor", 0.0, "another meaning."),
        ("kept", 3, "from the base."),
        ("size", (3, 5), "rows and columns."),
        ("silent", False, ""),
    ]


def test_the_readme_table_has_a_row_a_mechanism_and_a_cell_a_column():
    lines = tables.readme_table().splitlines()
    header, _, *body = lines[: 2 + len(NAMES)]
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles == ["mechanism", "bidirectional", "causal", "padding", "packed", "cross", "grid", "CLS/prefix",
                      "decoding", "learned", "random", "weights", "dropout", "compile", "export", "pays from"]  # fmt: skip
    for name, line in zip(NAMES, body, strict=True):
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert first == f"[`{name}`](docs/mechanisms/{name}.md)"
        assert len(cells) == len(tables.COLUMNS)
        cell = dict(zip(titles[1:], cells))
        capabilities = hf_attn.get_mechanism(name).capabilities
        for title, flag in (("causal", "causal"), ("cross", "cross"), ("learned", "learned"), ("weights", "attention_weights")):  # fmt: skip
            assert cell[title] == ("✓" if getattr(capabilities, flag) else "–")
        assert (cell["grid"] == "needed") == (not capabilities.sequence)
        assert (cell["decoding"] == "–") == (capabilities.decode == "none")
        assert capabilities.pays_from.startswith(cell["pays from"])
    for title in titles[1:]:
        assert f"**{title}**: " in tables.readme_table(), "every column is explained"


def test_what_is_derived_is_said():
    derived = tables.derived()
    assert derived["ripple"] == hf_attn.get_mechanism("ripple").capabilities.derived
    for name, modes in derived.items():
        assert f"`{name}`: {', '.join(modes)}" in tables.readme_table()


def test_facts_hold_for_the_options_given():
    assert tables.facts("ripple")["capabilities"]["causal"] is False
    facts = tables.facts("ripple", {"allow_1d": True})
    assert facts["capabilities"]["causal"] is True
    assert facts["chosen"] == {**hf_attn.get_mechanism("ripple").example, "allow_1d": True}
    with pytest.raises(UnknownMechanism, match="did you mean 'ripple'"):
        tables.facts("riple")
    with pytest.raises(InvalidOption, match="did you mean 'r_cap'"):
        tables.facts("ripple", {"r_cup": 3})


def test_rewriting_replaces_the_block_and_nothing_else():
    text = f"# Title\n\n{tables.BEGIN}\nanother table\n{tables.END}\n\nend\n"
    new = tables.rewrite(text)
    assert new.startswith(f"# Title\n\n{tables.BEGIN}\n\n| mechanism") and new.endswith(f"\n\n{tables.END}\n\nend\n")
    assert "another table" not in new and tables.readme_table() in new
    assert tables.rewrite(new) == new


@pytest.mark.parametrize(
    "text",
    ["", tables.BEGIN, tables.END, tables.END + tables.BEGIN, 2 * (tables.BEGIN + tables.END),
     tables.BEGIN + 2 * tables.END, 2 * tables.BEGIN + tables.END],
)  # fmt: skip
def test_rewriting_needs_its_markers_once_and_in_order(text):
    with pytest.raises(InvalidInput, match="capabilities:begin"):
        tables.rewrite(text)


def test_the_script_rewrites_a_file(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "scripts/update_readme.py"))["main"]
    path = tmp_path / "page.md"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["update_readme.py", *map(str, arguments)])
        return main(), *capsys.readouterr()

    path.write_text(f"{tables.BEGIN}{tables.END}", encoding="utf-8")
    assert run(path) == (0, f"{path}: the table was rewritten\n", "")
    assert path.read_text(encoding="utf-8") == tables.rewrite(f"{tables.BEGIN}{tables.END}")
    assert run(path) == (0, f"{path}: the table was current\n", "")
    path.write_text("no markers")
    code, out, errors = run(path)
    assert code == 1 and out == "" and "capabilities:begin" in errors
    assert path.read_text() == "no markers"
    assert run(tmp_path / "none.md")[0] == 1
    assert run("--help")[0] == 0 and run(path, path)[0] == 2
