"""Packing: what is copied, what is refused, and what the manifest says."""

import hashlib
import json
import pickle
import stat

import pytest
import torch
import transformers
from safetensors.torch import save_file

import hf_attn
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.hub.pack import pack, verify

SIZES = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def folder(tmp_path):
    model = hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(**SIZES, attn_implementation="ripple"))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    return tmp_path / "model"


def test_packs_what_belongs_on_the_hub(folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("SECRET=1")
    (folder / "checkpoint-3").mkdir()
    plan = pack(folder, tmp_path / "hub", "someone/model")
    names = {"README.md", "config.json", "model.safetensors", "manifest.json", "modeling_hf_attn.py"}
    assert {path.name for path in plan.folder.iterdir()} == names == {file["path"] for file in plan.files}
    assert set(plan.skipped) == {"notes.txt", ".env", "checkpoint-3/"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in plan.folder.iterdir()} == {0o644}
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_the_manifest_tells_the_files_and_versions(folder, tmp_path):
    plan = pack(folder, tmp_path / "hub")
    manifest = json.loads((plan.folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        content = (plan.folder / entry["path"]).read_bytes()
        assert entry["size"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["versions"] == {
        "hf_attn": hf_attn.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    verify(plan.folder)


def test_a_change_after_packing_is_noticed(folder, tmp_path):
    plan = pack(folder, tmp_path / "hub")
    weights = plan.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"model.safetensors .* has changed"):
        verify(plan.folder)
    (plan.folder / "extra").touch()
    with pytest.raises(InvalidInput, match="not those of its manifest"):
        verify(plan.folder)
    with pytest.raises(InvalidInput, match="no readable"):
        verify(folder)


def test_the_plan_prints_a_table_and_one_command(folder, tmp_path):
    text = str(pack(folder, tmp_path / "my hub", "someone/model"))
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}" in text
    assert text.splitlines()[-1].strip() == f"hf-attn publish '{tmp_path / 'my hub'}' --repo-id someone/model"


def test_an_earlier_pack_is_replaced_and_nothing_else(folder, tmp_path):
    pack(folder, tmp_path / "hub")
    (folder / "LICENSE").write_text("Apache-2.0")
    assert (pack(folder, tmp_path / "hub").folder / "LICENSE").is_file()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(InvalidInput, match="no earlier pack made"):
        pack(folder, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").exists()


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder: (folder / "README.md").write_text(f"---\n---\nuse {TOKEN}\n"),
        lambda folder: (folder / "notes.txt").write_text(TOKEN),
        # in the middle of a word, in bytes that are no text, and across two reads
        lambda folder: (folder / "some.png").write_bytes(
            b"\x89\xff" + b"x" * ((1 << 20) - 12) + TOKEN.encode() + b"\x00"
        ),
        lambda folder: save_file({"a": torch.zeros(2)}, folder / "model.safetensors", metadata={"key": TOKEN}),
    ],
    ids=["card", "file left out", "bytes", "safetensors metadata"],
)
def test_a_planted_token_is_refused(folder, tmp_path, plant):
    plant(folder)
    with pytest.raises(InvalidInput, match="access token") as caught:
        pack(folder, tmp_path / "hub")
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.bin", "optimizer.pt", "model.pkl"])
def test_a_planted_pickle_is_refused(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(Unsupported, match=name):
        pack(folder, tmp_path / "hub")


def test_damaged_weights_are_refused(folder, tmp_path):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-5], content + b"more", b"", pickle.dumps({"a": 1})):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match="model.safetensors .* is damaged"):
            pack(folder, tmp_path / "hub")
    path.unlink()
    with pytest.raises(InvalidInput, match="holds no"):
        pack(folder, tmp_path / "hub")


def test_shards_and_their_index_must_agree(tmp_path):
    model = hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(**SIZES, attn_implementation="ripple"))
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="8KB")
    (folder / "README.md").write_text("card")
    plan = pack(folder, tmp_path / "hub")
    assert "model.safetensors.index.json" in {file["path"] for file in plan.files} and len(plan.files) > 5
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].popitem()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match="does not match the weight files"):
        pack(folder, tmp_path / "hub")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InvalidInput, match="shards without"):
        pack(folder, tmp_path / "hub")


def test_a_config_that_does_not_load_or_is_not_ours_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for text, error, message in (
        (json.dumps({**config, "attention": {"default": {"name": "nothing"}}}), InvalidInput, "nothing"),
        (json.dumps({**config, "model_type": "unheard_of"}), InvalidInput, "does not load"),
        (json.dumps({**config, "model_type": "vit", "attention": None}), Unsupported, "not a model of hf_attn"),
        ("{", InvalidInput, "not valid JSON"),
        ("[]", InvalidInput, "JSON object"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(error, match=message):
            pack(folder, tmp_path / "hub")


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(InvalidInput, match="there is no folder"):
        pack(tmp_path / "nowhere", tmp_path / "hub")
    (folder / "README.md").unlink()
    with pytest.raises(InvalidInput, match="has no README.md"):
        pack(folder, tmp_path / "hub")
    (tmp_path / "card.md").write_text("card")
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(InvalidInput, match="is a link"):
        pack(folder, tmp_path / "hub")


def test_a_card_made_before_the_name_was_known_gets_it(folder, tmp_path):
    (folder / "README.md").write_text('---\n---\nAutoModel.from_pretrained("ORG/my-model.v1")\n"ORGANISED/x"\n')
    card = (pack(folder, tmp_path / "hub", "someone/model").folder / "README.md").read_text()
    assert 'from_pretrained("someone/model")' in card and '"ORGANISED/x"' in card


def test_a_card_that_the_hub_would_refuse_is_refused(folder, tmp_path):
    (folder / "README.md").write_text("---\nscore: .nan\n---\n")
    with pytest.raises(InvalidInput, match="score is nan"):
        pack(folder, tmp_path / "hub")
    assert list(tmp_path.iterdir()) == [folder], "nothing is left behind"
