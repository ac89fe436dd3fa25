"""Stage one of HOWM: slots that explain a picture, trained by reconstruction.

Slot attention of Locatello et al., NeurIPS 2020, with the small CNN of Zhao et al., ICML 2022 (arXiv 2204.13661).

    inputs = MLP(CNN(picture) + positions)                 a grid of (image_size / patch_size)^2
    slots  = slot attention over the inputs                (B,K,S)
    picture = sum over slots of mask_k * colours_k,  masks = softmax over slots,  both decoded from slot k alone

Shapes: pictures (B,C,H,H), H = config.image_size; g = H / patch_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hf_attn.errors import InvalidInput
from hf_attn.models.saving import SavedModelMixin
from hf_attn.models.world_model_config import WorldModelConfig
from hf_attn.models.world_model_layers import SlotAttention

_INITIALISED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GRUCell, SlotAttention)


@dataclass
class SlotAttentionOutput(ModelOutput):
    """What a slot attention model sees.

    Attributes:
        loss: mean squared error of the reconstruction.
        slots: (B,K,S).
        attention: (B,K,g,g), how each place is shared out among the slots; sums to 1 over the slots.
        reconstruction: (B,C,H,H).
        masks: (B,K,H,H), how each pixel is shared out among the slots.
    """

    loss: Tensor | None = None
    slots: Tensor | None = None
    attention: Tensor | None = None
    reconstruction: Tensor | None = None
    masks: Tensor | None = None


class WorldModelPreTrainedModel(SavedModelMixin, PreTrainedModel):
    """Loading, saving and initialisation of world models and of their vision."""

    config_class = WorldModelConfig
    config: WorldModelConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initial weights, as the paper's code
        if isinstance(module, _INITIALISED):
            module.reset_parameters()
        elif isinstance(module, SlotAttentionModel):
            module.reset_noise()
        else:
            super()._init_weights(module)


class SoftPosition(nn.Module):
    """Adds a linear map of (row, column, 1 - row, 1 - column), each from 0 to 1, to features (B,C,g,g)."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection = nn.Linear(4, channels)

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, n, device=features.device) for n in features.shape[2:])
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        places = torch.stack([row, column, 1 - row, 1 - column], dim=-1).to(features.dtype)
        return features + self.projection(places).permute(2, 0, 1)


class SlotAttentionModel(WorldModelPreTrainedModel):
    """Slots of a picture, and the picture as the slots tell it.

    Args:
        config: a WorldModelConfig with encoder="cnn".

    Raises:
        InvalidInput: the config's encoder is another one.
    """

    noise: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        if config.encoder != "cnn":
            raise InvalidInput(f"SlotAttentionModel: encoder={config.encoder!r} has no vision. Set encoder='cnn'.")
        first, second, third = config.encoder_channels
        size, hidden, patch = config.slot_size, config.decoder_channels, config.patch_size
        self.encoder = nn.Sequential(
            *_stage(nn.Conv2d(config.num_channels, first, patch, stride=patch)),
            *_stage(nn.Conv2d(first, second, 3, padding=1)),
            *_stage(nn.Conv2d(second, third, 1)),
            nn.Conv2d(third, third, 1),
            SoftPosition(third),
        )
        self.inputs = nn.Sequential(nn.Linear(third, size), nn.LeakyReLU(), nn.Linear(size, size))
        self.slot_attention = SlotAttention(size, size, config.num_slots, config.num_iterations, config.mlp_hidden_size)
        # the last step spreads each place of the grid over the pixels of its patch
        self.decoder = nn.Sequential(
            SoftPosition(size),
            nn.ConvTranspose2d(size, hidden, 5, padding=2),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(hidden, hidden, 3, padding=1),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(hidden, config.num_channels + 1, patch, stride=patch),
        )
        self.register_buffer("noise", torch.empty(1, config.num_slots, size), persistent=False)
        self.post_init()

    def reset_noise(self) -> None:
        """Draw the noise of `deterministic_slots`, the same in every process."""
        self.noise.copy_(torch.randn(self.noise.shape, generator=torch.Generator().manual_seed(0)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        slots: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> SlotAttentionOutput:
        """Slots of pictures.

        Args:
            pixel_values: (B,C,H,H), from 0 to 1.
            slots: (B,K,S) initial slots; None: drawn, in evaluation too (see `deterministic_slots`).
            return_loss: decode the slots as well; False leaves loss, reconstruction and masks out.
            kwargs: return_dict.

        Raises:
            InvalidInput: wrong shapes.
        """
        config, side = self.config, self.config.image_size
        if pixel_values.shape[1:] != (config.num_channels, side, side):
            raise InvalidInput(
                f"pixel_values {tuple(pixel_values.shape)} must be (B, {config.num_channels}, {side}, {side}), the sizes of "
                "the config."
            )
        pixels = pixel_values.to(self.inputs[0].weight.dtype)
        grid = self.encoder(pixels)
        inputs = self.inputs(grid.flatten(2).transpose(1, 2))
        if slots is None and config.deterministic_slots:
            slots = self.slot_attention.initial_slots(self.noise).expand(len(pixels), -1, -1)
        slots = self.slot_attention(inputs, slots)
        attention = self.slot_attention.weights(inputs, slots).transpose(1, 2).unflatten(2, grid.shape[2:])
        if not return_loss:
            return SlotAttentionOutput(slots=slots, attention=attention)
        reconstruction, masks = self.decode(slots)
        wide = torch.promote_types(pixels.dtype, torch.float32)
        loss = functional.mse_loss(reconstruction.to(wide), pixels.to(wide))
        return SlotAttentionOutput(loss, slots, attention, reconstruction, masks)

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The picture (B,C,H,H) that slots (B,K,S) tell, and the masks (B,K,H,H)."""
        side = self.config.image_size // self.config.patch_size
        cells = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, side, side)
        decoded = self.decoder(cells).unflatten(0, slots.shape[:2])
        colours, masks = decoded[:, :, :-1], decoded[:, :, -1].softmax(1)
        return (masks[:, :, None] * colours).sum(1), masks


def _stage(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU()
