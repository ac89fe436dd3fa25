"""The bridge into transformers: the attention function every mechanism registers, and its mask function.

transformers calls `attention_forward(module, query, key, value, mask, scaling=..., dropout=..., ...)` with the
model's own attention module first. A wrapped model (`hf_attn.models.wrapping`) carries the mechanism as the sub-module
`mechanism` of that module; a stock model gets a default one, which must have nothing to learn.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.errors import InvalidOption, Unsupported
from hf_attn.masks import Packing, interpret, mask_interface
from hf_attn.module import AttentionModule

# keywords by which a host model changes the softmax itself; leaving them out would be silently wrong
_UNKNOWN_MATHS = ("softcap", "s_aux", "sinks", "position_bias", "attention_bias", "alibi")

_stateless: dict[tuple[str, int, int], AttentionModule] = {}
_defaults: weakref.WeakKeyDictionary[nn.Module, AttentionModule] = weakref.WeakKeyDictionary()


def register_with_transformers(name: str, module_class: type[AttentionModule]) -> None:
    """Register `name` in AttentionInterface and AttentionMaskInterface: without the second, transformers passes no mask."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, attention_function(name, module_class))
    AttentionMaskInterface.register(name, mask_interface)


def attention_function(name: str, module_class: type[AttentionModule]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that transformers calls for `attn_implementation=name`."""

    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        mechanism = getattr(module, "mechanism", None)
        if mechanism is None:
            mechanism = default_mechanism(name, module_class, module, query)
        return run(mechanism, module, query, key, value, attention_mask, scaling, dropout, kwargs)

    attention_forward.__name__ = attention_forward.__qualname__ = f"{name}_attention_forward"
    return attention_forward


def run(
    mechanism: AttentionModule,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """One attention call of a transformers model: (B,N,H,D) output and the weights, where they were asked for."""
    for keyword in _UNKNOWN_MATHS:
        if kwargs.get(keyword) is not None:
            raise Unsupported(
                f"{mechanism.name} in {type(module).__name__}",
                f"the model passes {keyword}, which changes the attention in a way {mechanism.name} does not define",
                'Keep the model\'s own attention (attn_implementation="eager")',
            )
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    cache = kwargs.get("state_layer")
    is_causal = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    mask = interpret(
        attention_mask,
        batch=query.shape[0],
        queries=query.shape[2],
        keys=key.shape[2],
        is_causal=is_causal,
        position_ids=None if cache is not None else kwargs.get("position_ids"),
        keep_dense=mechanism.capabilities.dense_mask,
    )
    call: dict[str, Any] = {
        "key_padding_mask": mask.key_padding,
        "is_causal": mask.is_causal,
        "scaling": scaling,
        "grid": kwargs.get("grid"),
        "num_prefix_tokens": kwargs.get("num_prefix_tokens", 0),
        "layer_input": kwargs.get("layer_input"),
        "layer_idx": getattr(module, "layer_idx", None),
    }
    if mask.dense is not None:
        call["attention_mask"] = mask.dense
    if mechanism.capabilities.dropout:
        call["dropout"] = dropout
    elif dropout:
        warn_dropout(mechanism.name, dropout)

    if cache is not None:
        if attention_mask is not None and attention_mask.dim() == 4 and mask.dense is not None:
            raise Unsupported(mechanism.name, "a 4-D mask while decoding with a state", "Pass a 2-D attention_mask")
        weights = None
        if wants_weights(kwargs):
            if cache.state is not None:
                raise Unsupported(
                    mechanism.name,
                    "output_attentions while decoding with a state: the past keys are gone",
                    "Pass use_cache=False",
                )
            weights = mechanism.attention_weights(query, key, value, **call)
        del call["is_causal"]
        out, cache.state = mechanism.step(query, key, value, cache.state, **call)
        return out.transpose(1, 2).contiguous(), weights

    weights = None
    if mask.segments is not None:
        if wants_weights(kwargs):
            raise Unsupported(mechanism.name, "output_attentions of packed sequences", "Pass one sequence a row")
        out = packed(mechanism, query, key, value, mask.segments, call)
    elif wants_weights(kwargs):
        drops = call.pop("dropout", 0.0)
        weights = mechanism.attention_weights(query, key, value, **call)
        # one draw for both: a second call of a random mechanism in training would draw anew
        out = mechanism(query, key, value, dropout=drops, **call) if drops else weights @ value
    else:
        out = mechanism(query, key, value, **call)
    return out.transpose(1, 2).contiguous(), weights


def packed(
    mechanism: AttentionModule, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, call: dict[str, Any]
) -> Tensor:
    """Attention within the packed sequences of each row: every sequence gets a padded row of its own."""
    if not mechanism.capabilities.packed:
        raise Unsupported(
            mechanism.name,
            f"packed sequences ({int(segments.max()) + 1} in a row): it cannot tell them apart exactly",
            "Pad one sequence a row, or use softmax",
        )
    packing = Packing.of(segments)
    call = {**call, "key_padding_mask": packing.key_padding}
    if call["layer_input"] is not None:
        call["layer_input"] = packing.unpack(call["layer_input"][:, None])[:, 0]
    return packing.pack(mechanism(packing.unpack(query), packing.unpack(key), packing.unpack(value), **call))


def default_mechanism(
    name: str, module_class: type[AttentionModule], module: nn.Module, query: Tensor
) -> AttentionModule:
    """The mechanism of a stock model's attention module: default options, nothing learned, draws fixed by the layer."""
    heads, dim = query.shape[1], query.shape[3]
    if (name, heads, dim) in _stateless:
        return _stateless[name, heads, dim]
    if module in _defaults:
        return _defaults[module].to(query.device).train(module.training)
    remedy = f'Load the model with hf_attn\'s class (AttnBert..., AttnViT..., AttnGPT2...), or call hf_attn.convert(model, "{name}")'
    try:
        options = module_class.options_class.parse()
    except InvalidOption as error:
        raise Unsupported(
            f"{name} in {type(module).__name__}",
            f"its options depend on the model's configuration, which a stock model does not pass ({error})",
            remedy,
        ) from error
    capabilities = module_class.describe(options)
    if capabilities.learned:
        raise Unsupported(
            f"{name} in {type(module).__name__}",
            "it has learned parameters, which a stock model has no place for",
            remedy,
        )
    if capabilities.needs_layer_input:
        raise Unsupported(
            f"{name} in {type(module).__name__}",
            "it needs the layer's input, which a stock model does not pass",
            remedy,
        )
    # a model built from a config alone has no such name, and will be trained anyway
    if getattr(getattr(module, "config", None), "name_or_path", ""):
        module_class.warn_untrained()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(module, "layer_idx", None) or 0)
        mechanism = module_class(heads, dim, options)
        mechanism.reset_parameters()
    mechanism = mechanism.to(query.device).train(module.training)
    if not mechanism.state_dict():
        _stateless[name, heads, dim] = mechanism
    else:
        _defaults[module] = mechanism
    return mechanism


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether this forward pass collects attention weights (`output_attentions=True`)."""
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get() or {}
    return "attentions" in collected or "cross_attentions" in collected


_warned: set[str] = set()


def warn_dropout(name: str, dropout: float) -> None:
    """Say once that attention dropout does nothing for this mechanism."""
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        warnings.warn(
            f"{name} has no attention weights to drop: the model's attention dropout of {dropout} has no effect in it.",
            stacklevel=3,
        )
