"""The documentation says what the code says: the README's table, and a page for every mechanism."""

import re
from pathlib import Path

import pytest

import hf_attn
from hf_attn import tables

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "mechanisms"
SECTIONS = ["How it works", "Constraints", "When to use", "When not to use", "Numbers", "API", "Unverified"]
NAMES = hf_attn.list_mechanisms()


def test_the_table_in_the_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.BEGIN in text and tables.END in text, (
        f"README.md has no capability table: put the lines {tables.BEGIN} and {tables.END} where it belongs, then run "
        "python scripts/update_readme.py"
    )
    assert tables.rewrite(text) == text, "the capability table is stale: run python scripts/update_readme.py"


def page_of(name: str) -> str:
    path = PAGES / f"{name}.md"
    assert path.is_file(), f"{name} has no page: write {path.relative_to(ROOT)}"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_has_a_page_with_its_sections(name):
    # headings in code blocks are comments
    page = re.sub(r"^```.*?^```", "", page_of(name), flags=re.DOTALL | re.MULTILINE)
    assert page.startswith("# "), "a page begins with its title"
    assert re.findall(r"^## (.+?)\s*$", page, flags=re.MULTILINE) == SECTIONS
    for section in re.split(r"^## .+$", page, flags=re.MULTILINE):
        assert section.strip(), "a section says something"


@pytest.mark.parametrize("name", NAMES)
def test_a_page_lists_every_option(name):
    api = page_of(name).partition("\n## API")[2].partition("\n## ")[0]
    for option in tables.option_rows(hf_attn.get_mechanism(name).options_class):
        assert re.search(rf"^\|[^|]*`{option.name}`", api, flags=re.MULTILINE), (
            f"the API section leaves {option.name} out"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_the_attention_map(name):
    if hf_attn.get_mechanism(name).capabilities.attention_weights:
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert f"(../images/{name}.png)" in text, "python scripts/attention_pictures.py draws it"


@pytest.mark.parametrize("name", ["randomized", "lara", "eva", "rfa", "topological"])
def test_a_page_says_from_which_length_it_pays(name):
    numbers = page_of(name).partition("\n## Numbers")[2].partition("\n## ")[0]
    said = hf_attn.get_mechanism(name).capabilities.pays_from
    length = re.match(r"\d+", said)
    assert f"Faster than exact attention {f'from {length[0]} tokens' if length else 'at no length'}" in numbers


def test_there_are_no_pages_of_mechanisms_that_do_not_exist():
    assert {path.stem for path in PAGES.glob("*.md")} <= set(NAMES)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^>]+-->\s*)?```python\n(.*?)```", re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)} {number}")
    for page in DOCUMENTS
    for number, (skipped, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if not skipped
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<example>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_times_in_the_pages_are_those_of_the_bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import update_numbers

    found = update_numbers.ratios()
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert update_numbers.rewrite(path.stem, text, found) == text, "run scripts/update_numbers.py"
    other = dict.fromkeys(found, 9.99)
    assert "| bidirectional | 9.99 / 9.99 |" in update_numbers.rewrite("rfa", (PAGES / "rfa.md").read_text(), other)
