"""A Trainer that can be killed at any moment: checkpoints are whole, and a resumed run equals an unbroken one.

    trainer = SafeTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=True)

What Trainer does otherwise: it writes into the final folder; it evaluates, which draws random numbers, after saving at the end
of an epoch; and it trains one step more where it resumes a run of `max_steps` that was complete.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_attn.errors import Unsupported
from hf_attn.hub.trainer import PublishingTrainer
from hf_attn.recipes.checkpoints import (
    PARTIAL,
    STATE,
    CheckpointNotSaved,
    checkpoints,
    commit,
    logger,
    newest_valid,
    rotate,
    verify,
)

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as a shell reports it."""


class SafeTrainer(PublishingTrainer):
    """transformers' Trainer with checkpoints that are whole, resumed bit for bit, and saved on SIGTERM.

    It pushes to the Hub as `PublishingTrainer` does, after the checkpoint is in its place.

    Raises, besides what Trainer raises:
        Unsupported: `enable_jit_checkpoint` is set.
        BrokenCheckpoint: the checkpoint to resume from, or the best one, is not what was saved.
        CheckpointNotSaved: the disk is full, or a file could not be written. Earlier checkpoints are untouched.
        SystemExit: SIGTERM came during `train`; a checkpoint was saved, and the status is 143.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if getattr(args, "enable_jit_checkpoint", False):
            raise Unsupported(
                "SafeTrainer", "enable_jit_checkpoint=True: SIGTERM saves at the end of the step here", "Leave it out"
            )
        super().__init__(model, args, **kwargs)
        self._saving = False
        self._asked_to_stop = False
        self.stopping = False
        self.add_callback(_Boundaries(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As Trainer.train.

        Args:
            resume_from_checkpoint: True resumes from the newest valid checkpoint in `output_dir`, and starts from the
                beginning where there is none; a path resumes from that checkpoint, if it is valid.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: outputs that evaluation leaves out.
        """
        run = self._get_output_dir(trial)
        chosen: list[Any] = [None]
        if self.accelerator.is_main_process:
            shutil.rmtree(Path(run, PARTIAL), ignore_errors=True)
            chosen = [self._checkpoint(run, resume_from_checkpoint)]
        broadcast_object_list(chosen)
        with self._listening():
            return super().train(chosen[0], trial, ignore_keys_for_eval)

    def _checkpoint(self, run: str, resume: str | bool | None) -> str | None:
        """The checkpoint to resume from, verified; None to start from the beginning."""
        if resume is True:
            found = newest_valid(run)
            logger.info("resuming from %s", found or "nothing: there is no checkpoint")
            return str(found) if found else None
        if resume:
            verify(resume)
            return resume
        if old := checkpoints(run):
            logger.warning(
                f"{run} holds {old[-1].name} of another run, and training starts from the beginning. A later resume would "
                "mix both: use an empty output_dir, or resume_from_checkpoint=True."
            )
        return None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note SIGTERM instead of dying of it. Python delivers signals to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._asked_to_stop = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        # it came after the last step
        if self._asked_to_stop:
            signal.raise_signal(signal.SIGTERM)

    def agree_to_stop(self) -> bool:
        """Whether any process was sent SIGTERM; the same answer on all of them."""
        if self.accelerator.num_processes == 1:
            return self._asked_to_stop
        asked = torch.tensor(int(self._asked_to_stop), device=self.args.device)
        return bool(self.accelerator.reduce(asked).item())

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, PARTIAL) if self._saving else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial, final = run / PARTIAL / name, run / name
        try:
            self._saving = True
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = self.state.best_model_checkpoint
            if best and Path(best) == partial:
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(partial / STATE))
                commit(partial, final)
                rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointNotSaved(_not_saved(final, error)) from error
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(run / PARTIAL, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer asks for it while the checkpoint is not in its place yet
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        verify(self.state.best_model_checkpoint or "")
        super()._load_best_model()


class _Boundaries(TrainerCallback):
    """Moves a checkpoint at the end of an epoch behind its evaluation, and saves and exits after SIGTERM."""

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer
        self.owed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.agree_to_stop():
            self.trainer.stopping = control.should_save = True
        ends = float(state.epoch).is_integer() or control.should_training_stop
        if control.should_save and ends:
            self.owed, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.owed:
            self.owed, control.should_save = False, True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopping:
            raise SystemExit(TERMINATED)


def _not_saved(final: Path, error: Exception) -> str:
    kept = [path for path in checkpoints(final.parent) if path != final]
    there = f"{kept[-1].name} is untouched" if kept else "there is no earlier checkpoint"
    free = shutil.disk_usage(final.parent).free
    return (
        f"{final} could not be saved: {error}. What was written of it is removed; {there}. {free} bytes were free. Make room "
        "(save_total_limit keeps fewer checkpoints), then resume with resume_from_checkpoint=True."
    )
