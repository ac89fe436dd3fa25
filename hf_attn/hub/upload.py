"""Publish a checkpoint: checked, in one commit, verified afterwards, and safe to run again.

    hf_attn.hub.publish("runs/model", "someone/bert-rfa")
    hf_attn.hub.publish(trainer, "someone/bert-rfa")   # in the foreground: a failure is an error, not a log line
    model.push_to_hub("someone/bert-rfa")              # models of this package go the same way

The commit names the head it was planned on, so a change that somebody else made meanwhile is never overwritten. What was
done is read from the repository itself: a run that was interrupted, or whose answer got lost, is continued by running
the same command again, and a run that has nothing to change makes no commit. The token comes from the environment or
the stored login, never from an argument.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput, PublishFailed
from hf_attn.hub import talk
from hf_attn.hub.check import check_config
from hf_attn.hub.pack import MANIFEST, Plan, pack, plan_of
from hf_attn.hub.probe import check_probe, write_probe
from hf_attn.hub.verify import Change, change

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from transformers import PreTrainedModel, Trainer

MESSAGE = "Publish with hf_attn"
_MADE = "The repository exists, and its files are as they were"


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        repo_id: `owner/name`.
        private: visibility of a new repository; None is the owner's default. An existing one must agree.
        revision: branch, made where it does not exist.
        create_pr: open a pull request instead of committing.
        tag: name of a tag for the commit.
        message: title of the commit.
    """

    repo_id: str
    private: bool | None = None
    revision: str = "main"
    create_pr: bool = False
    tag: str | None = None
    message: str = MESSAGE

    def __str__(self) -> str:
        visibility = {True: "private", False: "public", None: "visibility as it is, or the owner's default"}[
            self.private
        ]
        what = "a pull request to main" if self.create_pr else self.revision
        return f"{self.repo_id}, {what} ({visibility})" + (f", tag {self.tag}" if self.tag else "")

    def check(self) -> None:
        """Raise `InvalidInput` for what cannot work, before any work."""
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InvalidInput(f"repo_id={self.repo_id!r} is not a repository name: {error}") from error
        if self.repo_id.count("/") != 1:
            raise InvalidInput(f"repo_id={self.repo_id!r} must name its owner, as in someone/model.")
        if self.create_pr and (self.revision != "main" or self.tag):
            raise InvalidInput("create_pr opens a pull request against main: leave revision and tag out.")
        if not self.message.strip():
            raise InvalidInput("message must say something: it is the title of the commit.")
        for name in (self.revision, *([self.tag] if self.tag is not None else [])):
            if not name or name.startswith(("-", "/")) or ".." in name or any(c in " ~^:?*[\\" for c in name):
                raise InvalidInput(f"{name!r} is not a valid name of a branch or tag.")


