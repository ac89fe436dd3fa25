"""Train a vision transformer by SSTA: from labels, a supervised teacher and a self-supervised teaching assistant.

    trainer = HeadDistillationTrainer(model=student, ssta=SSTAConfig(teacher, assistant), args=..., train_dataset=...)
    trainer.train()                     # selects the heads first

Losses and paper: `hf_attn.recipes.ssta`. Teacher and assistant are frozen copies beside the student: they are neither
trained nor saved with it. Maps are exact, taken before dropout, of the last layer of each model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.recording import exact_copy
from hf_attn.models.wrapping import WrappedAttention, attention_modules, token_grid
from hf_attn.recipes.ssta import check_rows, check_weights, resize_attention, ssta_terms, weighted

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""(model, batch) -> (B,) loss of each example."""
IMPORTANCE = ("taylor", "ablation")
UNIFORM = 0.98
"""A head whose rows have more than this part of the largest possible entropy has little to teach."""


@dataclass(frozen=True)
class SSTAConfig:
    """What the student learns from.

    Attributes:
        teacher: an image classifier with the student's classes and size of pictures.
        assistant: any vision transformer with that size of pictures; its base model is used.
        importance: "taylor" (slope of the loss along a head's weight) or "ablation" (rise of the loss without the head).
        calibration_size: training examples that the importance is measured on.
        teacher_head, assistant_head: numbers of heads; None: the most important one, found before training.
        student_heads: the student's heads for the teacher and for the assistant; they may be one.
        alpha, temperature, lambda_teacher, lambda_assistant, kd: see `hf_attn.recipes.ssta.ssta_loss`.
    """

    teacher: PreTrainedModel
    assistant: PreTrainedModel
    importance: str = "taylor"
    calibration_size: int = 256
    teacher_head: int | None = None
    assistant_head: int | None = None
    student_heads: tuple[int, int] = (0, 1)
    alpha: float = 0.5
    temperature: float = 1.0
    lambda_teacher: float = 1.0
    lambda_assistant: float = 1.0
    kd: str = "soft"

    def __post_init__(self) -> None:
        check_weights(self.alpha, self.temperature, self.lambda_teacher, self.lambda_assistant, self.kd)
        if self.importance not in IMPORTANCE:
            raise InvalidOption(f"ssta: importance={self.importance!r} must be one of {', '.join(IMPORTANCE)}.")
        if self.calibration_size < 1:
            raise InvalidOption(f"ssta: calibration_size={self.calibration_size!r} must be at least 1.")
        if len(self.student_heads) != 2:
            raise InvalidOption(f"ssta: student_heads={self.student_heads!r} must be two numbers of heads.")


def last_attention(model: PreTrainedModel, role: str) -> Any:
    """The last attention module of `model`.

    Raises:
        Unsupported: no vision model, or its weights are no distributions, or dropout would change the maps.
    """
    name = f"ssta, {role} {type(model).__name__}"
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise Unsupported(name, "it takes no pixel_values", "Use a vision transformer")
    modules = list(attention_modules(model).values())
    if not modules:
        raise Unsupported(name, "its attention gives no maps", "Use a vision transformer such as ViT, or attn_vit")
    module: Any = modules[-1]
    if isinstance(module, WrappedAttention):
        capabilities = module.mechanism.capabilities
        if not (capabilities.attention_weights and capabilities.convex):
            raise Unsupported(
                f"{name}, {module.mechanism.name}",
                "it has no N x N weights whose rows are distributions",
                "Use a mechanism with such weights, such as softmax",
            )
        if role == "student" and capabilities.random:
            raise Unsupported(
                f"{name}, {module.mechanism.name}",
                "it may draw anew in training, and its map would be of another draw than its output",
                "Use a mechanism without random draws, such as softmax",
            )
    elif role == "student" and (dropout := getattr(module, "attention_dropout", 0.0)):
        raise Unsupported(
            name,
            f"attention_probs_dropout_prob={dropout} and its maps would be those after dropout",
            "Set attention_probs_dropout_prob=0.0",
        )
    return module


def heads_of(module: Any) -> int:
    """H of an attention module."""
    return module.mechanism.num_heads if isinstance(module, WrappedAttention) else module.num_attention_heads


