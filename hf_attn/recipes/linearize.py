"""Turn a pretrained softmax model into any mechanism: attention transfer, then distillation.

    result = linearize(model, "lara", batches, LinearizeOptions(transfer_steps=200, distill_steps=400))
    result.model.save_pretrained("minilm-lara")

1. Attention transfer. Every layer's mechanism gets what the softmax layer gets on real data, and learns to return what
   that one returns. Layers learn apart from each other: no error of an earlier layer reaches a later one.
2. Distillation. The whole model learns the hidden states of the original after every layer, and its logits (or, where
   it has none, its mean-pooled embedding).

The two stages are those of Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024, here for any
mechanism; the losses of the second stage are choices made here. The model is trained as it is evaluated: without
dropout, and random mechanisms keep their saved draws.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_attn.analysis.fidelity import Report, fidelity
from hf_attn.analysis.outputs import Batch, embedding, hidden_states, logits, run, token_mask
from hf_attn.errors import HfAttnError, InvalidInput, InvalidOption, Unsupported
from hf_attn.models.recording import (
    Recorded,
    converted_copy,
    exact_copy,
    mechanisms,
    real_tokens,
    recording,
    replay,
    require_calls,
)
from hf_attn.models.wrapping import attention_modules
from hf_attn.recipes.linearize_report import LinearizeResult

WARM_UP = 0.1
"""Part of the steps in which the learning rate rises; it then falls to zero along a cosine."""
CLIP = 1.0
"""Largest norm of a step's gradients: of one layer in the first stage, of the model in the second."""


class Diverged(HfAttnError, RuntimeError):
    """A loss is no finite number any more."""


