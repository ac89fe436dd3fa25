"""The kernels as a Hub kernel repository: what is written, and that it runs without hf_attn.

It is loaded by the package `kernels` where that is installed, else as that package would: the folder of the build as a
module of the name in its metadata.
"""

import importlib
import importlib.util
import json
import pkgutil
import re
import sys

import pytest
import torch

import hf_attn.kernels
from hf_attn.cli import app
from hf_attn.errors import InvalidInput
from hf_attn.hub import kernel_repo
from hf_attn.kernels import random_features

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not random_features.INTERPRETED, reason="kernels are compiled for a GPU here")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return kernel_repo.export_kernels(tmp_path_factory.mktemp("kernels"))


def installed():
    """Whether the package `kernels` is; the folder tests/kernels has its name, and no file."""
    spec = importlib.util.find_spec("kernels")
    return spec is not None and spec.origin is not None


def load(exported):
    if installed():
        return importlib.import_module("kernels").get_local_kernel(exported.folder)
    build = exported.folder / "build" / kernel_repo.VARIANT
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_exported(exported):
    ours = set()
    for module in pkgutil.iter_modules(hf_attn.kernels.__path__):
        contents = vars(importlib.import_module(f"hf_attn.kernels.{module.name}"))
        ours |= {name for name, x in contents.items() if isinstance(x, torch.library.CustomOpDef)}
    assert set(exported.functions) == {name for name in ours if not name.startswith("_")}


def test_the_layout_is_the_documented_one(exported):
    build = exported.folder / "build" / kernel_repo.VARIANT
    metadata = json.loads((build / "metadata.json").read_text())
    assert set(metadata) == {"id", "name", "version", "license", "python-depends", "backend"}
    assert metadata["id"].isidentifier() and metadata["id"] == exported.id
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
    assert isinstance(metadata["version"], int) and metadata["python-depends"] == []
    found = sorted(p.relative_to(exported.folder).as_posix() for p in exported.folder.rglob("*") if p.is_file())
    assert [path for path in found if "__pycache__" not in path] == exported.files
    for path in build.glob("*.py"):
        text = path.read_text()
        assert "import hf_attn" not in text and "from hf_attn" not in text and "hf_attn::" not in text
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE))
        assert imported <= {"__future__", "collections", "typing", "torch", "triton"}


def test_the_same_source_gives_the_same_bytes(exported, tmp_path):
    again = kernel_repo.export_kernels(tmp_path / "new")
    assert (again.id, again.files) == (exported.id, exported.files)
    for path in again.files:
        assert (again.folder / path).read_bytes() == (exported.folder / path).read_bytes()


@interpreted
def test_it_is_loaded_from_disk_beside_hf_attn_and_gives_the_same(exported):
    loaded = load(exported)
    assert sorted(loaded.__all__) == exported.functions
    from hf_attn.kernels.ring_window import ring_window_sums

    assert loaded.ring_window_sums is not ring_window_sums
    assert loaded.ring_window_sums._opoverload.namespace == exported.id
    found = []
    for sums in (loaded.ring_window_sums, ring_window_sums):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, 2, 20, n, generator=generator).requires_grad_() for n in (8, 8, 6, 2)]
        out, mass = sums(*inputs, 4, 5)
        found.append([out, mass, *torch.autograd.grad(out.square().sum() + mass.sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "weights").write_text("precious")
    with pytest.raises(InvalidInput, match="must be an empty or new folder"):
        kernel_repo.export_kernels(tmp_path)
    assert (tmp_path / "weights").read_text() == "precious"
    with pytest.raises(InvalidInput, match="must be an empty or new folder"):
        kernel_repo.export_kernels(tmp_path / "weights")


def test_a_source_that_needs_the_rest_of_hf_attn_is_refused():
    with pytest.raises(InvalidInput, match="uses 'hf_attn.functional'"):
        kernel_repo._relative("new", "from hf_attn.functional import log_positive\n", "x")


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["kernels", "export", str(tmp_path / "k"), "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["files"] == sorted(facts["files"]) and (tmp_path / "k" / "README.md").is_file()
    again = CliRunner().invoke(app, ["kernels", "export", str(tmp_path / "k")])
    assert again.exit_code == 1 and "must be an empty or new folder" in again.stderr
