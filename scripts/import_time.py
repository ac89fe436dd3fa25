"""How much `import hf_attn` adds to `import transformers`: fresh processes, taken in turns, medians.

python scripts/import_time.py [--runs 15]
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {
    "import transformers": "import transformers",
    "import hf_attn, transformers": "import hf_attn, transformers",
    "transformers.BertModel": "import transformers; transformers.BertModel",
    "transformers.BertModel after import hf_attn": "import hf_attn, transformers; transformers.BertModel",
}
CLOCK = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    # the first round warms the file cache and does not count
    for turn in range(runs + 1):
        for name, statement in STATEMENTS.items():
            done = subprocess.run(
                [sys.executable, "-c", CLOCK.format(statement)], capture_output=True, text=True, check=True
            )
            if turn:
                seconds[name].append(float(done.stdout))
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:<46}{middle:7.3f} s   (quartiles {low:.3f} to {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
