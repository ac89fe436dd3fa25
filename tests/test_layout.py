"""The house: data flows one way, imports stay cheap, files stay short, errors are typed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_attn"
FILES = sorted(PACKAGE.rglob("*.py"))
BELOW = {
    "kernels": ("errors", "masks", "kernels", "functional"),
    "mechanisms": (
        "errors",
        "masks",
        "kernels",
        "functional",
        "functional_masks",
        "options",
        "capabilities",
        "module",
        "registry",
        "mechanisms",
    ),
    "models": (
        "errors",
        "masks",
        "kernels",
        "functional",
        "functional_masks",
        "options",
        "capabilities",
        "module",
        "registry",
        "mechanisms",
        "models",
    ),
}
"""Part of the package -> the parts it may import at module level or below."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "hf_attn" else {f"hf_attn.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("hf_attn")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_short_documented_and_asserts_nothing(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file says what it holds"
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], "users meet typed errors, not asserts"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "no bare except"
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass) and _broad(node.type)), (
                "errors are not swallowed"
            )


def _broad(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("Exception", "BaseException")


@pytest.mark.parametrize("part", BELOW)
def test_nothing_imports_upwards(part):
    for path in (PACKAGE / part).rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[1] in BELOW[part], f"{path.name} imports {name}"


def test_modules_import_without_circles():
    """Each module is importable as the first one."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code, *names], check=True)
    for name in ("hf_attn.mechanisms.ripple", "hf_attn.registry", "hf_attn.models.wrapping", "hf_attn.models.vit"):
        subprocess.run([sys.executable, "-c", f"import {name}"], check=True)


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, hf_attn; print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["import hf_attn, transformers", "import transformers, hf_attn"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"{first}\nfrom transformers.modeling_utils import AttentionInterface\nfrom transformers import AutoConfig\n"
    code += "print('rfa' in AttentionInterface(), type(AutoConfig.for_model('attn_bert')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "True AttnBertConfig"
