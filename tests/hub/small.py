"""Sizes of a small model, and processes of their own to load it in."""

import os
import subprocess
import sys
from pathlib import Path

BERT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_attn":
            raise ModuleNotFoundError("No module named 'hf_attn'", name="hf_attn")
sys.meta_path.insert(0, Absent())
"""
"""Put before a program, it makes hf_attn impossible to import."""


def process(code: str, *arguments, home: Path, **environment) -> subprocess.CompletedProcess:
    """Python in a process of its own, in an empty folder, with an empty cache of remote code."""
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)
