"""Turn a saved model into a folder that is safe to upload, and say what would be uploaded.

Only known kinds of files are copied, every weight file is opened, pickles and access tokens are refused, and a manifest
records what is there. Nothing here talks to the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attn.errors import InvalidInput
from hf_attn.hub.card import check_card, checkpoint_card
from hf_attn.hub.check import ALLOWED, check_folder, listing, matches
from hf_attn.hub.code import FILES, write_code
from hf_attn.hub.secrets import local_paths

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What would be uploaded.

    Attributes:
        folder: the packed folder.
        repo_id: where it would go.
        files: the manifest's entries (path, size, sha256), and the manifest.
        skipped: files of the source folder that stay behind.
        warnings: what a person should look at, such as paths of this machine.
    """

    folder: Path
    repo_id: str
    files: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that uploads the folder."""
        return f"hf-attn publish {shlex.quote(str(self.folder))} --repo-id {shlex.quote(self.repo_id)}"

    def table(self) -> str:
        """Files and sizes, what is left out, and the warnings."""
        width = max(len(file["path"]) for file in self.files)
        rows = [f"{file['path']:<{width}}  {file['size']:>12,}" for file in self.files]
        total = f"{'total':<{width}}  {sum(file['size'] for file in self.files):>12,}"
        left = [f"left out: {', '.join(self.skipped)}"] if self.skipped else []
        header = f"{'file':<{width}}  {'bytes':>12}"
        rule = "-" * len(header)
        return "\n".join([header, rule, *rows, rule, total, *left, *(f"warning: {text}" for text in self.warnings)])

    def __str__(self) -> str:
        return f"{self.table()}\n\nNothing was uploaded. To upload:\n  {self.command}"


def pack(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    repo_id: str = "ORG/NAME",
    code: str = "shim",
    write_card: bool = False,
) -> Plan:
    """Copy what belongs on the Hub from `folder` to the clean folder `target`, checked.

    Args:
        folder: a saved model of hf_attn.
        target: the folder to make. An earlier pack there is replaced; any other content is refused.
        repo_id: `owner/name` on the Hub, for the printed command.
        code: what loads the checkpoint where hf_attn is not imported: "shim" (it names the package) or "vendored".
        write_card: write a model card where the folder has none.

    Returns:
        The plan; printing it shows the files and the command.

    Raises:
        InvalidInput: a file is missing, damaged, or holds an access token.
        Unsupported: the folder holds pickles, or the model is not one of hf_attn.
    """
    folder, target = Path(folder), Path(target)
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {str(folder)!r} to pack. Give a folder made by save_pretrained.")
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput(f"{str(target)!r} holds files that no earlier pack made. Give another target, or empty it.")
    chosen, skipped = listing(folder)
    config = check_folder(folder, chosen, card=not write_card)

    partial = working_place(target)
    partial.mkdir(parents=True)
    try:
        for name in chosen:
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        added = write_code(partial, config, code)
        if "README.md" in chosen:
            card = _named((partial / "README.md").read_bytes().decode("utf-8", "replace"), repo_id)
            check_card(card)
            (partial / "README.md").write_bytes(card.encode())
        else:
            (partial / "README.md").write_text(str(checkpoint_card(partial, config, repo_id)), encoding="utf-8")
            added.append("README.md")
        names = sorted([*chosen, *added])
        entries = [entry_of(partial, name) for name in names]
        manifest = {"files": entries, "versions": _versions()}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (*names, MANIFEST):
            # safetensors writes 0600, which a shared machine or a container cannot read
            (partial / name).chmod(0o644)
        files = (*entries, entry_of(partial, MANIFEST))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Plan(target, repo_id, files, tuple(skipped), warnings_of(target, names))


def plan_of(folder: Path, repo_id: str) -> Plan:
    """The plan of a folder that was packed before."""
    verify(folder)
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    names = [entry["path"] for entry in entries]
    if strange := [name for name in names if not matches(name, (*ALLOWED, *FILES))]:
        raise InvalidInput(
            f"{strange[0]!r} in {str(folder)!r} is no file that is published. Pack the saved model again."
        )
    check_folder(folder, names)
    check_card((folder / "README.md").read_text(encoding="utf-8"))
    return Plan(folder, repo_id, (*entries, entry_of(folder, MANIFEST)), (), warnings_of(folder, names))


def verify(folder: str | os.PathLike[str]) -> None:
    """Raise `InvalidInput` where a packed folder differs from its manifest."""
    folder = Path(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        paths = {entry["path"] for entry in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{str(folder)!r} has no readable {MANIFEST}. Pack it again.") from error
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    if there != paths:
        raise InvalidInput(f"the files in {str(folder)!r} are not those of its {MANIFEST}. Pack it again.")
    for entry in listed:
        if entry_of(folder, entry["path"]) != entry:
            raise InvalidInput(f"{entry['path']} in {str(folder)!r} has changed since it was packed. Pack it again.")


def warnings_of(folder: Path, names: list[str]) -> tuple[str, ...]:
    return tuple(str(finding) for name in names for finding in local_paths(folder / name, name))


def entry_of(folder: Path, name: str) -> dict[str, Any]:
    """Path, size and sha256 of a file."""
    digest = hashlib.sha256()
    with (folder / name).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"path": name, "size": (folder / name).stat().st_size, "sha256": digest.hexdigest()}


def _named(card: str, repo_id: str) -> str:
    """The card with the repository's name where it was made before that was known."""
    return re.sub(r'"ORG/[A-Za-z0-9._-]+"', f'"{repo_id}"', card)


def working_place(target: Path) -> Path:
    """A free place beside `target` to work in; what killed processes left in theirs is removed."""
    for path in target.parent.glob(f".{target.name}.partial-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdigit() or int(number) == os.getpid() or not _runs(int(number)):
            shutil.rmtree(path, ignore_errors=True)
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import hf_attn

    return {"hf_attn": hf_attn.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
