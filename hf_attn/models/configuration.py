"""Configs that know the mechanism of every layer.

`AttnBertConfig` is `BertConfig` plus `attention`. Its `model_type` is its own (`attn_bert`), so that plain
transformers refuses the checkpoint instead of running softmax on it. This module is imported together with
transformers' AutoConfig, and like it does without torch.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers.configuration_utils import PreTrainedConfig

from hf_attn.errors import HfAttnError, InvalidOption, Unsupported
from hf_attn.models.limits import check_stored

Spec = dict[str, dict[str, Any]]
STATIC = {"bert": "bert", "vit": "vit", "gpt2": "gpt2"}
"""Families with a file of their own, by model type."""
GENERATED = ("roberta", "distilbert", "deit", "llama", "qwen2", "qwen3", "modernbert")
"""Further model types whose converted checkpoints load in a fresh process; any other after `register_family`."""


VERSION = "hf_attn_version"
"""Field of a published config.json: the version of this package that wrote it."""


def warn_newer(published: Any, installed: str) -> None:
    """Warn where a checkpoint was published with a newer package: what that changed is not known here."""
    try:
        newer = Version(published) > Version(installed)
    except (InvalidVersion, TypeError) as error:
        raise InvalidOption(f"config: {VERSION}={str(published)[:40]!r} is not a version.") from error
    if newer:
        warnings.warn(
            f"this checkpoint was published with hf_attn {published}, and {installed} is installed: it may compute something "
            f'else. Install the newer one with: pip install "hf_attn>={published}"',
            stacklevel=2,
        )


class StoredConfigMixin:
    """The part of a config of this package that reads config.json as a stranger's file, and writes no code beside it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a stored dict, without `auto_map`.

        Raises:
            InvalidOption: a field has a wrong type, or asks for more than any model has; nothing was built.
        """
        check_stored(config_dict)
        published = config_dict.get(VERSION)
        if cls.__module__.startswith("hf_attn."):
            # the code beside a checkpoint is for machines without this package; saving again must not point at it
            config_dict = {key: value for key, value in config_dict.items() if key not in ("auto_map", VERSION)}
            if published is not None:
                warn_newer(published, sys.modules[cls.__module__.partition(".")[0]].__version__)
        try:
            return super().from_dict(config_dict, **kwargs)
        except HfAttnError:
            raise
        except Exception as error:  # a stranger's config can go wrong in any place of the stock class
            raise InvalidOption(f"config: {cls.__name__} cannot be made of it ({error}).") from error

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing for classes of the installed package, which need no code beside their checkpoints."""
        if not cls.__module__.startswith("hf_attn."):
            super().register_for_auto_class(auto_class)


class AttnConfigMixin(StoredConfigMixin):
    """The part of a config that knows the mechanisms: `attention`, filled by attn_implementation and attention_options."""

    stock_class: type[PreTrainedConfig]
    attention: Spec | None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention is not None:
            self.attention = self._canonical(self.attention)
        super().__post_init__(**kwargs)
        from hf_attn.models.family import register_models

        register_models(type(self))

    @staticmethod
    def _canonical(attention: Any, options: dict[str, Any] | None = None) -> Spec:
        # mechanisms need torch, and this module is imported with AutoConfig, which does not
        importlib.import_module("hf_attn.mechanisms")
        from hf_attn.models.spec import canonical

        return canonical(attention, options)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The stored config; a stock one counts as ours, so that loading a stock checkpoint is not warned about."""
        stored, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if stored.get("model_type") == cls.stock_class.model_type:
            stored = {**stored, "model_type": cls.model_type}
        return stored, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a stored dict; warns of a mechanism in `kwargs` that the checkpoint must be trained with first."""
        stored, asked = config_dict.get("attention"), kwargs.get("attn_implementation")
        made = super().from_dict(config_dict, **kwargs)
        if asked is not None:
            from hf_attn.models.spec import warn_switch

            config = made[0] if isinstance(made, tuple) else made
            warn_switch(None if stored is None else cls._canonical(stored), config.attention)
        return made

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        if self.attention is None or value is not None:
            spec = self._canonical(value)
            # naming the mechanism a checkpoint has already keeps its options and its per-layer choice
            if (
                self.attention is None
                or self.attention["default"]["name"] != spec["default"]["name"]
                or isinstance(value, dict)
            ):
                self.attention = spec
        self._attn_implementation_internal = self.attention["default"]["name"]

    @property
    def attention_options(self) -> dict[str, Any]:
        """Options of the default mechanism."""
        return {k: v for k, v in self.attention["default"].items() if k != "name"}

    @attention_options.setter
    def attention_options(self, options: dict[str, Any]) -> None:
        self.attention = self._canonical(self.attention, options)


@functools.cache
def attn_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of `stock` with an `attention` field and a model type of its own; it lives in this module."""
    name = f"Attn{stock.__name__}"
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"`transformers.{stock.__name__}` with the attention mechanism of every layer.\n\n"
        "Args:\n    attn_implementation: a mechanism's name, or a dict by layer (see hf_attn.models.spec).\n"
        "    attention_options: options of the mechanism.\n"
        "    attention: both in their stored form.\n"
        f"    kwargs: everything {stock.__name__} takes.",
        "__annotations__": {"attention": "dict | None"},
        "attention": None,
        "model_type": f"attn_{stock.model_type}",
        "stock_class": stock,
    }
    created = type(name, (AttnConfigMixin, stock), body)
    globals()[name] = created
    return created


def attn_config(config: PreTrainedConfig, attention: str | dict[str, Any] | None = None) -> PreTrainedConfig:
    """A copy of a stock `config` as its attn config, with `attention` (by default what its attn_implementation says)."""
    values = config.to_dict()
    values.pop("model_type", None)
    chosen = attention if attention is not None else config._attn_implementation
    return attn_config_class(type(config))(**values, attention=chosen)


@functools.cache
def register_family(model_type: str) -> type[PreTrainedConfig]:
    """Let AutoConfig (and with it the Auto model classes) know checkpoints of `attn_<model_type>`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise Unsupported(
            "register_family",
            f"model_type={model_type!r} is not a model type of transformers",
            "Give a stock type, such as 'llama'",
        )
    created = attn_config_class(CONFIG_MAPPING[model_type])
    AutoConfig.register(created.model_type, created, exist_ok=True)
    return created


def announce_family(model_type: str) -> None:
    """`register_family`, put off until a checkpoint of the family is loaded."""
    announce(f"attn_{model_type}", functools.partial(register_family, model_type))


def announce(model_type: str, load: Callable[[], type[PreTrainedConfig]]) -> None:
    """Let AutoConfig know `model_type`, whose config class `load` returns, without loading it now.

    AutoConfig is often imported in the middle of a stock config's own import, when its class cannot be derived from
    yet.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    class StandIn(PreTrainedConfig):
        def __new__(cls, *args: Any, **kwargs: Any) -> PreTrainedConfig:
            return load()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return load().from_dict(config_dict, **kwargs)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
            return load().from_pretrained(pretrained_model_name_or_path, **kwargs)

    StandIn.model_type = model_type
    AutoConfig.register(model_type, StandIn, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Config classes are made on first use; importing one by name (pickle does) makes it."""
    import transformers

    stock = getattr(transformers, name.removeprefix("Attn"), None) if name.startswith("Attn") else None
    if not isinstance(stock, type) or not issubclass(stock, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attn_config_class(stock)
