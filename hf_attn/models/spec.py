"""Which mechanism each layer has: the small language of `attention`, in configs, files and `convert`.

    "lara"                                            every layer
    {"name": "lara", "num_landmarks": 49}             every layer, with options
    {"default": "softmax", "2-9": "lara", "0,11": {"name": "rfa", "num_features": 32}}
    {"default": "generalized", "cross": "softmax"}    another mechanism where a decoder attends to the encoder

The canonical form, which config.json stores, maps "default", layer ranges and "cross" to {"name": ..., **options}.
"""

from __future__ import annotations

import re
from typing import Any

from hf_attn.errors import InvalidOption
from hf_attn.registry import get_mechanism

Spec = dict[str, dict[str, Any]]

ALIASES: dict[str, dict[str, Any]] = {
    "eager": {"name": "softmax", "backend": "math"},
    "sdpa": {"name": "softmax", "backend": "sdpa"},
    "flash_attention_2": {"name": "softmax", "backend": "flash-attn-2"},
    "flash_attention_3": {"name": "softmax", "backend": "flash-attn-3"},
    "flash_attention_4": {"name": "softmax", "backend": "flash-attn-4"},
}
"""transformers' own names for exact attention, in our terms."""

CROSS = "cross"
"""Key of the encoder-decoder attention of every layer; without it a layer has one entry for all its attention."""
_RANGE = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def canonical(attention: str | dict[str, Any] | None, options: dict[str, Any] | None = None) -> Spec:
    """The canonical form of `attention`; `options` belong to its default mechanism.

    Raises:
        UnknownMechanism, InvalidOption: a name, key or option name that does not exist.
    """
    if attention is None:
        attention = "softmax"
    if not isinstance(attention, (str, dict)):
        raise InvalidOption(f"attention must be a mechanism's name or a dict; got {attention!r}.")
    if isinstance(attention, str) or "name" in attention:
        attention = {"default": attention}
    spec = {"default": _entry(attention.get("default", "softmax"), options)}
    for key, value in attention.items():
        if key != "default":
            if key != CROSS and not _RANGE.fullmatch(str(key)):
                raise InvalidOption(
                    f"attention has the key {key!r}; keys are 'default', 'cross' and layer ranges like '0', '2-9' or '0,4-6'."
                )
            spec[str(key)] = _entry(value, None)
    return spec


def per_layer(spec: Spec, num_layers: int) -> list[dict[str, Any]]:
    """The entry of every layer, 0 to `num_layers` - 1. Overlapping or missing layers are refused."""
    layers: dict[int, tuple[str, dict[str, Any]]] = {}
    for key, entry in spec.items():
        if key in ("default", CROSS):
            continue
        for part in key.split(","):
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                if index >= num_layers:
                    raise InvalidOption(
                        f"attention names layer {index} in {key!r}; the model has layers 0 to {num_layers - 1}."
                    )
                if index in layers:
                    raise InvalidOption(
                        f"attention names layer {index} twice, in {layers[index][0]!r} and {key!r}; name it once."
                    )
                layers[index] = (key, entry)
    return [layers[i][1] if i in layers else spec["default"] for i in range(num_layers)]


def warn_switch(before: Spec | None, after: Spec) -> None:
    """Warn of mechanisms that a trained model gets, and must be trained with; `before` None: softmax everywhere."""
    had = {entry["name"] for entry in (before or {}).values()}
    for name in sorted({entry["name"] for entry in after.values()} - had):
        get_mechanism(name).module_class.warn_untrained()


def _entry(value: Any, options: dict[str, Any] | None) -> dict[str, Any]:
    """One mechanism with its options, from a name or a dict."""
    if isinstance(value, str):
        value = ALIASES.get(value, {"name": value})
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise InvalidOption(f"attention entry {value!r} must be a mechanism's name or a dict with 'name' and options.")
    entry = {**value, **(options or {})}
    mechanism = get_mechanism(entry["name"])
    given = {k: v for k, v in entry.items() if k != "name"}
    unknown = [k for k in given if k not in mechanism.options_class.names()]
    if unknown:
        mechanism.options_class.parse(**{unknown[0]: given[unknown[0]]})
    return {"name": mechanism.name, **given}
