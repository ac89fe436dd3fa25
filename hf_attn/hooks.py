"""Registers the package in transformers at the moment transformers needs it, and not before.

`import hf_attn` must stay cheap: transformers itself loads torch only when a model is touched, and so do we. A finder
on `sys.meta_path` runs an action right after one of two transformers modules has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _mechanisms() -> None:
    importlib.import_module("hf_attn.mechanisms")


def _families() -> None:
    configuration = importlib.import_module("hf_attn.models.configuration")
    for model_type in (*configuration.STATIC, *configuration.GENERATED):
        configuration.announce_family(model_type)
    importlib.import_module("hf_attn.models.own").announce_own()


ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.modeling_utils": _mechanisms,  # where attention functions live
    "transformers.models.auto.configuration_auto": _families,  # where checkpoints find their config class
}
"""transformers module -> what to do once it is imported."""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the watched modules like everybody else, with a loader that runs the action afterwards."""

    def __init__(self) -> None:
        self.searching: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ACTIONS or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, ACTIONS[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, action: Callable[[], None]):
        self.inner, self.action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        module.__loader__ = self.inner
        self.inner.exec_module(module)
        self.action()


def install() -> None:
    """Register now what transformers has loaded already; watch for the rest."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, action in ACTIONS.items():
        if name in sys.modules:
            action()
