"""Publishing: model cards, folders that are safe to upload, and the upload itself.

hf_attn.hub.publish("runs/model", "someone/bert-rfa")
"""

from typing import Any

__all__ = ["Published", "publish"]


def __getattr__(name: str) -> Any:
    """Both are loaded on first use: importing a part of the package loads no other."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_attn.hub import upload

    return getattr(upload, name)
