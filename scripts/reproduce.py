"""Rerun the papers' headlines at the scale of a minute, and write docs/reproduction.md.

python scripts/reproduce.py            write the page from the committed results
python scripts/reproduce.py NAME ...   run these experiments first (`all`: every one), and note how long they took

An experiment writes its own page and CSV file under docs/benchmarks; the verdicts are computed from these.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from headlines import HEADLINES, RESULTS, Headline
from rich.progress import Progress

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
TIMES = RESULTS / "reproduction_seconds.json"
HEAD = """# Reproduction

What each paper claims, the smallest run that could contradict it, and what came out. Nothing here repeats a paper's own
experiment: those take accelerators and days. A direction is what had to come out; it *holds* if it does in every seed. Rows that do
not hold stay. Where a set-up was changed after results were seen, the page of the results says so.

Where a paper's tables could not be read, its claim stands without figures. "Backed by" says what our form could be compared
with.
"""


def render(times: dict[str, float]) -> str:
    """The page."""
    lines = [
        HEAD,
        "| system | the paper's claim | backed by | direction | shown, mean of the seeds | holds | command | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    held = 0
    for name, headline in HEADLINES.items():
        verdict = headline.judge()
        whole = verdict.held == verdict.of
        held += whole
        lines.append(
            f"| [{headline.system}]({headline.page}) | {headline.claim} | {headline.backing} | {headline.direction} "
            f"| {verdict.shown} ([results](benchmarks/{headline.results})) | {'yes' if whole else '**no**'}, "
            f"{verdict.held} of {verdict.of} | `{name}`: `python {headline.command}` "
            f"| {round(times[name]) if name in times else 'not noted'} |"
        )
    lines += [
        "",
        f"{held} of {len(HEADLINES)} directions hold. `python scripts/reproduce.py NAME` runs a row again and rewrites this page; "
        "seconds are those of such a run on one CPU thread, with whatever else the machine did.",
        "",
    ]
    return "\n".join(lines)


def run(headline: Headline) -> float:
    """Seconds of the experiment."""
    if headline.resumes:
        (RESULTS / headline.resumes).unlink(missing_ok=True)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *headline.command.split()], cwd=ROOT, env=environment, check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or of {', '.join(HEADLINES)}")
    chosen = parser.parse_args().names
    chosen = list(HEADLINES) if chosen == ["all"] else chosen
    if unknown := [name for name in chosen if name not in HEADLINES]:
        parser.error(f"there is no headline {unknown[0]!r}; there are {', '.join(HEADLINES)}, and all")
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    with Progress(disable=not chosen) as progress:
        for name in progress.track(chosen):
            progress.print(f"{name}: python {HEADLINES[name].command}")
            times[name] = run(HEADLINES[name])
            TIMES.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(times), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
