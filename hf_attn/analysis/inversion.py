"""Plug-In Inversion: pictures that an image classifier takes for a class, made with augmentations alone.

Paper: Ghiasi, Kazemi, Reich, Zhu, Goldblum, Goldstein, "Plug-In Inversion: Model-Agnostic Inversion for Vision with Data
Augmentations", ICML 2022 (arXiv 2201.12961).

    minimise over x   mean over n copies of cross_entropy( model( resize( color_shift( jitter(x) ) ) ), class )

The picture grows in stages: noise is added around it (`way="center"`), or it is enlarged (`way="zoom"`). There is no
regulariser to tune; `tv_weight` adds one for comparison. Works for every image classifier of transformers. Pictures are
float (C,3,h,w) with values from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

STAGES = 8
"""The picture of the first stage has 2/8 of the side, that of the last all of it."""
WAYS = ("center", "mixed", "zoom")


def jitter(images: Tensor, shift: Tensor) -> Tensor:
    """Shift rows by `shift[0]` and columns by `shift[1]`, circularly. images (n,c,h,w)."""
    return images.roll((int(shift[0]), int(shift[1])), dims=(-2, -1))


def color_shift(images: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """images (n,c,h,w) * exp(log_std) + mean, both (n,c,1,1); values may leave [0, 1]."""
    return images * log_std.exp() + mean


def ensemble(images: Tensor, num_copies: int) -> Tensor:
    """(1,c,h,w) -> (n,c,h,w): copies, which are then augmented independently."""
    return images.expand(num_copies, -1, -1, -1)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The square window of side `size` in the middle of images (n,c,h,w), all of a side that is shorter."""
    top, left = (max(side // 2 - size // 2, 0) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear, without aligned corners. images (n,c,h,w)."""
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def grow(image: Tensor, padding: int, canvas: Tensor) -> Tensor:
    """Paste `image`, resized to the side of `canvas` (n,c,s,s) less `padding`, into the middle of the canvas."""
    size = canvas.shape[-1] - padding
    first = padding // 2
    out = canvas.clone()
    out[..., first : first + size, first : first + size] = resize(image, size)
    return out


def stage_sizes(image_size: int) -> Tensor:
    """int64: 2, 3, ... eighths of `image_size`, rounded down to whole steps, and `image_size` itself at the end."""
    step = image_size // STAGES
    sizes = list(range(2 * step, image_size + 1, step))
    return torch.tensor(sizes if sizes[-1] == image_size else [*sizes, image_size])


def augment(image: Tensor, shift: Tensor, mean: Tensor, log_std: Tensor, size: int, image_size: int) -> Tensor:
    """What the model sees of one picture (1,c,h,w): (n,c,image_size,image_size), n the number of colour shifts."""
    copies = ensemble(jitter(center_crop(image, size), shift), mean.shape[0])
    return resize(color_shift(copies, mean, log_std), image_size)


def inversion_loss(logits: Tensor, target: int) -> Tensor:
    """Mean cross-entropy of (n,classes) logits to one class."""
    return functional.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))