@dataclass(frozen=True)
class Published:
    """What a run did.

    Attributes:
        state: "published", "unchanged" (the Hub held it already) or "dry run".
        commit: the commit that holds the files; None after a dry run.
        url: page of the commit or pull request.
        files: path, size and sha256 of every file.
        deleted: stale files that were removed.
    """

    state: str
    repo_id: str
    revision: str
    private: bool | None
    commit: str | None
    url: str | None
    tag: str | None
    pull_request: str | None
    files: tuple[dict[str, Any], ...]
    deleted: tuple[str, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    table: str

    @property
    def command(self) -> str:
        """Python that loads exactly this commit."""
        pin = f', revision="{self.commit}"' if self.commit else ""
        return f'import hf_attn; from transformers import AutoModel; AutoModel.from_pretrained("{self.repo_id}"{pin})'

    def commit_info(self, message: str) -> CommitInfo:
        """The commit in the form of huggingface_hub."""
        from huggingface_hub import CommitInfo

        return CommitInfo(self.url or "", message, "", self.commit or "", pr_url=self.pull_request)

    def as_json(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["table"]
        return facts

    def __str__(self) -> str:
        deleted = [f"deleted: {', '.join(self.deleted)}"] if self.deleted else []
        if self.state == "dry run":
            return f"{self.table}\nNothing was uploaded: this was a dry run."
        visibility = "private" if self.private else "public"
        done = f"{self.state}: {self.repo_id}, {self.revision} ({visibility})" + (
            f", tag {self.tag}" if self.tag else ""
        )
        return "\n".join([*deleted, done, f"  {self.url}", "Load exactly this:", f"  {self.command}"])


def publish(
    source: str | os.PathLike[str] | PreTrainedModel | Trainer,
    repo_id: str,
    *,
    processor: Any = None,
    private: bool | None = None,
    revision: str = "main",
    create_pr: bool = False,
    tag: str | None = None,
    message: str = MESSAGE,
    vendored: bool = False,
    dry_run: bool = False,
    timeout: float = 120.0,
    show: Callable[[str], None] | None = None,
    max_shard_size: int | str | None = None,
) -> Published:
    """Check `source`, upload it in one commit, and verify what arrived.

    Args:
        source: a folder made by save_pretrained or by `pack`, a model, or a Trainer (on its main process).
        repo_id: `owner/name`; made where it does not exist.
        processor: tokenizer or image processor to save beside a model; a Trainer brings its own.
        private: visibility of a new repository. An existing one of the other kind is refused.
        revision: branch to commit to, made where it does not exist.
        create_pr: open a pull request instead. Where an open one holds the same files, that one is the result.
        tag: name of a tag for the commit. A tag that points elsewhere is refused.
        message: title of the commit.
        vendored: add the code itself instead of a shim that imports hf_attn.
        dry_run: check and show the plan; nothing is sent, and no network is needed.
        timeout: seconds without any answer after which a request counts as failed.
        show: gets the plan (files, sizes, target, visibility) before anything is sent.
        max_shard_size: largest weight file, such as "5GB", where `source` is no folder.

    Raises:
        InvalidInput, Unsupported: the folder must not be published as it is; nothing was sent.
        PublishFailed: the Hub, or the way to it; the message says what the repository holds now.
    """
    target = Target(repo_id, private, revision, create_pr, tag, message)
    target.check()
    with prepared(source, repo_id, vendored, processor, max_shard_size) as plan:
        if dry_run:
            return _result("dry run", plan, target, private, None, None, None, ())
        if show is not None:
            show(f"{plan.table()}\ntarget: {target}")
        with talk.patience(timeout):
            return _upload(plan, target)


@contextlib.contextmanager
def prepared(
    source: Any, repo_id: str, vendored: bool = False, processor: Any = None, max_shard_size: int | str | None = None
) -> Iterator[Plan]:
    """The packed and checked folder of `source`, in a temporary place unless `source` is one already."""
    with tempfile.TemporaryDirectory(prefix="hf_attn-publish-") as temporary:
        exact = not isinstance(source, (str, os.PathLike))
        if exact:
            folder = Path(temporary) / "model"
            model, processor = _parts(source, processor)
            model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
            if processor is not None:
                processor.save_pretrained(folder)
            write_probe(model, folder)
        elif processor is not None or max_shard_size is not None:
            raise InvalidInput("processor and max_shard_size belong to a model; the source is a folder.")
        else:
            folder = Path(source)
            if (folder / MANIFEST).is_file():
                if vendored and not any(folder.glob("hf_attn_*.py")):
                    raise InvalidInput(f"{str(folder)!r} was packed without its code. Publish the saved model itself.")
                plan = plan_of(folder, repo_id)
                check_probe(folder, check_config(folder))
                yield plan
                return
            if not folder.is_dir():
                raise InvalidInput(f"there is no folder {str(folder)!r}. Give a folder made by save_pretrained.")
        packed = Path(temporary) / "hub"
        plan = pack(folder, packed, repo_id, "vendored" if vendored else "shim", write_card=True)
        check_probe(packed, check_config(packed), exact=exact)
        yield plan


def _parts(source: Any, processor: Any) -> tuple[Any, Any]:
    """Model and processor of a Trainer, or of the model itself."""
    from transformers import PreTrainedModel, Trainer

    if isinstance(source, Trainer):
        if not source.is_world_process_zero():
            raise InvalidInput("publish belongs on the main process: ask trainer.is_world_process_zero() first.")
        return source.accelerator.unwrap_model(source.model), processor or source.processing_class
    if not isinstance(source, PreTrainedModel):
        raise InvalidInput(f"publish takes a folder, a model or a Trainer; got a {type(source).__name__}.")
    return source, processor


def _upload(plan: Plan, target: Target) -> Published:
    """Everything that talks to the Hub, in order; each stage either changes nothing or is found done by the next run."""
    api = talk.connect()
    repo = target.repo_id
    private, made = _make(api, target), _MADE
    if target.revision != "main" and not target.revision.startswith("refs/"):
        talk.attempt(
            "creating the branch", made, lambda: api.create_branch(repo, branch=target.revision, exist_ok=True)
        )
    head = _head(api, target, made)
    todo = talk.attempt("listing the files", made, lambda: change(api, repo, head, plan.folder, plan.files))
    refs = talk.attempt(
        "listing the tags", made, lambda: api.list_repo_refs(repo, include_pull_requests=target.create_pr)
    )
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == target.tag), None)
    if tagged is not None and (todo or tagged != head):
        raise PublishFailed(
            "checking the tag",
            f"the tag {target.tag!r} exists already and points at {tagged}",
            made,
            "Choose another tag; a published tag should never move",
        )
    pull, commit, url, state = None, head, f"{api.endpoint}/{repo}/commit/{head}", "unchanged"
    if todo:
        commit, url, pull = _commit(api, plan, target, head, todo, made)
        state = "published"
        done = f"The commit {commit} is there"
        wrong = talk.attempt("verifying the upload", done, lambda: change(api, repo, commit, plan.folder, plan.files))
        if wrong:
            raise PublishFailed(
                "verifying the upload",
                f"{', '.join([*wrong.add, *wrong.delete])} on the Hub differ from {plan.folder}",
                done,
                "Run the same command again; if it happens again, report it",
            )
    if target.tag is not None and tagged is None:
        done = f"The commit {commit} is there, without the tag"
        talk.attempt("creating the tag", done, lambda: api.create_tag(repo, tag=target.tag or "", revision=commit, exist_ok=True))  # fmt: skip
    return _result(state, plan, target, private, commit, url, pull, todo.delete)


