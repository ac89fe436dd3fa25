"""The command line: one file a command, whose docstring is its help page; what is heavy is imported inside the function."""

import importlib

from hf_attn.cli.common import app

COMMANDS = (
    "list", "show", "train", "convert", "linearize", "fidelity", "publish", "doctor", "bench", "kernels", "nip", "invert",
    "spectrum", "version",
)  # fmt: skip
"""Modules of this package, in the order in which the help lists them."""

for _name in COMMANDS:
    importlib.import_module(f"hf_attn.cli.{_name}")

__all__ = ["COMMANDS", "app"]
