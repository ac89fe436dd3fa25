"""Publishing to a loopback Hub: what arrives, what is refused, and that every fault leaves the repository whole."""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import threading

import faults
import huggingface_hub
import pytest
import torch
from faults import ALWAYS, FAULTS, REPO, STAGES
from huggingface_hub import constants
from server import TOKEN, Hub
from transformers import AutoModelForMaskedLM, BertTokenizer, Trainer, TrainingArguments
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli import app
from hf_attn.errors import InvalidInput, PublishFailed, Unsupported
from hf_attn.hub import publish, talk
from hf_attn.hub.check import PROBE
from hf_attn.hub.pack import entry_of, pack
from hf_attn.hub.probe import answer, write_probe
from hf_attn.hub.upload import Target, _upload


def upload(plan, repo=REPO, **wishes):
    """The part of `publish` that talks to the Hub."""
    return _upload(plan, Target(repo, **wishes))


@pytest.fixture
def plan(folder, tmp_path):
    return pack(folder, tmp_path / "packed", REPO, write_card=True)


def test_one_commit_holds_exactly_the_files_of_the_plan(hub, folder):
    result = publish(folder, REPO)
    files = hub.files(REPO)
    assert result.state == "published" and {file["path"] for file in result.files} == files.keys() - {".gitattributes"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.titles(REPO) == ["initial commit", "Publish with hf_attn"]
    assert result.commit == hub.repos[REPO].refs["main"] and result.commit in result.url
    assert result.commit in str(result)
    assert json.loads(json.dumps(result.as_json()))["commit"] == result.commit


def test_a_second_run_changes_nothing_and_uploads_nothing(hub, folder):
    first = publish(folder, REPO)
    before = len(hub.requests)
    second = publish(folder, REPO)
    assert second.state == "unchanged" and second.commit == first.commit
    assert {request.method for request in hub.requests[before:]} == {"GET", "POST"}
    assert [r.path for r in hub.requests[before:] if r.method == "POST"] == ["/api/repos/create"]


def test_a_published_model_loads_from_the_hub(hub, model):
    result = publish(model, REPO)
    loaded = AutoModelForMaskedLM.from_pretrained(REPO, revision=result.commit).eval()
    assert type(loaded) is hf_attn.AttnBertForMaskedLM and loaded.config.attention == model.config.attention
    inputs = {"input_ids": torch.arange(10)[None]}
    torch.testing.assert_close(answer(loaded, inputs), answer(model, inputs), rtol=0, atol=0)
    # no trust flag was given, and saving again leaves no trace of the code that is for others
    assert not hasattr(loaded.config, "auto_map")


def test_push_to_hub_goes_the_same_way(hub, model):
    commit = model.push_to_hub(REPO, private=True, commit_message="Mine")
    assert commit.oid == hub.repos[REPO].refs["main"] and hub.titles(REPO)[-1] == "Mine"
    assert PROBE in hub.files(REPO) and "manifest.json" in hub.files(REPO) and hub.repos[REPO].private
    with pytest.raises(InvalidInput, match="token"):
        model.push_to_hub(REPO, token=TOKEN)
    hub.fail("POST", "/commit/", 403)
    with torch.no_grad():
        model.cls.predictions.bias.add_(1)
    with pytest.raises(PublishFailed, match="403"):
        model.push_to_hub(REPO)


def test_a_trainer_is_published_with_its_tokenizer_and_without_its_pickles(hub, model, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, processing_class=tokenizer)
    trainer.save_model()
    with pytest.raises(Unsupported, match="training_args.bin"):
        publish(tmp_path / "run", REPO)
    assert publish(trainer, REPO).state == "published"
    assert "tokenizer_config.json" in hub.files(REPO) and "training_args.bin" not in hub.files(REPO)
    hub.fail("POST", "/commit/", 403)
    with torch.no_grad():
        model.cls.predictions.bias.add_(1)
    with pytest.raises(PublishFailed, match="403"):
        publish(trainer, REPO)


def test_what_cannot_be_published_is_refused(hub, folder):
    with pytest.raises(InvalidInput, match="got a Linear"):
        publish(torch.nn.Linear(2, 2), REPO)
    with pytest.raises(InvalidInput, match="the source is a folder"):
        publish(folder, REPO, max_shard_size="1KB")


def test_stale_shards_are_deleted_and_other_files_stay(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert publish(tmp_path / "sharded", REPO).state == "published"
    shards = [path for path in hub.files(REPO) if "-of-" in path]
    assert len(shards) > 1
    repo = hub.repos[REPO]
    blob = repo.at("main").tree["README.md"]
    repo.commit(
        "main", repo.refs["main"], "by hand", {**repo.at("main").tree, "notes.md": blob, "training_args.bin": blob}
    )
    model.save_pretrained(tmp_path / "whole")
    result = publish(tmp_path / "whole", REPO)
    assert set(result.deleted) == {*shards, "model.safetensors.index.json", "training_args.bin"}
    assert "notes.md" in hub.files(REPO) and not set(result.deleted) & hub.files(REPO).keys()
    # deletions are part of the one commit
    assert len(hub.titles(REPO)) == 4


def test_a_sharded_model_makes_the_round_trip(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    publish(tmp_path / "sharded", REPO)
    loaded = AutoModelForMaskedLM.from_pretrained(REPO)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_private_branch_tag_and_pull_request(hub, plan):
    upload(plan, private=True, tag="v1")
    repo = hub.repos[REPO]
    assert repo.private and repo.tags == {"v1": repo.refs["main"]}
    with pytest.raises(PublishFailed, match="is private, and public was asked for"):
        upload(plan, private=False)
    assert upload(plan, "someone/other", revision="next").state == "published"
    other = hub.repos["someone/other"]
    assert set(hub.files("someone/other")) == {".gitattributes"} and "README.md" in hub.files("someone/other", "next")
    opened = upload(plan, "someone/other", create_pr=True)
    assert opened.pull_request.endswith("/discussions/1") and "README.md" in hub.files("someone/other", "refs/pr/1")
    assert set(hub.files("someone/other")) == {".gitattributes"}
    # asking again finds the one that is open
    assert upload(plan, "someone/other", create_pr=True).pull_request == opened.pull_request
    assert [ref for ref in other.refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_tag_never_moves(hub, plan, folder, tmp_path):
    upload(plan, tag="v1")
    assert upload(plan, tag="v1").state == "unchanged"
    (folder / "LICENSE").write_text("Apache-2.0")
    changed = pack(folder, tmp_path / "changed", REPO, write_card=True)
    with pytest.raises(PublishFailed, match="tag 'v1' exists already"):
        upload(changed, tag="v1")
    assert "LICENSE" not in hub.files(REPO)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"repo_id": "model"}, "must name its owner"),
        ({"repo_id": "some one/model"}, "not a repository name"),
        ({"repo_id": "../model"}, "repository name"),
        ({"create_pr": True, "revision": "next"}, "leave revision"),
        ({"tag": "../v1"}, "not a valid name"),
        ({"tag": ""}, "not a valid name"),
        ({"revision": "a b"}, "not a valid name"),
        ({"message": " "}, "title of the commit"),
    ],
)
def test_wishes_that_cannot_work_are_refused_before_any_work(hub, wish, message):
    with pytest.raises(InvalidInput, match=message):
        publish("nowhere", **{"repo_id": REPO, **wish})
    assert hub.requests == []