def reserve(target: Target, timeout: float = 120.0) -> None:
    """Make the repository, if it is not there: before a long run, what would be refused after it is refused now.

    Raises:
        PublishFailed: there is no token, or it may not write, or the repository has the other visibility.
    """
    target.check()
    with talk.patience(timeout):
        _make(talk.connect(), target)


def _make(api: HfApi, target: Target) -> bool:
    """Make the repository, if it is not there; whether it is private."""
    repo = target.repo_id
    talk.attempt(
        "creating the repository",
        "Nothing was changed on the Hub",
        lambda: bool(api.create_repo(repo, private=target.private, exist_ok=True)),
        landed=lambda: _exists(api, repo),
    )
    private = bool(talk.attempt("reading the repository", _MADE, lambda: api.model_info(repo)).private)
    if target.private is not None and private != target.private:
        is_now, wanted = ("private", "public") if private else ("public", "private")
        raise PublishFailed(
            "checking the visibility",
            f"{repo} is {is_now}, and {wanted} was asked for",
            _MADE,
            "Change it in the repository's settings, or leave private out",
        )
    return private


def _exists(api: HfApi, repo: str) -> bool | None:
    """True for a repository that is there: whoever may write to it need not be allowed to make one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> bool | None:
        try:
            api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        return True

    return talk.attempt("reading the repository", "Nothing was changed on the Hub", ask)


def _head(api: HfApi, target: Target, state: str) -> str:
    """The commit that the branch points at now."""
    found = talk.attempt("reading the branch", state, lambda: api.model_info(target.repo_id, revision=target.revision))
    return str(found.sha)


def _commit(api: HfApi, plan: Plan, target: Target, head: str, todo: Change, state: str) -> tuple[str, str, str | None]:
    """One commit, or pull request, on top of `head`; its id and page. Found done, it is not made twice."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if target.create_pr and (there := _pull_request(api, plan, target, state)):
        return there
    add = [CommitOperationAdd(path, plan.folder / path) for path in todo.add]
    delete = [CommitOperationDelete(path, is_folder=False) for path in todo.delete]
    # large files first: they survive a failed commit, so running again is cheap
    talk.attempt("uploading files", state, lambda: api.preupload_lfs_files(target.repo_id, add, revision=target.revision, create_pr=target.create_pr), tries=1)  # fmt: skip

    def send() -> tuple[str, str, str | None]:
        made = api.create_commit(
            target.repo_id,
            [*add, *delete],
            commit_message=target.message,
            revision=target.revision,
            create_pr=target.create_pr,
            parent_commit=head,
        )
        return made.oid, made.pr_url or made.commit_url, made.pr_url

    def landed() -> tuple[str, str, str | None] | None:
        """The commit, where it was made and only its answer got lost."""
        if target.create_pr:
            return _pull_request(api, plan, target, state)
        now = _head(api, target, state)
        if now == head or change(api, target.repo_id, now, plan.folder, plan.files):
            return None
        return now, f"{api.endpoint}/{target.repo_id}/commit/{now}", None

    def conflict() -> str | None:
        now = head if target.create_pr else _head(api, target, state)
        return None if now == head else f"somebody else committed {now} to {target.revision} meanwhile"

    return talk.attempt("committing", state, send, landed=landed, conflict=conflict)


def _pull_request(api: HfApi, plan: Plan, target: Target, state: str) -> tuple[str, str, str | None] | None:
    """The newest pull request that holds exactly these files; of the last ten."""
    refs = talk.attempt("listing pull requests", state, lambda: api.list_repo_refs(target.repo_id, include_pull_requests=True))  # fmt: skip
    for ref in list(reversed(refs.pull_requests or []))[:10]:
        differs = talk.attempt("reading a pull request", state, lambda oid=ref.target_commit: change(api, target.repo_id, oid, plan.folder, plan.files))  # fmt: skip
        if not differs:
            page = f"{api.endpoint}/{target.repo_id}/discussions/{ref.name.rpartition('/')[2]}"
            return ref.target_commit, page, page
    return None


def _result(
    state: str,
    plan: Plan,
    target: Target,
    private: bool | None,
    commit: str | None,
    url: str | None,
    pull: str | None,
    deleted: tuple[str, ...],
) -> Published:
    return Published(
        state=state,
        repo_id=target.repo_id,
        revision=target.revision,
        private=private,
        commit=commit,
        url=url,
        tag=target.tag,
        pull_request=pull,
        files=plan.files,
        deleted=deleted,
        skipped=plan.skipped,
        warnings=plan.warnings,
        table=f"{plan.table()}\ntarget: {target}",
    )
