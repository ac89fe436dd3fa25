"""Our Triton kernels as a Hub kernel repository, which the package `kernels` loads without hf_attn.

    DIR/README.md                          the card
    DIR/build/torch-universal/__init__.py  one function for every kernel
    DIR/build/torch-universal/metadata.json, tiles.py, block_sparse.py, ...

There is one build, of Python files that Triton compiles where they run. It is made from the installed source, which is
changed in two ways: imports become relative, and the operators are registered under an id made from the files, so that
several versions can be loaded side by side. Nothing is imported here, and the same source gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from hf_attn.errors import InvalidInput

NAME = "hf-attn-kernels"
VARIANT = "torch-universal"
VERSION = 1
"""Of the interface of the functions; the branch v1 of a repository on the Hub."""
_SOURCE = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the repository.
        id: the module name and operator namespace of this build.
        functions: the kernels, by name.
        files: paths inside the folder.
    """

    folder: Path
    id: str
    functions: list[str]
    files: list[str]


def export_kernels(folder: str | Path) -> Exported:
    """Write the kernel repository.

    Args:
        folder: where it goes; empty or not there yet.

    Raises:
        InvalidInput: the folder holds something, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"kernels export: {folder} must be an empty or new folder. Choose another, or empty it.")
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_SOURCE.glob("*.py"))}
    sources = {name: text for name, text in sources.items() if "import triton\n" in text}
    operators = {name: found for name, text in sources.items() if (found := _operators(text))}
    build = hashlib.sha256("\0".join(part for item in sources.items() for part in item).encode()).hexdigest()[:8]
    identity = f"{NAME.replace('-', '_')}_{build}"
    functions = sorted(function for found in operators.values() for function in found)
    metadata = {
        "id": identity, "name": NAME, "version": VERSION, "license": "apache-2.0", "python-depends": [],
        "backend": {"type": "cuda"},
    }  # fmt: skip
    files = {f"{name}.py": _relative(name, text, identity) for name, text in sources.items()}
    files["__init__.py"] = _entry(operators, functions)
    files["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    files = {f"build/{VARIANT}/{name}": text for name, text in files.items()}
    files["README.md"] = _card(functions)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return Exported(folder, identity, functions, sorted(files))


def _operators(text: str) -> list[str]:
    """Names of the operators that a source defines, without those of the backward passes."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            calls = (d for d in node.decorator_list if isinstance(d, ast.Call))
            if any(ast.unparse(call.func) == "torch.library.custom_op" for call in calls):
                found.append(node.name)
    return found


def _relative(name: str, text: str, identity: str) -> str:
    """The source with relative imports and its operators under `identity`."""
    text = re.sub(r"^from hf_attn\.kernels import ", "from . import ", text, flags=re.MULTILINE)
    text = re.sub(r"^from hf_attn\.kernels\.", "from .", text, flags=re.MULTILINE)
    text = text.replace('custom_op("hf_attn::', f'custom_op("{identity}::')
    if (rest := re.search(r"hf_attn[.:]\S*|import hf_attn", text)) is not None:
        raise InvalidInput(
            f"kernels export: hf_attn.kernels.{name} uses {rest[0]!r}, which a repository does not have."
        )
    return text


def _entry(operators: dict[str, list[str]], functions: list[str]) -> str:
    """`__init__.py`."""
    imports = "".join(f"from .{name} import {', '.join(found)}\n" for name, found in sorted(operators.items()))
    names = "".join(f'    "{name}",\n' for name in functions)
    return f'"""Triton kernels of hf_attn: attention mechanisms, forward and backward."""\n\n{imports}\n__all__ = [\n{names}]\n'


def _card(functions: list[str]) -> str:
    listed = "".join(f"- `{name}`\n" for name in functions)
    return f"""---
license: apache-2.0
library_name: kernels
tags:
- kernel
---

# {NAME}

Triton kernels of published attention mechanisms, forward and backward, from the library hf_attn. Arguments and shapes are
in the docstring of each function. They are operators of `torch.library`: `torch.compile` and autograd work through them.
They need torch and Triton, and a GPU that Triton compiles for.

{listed}
```python
from pathlib import Path

from kernels import get_kernel, get_local_kernel

kernels = get_local_kernel(Path("path/to/this/folder"))
# from the Hub: get_kernel("OWNER/NAME", version={VERSION}, trust_remote_code=["OWNER/NAME"])
```

They agree with their definitions in Triton's interpreter, in float32 and float16.
"""
