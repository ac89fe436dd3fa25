"""Find what must not be published: access tokens and keys in the bytes of any file, and local paths in text.

Every byte is searched, whatever the kind of file, and the members of zip archives (which is what `torch.save` writes)
as well. A finding names file and line and shows only the first characters.
"""

from __future__ import annotations

import base64
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hf_attn.errors import InvalidInput


@dataclass(frozen=True)
class Rule:
    """What a kind of secret looks like. `anchors` are in every one, and are what a file is searched for: that is fast."""

    kind: str
    anchors: tuple[bytes, ...]
    pattern: re.Pattern[bytes]
    before: int = 0
    """Largest number of bytes from the beginning to the anchor."""


def _rule(kind: str, anchors: str, pattern: bytes, before: int = 0) -> Rule:
    return Rule(kind, tuple(anchors.encode().split(b" ")), re.compile(pattern), before)


SECRETS = (
    _rule("a Hugging Face token", "hf_ api_org_", rb"(?:hf_|api_org_)[A-Za-z0-9]{30,200}"),
    _rule("an AWS access key", "AKIA ASIA", rb"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"),
    _rule("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", rb"(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255})"),
    _rule("a Google API key", "AIza", rb"AIza[0-9A-Za-z_-]{35}"),
    _rule("an OpenAI or Anthropic key", "sk-", rb"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,255}"),
    _rule("a Slack token", "xoxa- xoxb- xoxp- xoxr- xoxs-", rb"xox[abprs]-[A-Za-z0-9-]{10,255}"),
    _rule("a private key", "-----BEGIN", rb"-----BEGIN (?:[A-Z]{2,10} )?PRIVATE KEY-----"),
    _rule("a URL with a password", "://", rb"[a-z]{3,10}://[A-Za-z0-9._-]{1,64}:[A-Za-z0-9._~!$&*+=%-]{3,128}@[A-Za-z0-9.-]{3,100}", 10),
)  # fmt: skip
PATHS = (
    _rule("a path on a local machine", "/home/ /Users/ /root/ /mnt/ /scratch/ /tmp/", rb"/(?:home|Users|root|mnt|scratch|tmp)/[A-Za-z0-9._-]{1,100}"),
    _rule("a path on a local machine", ":\\Users\\ :\\\\Users\\", rb"[A-Z]:\\{1,2}Users\\{1,2}[A-Za-z0-9._-]{1,100}", 1),
)  # fmt: skip
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
    rules = _rules()
    with path.open("rb") as file:
        found = list(_search(file, name, rules))
    if zipfile.is_zipfile(path):
        found += _scan_members(path, name, rules)
    return found


def local_paths(path: Path, name: str | None = None) -> list[Finding]:
    """Absolute paths of somebody's machine in a text file; they tell who and where, but open nothing."""
    name = name or path.name
    with path.open("rb") as file:
        if b"\0" in file.read(_CHUNK):
            return []
        file.seek(0)
        return list(_search(file, name, PATHS))


def _scan_members(path: Path, name: str, rules: Sequence[Rule]) -> list[Finding]:
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
                    found += _search(file, f"{name}!{member.filename}", rules)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise InvalidInput(f"{name} is an archive that cannot be searched for secrets ({error}). Leave it out.") from error  # fmt: skip
    return found


def _rules() -> list[Rule]:
    """Every known kind of secret, and the token of this session in the forms a file may hold it."""
    from huggingface_hub import get_token

    rules = list(SECRETS)
    if len(token := get_token() or "") >= 8:
        encoded = base64.b64encode(token.encode()).rstrip(b"=")[:-1]
        for form in (token.encode(), token.encode("utf-16-le"), encoded):
            rules.append(Rule("your own token", (form,), re.compile(re.escape(form))))
    return rules


def _search(file: BinaryIO, name: str, rules: Sequence[Rule]) -> Iterator[Finding]:
    """Matches in a stream, each place once, with its line."""
    tail, lines, position, reported = b"", 1, 0, -1
    chunk = file.read(_CHUNK)
    while chunk:
        following = file.read(_CHUNK)
        text = tail + chunk
        for match, kind in sorted(_matches(text, rules), key=lambda found: found[0].span()):
            # one that touches the end may go on in the next chunk, which will hold it whole
            if (match.end() == len(text) and following) or position + match.start() <= reported:
                continue
            reported = position + match.end() - 1
            line = lines + text.count(b"\n", 0, match.start())
            yield Finding(name, line, kind, match.group()[:6].decode("ascii", "replace"))
        keep = min(_OVERLAP, len(text))
        lines += text.count(b"\n", 0, len(text) - keep)
        position += len(text) - keep
        tail = text[-keep:]
        chunk = following


def _matches(text: bytes, rules: Sequence[Rule]) -> Iterator[tuple[re.Match[bytes], str]]:
    for rule in rules:
        for anchor in rule.anchors:
            at = text.find(anchor)
            while at >= 0:
                # the longest beginning first, so that a URL is found with its whole scheme
                for start in range(max(0, at - rule.before), at + 1):
                    if match := rule.pattern.match(text, start):
                        yield match, rule.kind
                        break
                at = text.find(anchor, at + 1)
