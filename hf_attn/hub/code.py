"""The code a published checkpoint carries, so that it loads with `trust_remote_code=True` where hf_attn was not imported.

The shim imports the package, or says which package, version and command are missing. The vendored form is the package's
own source, flattened: only the modules that the checkpoint's family and mechanisms need (`hf_attn.hub.vendor`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

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
{imports}
except ImportError as error:
    raise ImportError(f"{{_NEEDED}} ({{error}})") from error

from packaging.specifiers import SpecifierSet

if not SpecifierSet("{versions}").contains(hf_attn.__version__, prereleases=True):
    raise ImportError(f"{{_NEEDED}} (installed: {{hf_attn.__version__}})")

__all__ = ["{names}"]
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
    classes = [type(config), *models_of(config)]
    homes = dict.fromkeys(kind.__module__ for kind in classes)
    lines = []
    for home in homes:
        names = "".join(f"        {kind.__name__},\n" for kind in classes if kind.__module__ == home)
        lines.append(f"    from {home} import (\n{names}    )")
    names = '", "'.join(kind.__name__ for kind in classes)
    return _SHIM.format(versions=versions(), imports="\n".join(lines), names=names)


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Auto class -> name of the class, of the config and of every head that transformers knows."""
    from hf_attn.models.loading import model_classes

    models = {auto: model.__name__ for auto, model in model_classes(config).items()}
    return {"AutoConfig": type(config).__name__, **models}


def models_of(config: PreTrainedConfig) -> list[type]:
    """The model classes of the family, each once."""
    from hf_attn.models.loading import model_classes

    return list(dict.fromkeys(model_classes(config).values()))


def versions() -> str:
    """The versions of hf_attn that read a checkpoint of this one: up to the next minor release, or major from 1.0 on."""
    from packaging.version import Version

    import hf_attn

    now = Version(hf_attn.__version__)
    limit = f"0.{now.minor + 1}" if now.major == 0 else f"{now.major + 1}"
    return f">={now.base_version},<{limit}"
