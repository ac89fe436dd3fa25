"""Several processes: what accelerate and transformers leave out for machines without a GPU, and for FSDP2."""

from __future__ import annotations

import os
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
    """Let FSDP2 shard the model layer by layer, its embeddings apart.

    accelerate would take BERT's embeddings as one more layer, and then fail to shard (or to tie) the word embeddings in
    them. Call it after the Trainer is made, before it trains.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        names = trainer.model._no_split_modules or ()
        plugin.transformer_cls_names_to_wrap = sorted(name for name in names if "Embedding" not in name)
