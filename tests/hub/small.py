"""Sizes of a small model, and processes of their own to load it in."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

BERT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
GAU = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "query_key_dim": 8, "max_position_embeddings": 32, "image_size": 8, "patch_size": 2}  # fmt: skip


def own_models() -> dict:
    """The families with attention of their own, each in two forms."""
    import hf_attn

    block = {**GAU, "block": "transformer", "num_attention_heads": 2, "query_key_dim": 128}
    wide = hf_attn.AAResNetConfig.wide(10, 1, image_size=8, num_attention_heads=2, min_head_key_dim=2, upsilon=0.25)
    deep = hf_attn.AAResNetConfig(
        image_size=32, embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic",
        num_attention_heads=2, min_head_key_dim=2, attention_stages=(2, 3), upsilon=0.5,
    )  # fmt: skip
    return {
        "gau": hf_attn.GauForMaskedLM(hf_attn.GauConfig(**GAU, attention="quadratic")),
        "flash": hf_attn.GauForCausalLM(hf_attn.GauConfig(**GAU, chunk_size=4, is_decoder=True)),
        "mc_tfm": hf_attn.GauForMaskedLM(hf_attn.GauConfig(**block, chunk_size=4)),
        "gau_image": hf_attn.GauForImageClassification(hf_attn.GauConfig(**GAU, attention="quadratic", pooling="mean")),
        "aa_resnet": hf_attn.AAResNetForImageClassification(wide),
        "aa_basic": hf_attn.AAResNetForImageClassification(deep),
    }


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


def bare_python(folder: Path) -> Path:
    """Make a virtual environment with the packages of this one, linked, but without hf_attn; its interpreter."""
    venv.create(folder, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "hf_attn" not in entry.name:
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"
