"""A probe: a small input and what the model answers to it, stored beside the weights, so that a reload can be proved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput
from hf_attn.hub.check import PROBE, model_class_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_SEED = 20
_TOLERANCE = 1e-4
"""Of the largest number, for a probe that another machine may have written: matrix products round as the CPU likes."""


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two that the model accepts, the same every time; one row padded where there is a mask."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.rand(2, config.num_channels, height, width, generator=generator)}
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    rows = (2, 2, length) if "MultipleChoice" in type(model).__name__ else (2, length)
    mask = torch.ones(rows, dtype=torch.long)
    mask[..., -1, length - length // 4 :] = 0
    return {"input_ids": torch.randint(0, config.vocab_size, rows, generator=generator), "attention_mask": mask}


def answer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of the model in evaluation, in float32; random mechanisms draw from a fixed seed."""
    import torch

    # weights read from a file lie at odd addresses, which changes the rounding of a matrix product
    copied: Any = copy.deepcopy(model)
    # what accelerate puts around a model that it trains in half precision
    copied.__dict__.pop("forward", None)
    copied.to("cpu").eval()
    batch = {name: x.to(copied.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which seeds GPUs as well
        torch.default_generator.manual_seed(_SEED)
        first = copied(**batch)[0]
        # a backbone gives a tuple of feature maps
        return (first[-1] if isinstance(first, tuple) else first).float()


def write_probe(model: PreTrainedModel, folder: Path) -> None:
    """Store the probe of `model` in `folder`."""
    from safetensors.torch import save_file

    inputs = probe_inputs(model)
    save_file({**inputs, "output": answer(model, inputs).contiguous()}, folder / PROBE, {"format": "pt"})


def check_probe(folder: Path, config: PreTrainedConfig, exact: bool = False) -> float:
    """Load the model in `folder` and compare its answer with the stored one; the largest relative difference.

    Where no probe is stored, the model is loaded and run all the same.

    Args:
        folder: a saved model.
        config: its config.
        exact: this process wrote the probe, so that every bit must agree.

    Raises:
        InvalidInput: the model does not load, or answers something else.
    """
    from safetensors.torch import load_file

    model = load_model(folder, config)
    try:
        if not (folder / PROBE).is_file():
            answer(model, probe_inputs(model))
            return 0.0
        stored = load_file(folder / PROBE)
        expected = stored.pop("output")
        found = answer(model, stored)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    except Exception as error:
        raise InvalidInput(f"the model in {str(folder)!r} cannot answer its probe ({error}).") from error
    if not difference <= (0 if exact else _TOLERANCE):
        raise InvalidInput(
            f"the model in {str(folder)!r} answers its probe with other numbers than it did when it was saved (relative "
            f"difference {difference:.1e}): weights or options were changed or not saved. Save the model again."
        )
    return difference


def load_model(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model in `folder`, of the class its config names, from safetensors only; every weight must be there."""
    family = model_class_of(folder, config)
    try:
        model, info = family.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise InvalidInput(f"the model in {str(folder)!r} does not load: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            names = ", ".join(sorted(map(str, info[problem]))[:3])
            raise InvalidInput(
                f"the weights in {str(folder)!r} are not those of {family.__name__}: {problem.replace('_', ' ')} {names}. "
                "Save the model again."
            )
    return model
