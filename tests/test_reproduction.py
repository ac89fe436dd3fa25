"""docs/reproduction.md is what the committed results say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reproduce

    yield reproduce
    for name in ("reproduce", "headlines"):
        sys.modules.pop(name)


def test_the_page_is_that_of_the_results(reproduce):
    times = json.loads(reproduce.TIMES.read_text()) if reproduce.TIMES.exists() else {}
    assert reproduce.PAGE.read_text(encoding="utf-8") == reproduce.render(times)


def test_every_row_has_its_pages_and_its_command(reproduce):
    for name, headline in reproduce.HEADLINES.items():
        for path in (
            ROOT / "docs" / headline.page,
            reproduce.RESULTS / headline.results,
            ROOT / headline.command.split()[0],
        ):
            assert path.is_file(), f"{name}: {path}"


def test_a_row_that_fails_is_told(reproduce, monkeypatch):
    verdict = type(reproduce.HEADLINES["ripple"].judge())("ripple 0.1, linear 0.2", 1, 3)
    monkeypatch.setitem(reproduce.HEADLINES, "ripple", reproduce.Headline(*["x"] * 7, judge=lambda: verdict))
    (line,) = [line for line in reproduce.render({}).splitlines() if "`ripple`" in line]
    assert "**no**, 1 of 3" in line and "not noted" in line


def test_a_result_that_turns_over_turns_the_verdict(reproduce, tmp_path, monkeypatch):
    import headlines

    rows = (headlines.RESULTS / "context_pool.csv").read_text().splitlines()
    worse = [
        line.replace("context_pool, 2 layers", "x").replace("no pooling, 2 layers", "context_pool, 2 layers")
        for line in rows
    ]
    (tmp_path / "context_pool.csv").write_text("\n".join(w.replace('"x"', '"no pooling, 2 layers"') for w in worse))
    assert headlines.context_pool().held == 3
    monkeypatch.setattr(headlines, "RESULTS", tmp_path)
    assert headlines.context_pool().held == 0
