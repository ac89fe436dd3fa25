"""Several processes: what accelerate and transformers leave out for machines without a GPU, and for FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def needs_cpu() -> bool:
    """Whether this is one of several processes, and there is no accelerator for them.

    Trainer must be told (use_cpu), or each process would train alone, and all would write to the same folder.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def shard_on_cpu(arguments: Any) -> None:
    """Let accelerate shard (FSDP2) on CPU processes, as its configuration says: by itself it would run without.

    accelerate reads the FSDP settings only for processes on accelerators. Call it before the Trainer is made.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and arguments.device.type == "cpu" and arguments.world_size > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_layers(trainer: Any) -> None:
    """Let FSDP2 shard the model layer by layer, and what is tied as one piece.

    accelerate would take BERT's embeddings as one more layer, and shard its tied embeddings apart from the bias that is
    tied to them; both fail. Such a model's embeddings and head stay in the outermost piece. Call it after the Trainer
    is made, before it trains.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    model = trainer.model
    if plugin.transformer_cls_names_to_wrap is None:
        names = model._no_split_modules or ()
        plugin.transformer_cls_names_to_wrap = sorted(name for name in names if "Embedding" not in name)
    if any(name.endswith("bias") for name in getattr(model, "all_tied_weights_keys", None) or ()):
        trainer.accelerator.prepare = _without_embeddings(trainer.accelerator.prepare, model)


def _without_embeddings(prepare: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """`prepare` for a model that says it has no embeddings while it is prepared."""

    def prepared(*args: Any, **kwargs: Any) -> Any:
        names = ("get_input_embeddings", "get_output_embeddings")
        if model not in args:
            return prepare(*args, **kwargs)
        for name in names:
            setattr(model, name, lambda: None)
        try:
            return prepare(*args, **kwargs)
        finally:
            for name in names:
                delattr(model, name)

    return prepared