# faults


@pytest.fixture
def install(hub, monkeypatch):
    """Points this process's client at another server."""

    def point(server: Hub) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)

    return point


@pytest.mark.parametrize("often", ["once", "always"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_any_stage_leaves_the_repository_whole(kind, often, plan, install):
    for stage in STAGES:
        outcome = faults.faulty(plan, stage, kind, often, install)
        assert outcome.sound, outcome
        passing = kind in (429, 503, "close", "truncate", "lost")
        if often == "once" and passing:
            assert outcome.first in ("published", "unchanged"), outcome
        elif outcome.first.startswith("refused"):
            # what went wrong is told, with what the repository holds and what to do
            told = "unexpected form" if (stage, kind) == ("create the repository", 409) else str(kind)
            assert told in outcome.message or not isinstance(kind, int), outcome
            assert re.search("Hub|repository|commit", outcome.message), outcome


def test_a_fault_that_stays_is_never_called_a_success(plan, install):
    for stage in STAGES:
        outcome = faults.faulty(plan, stage, 403, "always", install)
        # an existing repository may be written by somebody who may not create one, and this one is new
        assert outcome.first.startswith("refused"), outcome


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_any_stage_then_run_again(when, plan, install):
    for stage in STAGES:
        outcome = faults.killed(plan, stage, when, install)
        assert outcome.first == "killed" and outcome.sound, outcome


def test_kill_while_packing_then_pack_again(folder, tmp_path, plan):
    def kill_at(number: int) -> None:
        count, copy, rename = [0], shutil.copyfile, type(tmp_path).rename

        def step(original):
            def run(*arguments):
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return original(*arguments)

            return run

        shutil.copyfile, type(tmp_path).rename = step(copy), step(rename)
        pack(folder, tmp_path / "again", REPO, write_card=True)

    for number in range(3):
        child = os.fork()
        if child == 0:
            try:
                kill_at(number)
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not (tmp_path / "again").exists(), "a folder appears whole or not at all"
    again = pack(folder, tmp_path / "again", REPO, write_card=True)
    assert again.files == plan.files
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_somebody_elses_commit_is_never_overwritten(hub, plan):
    upload(plan)
    repo = hub.repos[REPO]
    repo.commit("main", repo.refs["main"], "emptied", {})

    def other(_, when):
        if when == "before":
            repo.commit("main", repo.refs["main"], "theirs", {**repo.at("main").tree, "theirs.md": blob})

    blob = next(iter(repo.commits.values())).tree[".gitattributes"]
    hub.fail("POST", "/commit/", other)
    with pytest.raises(PublishFailed, match="somebody else committed") as caught:
        upload(plan)
    assert caught.value.status == 412
    assert hub.titles(REPO)[-1] == "theirs" and "theirs.md" in hub.files(REPO)
    assert upload(plan).state == "published"
    assert "theirs.md" in hub.files(REPO) and hub.titles(REPO)[-2] == "theirs"


def test_two_pushers_of_the_same_files_make_one_commit(hub, plan):
    results, errors = [], []

    def push():
        try:
            results.append(upload(plan))
        except PublishFailed as error:
            errors.append(error)

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(hub.titles(REPO)) == 2 and {result.commit for result in results} == {hub.repos[REPO].refs["main"]}


def test_what_arrived_wrong_is_noticed(hub, plan, monkeypatch):
    real = huggingface_hub.HfApi.create_commit

    def corrupt(self, *arguments, **named):
        made = real(self, *arguments, **named)
        tree = hub.repos[REPO].at("main").tree
        tree["model.safetensors"].content = tree["model.safetensors"].content[:-1] + b"!"
        return made

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", corrupt)
    with pytest.raises(PublishFailed, match=r"verifying the upload: model.safetensors on the Hub differ"):
        upload(plan)


def test_a_server_that_hangs_does_not_block_for_ever(hub, folder, monkeypatch):
    release = threading.Event()
    hub.fail("POST", "/api/repos/create", lambda *_: release.wait(20), count=ALWAYS)
    monkeypatch.setattr(talk, "TRIES", 1)
    try:
        with pytest.raises(PublishFailed, match=r"creating the repository: \w*Timeout"):
            publish(folder, REPO, timeout=0.2)
    finally:
        release.set()


def test_retry_after_is_honoured(hub, plan, monkeypatch):
    waited = []
    monkeypatch.setattr(talk, "pause", waited.append)
    hub.fail("POST", "/api/repos/create", 429, headers={"Retry-After": "7"})
    hub.fail("POST", "/commit/", 503, count=2)
    assert upload(plan).state == "published"
    assert waited == [7.0, 1.0, 2.0]


# tokens, offline


def everything(path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_the_token_goes_to_the_hub_in_one_header_and_nowhere_else(hub, folder, tmp_path, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        print(publish(folder, REPO, private=True))
        AutoModelForMaskedLM.from_pretrained(REPO)
        hub.fail("POST", "/tag/", 403)
        with pytest.raises(PublishFailed) as caught:
            publish(folder, REPO, tag="v1")
    token = TOKEN.encode()
    assert any(request.origin == "store" and request.method == "PUT" for request in hub.requests)
    for request in hub.requests:
        inside = request.raw.count(token)
        assert inside == int(request.authorised)
        assert not (inside and request.origin == "store")
    printed = capfd.readouterr()
    for text in (str(caught.value), caplog.text, printed.out, printed.err):
        assert TOKEN not in text
    assert token not in everything(tmp_path) and all(token not in content for content in hub.store.values())


def test_without_a_token_nothing_is_sent(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with pytest.raises(PublishFailed, match="no access token"):
        publish(folder, REPO)
    assert hub.requests == []


def test_a_private_repository_is_closed_to_others(hub, plan, monkeypatch):
    upload(plan, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    with pytest.raises(PublishFailed, match="401") as caught:
        upload(plan)
    assert caught.value.status == 401 and "hf auth login" in str(caught.value)


@pytest.mark.parametrize("what", ["publish", "dry run", "load from the cache"])
def test_offline(what, hub, folder, monkeypatch):
    if what == "load from the cache":
        publish(folder, REPO)
        AutoModelForMaskedLM.from_pretrained(REPO)
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if what == "publish":
        with pytest.raises(PublishFailed, match="offline mode is on"):
            publish(folder, REPO)
    elif what == "dry run":
        assert publish(folder, REPO, dry_run=True).state == "dry run"
    else:
        assert AutoModelForMaskedLM.from_pretrained(REPO).config.attention["default"]["name"] == "rfa"
        with pytest.raises(OSError, match="cached"):
            AutoModelForMaskedLM.from_pretrained("someone/unknown")
    assert len(hub.requests) == before


def test_a_hub_that_is_gone(hub, folder):
    publish(folder, REPO)
    AutoModelForMaskedLM.from_pretrained(REPO)
    hub.stop()
    # kept connections would still be answered
    huggingface_hub.close_session()
    with pytest.raises(PublishFailed, match="ConnectError") as caught:
        publish(folder, REPO)
    assert "not known" in caught.value.state and "Run the same command again" in str(caught.value)
    assert publish(folder, REPO, dry_run=True).state == "dry run"
    assert AutoModelForMaskedLM.from_pretrained(REPO).config.attention["default"]["name"] == "rfa"


# the folder


def test_a_reload_with_other_numbers_is_refused(hub, model, folder):
    write_probe(model, folder)
    assert publish(folder, REPO, dry_run=True).state == "dry run"
    with torch.no_grad():
        model.cls.predictions.bias[:5] += 1
    model.save_pretrained(folder)
    with pytest.raises(InvalidInput, match="answers its probe with other numbers"):
        publish(folder, REPO)
    assert hub.requests == []


def test_weights_of_another_model_are_refused(hub, folder):
    other = hf_attn.AttnBertModel(hf_attn.AttnBertConfig.from_pretrained(folder))
    config = (folder / "config.json").read_text()
    other.save_pretrained(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match="missing keys"):
        publish(folder, REPO)


def test_planted_secrets_and_pickles_are_refused(hub, folder):
    (folder / "training_args.bin").write_bytes(pickle.dumps({"hub_token": TOKEN}))
    with pytest.raises(InvalidInput, match=r"training_args.bin:\d+: a Hugging Face token \(hf_Zx9\.\.\.\)") as caught:
        publish(folder, REPO)
    assert TOKEN not in str(caught.value)
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(Unsupported, match="pickles"):
        publish(folder, REPO)
    assert hub.requests == []


def test_a_packed_folder_is_published_as_it_is_after_every_check(hub, plan):
    assert publish(plan.folder, REPO).state == "published"
    assert {entry["path"]: entry["sha256"] for entry in publish(plan.folder, REPO).files} == {entry["path"]: entry["sha256"] for entry in plan.files}  # fmt: skip
    with pytest.raises(InvalidInput, match="packed without its code"):
        publish(plan.folder, REPO, vendored=True)


@pytest.mark.parametrize(("name", "content", "message"), [("notes.txt", b"mine", "no file that is published"), ("README.md", f"\n{TOKEN}".encode(), "README.md:2"), ("a.pkl", b"", "no file")])  # fmt: skip
def test_a_manifest_made_by_hand_opens_no_door(hub, plan, name, content, message):
    (plan.folder / name).write_bytes(content)
    manifest = json.loads((plan.folder / "manifest.json").read_text())
    entries = [entry for entry in manifest["files"] if entry["path"] != name] + [entry_of(plan.folder, name)]
    (plan.folder / "manifest.json").write_text(json.dumps({**manifest, "files": entries}))
    with pytest.raises(InvalidInput, match=message):
        publish(plan.folder, REPO)
    assert hub.requests == []


# the command


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, ["publish", *map(str, words)], prog_name="hf-attn")


def test_the_command_publishes(hub, folder, command):
    done = command(folder, "--repo-id", REPO, "--private", "--tag", "v1", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["state"] == "published" and facts["private"] and facts["tag"] == "v1"
    again = command(folder, "--repo-id", REPO)
    assert "unchanged: someone/model, main (private)" in again.stdout
    # the plan is a hint, shown before anything is sent
    assert "model.safetensors" in again.stderr and "target: someone/model, main (visibility as it is" in again.stderr
    hub.fail("POST", "/api/repos/create", 401, count=ALWAYS)
    hub.fail("GET", "/api/models/", 401, count=ALWAYS)
    failed = command(folder, "--repo-id", REPO)
    assert (
        failed.exit_code == 1 and failed.stderr.index("target:") < failed.stderr.index("error: ") and not failed.stdout
    )


def test_a_dry_run_shows_the_plan_and_sends_nothing(hub, folder, command):
    (folder / "notes.txt").write_text("mine")
    done = command(folder, "--repo-id", REPO, "--dry-run", "--private")
    assert done.exit_code == 0 and hub.requests == []
    for words in ("model.safetensors", "left out: notes.txt", "target: someone/model, main (private)", "dry run"):
        assert words in done.stdout


def test_a_dry_run_names_file_and_line_of_a_planted_token(hub, folder, command):
    (folder / "README.md").write_text(f"# A model\n\nLoad it with\ntoken={TOKEN}\n")
    done = command(folder, "--repo-id", REPO, "--dry-run")
    assert done.exit_code == 1 and "README.md:4: a Hugging Face token (hf_Zx9...)" in done.stderr
    assert TOKEN not in done.output


def test_a_server_without_xet_is_explained(hub, plan, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(PublishFailed, match="HF_HUB_DISABLE_XET=1") as caught:
        upload(plan)
    assert caught.value.stage == "uploading files" and hub.titles(REPO) == ["initial commit"]


def test_the_round_trip_through_xet(hub, model, folder, tmp_path, monkeypatch):
    """Optional: `local://` is no promised interface of hf_xet."""
    pytest.importorskip("hf_xet")
    (tmp_path / "xet").mkdir()
    hub.xet = tmp_path / "xet"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    result = publish(folder, REPO)
    assert result.state == "published" and hub.repos[REPO].at("main").tree["model.safetensors"].xet
    assert not hub.store and publish(folder, REPO).state == "unchanged"
    loaded = AutoModelForMaskedLM.from_pretrained(REPO)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
