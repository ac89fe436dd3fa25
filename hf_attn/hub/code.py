"""The code a published checkpoint carries, so that it loads with `trust_remote_code=True` where hf_attn was not imported.

The shim imports the package, or says which package, version and command are missing. The vendored form is the package's
own source, flattened: only the modules that the checkpoint's family and mechanisms need (`hf_attn.hub.vendor`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ENTRY = "modeling_hf_attn"
FILES = (f"{ENTRY}.py", "hf_attn_*.py")
"""Names of the files that carry code."""
KINDS = ("shim", "vendored")

_SHIM = '''"""Loads this checkpoint through the package hf_attn {versions}. Written by `hf-attn publish`."""

_NEEDED = (
    "this checkpoint needs the Python package hf_attn, version {versions}. "
    'Install it with: pip install "hf_attn{versions}"'
)

try:
    import hf_attn
    from hf_attn.models.configuration import {config}
    from hf_attn.models.{home} import (
        {models},
    )
except ImportError as error:
    raise ImportError(f"{{_NEEDED}} ({{error}})") from error

from packaging.specifiers import SpecifierSet

if not SpecifierSet("{versions}").contains(hf_attn.__version__, prereleases=True):
    raise ImportError(f"{{_NEEDED}} (installed: {{hf_attn.__version__}})")

__all__ = ["{config}", "{names}"]
'''


def write_code(folder: Path, config: PreTrainedConfig, kind: str = "shim") -> list[str]:
    """Write the code beside config.json, and the `auto_map` that leads to it; the names of the new files."""
    if kind not in KINDS:
        raise InvalidInput(f"code={kind!r} must be one of {', '.join(KINDS)}.")
    import hf_attn
    from hf_attn.models.configuration import VERSION

    if kind == "vendored":
        from hf_attn.hub.vendor import vendored

        files = vendored(config)
    else:
        files = {f"{ENTRY}.py": shim(config)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored["auto_map"] = {auto: f"{ENTRY}.{name}" for auto, name in auto_map(config).items()}
    stored[VERSION] = hf_attn.__version__
    (folder / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(files)


def shim(config: PreTrainedConfig) -> str:
    """The text of the shim."""
    from hf_attn.models.configuration import STATIC

    names = list(dict.fromkeys(name for auto, name in auto_map(config).items() if auto != "AutoConfig"))
    return _SHIM.format(
        versions=versions(),
        config=type(config).__name__,
        home=STATIC.get(stock_config(config).model_type, "generated"),
        models=",\n        ".join(names),
        names='", "'.join(names),
    )


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Auto class -> class of the family, for every head transformers knows."""
    from hf_attn.models.family import auto_heads

    stock = stock_config(config)
    return {"AutoConfig": type(config).__name__} | {
        auto.__name__: f"Attn{head.__name__}" for auto, head in auto_heads(stock)
    }


def stock_config(config: Any) -> Any:
    """The config class of transformers behind one of ours."""
    return type(config).stock_class


def versions() -> str:
    """The versions of hf_attn that read a checkpoint of this one: up to the next minor release, or major from 1.0 on."""
    from packaging.version import Version

    import hf_attn

    now = Version(hf_attn.__version__)
    limit = f"0.{now.minor + 1}" if now.major == 0 else f"{now.major + 1}"
    return f">={now.base_version},<{limit}"
