"""What a population is trained by: its arguments, the members' seeds, their data in memory and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler, set_seed

from hf_attn.errors import InvalidInput, InvalidOption, near
from hf_attn.recipes.population import EXPLORE, check_space

TUNED = ("learning_rate", "weight_decay")
"""The hyperparameters that each member has of its own."""


@dataclass
class PopulationArguments:
    """Arguments of `PopulationTrainer`; names that `TrainingArguments` has mean the same.

    Attributes:
        output_dir: where members are saved.
        population_size: number of members P.
        space: name -> (kind, low, high), the priors of learning_rate and weight_decay; see `population.resample`. What is
            not in it is the same for all members.
        exploit_every: training steps between rounds of exploiting and exploring; 0 for none.
        bottom_frac: the share of members that a round may replace.
        explore: "resample" or "perturb".
        same_batch: all members see the same batches, in the order of member 0.
        metric_for_best_model: what `evaluate` returns that ranks members.
        greater_is_better: default: True unless the metric's name ends in "loss".
    """

    output_dir: str
    population_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    space: dict[str, Any] = field(default_factory=dict)
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    seed: int = 0
    exploit_every: int = 0
    bottom_frac: float = 0.4
    explore: str = "resample"
    same_batch: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        for name in ("population_size", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"PopulationArguments: {name}={getattr(self, name)!r} must be at least 1.")
        for name in (
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "exploit_every",
            "num_train_epochs",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidOption(f"PopulationArguments: {name}={getattr(self, name)!r} must be at least 0.")
        check_space(self.space)
        for name in set(self.space) - set(TUNED):
            raise InvalidOption(
                f"PopulationArguments: space has {name!r}{near(name, TUNED)}; members differ in {' and '.join(TUNED)}."
            )
        if self.explore not in EXPLORE:
            raise InvalidOption(f"PopulationArguments: explore={self.explore!r} must be one of {', '.join(EXPLORE)}.")
        if not 0 <= self.bottom_frac < 1:
            raise InvalidOption(
                f"PopulationArguments: bottom_frac={self.bottom_frac!r} must be at least 0 and below 1."
            )
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if not self.metric_for_best_model.startswith("eval_"):
            self.metric_for_best_model = f"eval_{self.metric_for_best_model}"


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which the member of this seed sees `count` examples."""
    return torch.randperm(count, generator=generator_of(seed, epoch + 1))


def generator_of(*seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers below 2**20."""
    return torch.Generator().manual_seed(sum(number << 20 * place for place, number in enumerate(seeds)))


def make_members(
    models: Callable[[], PreTrainedModel] | Sequence[PreTrainedModel], args: PopulationArguments
) -> list[PreTrainedModel]:
    if callable(models):
        made = []
        for i in range(args.population_size):
            set_seed(args.seed + i)
            made.append(models())
        return made
    if len(models) != args.population_size:
        raise InvalidInput(
            f"PopulationTrainer: {len(models)} models were given, and population_size is {args.population_size}."
        )
    return list(models)


def collate(
    data: Any, collator: Callable[[list[Any]], Mapping[str, Any]], name: str, device: torch.device
) -> dict[str, Tensor]:
    if not len(data):
        raise InvalidInput(f"PopulationTrainer: {name} is empty.")
    made = collator([data[i] for i in range(len(data))])
    tensors = {n: t.to(device) for n, t in made.items() if isinstance(t, Tensor)}
    if "labels" not in tensors or any(len(t) != len(data) for t in tensors.values()):
        raise InvalidInput(
            f"PopulationTrainer: {name} must give labels, and one row of every tensor for each example; got {list(made)}."
        )
    return tensors


def schedule(args: PopulationArguments, steps: int) -> list[float]:
    """What the learning rates are multiplied by in each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates
