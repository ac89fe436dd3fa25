"""What the attention modules of a model receive and compute during a forward pass, and the same once more elsewhere.

    with recording(model) as calls:
        model(**batch)
    calls["encoder.layer.0.attention.self"].output     # (B,H,N,D), what the mechanism of that module returned

`replay` hands one of these calls to another model's attention module: same layer input, other weights or mechanism.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.family import convert
from hf_attn.models.wrapping import WrappedAttention, attention_modules
from hf_attn.module import AttentionModule


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose attention can be recorded; a stock model's layers become `softmax`, which is what they are.

    Raises:
        Unsupported: the model has no attention that a mechanism could take the place of.
    """
    copied = copy.deepcopy(model)
    return copied if carries_mechanisms(copied) else convert(copied, "softmax")


def converted_copy(model: PreTrainedModel, attention: str | dict[str, Any], seed: int) -> PreTrainedModel:
    """A copy of `model` with other attention; the same `seed` draws the same parameters and buffers on every device."""
    copied = copy.deepcopy(model)
    device = copied.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        convert(copied.to("cpu"), attention)
    return copied.to(device)


def carries_mechanisms(model: nn.Module) -> bool:
    """Whether every attention module of `model` has a mechanism."""
    modules = attention_modules(model).values()
    return bool(modules) and all(isinstance(module, WrappedAttention) for module in modules)


def mechanisms(model: nn.Module) -> dict[str, AttentionModule]:
    """The mechanism of every attention module, by the path of the attention module."""
    return {path: module.mechanism for path, module in attention_modules(model).items()}


@dataclass
class Recorded:
    """One call of an attention module.

    Attributes:
        args, kwargs: what the attention module received: hidden states, mask and whatever its model passes.
        tensors: query, key and value (B,H,N,D) of its mechanism.
        call: the other arguments of its mechanism.
        output: (B,H,N,D), what the mechanism returned.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    tensors: tuple[Tensor, ...] = ()
    call: Mapping[str, Any] | None = None
    output: Any = None


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Recorded]]:
    """Record the last call of every attention module of `model`, by its path in the model.

    Raises:
        Unsupported: the model carries no mechanisms.
    """
    if not carries_mechanisms(model):
        raise Unsupported(
            type(model).__name__, "it carries no mechanisms to record", "Convert it with hf_attn.convert(model, ...)"
        )
    modules = attention_modules(model)
    calls = {path: Recorded() for path in modules}
    handles = [handle for path, module in modules.items() for handle in _hooks(module, calls[path])]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def require_calls(calls: Mapping[str, Recorded]) -> None:
    """Raise `InvalidInput` where an attention module was not run, such as cross-attention without the other sequence."""
    missing = [path for path, call in calls.items() if call.output is None]
    if missing:
        raise InvalidInput(
            f"{missing[0]} was not run by the batch ({len(missing)} of {len(calls)} attention modules were not). "
            "Give batches with every input of the model, such as encoder_hidden_states."
        )


def replay(module: nn.Module, call: Recorded) -> Recorded:
    """Run the attention module `module` on what another one received, in the dtype of `module`.

    Gradients reach the parameters of `module` only. A cache is left out: the keys are those of this call.
    """
    dtype = next(module.parameters()).dtype
    again = Recorded()
    handles = _hooks(module, again)
    try:
        kwargs = {k: v for k, v in (call.kwargs or {}).items() if k not in ("past_key_values", "past_key_value")}
        module(*_cast(call.args, dtype), **_cast(kwargs, dtype))
    finally:
        for handle in handles:
            handle.remove()
    return again


def _hooks(module: nn.Module, call: Recorded) -> list[Any]:
    def received(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.args, call.kwargs = args, kwargs

    def computed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        call.tensors, call.call, call.output = args[:3], kwargs, output

    return [
        module.register_forward_pre_hook(received, with_kwargs=True),
        module.mechanism.register_forward_hook(computed, with_kwargs=True),
    ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, detached."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def real_tokens(call: Recorded) -> Tensor:
    """(B,N) bool: the queries of a call that are no padding. All of them where the keys are another sequence."""
    query, key = call.tensors[:2]
    mask = (call.call or {}).get("key_padding_mask")
    if mask is None or query.shape[2] != key.shape[2]:
        return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    return mask
