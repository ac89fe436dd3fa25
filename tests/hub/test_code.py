"""The three ways a published checkpoint loads: with hf_attn, through the shim, and through its own copy of the code.

Where hf_attn must be absent, a fresh process refuses to import it (a finder in front of `sys.meta_path`), so neither an
installed package nor this repository can help.
"""

import json
import os
import re
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import ABSENT, BERT, VIT, bare_python, own_models, process

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.hub import vendor
from hf_attn.hub.code import shim, versions, write_code
from hf_attn.hub.pack import pack
from hf_attn.hub.probe import answer, probe_inputs

ROOT = Path(__file__).parents[2]
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file
transformers.utils.logging.disable_progress_bar()
for folder, auto in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    if len(sys.argv) > 2:
        model.save_pretrained(sys.argv[2] + "/" + folder.rpartition("/")[2])
    stored = load_file(folder + "/../" + folder.rpartition("/")[2] + ".probe")
    expected = stored.pop("output")
    with torch.no_grad():
        torch.manual_seed(20)
        found = model(**stored)[0].float()
    print(json.dumps([type(model).__module__, type(model).__name__, (found - expected).abs().max().item(),
                      "hf_attn" in sys.modules, type(model.config) is type(model).config_class]))
"""


def saved(model, folder: Path, code: str) -> tuple[str, str]:
    """A packed folder with its code, and beside it what the model answers."""
    model = model.eval()
    model.save_pretrained(folder.with_name(f"{folder.name}-saved"))
    pack(folder.with_name(f"{folder.name}-saved"), folder, code=code, write_card=True)
    inputs = probe_inputs(model)
    save_file({**inputs, "output": answer(model, inputs).contiguous()}, f"{folder}.probe")
    auto = "AutoModelForImageClassification" if "pixel_values" in inputs else "AutoModelForMaskedLM"
    return str(folder), "AutoModelForCausalLM" if "Causal" in type(model).__name__ or "LMHead" in type(
        model
    ).__name__ else auto


GPT2 = {
    "vocab_size": 60,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip


def model_with(name: str):
    """The smallest model that a mechanism fits."""
    record = hf_attn.get_mechanism(name)
    if record.capabilities.sequence:
        config = hf_attn.AttnBertConfig(**BERT, attn_implementation=name, attention_options=record.example)
        return hf_attn.AttnBertForMaskedLM(config)
    config = hf_attn.AttnViTConfig(**VIT, attn_implementation=name)
    return hf_attn.AttnViTForImageClassification(config)


def other_models() -> dict[str, torch.nn.Module]:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return {
        "gpt2": hf_attn.AttnGPT2LMHeadModel(hf_attn.AttnGPT2Config(**GPT2, attn_implementation="rfa")),
        "llama": hf_attn.convert(llama, {"default": "softmax", "1": {"name": "hypercube", "block_size": 4}}),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every mechanism, two more families, and those with attention of their own, as self-contained folders."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("vendored")
    models = {name: model_with(name) for name in hf_attn.list_mechanisms()} | other_models() | own_models()
    return root, [saved(model, root / name, "vendored") for name, model in models.items()]


def test_vendored_checkpoints_run_without_the_package_and_compute_the_same(exported):
    root, folders = exported
    done = process(ABSENT + LOAD, json.dumps(folders), root / "again", home=root / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(folders)
    for (folder, _), (module, name, difference, present, same) in zip(folders, rows):
        architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
        assert module.startswith("transformers_modules.") and name == architecture, folder
        assert not present and same, folder
        # weights read from a file lie at odd addresses, which changes the rounding of a matrix product
        assert difference < 1e-5, folder

    # what such a process saves is self-contained again
    again = [(str(root / "again" / Path(folder).name), auto) for folder, auto in folders]
    for folder, _ in again:
        (Path(folder).parent / f"{Path(folder).name}.probe").write_bytes(
            (root / f"{Path(folder).name}.probe").read_bytes()
        )
    done = process(ABSENT + LOAD, json.dumps(again), home=root / "home-again")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(json.loads(line)[2] < 1e-5 for line in done.stdout.splitlines())


def test_vendored_checkpoints_run_in_an_environment_without_the_package(exported, tmp_path):
    root, folders = exported
    python = bare_python(tmp_path / "venv")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([python, "-c", *words], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)  # fmt: skip

    absent = run("import hf_attn")
    assert absent.returncode == 1 and "No module named 'hf_attn'" in absent.stderr
    some = [entry for entry in folders if Path(entry[0]).name in ("hypercube", "gau", "aa_resnet")]
    done = run(LOAD, json.dumps(some))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3
    for _, _, difference, present, same in rows:
        assert difference < 1e-5 and not present and same


def test_vendored_code_is_flat_and_holds_only_what_is_used(exported):
    root, folders = exported
    for folder, _ in folders:
        files = {path.name: path.read_text() for path in Path(folder).glob("*.py")}
        for name, text in files.items():
            compile(text, name, "exec")
            assert not re.search(r"^\s*(from|import) (hf_attn|\.\.)", text, re.MULTILINE), name
        others = {
            f"hf_attn_mechanisms_{path.stem}.py" for path in (ROOT / "hf_attn/mechanisms").glob("*.py")
        } - files.keys()
        assert len(others) > 8 and not [name for name in files if "recipes" in name or "hub" in name or "cli" in name]
    assert {path.name for path in (root / "rfa").glob("*.py")} >= {"modeling_hf_attn.py", "hf_attn_mechanisms_rfa.py"}
    assert not (root / "rfa" / "hf_attn_mechanisms_lara.py").exists()
    # no family but its own
    assert {path.name for path in (root / "rfa").glob("hf_attn_models_*.py")} == {
        f"hf_attn_models_{name}.py"
        for name in ("bert", "cache", "configuration", "family", "limits", "saving", "spec", "wrapping")
    }


def test_with_the_package_no_trust_is_needed_and_the_package_wins(exported):
    _, folders = exported
    for folder, auto in folders:
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        assert type(model).__module__.startswith("hf_attn.models.")
        stored = load_file(f"{folder}.probe")
        expected = stored.pop("output")
        torch.testing.assert_close(answer(model, stored), expected, rtol=0, atol=0)


def test_what_cannot_be_flattened_is_refused(tmp_path, monkeypatch):
    for text, message in (
        ("import hf_attn\n", "cannot be made part"),
        ("from . import x\n", "relative import"),
        ("from hf_attn import build\n", "module that defines it"),
    ):
        (tmp_path / "source.py").write_text(text)
        monkeypatch.setattr(vendor, "_source", lambda _: tmp_path / "source.py")
        with pytest.raises(InvalidInput, match=message):
            vendor.flatten("hf_attn.models.spec")


def test_optional_packages_are_not_asked_for_and_lazy_modules_come_along(tmp_path, monkeypatch):
    (tmp_path / "source.py").write_text(
        'import importlib\nimport triton\n\n\ndef run():\n    return importlib.import_module("hf_attn.kernels.bands")\n'
    )
    monkeypatch.setattr(vendor, "_source", lambda _: tmp_path / "source.py")
    text, needed = vendor.flatten("hf_attn.kernels.flash")
    assert "try:\n    import triton\nexcept ImportError:" in text
    assert needed == {"hf_attn.kernels.bands"} and "from .hf_attn_kernels_bands import" in text
    (tmp_path / "flat.py").write_text(text)
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    assert get_imports(tmp_path / "flat.py") == ["importlib"]
    assert get_relative_imports(tmp_path / "flat.py") == ["hf_attn_kernels_bands"]


@pytest.fixture
def shimmed(model, tmp_path):
    return saved(model, tmp_path / "shimmed", "shim")


def test_the_shim_names_package_version_and_command(shimmed, tmp_path):
    done = process(ABSENT + LOAD, json.dumps([shimmed]), home=tmp_path / "home")
    assert done.returncode == 1
    assert (
        f'pip install "hf_attn{versions()}"' in done.stderr
        and "this checkpoint needs the Python package" in done.stderr
    )


def test_without_trust_and_without_the_package_transformers_asks_for_trust(shimmed, tmp_path):
    code = ABSENT + LOAD.replace(", trust_remote_code=True", "")
    done = process(code, json.dumps([shimmed]), home=tmp_path / "home")
    assert done.returncode == 1 and "trust_remote_code=True" in done.stderr


def test_the_shim_imports_the_package_where_nobody_did(shimmed, tmp_path):
    done = process(LOAD, json.dumps([shimmed]), home=tmp_path / "home", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    module, name, difference, present, same = json.loads(done.stdout)
    assert (module, name, present, same) == ("hf_attn.models.bert", "AttnBertForMaskedLM", True, True)
    assert difference < 1e-5


def test_the_shim_refuses_a_version_that_is_too_old(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_attn, "__version__", "0.7.1")
    assert versions() == ">=0.7.1,<0.8"
    text = shim(model.config)
    monkeypatch.setattr(hf_attn, "__version__", "0.6.0")
    with pytest.raises(ImportError, match=r"version >=0\.7\.1,<0\.8.*installed: 0\.6\.0"):
        exec(compile(text, "shim", "exec"), {})
    monkeypatch.setattr(hf_attn, "__version__", "1.4.0")
    assert versions() == ">=1.4.0,<2"


def test_unknown_kinds_of_code_are_refused(model, tmp_path):
    with pytest.raises(InvalidInput, match="must be one of shim, vendored"):
        write_code(tmp_path, model.config, "none")


def test_a_checkpoint_of_a_newer_package_is_loaded_with_a_warning(shimmed, tmp_path, monkeypatch):
    folder, auto = shimmed
    stored = json.loads((Path(folder) / "config.json").read_text())
    assert stored["hf_attn_version"] == hf_attn.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(transformers, auto).from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert not {"hf_attn_version", "auto_map"} & json.loads((tmp_path / "again" / "config.json").read_text()).keys()
    monkeypatch.setattr(hf_attn, "__version__", "0.0.9")
    with pytest.warns(UserWarning, match=r"published with hf_attn 0\.1\.0, and 0\.0\.9 is installed"):
        getattr(transformers, auto).from_pretrained(folder)
    (Path(folder) / "config.json").write_text(json.dumps({**stored, "hf_attn_version": [1]}))
    with pytest.raises(InvalidOption, match="not a version"):
        getattr(transformers, auto).from_pretrained(folder)
