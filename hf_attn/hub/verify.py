"""What a repository on the Hub holds, and how that differs from a packed folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn.hub.check import matches

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STALE = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "hf_attn_*.py", "modeling_hf_attn.py",
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state*.pth",
)  # fmt: skip
"""Files of an earlier version that would contradict the new one (weights, code) or should never have been there."""


@dataclass(frozen=True)
class Change:
    """What must be done to a repository, so that it holds a packed folder.

    Attributes:
        add: paths whose content is missing or differs.
        delete: stale paths.
    """

    add: tuple[str, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


def change(api: HfApi, repo_id: str, revision: str, folder: Path, files: tuple[dict[str, Any], ...]) -> Change:
    """Compare every size and hash of a revision with the entries of a plan."""
    there = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision) if hasattr(entry, "blob_id")}  # fmt: skip
    add = [entry["path"] for entry in files if not same(there.get(entry["path"]), entry, folder)]
    wanted = {entry["path"] for entry in files}
    return Change(tuple(add), tuple(sorted(path for path in there if path not in wanted and matches(path, STALE))))


def same(remote: Any, entry: dict[str, Any], folder: Path) -> bool:
    """Whether a file on the Hub has the bytes of a manifest entry: sha256 for large files, git's hash for the others."""
    if remote is None or remote.size != entry["size"]:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == entry["sha256"]
    content = (folder / entry["path"]).read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
