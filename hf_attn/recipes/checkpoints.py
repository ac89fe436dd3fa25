"""Checkpoints that a crash cannot corrupt unnoticed: a manifest of every file, and the newest one that matches its manifest.

A checkpoint is written into `RUN/partial`, checked, given a manifest, and renamed to `RUN/checkpoint-N`. So a folder of that
name is whole, or something damaged it later: then `newest_valid` moves it to `RUN/broken` and says why.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_attn.errors import HfAttnError
from hf_attn.hub.pack import entry_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
PARTIAL, BROKEN = "partial", "broken"
"""Folders of a run: checkpoints that are being written or deleted, and those that did not match their manifest."""
_NAME = re.compile(r"checkpoint-(\d+)")


class BrokenCheckpoint(HfAttnError, RuntimeError):
    """A checkpoint does not match its manifest."""


class CheckpointNotSaved(HfAttnError, RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


def write_manifest(folder: Path) -> None:
    """Check that every file can be opened, write path, size and sha256 of each into the manifest, and flush all to the disk.

    Raises:
        BrokenCheckpoint: a file was not written completely.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    for name in names:
        _open(folder / name)
    manifest = {"files": [entry_of(folder, name) for name in names]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        _flush(path)
    verify(folder)


def verify(folder: str | os.PathLike[str]) -> None:
    """Read every file of a checkpoint and compare it with the manifest. Files that the manifest does not list are ignored.

    Raises:
        BrokenCheckpoint: the first difference, by the name of its file.
    """
    folder = Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {entry["path"]: entry for entry in entries}
    except FileNotFoundError as error:
        raise BrokenCheckpoint(
            f"{folder} has no {MANIFEST}: it was not written by this trainer, or not to its end. Use an earlier "
            f"checkpoint; if you trust this one, hf_attn.recipes.checkpoints.write_manifest accepts it as it is."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(
            f"{MANIFEST} in {folder} cannot be read ({error}). Use an earlier checkpoint."
        ) from error
    if STATE not in expected:
        raise BrokenCheckpoint(f"{MANIFEST} in {folder} does not list {STATE}. Use an earlier checkpoint.")
    for name, entry in expected.items():
        try:
            found = entry_of(folder, name)
        except OSError as error:
            raise BrokenCheckpoint(
                f"{name} in {folder} cannot be read ({error}). Use an earlier checkpoint."
            ) from error
        if found != entry:
            raise BrokenCheckpoint(f"{name} in {folder} is not what was saved ({_difference(found, entry)}). Use an earlier checkpoint.")  # fmt: skip


def newest_valid(run: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of `run` with the most steps that matches its manifest; None where there is no checkpoint at all.

    Newer ones that do not match are moved to `run/broken`, and a warning names each.

    Raises:
        BrokenCheckpoint: there are checkpoints, and every one is broken. All were moved, so the next call returns None.
    """
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
        except BrokenCheckpoint as error:
            problems.append(f"{error} It was moved to {quarantine(folder)}.")
            logger.warning(problems[-1])
        else:
            return folder
    if problems:
        raise BrokenCheckpoint(
            f"no checkpoint in {run} is whole: {' '.join(problems)} Start again to train from the beginning."
        )
    return None


def quarantine(folder: Path) -> Path:
    """Move a checkpoint to `broken`, beside it, under a free name. Returns where it is now."""
    place = folder.parent / BROKEN
    place.mkdir(exist_ok=True)
    target, number = place / folder.name, 1
    while target.exists():
        number += 1
        target = place / f"{folder.name}-{number}"
    folder.rename(target)
    return target


def checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, valid or not, by their step."""
    run = Path(run)
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if run.is_dir() else []
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """N of a folder `checkpoint-N`."""
    return int(folder.name.rpartition("-")[2])


def commit(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its manifest, and then its name."""
    write_manifest(partial)
    if final.exists():
        final.rename(partial.with_name(f"replaced-{final.name}"))
    partial.rename(final)
    _flush(final.parent)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints until `limit` are left; never `newest` or `best`.

    Those beyond the step of `newest` are left from another run and go first, then the oldest. A checkpoint is renamed before
    its files go, so a kill leaves no half of one behind.
    """
    if not limit or limit < 1:
        return
    step, kept = step_of(newest), {newest, *([Path(best)] if best else [])}
    there = checkpoints(newest.parent)
    doomed = sorted((path for path in there if path not in kept), key=lambda p: (step_of(p) < step, step_of(p)))
    for path in doomed[: max(0, len(there) - max(limit, len(kept)))]:
        partial = newest.parent / PARTIAL
        partial.mkdir(exist_ok=True)
        shutil.rmtree(path.rename(partial / f"deleted-{path.name}"), ignore_errors=True)


def _difference(found: dict[str, Any], entry: dict[str, Any]) -> str:
    if found["size"] != entry.get("size"):
        return f"{found['size']} bytes instead of {entry.get('size')}"
    return "another sha256"


def _safetensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        file.keys()


def _archive(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        file.namelist()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _safetensors,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".pt": _archive,
    ".pth": _archive,
    ".bin": _archive,
}
"""Ending of a file -> what fails where the end of such a file is missing."""


def _open(path: Path) -> None:
    from safetensors import SafetensorError

    try:
        _OPENERS.get(path.suffix, lambda path: None)(path)
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise BrokenCheckpoint(f"{path.name} was not written completely: {error}") from error


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    # only there does a folder have a descriptor
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