def total_variation(images: Tensor) -> Tensor:
    """(n,) mean absolute difference of neighbouring pixels of images (n,c,h,w), rows and columns added."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return down + (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class PlugInInversionConfig:
    """How a picture is made.

    Attributes:
        steps: steps of Adam a stage; the learning rate falls to 0 along a cosine in each stage.
        learning_rate: at the beginning of a stage.
        betas: of Adam, which starts afresh at each stage.
        num_copies: n, differently coloured copies of the picture that the loss is averaged over.
        jitter: largest circular shift, in pixels; None is 32, and a seventh of the side for models of less than 128.
        color_shift_mean, color_shift_std: bounds of the uniform shift and of the uniform logarithm of the factor.
        way: how the picture grows: "center" (noise around it), "zoom" (enlarged), "mixed" (half of each); None begins
            with a picture of full size in one stage, as plain optimisation does.
        tv_weight: weight of the total variation; 0, as in the paper's method.
        seed: of all that is random.
    """

    steps: int = 400
    learning_rate: float = 0.01
    betas: tuple[float, float] = (0.5, 0.99)
    num_copies: int = 8
    jitter: int | None = None
    color_shift_mean: float = 1.0
    color_shift_std: float = 1.0
    way: str | None = "center"
    tv_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("num_copies", 1), ("seed", 0), ("jitter", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and not (name == "jitter" and value is None):
                raise InvalidOption(f"{name}={value!r} must be a whole number of at least {least}.")
        for name in ("learning_rate", "color_shift_mean", "color_shift_std", "tv_weight"):
            if not getattr(self, name) >= 0:
                raise InvalidOption(f"{name}={getattr(self, name)!r} must not be negative.")
        if self.way is not None and self.way not in WAYS:
            raise InvalidOption(f"way={self.way!r} must be one of {', '.join(WAYS)}, or None for a single stage.")


@dataclass(frozen=True)
class InversionOutput:
    """Pictures (C,3,s,s) from 0 to 1, one a class, on the CPU; the model's logits for them (C,classes); stages' losses (S,C)."""

    images: Tensor
    logits: Tensor
    losses: Tensor
    targets: list[int]


class PlugInInverter:
    """Makes pictures that `model` takes for given classes.

    Args:
        model: an image classifier of transformers: called with `pixel_values`, it returns `logits`.
        image_processor: gives the size and the normalisation of its input, as of `AutoImageProcessor`.
        config: how the pictures are made.

    Raises:
        Unsupported: a text model, whose inputs are discrete, or one without logits.
    """

    def __init__(self, model: Any, image_processor: Any = None, config: PlugInInversionConfig | None = None):
        if getattr(model, "main_input_name", None) != "pixel_values":
            raise Unsupported(
                "inversion", f"{type(model).__name__} takes no pixel_values: inputs are discrete, and have no gradient",
                "Pass an image classifier",
            )  # fmt: skip
        size = getattr(model.config, "image_size", None)
        size = size if size is not None else _size_of(image_processor)
        if isinstance(size, (tuple, list)) and len(set(size)) == 1:
            size = size[0]
        if not isinstance(size, int) or size < STAGES:
            raise InvalidInput(
                f"inversion: image_size={size!r} must be the side of square pictures, at least {STAGES}."
            )
        self.model, self.image_size, self.config = model, size, config or PlugInInversionConfig()
        channels = getattr(model.config, "num_channels", 3)
        mean, std = (getattr(image_processor, n, None) or [0.5] * channels for n in ("image_mean", "image_std"))
        self._mean, self._std = (torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std))
        self._channels = channels

    def invert(
        self, targets: Sequence[int], callback: Callable[[int, Tensor], None] | None = None, progress: bool = True
    ) -> InversionOutput:
        """A picture for each class of `targets`.

        Args:
            targets: numbers of classes.
            callback: called after each stage with its number and the pictures so far.
            progress: show a bar.

        Raises:
            InvalidInput: a class that the model does not have.
        """
        classes = self.model.config.num_labels
        for target in targets:
            if not 0 <= target < classes:
                raise InvalidInput(f"inversion: target {target} must be a class of the model, 0 to {classes - 1}.")
        parameters = list(self.model.parameters())
        trained = [p.requires_grad for p in parameters]
        mode = self.model.training
        self.model.eval()
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            return self._invert(list(targets), callback, progress)
        finally:
            self.model.train(mode)
            for parameter, was in zip(parameters, trained, strict=True):
                parameter.requires_grad_(was)

    def _invert(self, targets: list[int], callback: Any, progress: bool) -> InversionOutput:
        from tqdm.auto import tqdm

        config, device = self.config, next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return (low + (high - low) * torch.rand(shape, generator=generator)).to(device)

        sizes = [self.image_size] if config.way is None else stage_sizes(self.image_size).tolist()
        limit = config.jitter
        if limit is None:
            limit = 32 if self.image_size >= 128 else self.image_size // 7
        images = uniform(0, 1, len(targets), self._channels, self.image_size, self.image_size)
        step, losses = self.image_size // STAGES, []
        with tqdm(total=len(sizes) * config.steps, desc="inversion", unit="step", disable=not progress) as bar:
            for stage, size in enumerate(sizes):
                if config.way is not None:
                    padding = {"zoom": 0, "mixed": step // 2, "center": step}[config.way]
                    canvas = uniform(0, 1, len(targets), self._channels, size, size)
                    images = grow(images, min(padding, size - 1), canvas)
                images = images.detach().requires_grad_()
                optimizer = torch.optim.Adam([images], config.learning_rate, config.betas)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
                for _ in range(config.steps):
                    shift = torch.randint(-limit, limit + 1, (2,), generator=generator)
                    shape = (config.num_copies, self._channels, 1, 1)
                    mean = uniform(-config.color_shift_mean, config.color_shift_mean, *shape)
                    log_std = uniform(-config.color_shift_std, config.color_shift_std, *shape)
                    loss = self._loss(images, targets, shift, mean, log_std, size)
                    optimizer.zero_grad()
                    # summed over classes: each picture gets the gradient it would get alone
                    (loss + config.tv_weight * total_variation(images)).sum().backward()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        images.clamp_(0, 1)
                    bar.update()
                losses.append(loss.detach().cpu())
                bar.set_postfix(side=size, loss=f"{loss.mean().item():.3f}")
                if callback is not None:
                    callback(stage, images.detach().cpu())
        images = images.detach()
        with torch.no_grad():
            logits = self.logits(images)
        return InversionOutput(images.cpu(), logits.cpu(), torch.stack(losses), targets)

    def _loss(
        self, images: Tensor, targets: list[int], shift: Tensor, mean: Tensor, log_std: Tensor, size: int
    ) -> Tensor:
        """(C,) loss of each picture."""
        seen = [augment(image[None], shift, mean, log_std, size, self.image_size) for image in images]
        logits = self.logits(torch.cat(seen)).unflatten(0, (len(targets), -1))
        return torch.stack([inversion_loss(own, target) for own, target in zip(logits, targets, strict=True)])

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits for pictures (n,3,h,w) from 0 to 1, resized and normalised as it wants them."""
        pixels = (resize(images, self.image_size) - self._mean.to(images.device)) / self._std.to(images.device)
        return self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype)).logits.float()


def _size_of(image_processor: Any) -> Any:
    size = getattr(image_processor, "size", None)
    return (size["height"], size["width"]) if size and "height" in size else None


def draw(output: InversionOutput, path: Any, labels: Sequence[str] | None = None) -> None:
    """The pictures in a row as a PNG, each with its class and the probability that the model gives it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(output.targets), 10)
    rows = -(-len(output.targets) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    probability = output.logits.softmax(dim=-1)
    for axis in axes:
        axis.axis("off")
    for axis, image, target, row in zip(axes, output.images, output.targets, probability):
        picture = image.permute(1, 2, 0).numpy()
        axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{labels[target] if labels else target}\n{row[target]:.0%}", fontsize="small")
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error
