"""How models of this package are read and published: safetensors only, every check, and no code beside the weights."""

from __future__ import annotations

import importlib
from typing import Any

from hf_attn.errors import InvalidInput, Unsupported


class SavedModelMixin:
    """The part of a model that reads and publishes it; the class of transformers stands behind it."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: our initialisers leave loaded tensors alone, so transformers need not skip whole modules."""
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, use_safetensors: bool | None = True, **kwargs: Any
    ) -> Any:
        """`PreTrainedModel.from_pretrained`, which reads safetensors only: pickled weights can run any code.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            args, kwargs: of transformers.
            use_safetensors: None is True here, and False is refused.

        Raises:
            Unsupported: there are no safetensors, or `use_safetensors=False`.
        """
        what = f"from_pretrained, {cls.__name__}"
        remedy = "Ask its author for safetensors; if you trust the file, load it with a class of transformers and save it again"
        if use_safetensors is False:
            raise Unsupported(what, "use_safetensors=False would unpickle the weights, which can run any code", remedy)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except OSError as error:
            # transformers says no more than that a file is missing
            if "file named" not in str(error):
                raise
            reason = f"{str(pretrained_model_name_or_path)!r} has no safetensors ({error})"
            raise Unsupported(
                what, f"{reason}, and pickled weights can run any code when they are read", remedy
            ) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
    ) -> Any:
        """Publish the model with every check of `hf_attn.hub.publish`, in one commit that is verified afterwards.

        Args:
            repo_id: `owner/name`.
            commit_message: title of the commit.
            private: visibility of a new repository.
            token: None or True; a token in an argument ends up in logs, so it comes from HF_TOKEN or `hf auth login`.
            revision: branch.
            create_pr: open a pull request instead.
            max_shard_size: largest weight file, such as "5GB".

        Returns:
            The commit, as transformers returns it.
        """
        if token not in (None, True):
            raise InvalidInput(
                "push_to_hub takes no token as an argument. Set HF_TOKEN, or log in with `hf auth login`."
            )
        # a model must not depend on the hub tools, and its copy in a checkpoint comes without them
        try:
            upload = importlib.import_module("hf_attn.hub.upload")
        except ModuleNotFoundError as error:
            raise Unsupported(
                f"push_to_hub, {type(self).__name__}",
                "the checks before an upload are part of the package hf_attn, which is not installed",
                "Install it, or save the model and run `hf-attn publish` where it is",
            ) from error
        message = commit_message or upload.MESSAGE
        done = upload.publish(
            self,
            repo_id,
            private=private,
            revision=revision or "main",
            create_pr=create_pr,
            message=message,
            max_shard_size=max_shard_size,
        )
        return done.commit_info(message)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing for classes of the installed package, which need no code beside their checkpoints."""
        if not cls.__module__.startswith("hf_attn."):
            super().register_for_auto_class(auto_class)
