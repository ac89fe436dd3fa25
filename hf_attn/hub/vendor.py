"""Self-contained checkpoints: the package's own source, flattened to what one family and its mechanisms need.

transformers copies the code of a checkpoint by following lines of the form `from .name import ...` in one flat folder, so
every module `hf_attn.a.b` becomes `hf_attn_a_b.py` and every import of one module by another becomes such a line. The
files are made from the installed source each time; nothing is kept by hand.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput
from hf_attn.hub.families import mechanism_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PACKAGE = "hf_attn"
_REGISTER = "hf_attn.mechanisms"
"""Imports every mechanism; a checkpoint's copy imports its own only."""
OPTIONAL = ("triton", "flash_attn", "flash_attn_interface")
"""Packages that transformers must not ask for before it loads the code."""


def vendored(config: PreTrainedConfig) -> dict[str, str]:
    """File name -> text of everything the checkpoint needs to run without hf_attn, beside torch and transformers.

    Raises:
        InvalidInput: the source uses an import that cannot be flattened.
    """
    from hf_attn.hub.code import ENTRY, models_of, versions
    from hf_attn.models.own import OWN

    models = models_of(config)
    homes = list(dict.fromkeys(model.__module__ for model in models))
    mechanisms = _mechanisms(config)
    modules = {_REGISTER: _register(mechanisms)}
    waiting = [*homes, type(config).__module__, *mechanisms]
    if config.model_type not in OWN:
        waiting.append("hf_attn.models.family")
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules[name], needed = flatten(name)
            waiting += sorted(needed)
    own = config.model_type in OWN
    entry = _entry(config, models, _own_classes(config, models) if own else _attn_classes(config, models), versions())
    return {f"{flat(name)}.py": text for name, text in sorted(modules.items())} | {f"{ENTRY}.py": entry}


def flat(module: str) -> str:
    """`hf_attn.models.spec` -> `hf_attn_models_spec`."""
    return module.replace(".", "_")


def flatten(module: str) -> tuple[str, set[str]]:
    """The source of a module with flat imports, and the modules of the package it imports."""
    path = _source(module)
    text = path.read_text(encoding="utf-8")
    needed: set[str] = set()
    lazy: set[str] = set()
    edits: list[tuple[int, int, str]] = []
    tree = ast.parse(text)
    lines = _starts(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == PACKAGE):
            edits.append(_span(lines, node, _import(module, node, needed)))
        elif isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
            if PACKAGE in roots:
                raise InvalidInput(
                    f"{module}, line {node.lineno}: `import {PACKAGE}` cannot be made part of a checkpoint."
                )
            if roots & set(OPTIONAL):
                indent = "\n" + " " * node.col_offset
                guarded = f"try:{indent}    {ast.unparse(node)}{indent}except ImportError:{indent}    raise"
                edits.append(_span(lines, node, guarded))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_part(node.value):
            # a module named in a string is imported later, by that name
            lazy.add(node.value)
            edits.append(_span(lines, node, f'f"{{__package__}}.{flat(node.value)}"'))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if lazy - {_REGISTER}:
        # transformers follows these lines when it copies the files; they run where the module is used
        text += "\n\ndef _copied_with_this_file() -> None:\n"
        text += "".join(
            f"    from .{flat(name)} import __name__  # noqa: F401\n" for name in sorted(lazy - {_REGISTER})
        )
    return text, needed | (lazy - {_REGISTER})


def _import(module: str, node: ast.ImportFrom, needed: set[str]) -> str:
    """The flat form of `from hf_attn.a import b, c as d`, where b may be a module."""
    if node.level:
        raise InvalidInput(f"{module}, line {node.lineno}: a relative import cannot be made part of a checkpoint.")
    origin = node.module or ""
    parts = []
    plain = [alias for alias in node.names if not _is_module(f"{origin}.{alias.name}")]
    if plain:
        if origin == PACKAGE:
            raise InvalidInput(
                f"{module}, line {node.lineno}: import from the module that defines it, not from {PACKAGE}."
            )
        needed.add(origin)
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in plain)
        parts.append(f"from .{flat(origin)} import {names}")
    for alias in node.names:
        if alias not in plain:
            inner = f"{origin}.{alias.name}"
            needed.add(inner)
            # the first line is the one transformers follows, the second binds the module
            parts += [
                f"from .{flat(inner)} import __name__ as _",
                f"from . import {flat(inner)} as {alias.asname or alias.name}",
            ]
    return ("\n" + " " * node.col_offset).join(parts)


