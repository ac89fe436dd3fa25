"""Attach mechanisms to the attention modules of a transformers model, in place.

Every attention module that goes through `AttentionInterface` gets its mechanism as the sub-module `mechanism` (so its
parameters are saved, sharded and found by PEFT with their host), and a subclass of its own class whose forward passes
what a mechanism may need and transformers does not: the layer's input and the decoding state.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.capabilities import Host, check_host
from hf_attn.errors import InvalidOption, Unsupported
from hf_attn.models.cache import state_layer
from hf_attn.models.limits import check_memory
from hf_attn.models.spec import CROSS, Spec, per_layer
from hf_attn.module import AttentionModule
from hf_attn.registry import get_mechanism, with_capability


class WrappedAttention:
    """Forward of a wrapped attention module; the stock class stands behind it in the method resolution order."""

    stock_class: type[nn.Module]
    mechanism: AttentionModule

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stock forward; its keywords reach the attention function."""
        capabilities = self.mechanism.capabilities
        if capabilities.needs_layer_input:
            kwargs["layer_input"] = hidden_states
        cache = kwargs.get("past_key_values")
        if cache is not None and capabilities.keeps_state and getattr(self, "is_causal", False):
            kwargs["state_layer"] = state_layer(cache, getattr(self, "layer_idx", None), self.mechanism.name)
        return super().forward(hidden_states, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_wrapped, (self.stock_class,), self.__dict__


def _empty_wrapped(stock: type[nn.Module]) -> nn.Module:
    wrapped = wrapped_class(stock)
    return wrapped.__new__(wrapped)


@functools.cache
def wrapped_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The wrapped subclass of an attention class."""
    body = {"__module__": __name__, "__doc__": f"{stock.__name__} with a mechanism of hf_attn.", "stock_class": stock}
    return type(f"Attn{stock.__name__}", (WrappedAttention, stock), body)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every attention module whose forward goes through transformers' AttentionInterface."""
    return {path: m for path, m in model.named_modules() if isinstance(m, WrappedAttention) or _uses_interface(type(m))}


@functools.cache
def _uses_interface(cls: type) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def attach(model: nn.Module, spec: Spec, pretrained: bool = False) -> Spec:
    """Give every attention module of `model` the mechanism `spec` names; all or nothing.

    `pretrained` models get mechanisms that start without disturbing their weights, where a mechanism has such a start.

    Returns the spec with the options that were filled in from the model's configuration.

    Raises:
        Unsupported: the model cannot be wrapped, or a mechanism does not define what a layer asks for.
    """
    modules = attention_modules(model)
    if not modules:
        raise Unsupported(
            type(model).__name__,
            "none of its modules calls transformers' AttentionInterface, so there is no place to attach a mechanism",
            "Use a model of transformers whose attention takes attn_implementation=..., such as BERT, ViT, GPT-2 or Llama",
        )
    hosts = {path: host_of(model, path, module) for path, module in modules.items()}
    entries = per_layer(spec, max(host.layer_idx for host in hosts.values()) + 1)
    if CROSS in spec and not any(host.cross for host in hosts.values()):
        raise InvalidOption(
            f"attention has the key {CROSS!r}, and {type(model).__name__} has no encoder-decoder attention; leave it out."
        )
    entry_of = {
        path: spec[CROSS] if host.cross and CROSS in spec else entries[host.layer_idx] for path, host in hosts.items()
    }
    check_memory([planned(host, entry_of[path]) for path, host in hosts.items()], model, type(model).__name__)
    built, filled = {}, {}
    for path, module in modules.items():
        host = hosts[path]
        entry = entry_of[path]
        built[path], options = build_for(host, entry, module, pretrained)
        filled[id(entry)] = {"name": entry["name"], **options}
    for path, module in modules.items():
        if not isinstance(module, WrappedAttention):
            module.__class__ = wrapped_class(type(module))
        module.mechanism = built[path]
    return {key: filled.get(id(entry), entry) for key, entry in spec.items()}


def planned(host: Host, entry: dict[str, Any]) -> AttentionModule:
    """The mechanism of one attention module without memory, to see how much it would take."""
    mechanism = get_mechanism(entry["name"])
    options = {k: v for k, v in entry.items() if k != "name"}
    options |= mechanism.module_class.host_defaults(host, options)
    parsed = mechanism.options_class.parse(**options)
    check_host(mechanism.name, mechanism.module_class.describe(parsed), host, with_capability())
    try:
        with torch.device("meta"):
            return mechanism.module_class(host.num_heads, host.head_dim, parsed)
    except RuntimeError as error:
        raise InvalidOption(f"{mechanism.name}: no module can be made with these options ({error}).") from error


def build_for(
    host: Host, entry: dict[str, Any], module: nn.Module, pretrained: bool = False
) -> tuple[AttentionModule, dict[str, Any]]:
    """The mechanism of one attention module, checked against what it asks for, and its options."""
    mechanism = get_mechanism(entry["name"])
    given = {k: v for k, v in entry.items() if k != "name"}
    options = {**given, **mechanism.module_class.host_defaults(host, given)}
    parsed = mechanism.options_class.parse(**options)
    check_host(mechanism.name, mechanism.module_class.describe(parsed), host, with_capability())
    like = next(module.parameters())
    with torch.device(like.device):
        built = mechanism.module_class(host.num_heads, host.head_dim, parsed)
    built.to(like.dtype)
    if like.device.type != "meta":
        if pretrained:
            built.reset_beside_pretrained()
        else:
            built.reset_parameters()
    return built.train(module.training), options


def host_of(model: nn.Module, path: str, module: nn.Module) -> Host:
    """What `module`, at `path` in `model`, asks of a mechanism."""
    config = getattr(module, "config", model.config)
    heads = _first(module, "num_attention_heads", "num_heads", "n_heads") or getattr(
        config, "num_attention_heads", None
    )
    dim = _first(module, "head_dim", "attention_head_size")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        number = re.search(r"\.(\d+)\.", f".{path}.")
        layer = int(number.group(1)) if number else None
    if heads is None or dim is None or layer is None:
        raise Unsupported(
            f"{type(model).__name__}, module {path}",
            f"its number of heads ({heads}), head dimension ({dim}) or layer number ({layer}) cannot be read from {type(module).__name__}",
            "Report the model type; BERT, ViT, GPT-2 and their relatives work",
        )
    # BART and its relatives have one class for both, and this name for the one that reads the encoder
    cross = path.rpartition(".")[2] == "encoder_attn" or "Cross" in type(module).__name__
    cross = bool(getattr(module, "is_cross_attention", cross))
    grid, prefix = token_grid(model)
    sliding = _first(module, "sliding_window") or (getattr(module, "layer_type", "") == "sliding_attention" or None)
    dropout = _first(module, "attention_dropout", "dropout", "attn_dropout") or 0.0
    return Host(
        model=type(model).__name__,
        num_heads=heads,
        head_dim=dim,
        layer_idx=layer,
        causal=bool(getattr(module, "is_causal", False)) and getattr(config, "is_causal", True) is not False,
        cross=cross,
        grid=grid,
        num_prefix_tokens=prefix,
        sliding_window=sliding,
        dropout=getattr(dropout, "p", dropout),
        max_length=getattr(config, "max_position_embeddings", None),
    )


def token_grid(model: nn.Module) -> tuple[tuple[int, int] | None, int]:
    """The patch grid of a vision model at its configured image size, and the tokens before it; (None, 0) otherwise."""
    for module in model.modules():
        patches = getattr(module, "patch_embeddings", None)
        positions = getattr(module, "position_embeddings", None)
        if patches is not None and hasattr(patches, "patch_size") and isinstance(positions, Tensor):
            (height, width), (rows, columns) = _pair(patches.image_size), _pair(patches.patch_size)
            grid = height // rows, width // columns
            return grid, positions.shape[1] - grid[0] * grid[1]
    return None, 0


def _first(module: nn.Module, *names: str) -> Any:
    return next((value for name in names if (value := getattr(module, name, None)) is not None), None)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def layer_names(model: nn.Module) -> list[str]:
    """The mechanism of every layer, in order (the self-attention's where a layer has two)."""
    names: dict[int, str] = {}
    for path, module in attention_modules(model).items():
        if not isinstance(module, WrappedAttention):
            raise InvalidOption(
                f"{type(model).__name__} carries no mechanisms; convert it with hf_attn.convert(model, ...)."
            )
        names.setdefault(host_of(model, path, module).layer_idx, module.mechanism.name)
    return [names[i] for i in sorted(names)]
