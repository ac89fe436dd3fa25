"""convert(model, spec): any model of transformers whose attention goes through AttentionInterface."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModel

import hf_attn
from hf_attn import InvalidOption, Unsupported
from hf_attn.models.wrapping import attention_modules

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 12, "patch_size": 3}
MODELS = {
    "bert": ("BertForMaskedLM", {**SIZE, **TEXT}),
    "roberta": ("RobertaForMaskedLM", {**SIZE, **TEXT}),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, **TEXT}),
    "vit": ("ViTForImageClassification", {**SIZE, **IMAGE}),
    "deit": ("DeiTForImageClassification", {**SIZE, **IMAGE}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", {**SIZE, **TEXT, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**SIZE, **TEXT, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZE, **TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "modernbert": ("ModernBertForMaskedLM", {**SIZE, **TEXT, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3")
every = pytest.mark.parametrize("model_type", MODELS)


def stock(model_type: str):
    name, sizes = MODELS[model_type]
    cls = getattr(transformers, name)
    torch.manual_seed(4)
    return cls(cls.config_class(**copy.deepcopy(sizes))).double().eval()


def inputs(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 12, 12, generator=generator, dtype=torch.float64)}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": torch.randint(3, 99, (2, 12), generator=generator), "attention_mask": mask}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs(model)).logits
    return out[inputs(model)["attention_mask"].bool()] if out.dim() == 3 else out


@every
def test_converted_to_softmax_the_outputs_stay(model_type):
    model = stock(model_type)
    before = logits(model)
    hf_attn.convert(model, "softmax")
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)


@every
def test_a_mixed_choice_changes_the_model_and_survives_saving(model_type, tmp_path):
    model = stock(model_type)
    before = logits(model)
    # every third layer of ModernBERT attends to all tokens, the others to a window
    assert hf_attn.convert(model, {"default": "softmax", "0": {"name": "rfa", "num_features": 8}}) is model
    after = logits(model)
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-6
    assert hf_attn.layer_names(model) == ["rfa", "softmax", "softmax"]
    assert type(model).__name__ == "Attn" + MODELS[model_type][0]
    model.save_pretrained(tmp_path)
    assert model.config.model_type == f"attn_{model_type}"
    for loaded in (type(model).from_pretrained(tmp_path), _auto(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and hf_attn.layer_names(loaded) == hf_attn.layer_names(model)
        # a copy: weights read from a file lie at odd addresses, which changes the rounding of a matrix product
        loaded = copy.deepcopy(loaded.double().eval())
        torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)


def _auto(model):
    heads = {"MaskedLM": "AutoModelForMaskedLM", "ImageClassification": "AutoModelForImageClassification"}
    return getattr(
        transformers, next((v for k, v in heads.items() if k in type(model).__name__), "AutoModelForCausalLM")
    )


@every
def test_a_saved_conversion_loads_in_a_fresh_process(model_type, tmp_path):
    import subprocess
    import sys

    if model_type not in ("deit", "llama", "modernbert"):
        pytest.skip("three families stand for the ten: a process each takes seconds")
    model = hf_attn.convert(stock(model_type).float(), {"default": "softmax", "0": "rfa"})
    model.save_pretrained(tmp_path)
    code = (
        f"import hf_attn, transformers; m = transformers.{_auto(model).__name__}.from_pretrained({str(tmp_path)!r});"
        "print(type(m).__name__, hf_attn.layer_names(m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{type(model).__name__} ['rfa', 'softmax', 'softmax']"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_causal_model_refuses_a_mechanism_without_order_before_anything_changes(model_type):
    model = stock(model_type)
    before, keys = logits(model), set(model.state_dict())
    with pytest.raises(Unsupported, match="causal.*rfa"):
        hf_attn.convert(model, {"default": "softmax", "1": "ripple"})
    assert type(model).__name__ == MODELS[model_type][0] and set(model.state_dict()) == keys
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_a_sliding_window_is_refused_with_the_layers_that_work():
    model = stock("modernbert")
    with pytest.raises(Unsupported, match="sliding window"):
        hf_attn.convert(model, "rfa")


def test_grids_and_prefix_tokens_of_vision_models_reach_the_mechanism():
    model = hf_attn.convert(stock("deit"), "ripple")
    assert torch.isfinite(logits(model)).all()
    assert model.config.attention["default"]["r_cap"] == 3
    model = hf_attn.convert(stock("vit"), "ripple")
    large = torch.rand(1, 3, 18, 24, dtype=torch.float64)
    with torch.no_grad():
        assert torch.isfinite(model(large, interpolate_pos_encoding=True).logits).all()


def test_converting_twice_replaces_the_first_choice():
    model = hf_attn.convert(stock("bert"), "rfa")
    hf_attn.convert(model, {"default": "rfa", "2": "softmax"}, num_features=8)
    assert hf_attn.layer_names(model) == ["rfa", "rfa", "softmax"]
    assert model.config.attention["default"] == {"name": "rfa", "num_features": 8}


def test_dtype_and_mode_follow_the_model():
    model = hf_attn.convert(stock("vit").to(torch.bfloat16).train(), "ripple")
    for module in attention_modules(model).values():
        assert module.mechanism.training and {p.dtype for p in module.mechanism.parameters()} == {torch.bfloat16}


def test_what_cannot_be_wrapped_says_why():
    with pytest.raises(Unsupported, match="PreTrainedModel"):
        hf_attn.convert(torch.nn.Linear(2, 2), "rfa")
    mamba = transformers.MambaModel(transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(Unsupported, match="MambaModel.*AttentionInterface"):
        hf_attn.convert(mamba, "rfa")
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**SIZE, "num_hidden_layers": 1, "vocab_size": 99},
            vision_config={**SIZE, "num_hidden_layers": 1, **IMAGE},
        )
    )
    with pytest.raises(Unsupported, match="text_config"):
        hf_attn.convert(clip, "softmax")
    with pytest.raises(InvalidOption, match="layer 7"):
        hf_attn.convert(stock("bert"), {"default": "softmax", "7": "rfa"})


def test_a_vision_model_whose_grid_is_not_found_runs_as_a_sequence():
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZE, **IMAGE)).double().eval()
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = clip(pixels).last_hidden_state
        hf_attn.convert(clip, "softmax")
        torch.testing.assert_close(clip(pixels).last_hidden_state, wanted)


def test_t5_biases_are_refused_instead_of_dropped():
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=9)
    )
    with pytest.raises(Unsupported):
        hf_attn.convert(t5, "rfa")
        t5(torch.tensor([[1, 2, 3]]))


def test_the_encoder_of_a_converted_model_is_one_of_ours():
    model = hf_attn.convert(stock("bert"), "rfa")
    assert type(model.bert).__name__ == "AttnBertModel"
    assert isinstance(model, transformers.BertForMaskedLM)
    assert type(AutoModel.from_config(model.config)).__name__ == "AttnBertModel"


def bart():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    torch.manual_seed(4)
    config = transformers.BartConfig(
        **sizes, **TEXT, encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=1, forced_eos_token_id=None
    )
    return transformers.BartForConditionalGeneration(config).double().eval()


def test_encoder_decoder_attention_has_an_entry_of_its_own(tmp_path):
    model, generator = bart(), torch.Generator().manual_seed(2)
    source, target = (torch.randint(3, 99, (2, n), generator=generator) for n in (9, 6))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    call = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    before = model(**call).logits
    cross = {"name": "generalized", "beta": "1010"}
    hf_attn.convert(model, {"default": "generalized", "cross": cross})
    for path, module in attention_modules(model).items():
        assert module.mechanism.options.beta == ("1010" if path.endswith("encoder_attn") else "1111")
    # u and V^R start at zero
    torch.testing.assert_close(model(**call).logits, before, rtol=1e-10, atol=1e-10)
    for module in attention_modules(model).values():
        torch.nn.init.normal_(module.mechanism.key_bias)
    after = model(**call).logits
    assert (after - before).abs().max() > 1e-6
    cut = model(input_ids=source[1:, :6], decoder_input_ids=target[1:]).logits
    torch.testing.assert_close(after[1:], cut, rtol=1e-10, atol=1e-10)
    steps = model.generate(input_ids=source, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    plain = model.generate(
        input_ids=source, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False
    )
    assert torch.equal(steps, plain)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).double().eval()
    assert loaded.config.attention["cross"] == cross
    torch.testing.assert_close(loaded(**call).logits, after, rtol=1e-9, atol=1e-9)


def test_encoder_decoder_attention_refuses_positions_and_a_model_without_it_the_key():
    with pytest.raises(Unsupported, match="generalized"):
        hf_attn.convert(bart(), "generalized")
    with pytest.raises(InvalidOption, match="'cross'.*no encoder-decoder attention"):
        hf_attn.convert(stock("bert"), {"default": "softmax", "cross": "rfa"})


UNNORMALISED = ("relu2", "laplace", "softmax_plus", "mixed_chunk")


@pytest.mark.parametrize("name", UNNORMALISED)
def test_a_pretrained_model_is_said_to_need_training_after_the_switch(name, tmp_path):
    told = pytest.warns(UserWarning, match=f"{name} .*needs training")
    with told:
        hf_attn.convert(stock("bert"), name)
    model = hf_attn.convert(stock("bert"), "softmax")
    model.save_pretrained(tmp_path / "ours")
    with told:
        model.set_attn_implementation({"default": "softmax", "1": name})
    with told:
        AutoModel.from_pretrained(tmp_path / "ours", attn_implementation=name)
    stock("bert").save_pretrained(tmp_path / "stock")
    with told:
        hf_attn.AttnBertForMaskedLM.from_pretrained(tmp_path / "stock", attn_implementation=name)
    with told:
        # a shape of its own: a stock model's mechanism is made, and warned of, once for every shape
        other = transformers.BertModel(transformers.BertConfig(**{**SIZE, "hidden_size": 8 * len(name), **TEXT}))
        other.save_pretrained(tmp_path / "other")
        transformers.BertModel.from_pretrained(tmp_path / "other", attn_implementation=name)(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("name", UNNORMALISED)
def test_no_warning_where_nothing_was_pretrained_with_softmax(name, tmp_path, recwarn):
    model = hf_attn.AttnBertForMaskedLM(hf_attn.AttnBertConfig(**SIZE, **TEXT, attn_implementation=name))
    model.save_pretrained(tmp_path)
    for arguments in ({}, {"attn_implementation": name}):
        AutoModel.from_pretrained(tmp_path, **arguments)
    model.set_attn_implementation(name)
    model.set_attn_implementation("softmax")
    transformers.BertModel(transformers.BertConfig(**SIZE, **TEXT, attn_implementation=name))(torch.tensor([[3, 4]]))
    assert not [w for w in recwarn if "needs training" in str(w.message)]
