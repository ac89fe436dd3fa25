"""The families with attention of their own: their cards say what they compute, and they are published like the others."""

import json

import pytest
import torch
import transformers
from faults import REPO
from small import own_models

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.hub import publish
from hf_attn.hub.code import auto_map
from hf_attn.hub.families import DESCRIBED, attention_of, mechanism_names
from hf_attn.hub.probe import answer, probe_inputs
from hf_attn.models.limits import check_stored
from hf_attn.models.loading import load

MODELS = own_models()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_published_loads_and_computes_the_same(name, hub):
    model = MODELS[name].eval()
    model.push_to_hub(REPO)
    auto = next(auto for auto, kind in auto_map(model.config).items() if kind == type(model).__name__)
    loaded = getattr(transformers, auto).from_pretrained(REPO)
    assert type(loaded) is type(model) and not hasattr(loaded.config, "auto_map")
    inputs = probe_inputs(model)
    torch.testing.assert_close(answer(loaded, inputs), answer(model, inputs), rtol=0, atol=0)
    card = hub.files(REPO)["README.md"].decode()
    (attention,) = attention_of(model.config)
    assert f"{auto}.from_pretrained" in card and f"- {attention.name}\n" in card and attention.equation in card
    processor = "AutoImageProcessor" if "pixel_values" in inputs else "AutoTokenizer"
    assert f"{processor}.from_pretrained" in card and "not measured for this model" in card
    assert "image size" not in card or processor == "AutoImageProcessor"


def test_a_backbone_is_published(hub):
    config = MODELS["aa_basic"].config
    publish(hf_attn.AAResNetBackbone(config).eval(), REPO)
    assert type(transformers.AutoBackbone.from_pretrained(REPO)) is hf_attn.AAResNetBackbone


def test_the_attention_is_what_the_config_says():
    def of(name, **changes):
        return attention_of(type(MODELS[name].config)(**{**MODELS[name].config.to_dict(), **changes}))[0]

    assert of("flash").name == "flash_gau" and ("chunk_size", "4") in of("flash").options
    assert ("decoding keeps", "a state of constant size") in of("flash").capabilities
    assert of("gau").name == "gau" and ("attention_fn", "relu2") in of("gau").options and of("gau").unverified
    assert ("packed sequences", "a row each") in of("gau", packed_segments="exact").capabilities
    assert of("mc_tfm").name == "mixed_chunk" and mechanism_names(MODELS["mc_tfm"].config) == ["mixed_chunk"]
    assert "stages 2, 3" in of("aa_basic").layers and ("upsilon", "0.5") in of("aa_basic").options
    assert (
        of("aa_basic", upsilon=0.0).layers == "no layer" and "rel_width" not in of("aa_basic", relative=False).equation
    )
    with pytest.raises(InvalidInput, match="carries no attention"):
        attention_of(transformers.ViTConfig())


def test_a_folder_loads_with_its_head(tmp_path):
    MODELS["flash"].save_pretrained(tmp_path)
    assert type(load(str(tmp_path))) is hf_attn.GauForCausalLM
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "architectures": ["BertModel"]}))
    with pytest.raises(InvalidInput, match="has GauModel"):
        publish(tmp_path, REPO, dry_run=True)


@pytest.mark.parametrize("change", [{"expansion": 10**9}, {"query_key_dim": 2**40}, {"hidden_sizes": [2**30]}, {"depths": [1] * 99}])  # fmt: skip
def test_sizes_that_no_model_has_are_refused(change):
    with pytest.raises(InvalidOption, match=next(iter(change))):
        check_stored({"model_type": "gau", **change})


def test_a_family_that_cannot_be_published_yet_says_so(tmp_path, monkeypatch):
    MODELS["gau"].save_pretrained(tmp_path)
    monkeypatch.delitem(DESCRIBED, "gau")
    with pytest.raises(Unsupported, match="card cannot be written yet"):
        publish(tmp_path, REPO, dry_run=True)
