"""Put the measured times into the pages of the mechanisms: the rows of their tables, from the CSV files of `make bench`.

python scripts/update_numbers.py

A row is "forward / forward + backward", each the median over exact attention. Text around a table is left as it is.
"""

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES = [ROOT / "docs" / "benchmarks" / folder / "bench_attention.csv" for folder in ("cpu", "cpu_short")]
BENCHED = {"generalized, 0010": "generalized:beta=0010", "generalized, 1111": "generalized"}
"""Page and variant of a row -> what `make bench` calls it; elsewhere the only entry of the page's mechanism."""
OTHERS = ("topological",)
"""Pages whose rows show a mask for each order, which one entry of the bench does not give."""


def ratios() -> dict[tuple[str, str, str, int], float]:
    """(attention, mode, pass, length) -> ratio."""
    found = {}
    for path in TABLES:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for row in csv.DictReader(lines):
            if row["ratio"]:
                found[row["attention"], row["mode"], row["pass"], int(row["length"])] = float(row["ratio"])
    return found


def rewrite(page: str, text: str, found: dict[tuple[str, str, str, int], float]) -> str:
    """`text` of a page with the rows of its first table of times as they were measured."""
    names = {key[0] for key in found}
    header = re.search(r"^\| \|((?: N = \d+ \|)+)$", text, re.MULTILINE)
    if header is None or page in OTHERS:
        return text
    lengths = [int(n) for n in re.findall(r"\d+", header.group(1))]

    def row(match: re.Match[str]) -> str:
        mode, variant = match.group(1), match.group(3)
        entry = BENCHED.get(f"{page}, {variant}") or next(n for n in sorted(names) if n.partition(":")[0] == page)
        cells = [
            " / ".join(f"{found[entry, mode, p, n]:.2f}" for p in ("forward", "forward+backward")) for n in lengths
        ]
        return f"| {mode}{match.group(2) or ''} | {' | '.join(cells)} |"

    start = header.end()
    end = text.find("\n\n", start)
    rows = re.sub(r"^\| (bidirectional|causal)(, `(\d+)`)? \|.*\|$", row, text[start:end], flags=re.MULTILINE)
    return text[:start] + rows + text[end:]


def main() -> int:
    found = ratios()
    for path in sorted((ROOT / "docs" / "mechanisms").glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = rewrite(path.stem, old, found)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
