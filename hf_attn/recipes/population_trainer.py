"""Train a population of Hugging Face models in one process, each with its own learning rate, weight decay and seed.

    trainer = PopulationTrainer(model_init, PopulationArguments("runs/digits", population_size=16), train, test)
    trainer.train()
    trainer.save_model()

Method: see `hf_attn.recipes.population`. With `exploit_every`, weak members become copies of better ones as they go
(population-based training); without it, the result is that of separate runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, default_data_collator

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.population import pbt_step, resample
from hf_attn.recipes.population_arguments import (
    TUNED,
    PopulationArguments,
    collate,
    epoch_order,
    generator_of,
    make_members,
    schedule,
)
from hf_attn.recipes.population_members import Members


class PopulationTrainer:
    """Trains P models at once.

    Args:
        models: `model_init`, called P times, each after `set_seed(seed + i)`; or the P models themselves.
        args: see `PopulationArguments`.
        train_dataset, eval_dataset: sequences of examples with labels. They are collated once and kept in memory.
        data_collator: makes tensors of all examples; pads texts to one length.
        compute_metrics: as in transformers' Trainer, called for each member.
        hyperparameters: name -> P values; instead of a draw from `args.space`.

    Attributes:
        members: the stacked models.
        hyperparameters: name -> (P) float64.
        history: one dict a member and evaluation, with step, hyperparameters and the member it came from (`source`).
        step_number: training steps done.
    """

    def __init__(
        self,
        models: Callable[[], PreTrainedModel] | Sequence[PreTrainedModel],
        args: PopulationArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        hyperparameters: Mapping[str, Sequence[float]] | None = None,
    ):
        self.args, self.compute_metrics = args, compute_metrics
        if args.exploit_every and (eval_dataset is None or not args.space):
            raise InvalidOption(
                "PopulationTrainer: exploit_every needs an eval_dataset to rank members, and a space to draw from."
            )
        self.members = Members(make_members(models, args), (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
        self.train_data = collate(train_dataset, data_collator, "train_dataset", self.members.device)
        self.eval_data = (
            None if eval_dataset is None else collate(eval_dataset, data_collator, "eval_dataset", self.members.device)
        )
        self.hyperparameters = self._start(hyperparameters or {})
        self.history: list[dict[str, Any]] = []
        self.step_number = 0
        self.source = torch.arange(args.population_size, device=self.members.device)
        count = len(next(iter(self.train_data.values())))
        self.per_epoch = -(-count // args.per_device_train_batch_size)
        self.total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.per_epoch)
        self.rate = schedule(args, self.total_steps)

    def train(self, steps: int | None = None) -> list[dict[str, Any]]:
        """Train to the end, or for `steps` steps; returns `history`."""
        end = self.total_steps if steps is None else min(self.total_steps, self.step_number + steps)
        losses = None
        with tqdm(total=end, initial=self.step_number, desc="population", disable=self.args.disable_tqdm) as bar:
            for batch in self._batches(end):
                learning_rate = self.hyperparameters["learning_rate"] * self.rate[self.step_number]
                losses = self.members.step(
                    batch,
                    learning_rate,
                    self.hyperparameters["weight_decay"],
                    self.args.max_grad_norm,
                    self.args.same_batch,
                )
                self.step_number += 1
                bar.update()
                if self.step_number % 10 == 0 or self.step_number == end:
                    bar.set_postfix_str(_spread("loss", losses.tolist()))
                every = self.args.exploit_every
                if every and self.step_number % every == 0 and self.step_number < self.total_steps:
                    told = self._exploit()
                    if not self.args.disable_tqdm:
                        bar.write(f"step {self.step_number}: {told}")
        if self.eval_data is not None and self.step_number == self.total_steps:
            self._record(self.evaluate())
        return self.history

    def evaluate(self) -> list[dict[str, float]]:
        """The metrics of each member on `eval_dataset`."""
        if self.eval_data is None:
            raise InvalidInput("PopulationTrainer.evaluate: there is no eval_dataset.")
        count = len(next(iter(self.eval_data.values())))
        total, predictions = torch.zeros(self.members.size, device=self.members.device), []
        for rows in torch.arange(count).split(self.args.per_device_eval_batch_size):
            losses, logits = self.members.predict({n: t[rows] for n, t in self.eval_data.items()})
            total = total + losses * len(rows)
            predictions.append(logits.cpu())
        found: list[dict[str, float]] = [{"eval_loss": loss} for loss in (total / count).tolist()]
        if self.compute_metrics is not None:
            labels = self.eval_data["labels"].cpu().numpy()
            for row, guess in zip(found, torch.cat(predictions, dim=1).numpy()):
                metrics = self.compute_metrics(EvalPrediction(predictions=guess, label_ids=labels))
                row |= {n if n.startswith("eval_") else f"eval_{n}": float(v) for n, v in metrics.items()}
        return found

    def best_member(self) -> int:
        """The number of the member that `metric_for_best_model` ranks first; a NaN is the worst."""
        return int(self._returns(self.evaluate()).nan_to_num(-math.inf).argmax())

    def save_model(self, member: int | str = "best", output_dir: str | None = None) -> list[Path]:
        """Save a member (its number, "best" or "all") as a folder that `from_pretrained` loads; returns the folders."""
        size = self.members.size
        if member not in ("best", "all") and not (isinstance(member, int) and 0 <= member < size):
            raise InvalidOption(
                f'save_model: member={member!r} must be "best", "all" or a number from 0 to {size - 1}.'
            )
        root = Path(output_dir or self.args.output_dir)
        chosen = {f"member_{i}": i for i in range(size)} if member == "all" else {f"member_{member}": member}
        if member == "best":
            chosen = {"best": self.best_member()}
        for name, index in chosen.items():
            self.members.model(int(index)).save_pretrained(root / name)
        return [root / name for name in chosen]

    def push_to_hub(self, repo_id: str, member: int | None = None, **options: Any) -> Any:
        """Publish a member, by default the best; `options` are those of the model's own `push_to_hub`."""
        return self.members.model(self.best_member() if member is None else member).push_to_hub(repo_id, **options)  # type: ignore[arg-type]

    def save_state(self, folder: str | Path) -> None:
        """Save all members and their optimisers; `load_state` goes on with the same next step (dropout aside)."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self._tensors().items()}, path / "population.safetensors")
        (path / "population.json").write_text(json.dumps({"step": self.step_number, "history": self.history}))

    def load_state(self, folder: str | Path) -> None:
        """Go on from `save_state`; the trainer must have been made with the same arguments."""
        path = Path(folder)
        tensors = load_file(path / "population.safetensors", device=str(self.members.device))
        mine = {name: (t.shape, t.dtype) for name, t in self._tensors().items()}
        if {name: (t.shape, t.dtype) for name, t in tensors.items()} != mine:
            raise InvalidInput(
                f"load_state: {path} holds another population: names, shapes or types of its tensors differ."
            )
        for name, target in self._tensors().items():
            target.copy_(tensors[name])
        saved = json.loads((path / "population.json").read_text())
        self.step_number, self.history = saved["step"], saved["history"]

    def _tensors(self) -> dict[str, Tensor]:
        members = self.members
        parts = {"weights": members.weights, "m": members.state["m"], "v": members.state["v"], "own": members.own}
        parts |= {"hyperparameters": self.hyperparameters, "rest": {"t": members.state["t"], "source": self.source}}
        return {f"{part}.{name}": t for part, tree in parts.items() for name, t in tree.items()}

    def _start(self, given: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
        size, device = self.args.population_size, self.members.device
        for name in given:
            if name not in TUNED or len(given[name]) != size:
                raise InvalidInput(
                    f"PopulationTrainer: hyperparameters[{name!r}] must be {size} values of {' or '.join(TUNED)}."
                )
        uniforms = torch.rand(size, len(self.args.space), dtype=torch.float64, generator=generator_of(self.args.seed))
        values = {n: torch.full((size,), float(getattr(self.args, n)), dtype=torch.float64) for n in TUNED}
        values |= resample(self.args.space, uniforms)
        values |= {name: torch.as_tensor(list(v), dtype=torch.float64) for name, v in given.items()}
        return {name: v.to(device) for name, v in values.items()}

    def _batches(self, end: int) -> Iterator[dict[str, Tensor]]:
        size, epoch, order = self.args.per_device_train_batch_size, -1, torch.empty(0)
        count = len(next(iter(self.train_data.values())))
        while self.step_number < end:
            if self.step_number // self.per_epoch != epoch:
                epoch = self.step_number // self.per_epoch
                seeds = [self.args.seed + (0 if self.args.same_batch else i) for i in range(self.args.population_size)]
                order = torch.stack([epoch_order(seed, epoch, count) for seed in seeds])
            at = self.step_number % self.per_epoch * size
            rows = order[0, at : at + size] if self.args.same_batch else order[:, at : at + size]
            yield {name: t[rows] for name, t in self.train_data.items()}

    def _returns(self, metrics: list[dict[str, float]]) -> Tensor:
        name = self.args.metric_for_best_model
        if name not in metrics[0]:
            raise InvalidOption(
                f"PopulationTrainer: metric_for_best_model={name!r} is none of {', '.join(metrics[0])}."
            )
        values = torch.tensor([row[name] for row in metrics], dtype=torch.float64, device=self.members.device)
        return values if self.args.greater_is_better else -values

    def _exploit(self) -> str:
        metrics = self.evaluate()
        self._record(metrics)
        size, space = self.members.size, self.args.space
        generator = generator_of(self.args.seed, self.step_number)
        choices = torch.rand(size, dtype=torch.float64, generator=generator).to(self.members.device)
        uniforms = torch.rand(size, len(space), dtype=torch.float64, generator=generator).to(self.members.device)
        tuned = {name: self.hyperparameters[name] for name in space}
        self.source, new = pbt_step(
            self._returns(metrics), tuned, choices, uniforms, space, self.args.bottom_frac, self.args.explore
        )
        self.members.copy(self.source)
        self.hyperparameters |= new
        replaced = int((self.source != torch.arange(size, device=self.source.device)).sum())
        name = self.args.metric_for_best_model
        return f"{_spread(name.removeprefix('eval_'), [row[name] for row in metrics])}; {replaced} replaced"

    def _record(self, metrics: list[dict[str, float]]) -> None:
        for i, row in enumerate(metrics):
            tuned = {name: v[i].item() for name, v in self.hyperparameters.items()}
            self.history.append({"step": self.step_number, "member": i, "source": int(self.source[i]), **tuned, **row})


def _spread(name: str, values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{name} {low:.4g} / {middle:.4g} / {high:.4g}"