@contextmanager
def attention_map(module: Any) -> Iterator[list[Tensor]]:
    """A list that holds the (B,H,N,N) map of the last call of an attention module, with gradients.

    A mechanism gives its naive weights; a stock module runs in its eager form meanwhile (whose softmax is in float32), the
    model's others as they are.
    """
    maps: list[Tensor] = []

    def computed(_: Any, args: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
        if isinstance(module, WrappedAttention):
            arguments = {key: value for key, value in call.items() if key != "dropout"}
            maps[:] = [module.mechanism.attention_weights(*args, **arguments)]
        else:
            maps[:] = [output[1]]

    config = module.config
    if isinstance(module, WrappedAttention):
        handle = module.mechanism.register_forward_hook(computed, with_kwargs=True)
    else:
        handle = module.register_forward_hook(computed, with_kwargs=True)
        module.config = copy.copy(config)
        module.config._attn_implementation_internal = "eager"
    try:
        yield maps
    finally:
        handle.remove()
        module.config = config


def measure_heads(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], loss_fn: LossFunction, method: str = "taylor"
) -> Tensor:
    """(H) importance of the heads of the last layer of `model`, which stays as it is.

    Args:
        model: a vision transformer.
        batches: arguments of `loss_fn`, at least one.
        loss_fn: the loss of each example.
        method: "taylor": mean of |dL/dx| for a factor x of the head's output; "ablation": mean of L(x=0) - L(x=1).
    """
    if method not in IMPORTANCE:
        raise InvalidOption(f"measure_heads: method={method!r} must be one of {', '.join(IMPORTANCE)}.")
    copied = exact_copy(model).eval().requires_grad_(False)
    module = last_attention(copied, "model")
    heads, examples, factor = heads_of(module), 0, torch.ones(0)
    handle = module.mechanism.register_forward_hook(lambda _, args, output: output * factor[..., None, None])
    total: Tensor | None = None
    try:
        for batch in batches:
            size = len(batch["pixel_values"])
            ones = torch.ones(size, heads, device=copied.device, dtype=copied.dtype)
            if method == "taylor":
                factor = ones.requires_grad_()
                with torch.enable_grad():
                    slope = torch.autograd.grad(loss_fn(copied, batch).sum(), factor)[0]
                found = slope.abs().sum(dim=0)
            else:
                with torch.no_grad():
                    factor = ones
                    rises = [-loss_fn(copied, batch).sum()] * heads
                    for head in range(heads):
                        factor = ones.clone()
                        factor[:, head] = 0
                        rises[head] = rises[head] + loss_fn(copied, batch).sum()
                found = torch.stack(rises)
            total = found if total is None else total + found
            examples += size
    finally:
        handle.remove()
    if total is None:
        raise InvalidInput("measure_heads: batches is empty; give at least one.")
    return total / examples


def classification_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    return functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")


def probe_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], classes: int) -> LossFunction:
    """The loss of a linear probe on the first token of `model`, trained on `batches`."""
    batches = list(batches)
    with torch.no_grad():
        features = torch.cat([_first_token(model, batch) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    weight = features.new_zeros(features.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss_of(features: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(features @ weight[:-1] + weight[-1], labels, reduction="none")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # a small penalty: without one, separable features have no finite best weight
        loss = loss_of(features, labels).mean() + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight.requires_grad_(False)
    return lambda copied, batch: loss_of(_first_token(copied, batch), batch["labels"])


def _first_token(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model.base_model(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]


class HeadDistillationTrainer(Trainer):
    """Trainer with SSTA's loss; evaluation is by cross-entropy alone, and the four terms are logged.

    Args:
        model: the student, an image classifier: ViT, or `attn_vit` with row-stochastic attention.
        ssta: what it learns from.
        kwargs: of Trainer.

    Raises:
        Unsupported: a model has no usable maps. InvalidInput: sizes, classes or numbers of heads do not fit.
    """

    def __init__(self, model: PreTrainedModel, ssta: SSTAConfig, **kwargs: Any):
        check_models(model, ssta)
        super().__init__(model=model, **kwargs)
        # the loss is a mean over the batch: Trainer divides it over accumulated steps
        self.model_accepts_loss_kwargs = False
        self.ssta = ssta
        copies: list[Any] = [exact_copy(m).eval().requires_grad_(False) for m in (ssta.teacher, ssta.assistant)]
        self.teacher, self.assistant = (copied.to(self.args.device) for copied in copies)
        self._sums: dict[str, list[Tensor]] = {}

    def select_heads(self, batches: Iterable[Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Importance of the heads of "teacher" and "assistant"; the largest become `ssta.teacher_head` and `assistant_head`.

        Args:
            batches: with `pixel_values` and `labels`; the first `calibration_size` training examples by default.

        Warns where a chosen head attends almost uniformly.
        """
        given = self._calibration() if batches is None else batches
        batches = [self._prepare_inputs(dict(batch)) for batch in given]
        probe = probe_loss(self.assistant, batches, self.teacher.config.num_labels)
        found = {
            "teacher": measure_heads(self.teacher, batches, classification_loss, self.ssta.importance),
            "assistant": measure_heads(self.assistant, batches, probe, self.ssta.importance),
        }
        # the first of equal ones
        best = {role: int((values == values.max()).nonzero()[0]) for role, values in found.items()}
        self.ssta = replace(self.ssta, teacher_head=best["teacher"], assistant_head=best["assistant"])
        for role, model in (("teacher", self.teacher), ("assistant", self.assistant)):
            rows = self._maps(model, batches[0]["pixel_values"], best[role])[1]
            entropy = torch.special.entr(rows).sum(-1).mean().item() / math.log(rows.shape[-1])
            if entropy > UNIFORM:
                warnings.warn(
                    f"ssta: head {best[role]} of the {role} is almost uniform ({entropy:.3f} of the largest entropy); "
                    "it has little to teach.",
                    stacklevel=2,
                )
        return found

    def _calibration(self) -> Iterator[Any]:
        left = self.ssta.calibration_size
        for batch in self.get_eval_dataloader(self.train_dataset):
            yield {name: batch[name][:left] for name in ("pixel_values", "labels")}
            left -= len(batch["labels"])
            if left <= 0:
                return

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after the heads that were not given are selected."""
        given = (self.ssta.teacher_head, self.ssta.assistant_head)
        if None in given:
            self.select_heads()
            chosen = (self.ssta.teacher_head, self.ssta.assistant_head)
            kept = [c if g is None else g for g, c in zip(given, chosen)]
            self.ssta = replace(self.ssta, teacher_head=kept[0], assistant_head=kept[1])
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _maps(self, model: PreTrainedModel, pixels: Tensor, head: int) -> tuple[Any, Tensor]:
        """Outputs and one head's (B,N,N) map of a frozen model."""
        used = model if model is self.teacher else model.base_model
        with attention_map(last_attention(model, "teacher")) as maps:
            output = used(pixel_values=pixels)
        return output, patches(maps[0][:, head], model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        ssta, pixels = self.ssta, inputs["pixel_values"]
        if ssta.teacher_head is None or ssta.assistant_head is None:
            raise InvalidOption(
                "ssta: no heads are selected. Call select_heads() or train(), or give both in SSTAConfig."
            )
        teacher, teacher_map = self._maps(self.teacher, pixels, ssta.teacher_head)
        _, assistant_map = self._maps(self.assistant, pixels, ssta.assistant_head)
        student: Any = self.accelerator.unwrap_model(model)
        with attention_map(last_attention(student, "student")) as maps:
            outputs = model(pixel_values=pixels)
        own = torch.stack([patches(maps[0][:, head], student) for head in ssta.student_heads], dim=1)
        side = math.isqrt(own.shape[-1] - 1)
        teacher_map, assistant_map = (resize_attention(target, side) for target in (teacher_map, assistant_map))
        terms = ssta_terms(
            outputs.logits, inputs["labels"], teacher.logits, own, teacher_map, assistant_map, ssta.temperature, ssta.kd
        )
        for name, term in terms.items():
            self._sums.setdefault(name, []).append(term.detach())
        loss = weighted(terms, ssta.alpha, ssta.lambda_teacher, ssta.lambda_assistant)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the mean of each term since the last time."""
        if "loss" in logs and self._sums:
            logs |= {f"loss_{name}": torch.stack(terms).mean().item() for name, terms in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)


def patches(attention: Tensor, model: Any) -> Tensor:
    """(B,N,N) maps of the first token and the patches; tokens between them are dropped and rows divided by their sum."""
    grid, _ = token_grid(model)
    extra = attention.shape[-1] - (grid[0] * grid[1] if grid else attention.shape[-1] - 1) - 1
    check_rows(attention, "attention")
    if extra < 0:
        raise InvalidInput(
            f"ssta: {type(model).__name__} has no token before its patches. Use a model with a CLS token."
        )
    if extra == 0:
        return attention
    kept = [0, *range(1 + extra, attention.shape[-1])]
    attention = attention[:, kept][..., kept]
    return attention / attention.sum(dim=-1, keepdim=True)


def check_models(student: PreTrainedModel, ssta: SSTAConfig) -> None:
    """Raise where teacher, assistant and student do not fit together."""
    models = {"student": student, "teacher": ssta.teacher, "assistant": ssta.assistant}
    for role, model in models.items():
        heads = heads_of(last_attention(model, role))
        chosen = ssta.student_heads if role == "student" else (getattr(ssta, f"{role}_head"),)
        for head in chosen:
            if head is not None and not 0 <= head < heads:
                raise InvalidInput(f"ssta: head {head} of the {role} must be from 0 to {heads - 1}.")
        if model.config.image_size != student.config.image_size:
            raise InvalidInput(
                f"ssta: the {role} takes pictures of {model.config.image_size} and the student of "
                f"{student.config.image_size}; all see the same tensor. Use models of one size."
            )
    if ssta.teacher.config.num_labels != student.config.num_labels:
        raise InvalidInput(
            f"ssta: the teacher has {ssta.teacher.config.num_labels} classes and the student {student.config.num_labels}."
        )
