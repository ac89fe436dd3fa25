"""A Trainer whose pushes are publications: checked, in the foreground, and verified afterwards.

    arguments = TrainingArguments("run", push_to_hub=True, hub_model_id="someone/bert-rfa", hub_strategy="every_save")
    PublishingTrainer(model, arguments, train_dataset=data).train()

What Trainer does otherwise: it uploads what lies in the output folder, its pickled arguments included; it uploads in the
background, where a failure is not even logged; and its card does not know the attention.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_attn.errors import InvalidInput, PublishFailed, Unsupported
from hf_attn.hub.families import attention_of
from hf_attn.hub.upload import MESSAGE, Published, Target, publish, reserve

logger = logging.getLogger(__name__)
STRATEGIES = ("end", "every_save")
"""Values of `hub_strategy`; the others upload optimizer and random states as pickles."""


class PublishingTrainer(Trainer):
    """transformers' Trainer that pushes with the checks of `hf_attn.hub.publish`, in one commit.

    The repository is made before training, so that a missing right is known then. `hub_strategy="every_save"` also
    publishes the model at every checkpoint; training waits for it. Where the Hub fails then, training goes on with a
    warning, the next checkpoint pushes again, and `train` raises at its end if the last push did not arrive.

    Raises, besides what Trainer raises:
        InvalidInput: `hub_token` is set, or `hub_model_id` names no owner.
        Unsupported: `hub_strategy` uploads pickles, or the weights are sharded.
        PublishFailed: the Hub, or the way to it.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if args is not None and args.push_to_hub:
            check_push(args)
            if model is not None:
                attention_of(getattr(model, "config", None))
        self._not_pushed: PublishFailed | None = None
        super().__init__(model, args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find that this is not allowed."""
        if self.is_world_process_zero():
            target = self._target(token=token, private=private)
            reserve(target)
            self.hub_model_id = target.repo_id  # type: ignore[assignment]
            self.push_in_progress = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; raises `PublishFailed` at the end where the last checkpoint is not on the Hub."""
        self._not_pushed = None
        output = super().train(*args, **kwargs)
        if self._not_pushed is not None:
            raise self._not_pushed
        return output

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model to the output folder and publish it, on the main process.

        Args:
            commit_message, revision, private: as Trainer.push_to_hub.
            blocking: True; in the background a failure would be lost.
            token: None; it comes from HF_TOKEN or `hf auth login`.
            kwargs: refused: fields of Trainer's card, which is not written.

        Returns:
            The commit, as Trainer returns it; None on the other processes.
        """
        if not blocking:
            raise Unsupported("push_to_hub", "blocking=False hides a failure in the background", "Leave it out")
        if kwargs:
            raise InvalidInput(
                f"push_to_hub({next(iter(kwargs))}=...) is a field of Trainer's card, and the card is written by hf_attn. To "
                "publish a card of your own, put README.md beside the saved model and use hf_attn.hub.publish(folder, ...)."
            )
        target = self._target(token=token, private=private, revision=revision, message=commit_message)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # where the Hub fails, the model lies here
        self.save_model(_internal_call=True)
        return self._publish(target).commit_info(target.message) if self.is_world_process_zero() else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == "end" or not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._publish(self._target(message=f"Training in progress, step {self.state.global_step}"))
        except PublishFailed as error:
            self._not_pushed = error
            logger.warning("%s was not published, and training goes on: %s", checkpoint_folder, error)
        else:
            self._not_pushed = None

    def _publish(self, target: Target) -> Published:
        # the model is loaded for a check, and what it draws must not change what is trained
        with torch.random.fork_rng(devices=[]):
            return publish(
                self, target.repo_id, private=target.private, revision=target.revision, message=target.message
            )

    def _target(
        self,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> Target:
        if token is not None:
            raise InvalidInput("a token is taken from HF_TOKEN or `hf auth login` only, never from an argument.")
        check_push(self.args)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Unsupported(
                "push_to_hub",
                "the weights are sharded over processes",
                "Save the whole model after training, and publish its folder",
            )
        private = self.args.hub_private_repo if private is None else private
        revision = revision or getattr(self.args, "hub_revision", None) or "main"
        return Target(self.args.hub_model_id or "", private, revision, message=message or MESSAGE)


def check_push(args: TrainingArguments) -> None:
    """Raise for arguments that cannot work, or must not, before any work."""
    if args.hub_token is not None:
        raise InvalidInput(
            "hub_token would be pickled into training_args.bin. Set HF_TOKEN, or log in with `hf auth login`."
        )
    if args.hub_model_id is None:
        raise InvalidInput("hub_model_id is missing: say where to publish, as in hub_model_id='someone/model'.")
    Target(args.hub_model_id).check()
    if args.hub_strategy not in STRATEGIES:
        raise Unsupported(
            "push_to_hub",
            f"hub_strategy={str(getattr(args.hub_strategy, 'value', args.hub_strategy))!r} uploads optimizer and random states "
            "as pickles",
            f"Use {' or '.join(STRATEGIES)}; checkpoints stay on this machine",
        )
