"""Find what must not be published: access tokens and keys in the bytes of any file, and local paths in text.

Every byte is searched, whatever the kind of file, and the members of zip archives (which is what `torch.save` writes)
as well. A finding names file and line and shows only the first characters.
"""

from __future__ import annotations

import base64
import bisect
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hf_attn.errors import InvalidInput

SECRETS: dict[str, bytes] = {
    "a Hugging Face token": rb"(?:hf_|api_org_)[A-Za-z0-9]{30,200}",
    "an AWS access key": rb"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])",
    "a GitHub token": rb"(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255})",
    "a Google API key": rb"AIza[0-9A-Za-z_-]{35}",
    "an OpenAI or Anthropic key": rb"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,255}",
    "a Slack token": rb"xox[abprs]-[A-Za-z0-9-]{10,255}",
    "a private key": rb"-----BEGIN (?:[A-Z]{2,10} )?PRIVATE KEY-----",
    "a URL with a password": rb"[a-z]{3,10}://[A-Za-z0-9._-]{1,64}:[A-Za-z0-9._~!$&*+=%-]{3,128}@[A-Za-z0-9.-]{3,}",
}
"""Kind of secret -> what it looks like. All in one expression, so that a file is read once."""
LOCAL_PATH = re.compile(rb"(?:/home|/Users|/root|/mnt|/scratch|/tmp)/[A-Za-z0-9._-]+|[A-Z]:\\+Users\\+[A-Za-z0-9._-]+")
_CHUNK = 1 << 20
_OVERLAP = 512
"""Longer than any secret, so that one across two chunks is found."""
_LARGEST_MEMBER = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One suspicious place. `line` counts from 1; `shown` is the beginning of what was found."""

    path: str
    line: int
    kind: str
    shown: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind} ({self.shown}...)"


def refuse_secrets(folder: Path, paths: list[str]) -> None:
    """Raise `InvalidInput` that names file and line of every secret in `paths` of `folder`."""
    found = [finding for path in paths for finding in scan(folder / path, path)]
    if found:
        raise InvalidInput(
            f"{'; '.join(map(str, found[:10]))}{' and more' if len(found) > 10 else ''}: this looks like an access token "
            "or a key. Remove it from the folder, and revoke it where it was issued."
        )


def scan(path: Path, name: str | None = None) -> list[Finding]:
    """The secrets in one file, and in the members of a zip archive."""
    name = name or path.name
    pattern = _expression()
    with path.open("rb") as file:
        found = list(_search(file, name, pattern))
    if zipfile.is_zipfile(path):
        found += _scan_members(path, name, pattern)
    return found


def local_paths(path: Path, name: str | None = None) -> list[Finding]:
    """Absolute paths of somebody's machine in a text file; they tell who and where, but open nothing."""
    name = name or path.name
    with path.open("rb") as file:
        if b"\0" in file.read(_CHUNK):
            return []
        file.seek(0)
        return [
            Finding(name, finding.line, "a path on a local machine", finding.shown)
            for finding in _search(file, name, LOCAL_PATH)
        ]


def _scan_members(path: Path, name: str, pattern: re.Pattern[bytes]) -> list[Finding]:
    found: list[Finding] = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > _LARGEST_MEMBER:
                    raise InvalidInput(
                        f"{name} is an archive whose member {member.filename!r} unpacks to {member.file_size:,} bytes, "
                        "more than can be searched for secrets. Leave the archive out."
                    )
                with archive.open(member) as file:
                    found += _search(file, f"{name}!{member.filename}", pattern)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise InvalidInput(f"{name} is an archive that cannot be searched for secrets ({error}). Leave it out.") from error  # fmt: skip
    return found


def _expression() -> re.Pattern[bytes]:
    """Every known kind of secret, and the token of this session in the forms a file may hold it."""
    from huggingface_hub import get_token

    kinds = list(SECRETS.values())
    if len(token := get_token() or "") >= 8:
        encoded = base64.b64encode(token.encode()).rstrip(b"=")[:-1]
        kinds += [re.escape(form) for form in (token.encode(), token.encode("utf-16-le"), encoded)]
    return re.compile(b"|".join(b"(%s)" % kind for kind in kinds))


def _search(file: BinaryIO, name: str, pattern: re.Pattern[bytes]) -> Iterator[Finding]:
    """Matches in a stream, each once, with its line."""
    kinds = list(SECRETS)
    tail, lines, position, reported = b"", 1, 0, -1
    chunk = file.read(_CHUNK)
    while chunk:
        following = file.read(_CHUNK)
        text = tail + chunk
        breaks = [match.start() for match in re.finditer(b"\n", text)]
        for match in pattern.finditer(text):
            # one that touches the end may go on in the next chunk, which will hold it whole
            if (match.end() == len(text) and following) or position + match.start() <= reported:
                continue
            reported = position + match.start()
            kind = kinds[match.lastindex - 1] if match.lastindex and match.lastindex <= len(kinds) else "your own token"
            line = lines + bisect.bisect_left(breaks, match.start())
            yield Finding(name, line, kind, match.group()[:6].decode("ascii", "replace"))
        keep = min(_OVERLAP, len(text))
        lines += bisect.bisect_left(breaks, len(text) - keep)
        position += len(text) - keep
        tail = text[-keep:]
        chunk = following
