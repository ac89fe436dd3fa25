"""Limits of what a stored config may ask for, checked before anything is built from it.

A checkpoint is a stranger's file: a size of a billion, a list where a number belongs, or an option that takes gigabytes
must be an error with a name, and not a machine out of memory. The limits lie far above any published model.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidOption

if TYPE_CHECKING:
    from torch import nn

SIZES = {
    "hidden_size": 1 << 16, "n_embd": 1 << 16, "dim": 1 << 16, "embedding_size": 1 << 16, "intermediate_size": 1 << 20,
    "n_inner": 1 << 20, "hidden_dim": 1 << 20, "num_hidden_layers": 1 << 10, "n_layer": 1 << 10, "n_layers": 1 << 10,
    "num_attention_heads": 1 << 12, "n_head": 1 << 12, "n_heads": 1 << 12, "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 24, "n_positions": 1 << 24,
    "type_vocab_size": 1 << 16, "num_channels": 1 << 12, "image_size": 1 << 15, "patch_size": 1 << 12,
    "num_labels": 1 << 20, "encoder_stride": 1 << 12, "hidden_sizes": 1 << 16, "depths": 1 << 10, "expansion": 1 << 8,
    "query_key_dim": 1 << 14, "chunk_size": 1 << 20, "min_head_key_dim": 1 << 14,
}  # fmt: skip
"""Field of a config -> the largest value it may have."""
PARAMETERS = 10**12
OPTION = 1 << 24
MEMORY = 4 << 30
"""Bytes that all mechanisms of a model may take, or four times the model itself where that is more."""
_LISTS = ("image_size", "patch_size", "hidden_sizes", "depths")
"""Fields that may be a list of sizes."""
_DEPTH, _ENTRIES, _TEXT = 12, 1_000_000, 1 << 20


def check_stored(stored: Any) -> None:
    """Raise `InvalidOption` for a stored config that no model of this package can have."""
    if not isinstance(stored, dict):
        raise InvalidOption(f"a config must be a JSON object; got a {type(stored).__name__}.")
    _check_shape(stored, "config", _DEPTH, [0])
    for name, most in SIZES.items():
        if stored.get(name) is not None:
            _check_size(name, stored[name], most)
    count = parameters(stored)
    if count > PARAMETERS:
        raise InvalidOption(f"config: its sizes make about {count:.1e} parameters, more than {PARAMETERS:.0e}.")
    if stored.get("attention") is not None:
        check_attention(stored["attention"])


def parameters(stored: dict[str, Any]) -> float:
    """About how many parameters the sizes of a config make."""

    def size(*names: str, default: float = 0) -> float:
        found = [stored[name] for name in names if isinstance(stored.get(name), int)]
        return float(found[0]) if found else default

    hidden = size("hidden_size", "n_embd", "dim")
    inner = size("intermediate_size", "n_inner", "hidden_dim", default=size("expansion", default=4) * hidden)
    layers = size("num_hidden_layers", "n_layer", "n_layers")
    rows = size("vocab_size") + size("max_position_embeddings", "n_positions") + size("num_labels")
    lists = [value if isinstance(value := stored.get(name), list) else [] for name in ("hidden_sizes", "depths")]
    stages = sum(2.0 * depth * width * width for width, depth in zip(*lists))
    return rows * hidden + layers * (4 * hidden * hidden + 2 * hidden * inner) + stages


def check_attention(attention: Any) -> None:
    """The stored choice of mechanisms: a dict of short dicts with numbers of a sane size."""
    if not isinstance(attention, (dict, str)):
        raise InvalidOption(f"attention must be a mechanism's name or a dict; got a {type(attention).__name__}.")
    if isinstance(attention, str):
        return
    if len(attention) > SIZES["num_hidden_layers"]:
        raise InvalidOption(f"attention has {len(attention)} entries, more than a model has layers.")
    for key, entry in attention.items():
        if not isinstance(key, str) or len(key) > 4096 or re.search(r"\d{7}", key):
            raise InvalidOption(f"attention has a key that is no layer range: {str(key)[:40]!r}.")
        for name, value in entry.items() if isinstance(entry, dict) else [(key, entry)]:
            _check_option(f"attention[{key!r}], {str(name)[:40]}", value)


def check_memory(modules: list[nn.Module], model: nn.Module, what: str) -> None:
    """Raise `InvalidOption` where the mechanisms, built without memory, would take more than `MEMORY`."""
    wanted = sum(_bytes(module) for module in modules)
    allowed = max(MEMORY, 4 * _bytes(model))
    if wanted > allowed:
        raise InvalidOption(
            f"attention: the mechanisms of {what} would take {wanted / 2**30:.1f} GiB, more than {allowed / 2**30:.1f} GiB "
            "and the model itself. Choose smaller options."
        )


def _bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def _check_size(name: str, value: Any, most: int) -> None:
    values = value if isinstance(value, (list, tuple)) and name in _LISTS else [value]
    if len(values) > 64:
        raise InvalidOption(f"config: {name} is a list of {len(values)} sizes, more than any model has.")
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= most:
            raise InvalidOption(f"config: {name}={str(value)[:60]} must be an integer from 0 to {most}.")


def _check_option(where: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > 4096:
            raise InvalidOption(f"{where} is a list of {len(value)} entries, more than any option has.")
        for item in value:
            _check_option(where, item)
    elif isinstance(value, (int, float)) and (not math.isfinite(value) or abs(value) > OPTION):
        raise InvalidOption(f"{where}={str(value)[:40]} must be a number of at most {OPTION}.")
    elif isinstance(value, str) and len(value) > 256:
        raise InvalidOption(f"{where} is a text of {len(value)} characters, longer than any option.")


def _check_shape(value: Any, where: str, depth: int, count: list[int]) -> None:
    """Nesting, number of entries and length of texts."""
    count[0] += 1
    if depth == 0 or count[0] > _ENTRIES:
        raise InvalidOption(f"{where[:60]}: a config is not that deep or that long.")
    if isinstance(value, str) and len(value) > _TEXT:
        raise InvalidOption(f"{where[:60]} is a text of {len(value)} characters, longer than a config may hold.")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_shape(inner, str(key), depth - 1, count)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_shape(inner, where, depth - 1, count)