def _mechanisms(config: PreTrainedConfig) -> list[str]:
    """Modules of the mechanisms that the models ask the registry for."""
    from hf_attn.registry import get_mechanism

    found = list(dict.fromkeys(get_mechanism(name).module_class.__module__ for name in mechanism_names(config)))
    for name in found:
        if not _is_module(name):
            raise InvalidInput(
                f"the mechanism defined in {name} is not part of {PACKAGE}, so its code cannot be exported."
            )
    return found


def _register(mechanisms: list[str]) -> str:
    lines = [f"from .{flat(name)} import __name__ as _  # noqa: F401" for name in mechanisms]
    return "\n".join(['"""Registers the mechanisms of this checkpoint."""', "", *lines, ""])


def _attn_classes(config: PreTrainedConfig, models: list[type]) -> str:
    """Lines that make the classes of an attn family: the copied code derives them from those of transformers."""
    stock: Any = type(config).stock_class  # type: ignore[attr-defined]
    (home,) = {model.__module__ for model in models}
    lines = [
        f"from {stock.__module__.rpartition('.')[0]} import {stock.__name__}",
        "",
        "from .hf_attn_models_configuration import attn_config_class",
        "from .hf_attn_models_family import register_models",
        f"from .{flat(home)} import __name__ as _home  # noqa: F401",
        f"from . import {flat(home)} as home",
        "",
        f"{type(config).__name__} = attn_config_class({stock.__name__})",
        *(f'{model.__name__} = getattr(home, "{model.__name__}")' for model in models),
        f"register_models({type(config).__name__})",
    ]
    return "\n".join(lines)


def _own_classes(config: PreTrainedConfig, models: list[type]) -> str:
    """Lines that import the classes of a family of this package's own."""
    return "\n".join(f"from .{flat(kind.__module__)} import {kind.__name__}" for kind in [type(config), *models])


def _entry(config: PreTrainedConfig, models: list[type], classes: str, versions: str) -> str:
    """The file that `auto_map` names; config and models share it, so that both find the same classes."""
    names = [type(config).__name__, *(model.__name__ for model in models)]
    every = "\n".join(f'    "{name}",' for name in names)
    return f'''"""This checkpoint's model, without the package {PACKAGE}. Generated from it ({versions}) by `hf-attn publish --vendored`."""

from .{flat(_REGISTER)} import __name__ as _registered  # noqa: F401
{classes}

# saving copies the file that a class says it comes from, and what that imports
for _class in ({", ".join(names)}):
    _class.__module__ = __name__

__all__ = [
{every}
]
'''


def _is_part(name: str) -> bool:
    """Whether a module belongs into a checkpoint; what works on checkpoints does not."""
    return _is_module(name) and not name.startswith(f"{PACKAGE}.hub")


def _is_module(name: str) -> bool:
    if not name.startswith(f"{PACKAGE}.") or not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InvalidInput(f"the source of {module} is not on this machine, so it cannot be exported.")
    return Path(spec.origin)


def _starts(text: str) -> list[tuple[int, str]]:
    """Offset and content of every line."""
    found, offset = [], 0
    for line in text.splitlines(keepends=True):
        found.append((offset, line))
        offset += len(line)
    return found


def _span(lines: list[tuple[int, str]], node: Any, new: str) -> tuple[int, int, str]:
    """Where a node stands in the text, and what replaces it; ast counts columns in bytes."""

    def place(row: int, column: int) -> int:
        offset, line = lines[row - 1]
        return offset + len(line.encode()[:column].decode())

    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset), new
