"""Turn a saved model into a folder that is safe to upload, and say what would be uploaded.

Only known kinds of files are copied, every weight file is opened, pickles and access tokens are refused, and a manifest
records what is there. Nothing here talks to the Hub.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attn.errors import InvalidInput, Unsupported

ALLOWED = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "README.md", "LICENSE", "*.png",
)  # fmt: skip
"""Names of files that are uploaded; everything else stays."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
MANIFEST = "manifest.json"
_TOKEN = re.compile(rb"(?:hf_|api_org_)[A-Za-z0-9]{30,}")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What would be uploaded.

    Attributes:
        folder: the packed folder.
        repo_id: where it would go.
        files: the manifest's entries (path, size, sha256), and the manifest.
        skipped: files of the source folder that stay behind.
    """

    folder: Path
    repo_id: str
    files: tuple[dict[str, Any], ...]
    skipped: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that uploads the folder."""
        return f"hf upload {shlex.quote(self.repo_id)} {shlex.quote(str(self.folder))} . --repo-type model"

    def __str__(self) -> str:
        width = max(len(file["path"]) for file in self.files)
        rows = [f"{file['path']:<{width}}  {file['size']:>12,}" for file in self.files]
        total = f"{'total':<{width}}  {sum(file['size'] for file in self.files):>12,}"
        left = [f"left out: {', '.join(self.skipped)}"] if self.skipped else []
        header = f"{'file':<{width}}  {'bytes':>12}"
        rule = "-" * len(header)
        return "\n".join(
            [header, rule, *rows, rule, total, *left, "", "Nothing was uploaded. To upload:", f"  {self.command}"]
        )


def pack(folder: str | os.PathLike[str], target: str | os.PathLike[str], repo_id: str = "ORG/NAME") -> Plan:
    """Copy what belongs on the Hub from `folder` to the clean folder `target`, checked.

    Args:
        folder: a saved model of hf_attn.
        target: the folder to make. An earlier pack there is replaced; any other content is refused.
        repo_id: `owner/name` on the Hub, for the printed command.

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
    present = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    chosen = [path for path in present if path.is_file() and _matches(path.name, ALLOWED)]
    _check(folder, present, chosen)

    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path in chosen:
            shutil.copyfile(path, partial / path.name)
            # safetensors writes 0600, which a shared machine or a container cannot read
            (partial / path.name).chmod(0o644)
        entries = [_entry(partial / path.name) for path in chosen]
        manifest = {"files": entries, "versions": _versions()}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (partial / MANIFEST).chmod(0o644)
        files = (*entries, _entry(partial / MANIFEST))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    skipped = tuple(path.name + "/" * path.is_dir() for path in present if path not in chosen)
    return Plan(folder=target, repo_id=repo_id, files=files, skipped=skipped)


def verify(folder: str | os.PathLike[str]) -> None:
    """Raise `InvalidInput` where a packed folder differs from its manifest."""
    folder = Path(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{str(folder)!r} has no readable {MANIFEST}. Pack it again.") from error
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != {entry["path"] for entry in listed}:
        raise InvalidInput(f"the files in {str(folder)!r} are not those of its {MANIFEST}. Pack it again.")
    for entry in listed:
        if _entry(folder / entry["path"]) != entry:
            raise InvalidInput(f"{entry['path']} in {str(folder)!r} has changed since it was packed. Pack it again.")


def _check(folder: Path, present: list[Path], chosen: list[Path]) -> None:
    """Every rule a folder must pass before anything is copied."""
    pickles = [path.name for path in present if _matches(path.name, PICKLES)]
    if pickles:
        raise Unsupported(
            f"pack {folder}",
            f"it holds pickles ({', '.join(pickles)}), which run code when they are loaded and can carry secrets",
            "Save the model with save_pretrained into an empty folder, and pack that",
        )
    names = [path.name for path in chosen]
    for needed in ("config.json", "README.md"):
        if needed not in names:
            raise InvalidInput(f"{str(folder)!r} has no {needed}. Save the model and its card there first.")
    if links := [path.name for path in chosen if path.is_symlink()]:
        raise InvalidInput(f"{links[0]} in {str(folder)!r} is a link. Put the file itself there.")
    for path in (path for path in present if path.is_file()):
        if found := _find_token(path):
            raise InvalidInput(
                f"{path.name} holds what looks like an access token ({found[:6]}...). Remove it, and revoke the token."
            )
    _check_weights(folder, names)
    _check_config(folder)


def _check_weights(folder: Path, names: list[str]) -> None:
    """Open the header of every weight file; an index and its shards must name each other."""
    from safetensors import SafetensorError, safe_open

    held: dict[str, str] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt") as weights:
                    held.update(dict.fromkeys(weights.keys(), name))
            except (SafetensorError, OSError) as error:
                raise InvalidInput(f"{name} in {str(folder)!r} is damaged ({error}). Save the model again.") from error
    if not held:
        raise InvalidInput(f"{str(folder)!r} holds no *.safetensors with weights. Save the model there first.")
    if "model.safetensors.index.json" in names:
        index = _json(folder / "model.safetensors.index.json").get("weight_map")
        if index != held:
            raise InvalidInput(
                f"model.safetensors.index.json in {str(folder)!r} does not match the weight files beside it. "
                "Save the model again into an empty folder."
            )
    elif set(held.values()) != {"model.safetensors"}:
        raise InvalidInput(f"{str(folder)!r} holds shards without model.safetensors.index.json. Save the model again.")


def _check_config(folder: Path) -> None:
    from transformers import AutoConfig

    # first as JSON: the loader's own message for a damaged file does not name it
    _json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InvalidInput(f"config.json in {str(folder)!r} does not load: {error}") from error
    if not getattr(config, "attention", None):
        raise Unsupported(
            f"pack {folder}",
            f"its config (model_type={config.model_type!r}) has no `attention`, so it is not a model of hf_attn",
            "Convert the model with hf_attn.convert and save it again",
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{str(path)!r} is not valid JSON ({error}). Save the model again.") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{str(path)!r} does not hold a JSON object. Save the model again.")
    return value


def _find_token(path: Path) -> str | None:
    """The first access token in the bytes of a file."""
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            # a token may lie across two chunks
            if found := _TOKEN.search(tail + chunk):
                return found.group().decode()
            tail = chunk[-256:]
    return None


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"path": path.name, "size": path.stat().st_size, "sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import hf_attn

    return {"hf_attn": hf_attn.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