@dataclass(frozen=True)
class LinearizeOptions:
    """How to linearise.

    Attributes:
        transfer_steps: steps of the first stage, one batch each.
        distill_steps: steps of the second stage.
        train_projections: the first stage also trains what makes queries, keys and values of a layer, besides the
            mechanism. Mechanisms without parameters have nothing else to train.
        lora_rank: the second stage trains LoRA updates of that rank of the linear maps in the attention modules, and the
            mechanisms; they are merged into the weights at the end. 0: every parameter but the input embeddings.
        transfer_rate: largest learning rate of the first stage.
        distill_rate: largest learning rate of the second stage.
        hidden_weight: weight of the hidden states beside the logits or embeddings.
        seed: of the mechanisms' parameters and draws, and of the order of the batches.
    """

    transfer_steps: int = 200
    distill_steps: int = 200
    train_projections: bool = False
    lora_rank: int = 0
    transfer_rate: float = 1e-3
    distill_rate: float = 1e-4
    hidden_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("transfer_steps", "distill_steps", "lora_rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidOption(f"linearize: {name}={value!r} must be an integer of at least 0.")
        for name in ("transfer_rate", "distill_rate", "hidden_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InvalidOption(f"linearize: {name}={value!r} must be a number of at least 0.")
        if not isinstance(self.train_projections, bool):
            raise InvalidOption(f"linearize: train_projections={self.train_projections!r} must be true or false.")


def linearize(
    model: PreTrainedModel,
    attention: str | dict[str, Any],
    batches: Sequence[Batch],
    options: LinearizeOptions | None = None,
    held_out: Sequence[Batch] = (),
) -> LinearizeResult:
    """A copy of `model` with other attention, trained to compute what `model` computes.

    Args:
        model: any model that `hf_attn.convert` accepts; it stays as it is.
        attention: a mechanism, or a choice by layer, as `hf_attn.convert` takes it.
        batches: arguments of the model's forward pass, one step each, over and over in shuffled order.
        options: steps, learning rates, seed.
        held_out: batches to measure the fidelity on, before, between and after the stages.

    Raises:
        Unsupported: a mechanism is not defined in this model, the first stage has nothing to train, or PEFT is missing.
        InvalidInput: there is no batch to train on, or `model` has this attention already.
        Diverged: a loss became infinite or no number.
    """
    options = options or LinearizeOptions()
    if options.lora_rank and importlib.util.find_spec("peft") is None:
        raise Unsupported("linearize, lora_rank", "the package peft is not installed", "pip install peft")
    if not batches and options.transfer_steps + options.distill_steps:
        raise InvalidInput("linearize: batches is empty; give at least one batch to train on, or set both steps to 0.")
    student = converted_copy(model, attention, options.seed).eval()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    teacher = exact_copy(model).eval()
    layers = changed_layers(teacher, student)
    if not layers:
        raise InvalidInput(f"linearize: attention={attention!r} is what every layer has already; choose another one.")
    if options.transfer_steps and not options.train_projections:
        check_learned(student, layers)

    stages: dict[str, Report] = {}

    def measure(stage: str) -> None:
        if held_out:
            stages[stage] = fidelity(teacher, student, held_out, rows=False)

    transferred: list[float] = []
    distilled: list[float] = []
    measure("before")
    seconds = -time.perf_counter()
    if options.transfer_steps:
        transferred = transfer(teacher, student, batches, layers, options)
        seconds += time.perf_counter()
        measure("after transfer")
        seconds -= time.perf_counter()
    if options.distill_steps:
        distilled = distill(teacher, student, batches, options)
    seconds += time.perf_counter()
    if options.distill_steps:
        measure("after distillation")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return LinearizeResult(student, stages, tuple(transferred), tuple(distilled), seconds)


def changed_layers(teacher: nn.Module, student: nn.Module) -> list[str]:
    """Paths of the attention modules whose mechanism differs from the teacher's."""
    ours, theirs = mechanisms(student), mechanisms(teacher)
    return [
        path
        for path, mechanism in ours.items()
        if (mechanism.name, mechanism.options) != (theirs[path].name, theirs[path].options)
    ]


def check_learned(student: nn.Module, layers: Sequence[str]) -> None:
    """Raise where attention transfer would have no parameter to train."""
    ours = mechanisms(student)
    if not any(True for path in layers for _ in ours[path].parameters()):
        names = ", ".join(dict.fromkeys(ours[path].name for path in layers))
        raise Unsupported(
            f"linearize, {names}",
            "attention transfer trains the parameters of the mechanisms, and there are none under these options",
            "Set train_projections=True to train the layers' projections to queries, keys and values as well, or "
            "transfer_steps=0 to skip the stage",
        )


def transfer(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Sequence[str],
    options: LinearizeOptions,
) -> list[float]:
    """The first stage: every mechanism learns what the teacher's returns for the same layer input."""
    modules = {path: module for path, module in attention_modules(student).items() if path in layers}
    student.requires_grad_(False)
    for path, module in modules.items():
        # what comes after the mechanism in its module gets no gradient from this loss, and so does not change
        (module if options.train_projections else mechanisms(student)[path]).requires_grad_(True)
    losses: list[float] = []
    with training(student, options.transfer_rate, options.transfer_steps) as step:
        for batch in shuffled(batches, options.transfer_steps, options.seed, "attention transfer", losses):
            with torch.no_grad(), recording(teacher) as calls:
                run(teacher, batch)
            require_calls(calls)
            errors = []
            for path, module in modules.items():
                # one layer at a time: its graph is gone before the next one is made
                error = output_error(calls[path], replay(module, calls[path]))
                error.backward()
                nn.utils.clip_grad_norm_(module.parameters(), CLIP)
                errors.append(error.item())
            step()
            losses.append(sum(errors) / len(errors))
    return losses


def output_error(wanted: Recorded, got: Recorded) -> Tensor:
    """|got - wanted|^2 / |wanted|^2 over the real tokens of all heads."""
    mask = real_tokens(wanted)[:, None, :, None]
    return relative_error(got.output, wanted.output, mask)


def relative_error(got: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """|got - wanted|^2 / |wanted|^2 where `mask` (which broadcasts) is True."""
    wanted = wanted.to(got.dtype)
    return (got - wanted).mul(mask).square().sum() / wanted.mul(mask).square().sum().clamp(
        min=torch.finfo(got.dtype).tiny
    )


def distill(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Batch], options: LinearizeOptions
) -> list[float]:
    """The second stage: the whole model learns the teacher's hidden states, and its logits or embeddings."""
    losses: list[float] = []
    with adapted(student, options), training(student, options.distill_rate, options.distill_steps) as step:
        for batch in shuffled(batches, options.distill_steps, options.seed + 1, "distillation", losses):
            with torch.no_grad():
                wanted = run(teacher, batch)
            loss = distillation_loss(run(student, batch), wanted, batch, options.hidden_weight)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            step()
            losses.append(loss.item())
    return losses


def distillation_loss(got: Any, wanted: Any, batch: Batch, hidden_weight: float) -> Tensor:
    """Kullback-Leibler divergence of the logits, or 1 - cosine of the embeddings, and errors of the hidden states."""
    ours, theirs = hidden_states(got), hidden_states(wanted)
    mask = token_mask(batch, got)
    hidden = [relative_error(a, b, mask[..., None]) for a, b in zip(ours[1:], theirs[1:])]
    predictions, targets = logits(got, mask), logits(wanted, mask)
    if predictions:
        pairs = [(predictions[name].log_softmax(-1), targets[name].log_softmax(-1)) for name in predictions]
        heads = [functional.kl_div(a, b.to(a.dtype), reduction="batchmean", log_target=True) for a, b in pairs]
    else:
        pair = embedding(ours[-1], mask), embedding(theirs[-1], mask)
        heads = [1 - functional.cosine_similarity(pair[0], pair[1].to(pair[0].dtype)).mean()]
    return torch.stack(heads).sum() + hidden_weight * torch.stack(hidden).mean()


@contextmanager
def adapted(student: PreTrainedModel, options: LinearizeOptions) -> Iterator[None]:
    """What the second stage trains: LoRA updates and the mechanisms, or everything but the input embeddings."""
    student.requires_grad_(not options.lora_rank)
    for embeddings in input_embeddings(student):
        embeddings.requires_grad_(False)
    if not options.lora_rank:
        yield
        return
    from peft import LoraConfig, get_peft_model

    modules = attention_modules(student)
    targets = [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, Conv1D)) and not name.startswith("mechanism.")
    ]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(student.get_submodule(name), Conv1D) for name in targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        wrapper = get_peft_model(student, config)
    for mechanism in mechanisms(student).values():
        mechanism.requires_grad_(True)
    try:
        yield
    finally:
        wrapper.merge_and_unload()


def input_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """What a model looks its tokens up in, or makes of patches; nothing where transformers does not say."""
    try:
        return [model.get_input_embeddings()]
    except NotImplementedError:
        return []


@contextmanager
def training(student: nn.Module, rate: float, steps: int) -> Iterator[Any]:
    """A function that takes one step of AdamW with the gradients there are."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    rising = max(1, round(WARM_UP * steps))

    def factor(done: int) -> float:
        if done < rising:
            return (done + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (done - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step() -> None:
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    yield step


def shuffled(batches: Sequence[Batch], steps: int, seed: int, title: str, losses: Sequence[float]) -> Iterator[Batch]:
    """`steps` batches, every one once before any comes again, under a progress bar that shows the last loss."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    with tqdm(total=steps, desc=title, unit="step", disable=None) as bar:
        for _ in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            yield batches[order.pop()]
            if not math.isfinite(losses[-1]):
                raise Diverged(f"{title}: the loss of step {len(losses)} is {losses[-1]}. Use a smaller learning rate.")
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
