"""Benchmark attention mechanisms, alone or in whole models. Nothing is timed that was not verified.

python scripts/bench.py [NAME[:key=value,...] ...] [--lengths 1024 2048] [--model bert] [--output FOLDER]
"""

import argparse
import sys

from hf_attn import bench
from hf_attn.errors import HfAttnError


def arguments() -> argparse.Namespace:
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", help="mechanisms or other packages; all of them by default")
    add("--lengths", nargs="+", type=int, help="tokens; 512 1024 2048 4096, or 128 for a model; pixels for resnet, 224")
    add("--model", help="whole models: bert, gpt2, vit, resnet, a folder or a Hub id")
    add("--layers", type=int, default=4, help="layers of a model built from sizes")
    add("--batch", type=int, help="1, or 4 for a model")
    add("--heads", type=int, help="4, or 12 for a model")
    add("--head-dim", type=int, help="64")
    add("--dtype", default="float32", help="float64, float32, bfloat16 or float16")
    add("--device", default="cpu", help="cpu or cuda")
    add("--causal", action=flag, help="one mode only; every mode that is defined by default")
    add("--backward", action=flag, default=True, help="also forward and backward together")
    add("--memory", action=flag, default=True, help="also peak memory")
    add("--repeats", type=int, default=5, help="pairs of runs in a cell, at least")
    add("--min-seconds", type=float, default=0.2, help="seconds measured in a cell, at least")
    add("--budget", type=float, default=15.0, help="seconds a cell may take")
    add("--total", type=float, default=540.0, help="seconds for everything; 0: no limit")
    add("--seed", type=int, default=0, help="seed of inputs and parameters")
    add("--output", help="folder for CSV, Markdown and PNG")
    return parser.parse_args()


def main() -> int:
    values = vars(arguments())
    try:
        bench.run(values.pop("names") or None, total=values.pop("total") or None, **values)
    except HfAttnError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
