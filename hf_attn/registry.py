"""The register of mechanisms: one record each, one call that registers it here and in transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hf_attn import bridge
from hf_attn.capabilities import Capabilities, flags
from hf_attn.errors import InvalidOption, UnknownMechanism
from hf_attn.module import AttentionModule
from hf_attn.options import Options


@dataclass(frozen=True)
class Mechanism:
    """What the library knows about a mechanism.

    Attributes:
        name: registered name; also the `attn_implementation` string and the name of its file, test and docs page.
        title: the paper's title, or what the mechanism is.
        paper: where it was published.
        equation: the computation in one or two lines of plain text.
        module_class: builds the module; holds `naive`, options and capabilities.
    """

    name: str
    title: str
    paper: str
    equation: str
    module_class: type[AttentionModule]
    example: dict[str, Any]
    """Options that make a small valid module, for tests, `doctor` and pictures."""

    @property
    def options_class(self) -> type[Options]:
        return self.module_class.options_class

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities under the example options."""
        return self.module_class.describe(self.options_class.parse(**self.example))

    @property
    def naive(self) -> Any:
        """The definition, as a method of the module class."""
        return self.module_class.naive

    @property
    def summary(self) -> str:
        return (self.module_class.__doc__ or "").strip().splitlines()[0]


_MECHANISMS: dict[str, Mechanism] = {}


def register(mechanism: Mechanism) -> Mechanism:
    """Add `mechanism` to the register and to transformers' attention and mask interfaces, in one step.

    Raises:
        InvalidOption: the record contradicts itself or its name is taken; the message says what to change.
    """
    name = mechanism.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name):
        raise InvalidOption(
            f"mechanism name {name!r} must be lower case letters, digits and underscores, like 'context_pool'."
        )
    if name in _MECHANISMS and _MECHANISMS[name].module_class is not mechanism.module_class:
        raise InvalidOption(
            f"a mechanism called {name!r} is registered already ({_MECHANISMS[name].module_class!r}); pick another name."
        )
    if not issubclass(mechanism.module_class, AttentionModule):
        raise InvalidOption(
            f"{name}: module_class must derive from hf_attn.AttentionModule; got {mechanism.module_class!r}."
        )
    if mechanism.module_class.name != name or mechanism.options_class.mechanism not in ("", name):
        raise InvalidOption(f"{name}: module_class.name and options_class.mechanism must both be {name!r}.")
    if not mechanism.module_class.__doc__ or not mechanism.equation:
        raise InvalidOption(f"{name}: the module class needs a docstring and the record an equation.")
    mechanism.options_class.parse(**mechanism.example)
    bridge.register_with_transformers(name, mechanism.module_class)
    _MECHANISMS[name] = mechanism
    return mechanism


def list_mechanisms() -> list[str]:
    """Names of the registered mechanisms, in the order of registration."""
    return list(_MECHANISMS)


def get_mechanism(name: str) -> Mechanism:
    """The record of `name`; `UnknownMechanism` names the nearest one otherwise."""
    if name not in _MECHANISMS:
        raise UnknownMechanism(name, _MECHANISMS)
    return _MECHANISMS[name]


def build(name: str, *, num_heads: int, head_dim: int, **options: Any) -> AttentionModule:
    """A module of mechanism `name`, initialised.

    Args:
        name: a registered mechanism.
        num_heads: H, at least 1.
        head_dim: D, at least 1.
        options: the mechanism's options; unknown names and values are refused.
    """
    mechanism = get_mechanism(name)
    for argument, value in (("num_heads", num_heads), ("head_dim", head_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidOption(f"{name}: {argument}={value!r} must be an integer of at least 1.")
    module = mechanism.module_class(num_heads, head_dim, mechanism.options_class.parse(**options))
    module.reset_parameters()
    return module


def with_capability() -> dict[str, list[str]]:
    """For every yes/no cell, the mechanisms that have it."""
    return {flag: [n for n, m in _MECHANISMS.items() if getattr(m.capabilities, flag)] for flag in flags()}
