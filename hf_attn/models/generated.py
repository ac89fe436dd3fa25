"""Home of the classes made for families without a file of their own, such as `AttnLlamaForCausalLM`.

They are made on first use; importing one by name (pickle does) makes it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    import transformers

    from hf_attn.models.family import attn_class

    stock = getattr(transformers, name.removeprefix("Attn"), None) if name.startswith("Attn") else None
    if not isinstance(stock, type) or not issubclass(stock, transformers.PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attn_class(stock)
