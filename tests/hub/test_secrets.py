"""The secret scanner: every kind, wherever it hides, with file and line, and no false alarms on weights and vocabularies."""

import base64
import json
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_attn.errors import InvalidInput
from hf_attn.hub import secrets
from hf_attn.hub.secrets import local_paths, refuse_secrets, scan

HF = "hf_" + "aB3" * 12
PLANTED = {
    "a Hugging Face token": HF,
    "an AWS access key": "AKIA" + "ABCD1234" * 2,
    "a GitHub token": "ghp_" + "aB3" * 12,
    "a Google API key": "AIza" + "b" * 35,
    "an OpenAI or Anthropic key": "sk-proj-" + "aB3_" * 9,
    "a Slack token": "xoxb-1234567890-abc",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "a URL with a password": "https://me:sesame1@example.org/x",
}


def test_every_kind_has_a_case():
    assert list(PLANTED) == [rule.kind for rule in secrets.SECRETS]


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_is_found_with_its_line_and_not_repeated(kind, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(f"one\ntwo {PLANTED[kind]}\nthree\n")
    (finding,) = scan(path)
    assert (finding.path, finding.line, finding.kind) == ("notes.txt", 2, kind)
    assert PLANTED[kind] not in str(finding) and str(finding).startswith("notes.txt:2: ")


def test_places(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors", metadata={"key": HF})
    (tmp_path / ".env").write_text(f"HF_TOKEN={HF}")
    (tmp_path / "bytes").write_bytes(b"\xff\x00" + HF.encode() + b"\x00")
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", "x" * 5000 + "\n" + HF)
    torch.save({"token": HF}, tmp_path / "optimizer.pt")
    found = {path.name: scan(path) for path in tmp_path.iterdir()}
    assert all(found.values()), found
    (finding,) = found["training_args.bin"]
    assert finding.path == "training_args.bin!archive/data.pkl" and finding.line == 2
    with pytest.raises(InvalidInput, match=r"\.env:1: a Hugging Face token") as caught:
        refuse_secrets(tmp_path, sorted(found))
    assert HF not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 700), lines=st.integers(0, 20), chunk=st.integers(220, 600))
def test_a_token_anywhere_in_any_chunk_is_found_once(before, lines, chunk, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "file"
    path.write_bytes(b"\n" * lines + b"x" * before + b" " + HF.encode() + b" " + b"y" * (700 - before))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "_CHUNK", chunk)
        patch.setattr(secrets, "_OVERLAP", 210)
        (finding,) = scan(path)
    assert finding.line == lines + 1


def test_a_token_at_the_very_end(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_CHUNK", len(HF))
    (tmp_path / "file").write_text(HF)
    assert len(scan(tmp_path / "file")) == 1


@pytest.mark.parametrize("form", ["plain", "utf-16", "base64"])
def test_the_token_of_this_session_is_found_whatever_its_form(form, tmp_path, monkeypatch):
    token = "my-very-own-secret-42"
    monkeypatch.setenv("HF_TOKEN", token)
    content = {"plain": token.encode(), "utf-16": token.encode("utf-16-le"), "base64": base64.b64encode(token.encode())}
    (tmp_path / "file").write_bytes(b"a\nb" + content[form])
    (finding,) = scan(tmp_path / "file")
    assert finding.kind == "your own token" and finding.line == 2


def test_no_false_alarm(tmp_path):
    torch.manual_seed(0)
    save_file({"weight": torch.randn(500, 500)}, tmp_path / "weights.safetensors")
    (tmp_path / "vocab.txt").write_text("hf_token\nsk-\nghp_\nAKIA\nhttps://example.org/a:b@c\nhf_" + "a" * 20)
    (tmp_path / "empty").touch()
    assert [scan(path) for path in sorted(tmp_path.iterdir())] == [[], [], []]


def test_archives_that_cannot_be_searched_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", b"0" * 10_000)
    monkeypatch.setattr(secrets, "_LARGEST_MEMBER", 5_000)
    with pytest.raises(InvalidInput, match="unpacks to 10,000 bytes"):
        scan(tmp_path / "bomb.zip")
    content = bytearray((tmp_path / "bomb.zip").read_bytes())
    content[40:60] = b"\xff" * 20
    (tmp_path / "broken.zip").write_bytes(content)
    monkeypatch.setattr(secrets, "_LARGEST_MEMBER", 50_000)
    with pytest.raises(InvalidInput, match="cannot be searched"):
        scan(tmp_path / "broken.zip")


def test_local_paths_are_named_in_text_only(tmp_path):
    (tmp_path / "config.json").write_text('{\n "_name_or_path": "/home/someone/models/x"\n}')
    (tmp_path / "weights").write_bytes(b"\0/home/someone")
    (finding,) = local_paths(tmp_path / "config.json")
    assert finding.line == 2 and finding.shown == "/home/"
    assert local_paths(tmp_path / "weights") == []
    (tmp_path / "windows.json").write_text(json.dumps({"path": "C:\\Users\\someone\\model"}))
    (finding,) = local_paths(tmp_path / "windows.json")
    assert finding.line == 1
