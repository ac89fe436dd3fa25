"""Images: the processor that fits a model, pixels, hidden patches, and predictions as a reader sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.data import to_pixels
from hf_attn.recipes.language import Redrawn, Sample
from hf_attn.recipes.objectives import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_attn.recipes.tasks import Setting


def image_processor(config: PreTrainedConfig) -> Any:
    """The image processor of ViT that scales pictures to what `config` takes, with pixels from -1 to 1."""
    from transformers import ViTImageProcessorPil

    check_channels(config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def load_processor(name: str) -> Any:
    """The image processor of a checkpoint."""
    # from its own module: transformers 5.17 hides the public name where torchvision is missing
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"model={name!r} has no image processor that loads: {error}") from error


def check_channels(config: PreTrainedConfig) -> None:
    """Raise for a model that does not take colour."""
    if config.num_channels != 3:
        raise InvalidOption(
            f"config: num_channels={config.num_channels!r} must be 3: pictures are handed over as RGB, also by pipelines."
        )


def pixels(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """`pixel_values` and `labels`."""
    from datasets import DatasetDict

    return dict(to_pixels(DatasetDict(splits), setting.processor))


def hidden_patches(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """`pixel_values`, the patches that are hidden, and the hidden pixels as labels."""
    share = 0.6 if setting.data.mask_probability is None else setting.data.mask_probability
    side = setting.config.patch_size

    def hide(example: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        values = torch.as_tensor(example["pixel_values"])
        rows, columns = values.shape[-2] // side, values.shape[-1] // side
        places = random.permutation(rows * columns)[: max(round(share * rows * columns), 1)]
        hidden = torch.zeros(rows * columns, dtype=torch.bool)
        hidden[torch.as_tensor(places)] = True
        wide = hidden.view(rows, columns).repeat_interleave(side, 0).repeat_interleave(side, 1)
        return {
            "pixel_values": values,
            "bool_masked_pos": hidden,
            "labels": torch.where(wide, values, torch.tensor(float(IGNORED))),
        }

    data = pixels(splits, setting)
    return {name: Redrawn(split, hide, setting.seed + number) for number, (name, split) in enumerate(data.items())}


def show_classes(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """Images, by number, with their labels, true and predicted."""
    samples = []
    for index in range(min(setting.data.samples, len(data))):
        with torch.no_grad():
            said = model(pixel_values=data[index]["pixel_values"][None].to(model.device)).logits.argmax(-1).item()
        samples.append(Sample(f"test image {index}", setting.labels[int(data[index]["labels"])], setting.labels[said]))
    return samples


def show_patches(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """The mean absolute error over the hidden pixels of single images, beside that of the mean of what is seen."""
    samples = []
    for index in range(min(setting.data.samples, len(data))):
        example = data[index]
        hidden = example["labels"] != IGNORED
        with torch.no_grad():
            made = model(
                pixel_values=example["pixel_values"][None].to(model.device),
                bool_masked_pos=example["bool_masked_pos"][None].to(model.device),
            ).reconstruction[0]
        seen = example["pixel_values"][~hidden].mean()
        samples.append(
            Sample(
                given=f"test image {index}, {int(example['bool_masked_pos'].sum())} hidden patches",
                expected=f"error {(seen - example['labels'][hidden]).abs().mean():.3f} from the mean of the seen pixels",
                predicted=f"error {(made.cpu() - example['labels'])[hidden].abs().mean():.3f}",
            )
        )
    return samples
