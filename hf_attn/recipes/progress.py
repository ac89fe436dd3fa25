"""What a reader sees of a run while it goes on: a progress bar with the latest numbers, and one line an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import ProgressCallback, TrainerCallback

SHORT = {"learning_rate": "lr", "grad_norm": "grad"}
HIDDEN = ("total_flos", "epoch", "step", "runtime", "samples_per_second", "steps_per_second")


class LiveLine(ProgressCallback):
    """Trainer's progress bars; losses and metrics stand beside the bar, and each evaluation is kept as a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs or "train_runtime" in logs:
            return
        numbers = readable(logs)
        self.training_bar.set_postfix_str(numbers)
        if any(name.startswith("eval_") for name in logs):
            self.training_bar.write(f"epoch {logs.get('epoch', 0):.4g}: {numbers}")


class Redraw(TrainerCallback):
    """Tells a split with random parts (`hf_attn.recipes.language.Redrawn`) which epoch it is."""

    def __init__(self, split: Any):
        self.split = split

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.split.redraw(int(state.epoch or 0))


def readable(logs: Mapping[str, Any]) -> str:
    """The numbers of a log, short."""
    return "  ".join(
        f"{SHORT.get(name, name.replace('_', ' '))} {value:.4g}"
        for name, value in logs.items()
        if isinstance(value, (int, float)) and not name.endswith(HIDDEN)
    )
