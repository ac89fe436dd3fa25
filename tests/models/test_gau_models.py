"""The gau family as users of transformers expect it: every head, saving, Auto classes, generation, packing, training."""

import math
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import Largest
from transformers import AutoConfig, AutoModel, DynamicCache, GenerationConfig

import hf_attn
from hf_attn import InvalidOption, Unsupported
from hf_attn.errors import InvalidInput
from hf_attn.models.cache import cache_memory
from hf_attn.models.gau import HEADS, GauPreTrainedModel, UnitLayer

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "chunk_size": 4, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 98, "image_size": 12, "patch_size": 4, "num_labels": 3,
}  # fmt: skip
KINDS = {
    "quadratic": {"attention": "quadratic", "query_key_dim": 16},
    "mixed chunk": {"attention": "mixed_chunk", "query_key_dim": 16},
    "transformer": {"attention": "quadratic", "block": "transformer", "num_attention_heads": 4},
    "mixed chunk transformer": {"attention": "mixed_chunk", "block": "transformer", "num_attention_heads": 4},
}
CAUSAL = {
    **KINDS,
    "softmax_plus, rope bias": {**KINDS["quadratic"], "attention_fn": "softmax_plus", "rel_pos_bias": "rope"},
    "softmax, post-norm": {
        **KINDS["quadratic"], "attention_fn": "softmax", "norm_position": "post", "norm_type": "rms_norm",
    },
    "laplace, visible keys, token shift": {
        **KINDS["quadratic"], "attention_fn": "laplace", "quad_norm": "valid", "token_shift": True, "rel_pos_bias": "none",
    },
    "mixed laplace, token shift, no sinusoid": {
        **KINDS["mixed chunk"], "attention_fn": "laplace", "token_shift": True, "absolute_positions": "none",
        "linear_norm": "chunk", "rope_dim": 8,
    },
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
causal_kinds = pytest.mark.parametrize("kind", CAUSAL)
heads = pytest.mark.parametrize("head", ["GauModel", *HEADS.values()])
PROMPT = torch.tensor([[5, 17, 42, 9, 61, 8], [3, 3, 80, 12, 7, 30]])


def config_of(kind: str = "mixed chunk", **fields):
    return hf_attn.GauConfig(**{**SIZES, **CAUSAL[kind], **fields})


def model_of(head: str, kind: str = "mixed chunk", dtype=torch.float64, **fields):
    torch.manual_seed(2)
    model = getattr(hf_attn, head)(config_of(kind, **fields)).to(dtype).eval()
    for parameter in model.parameters():
        # far from uniform logits, so that rounding cannot decide between tokens
        torch.nn.init.normal_(parameter, std=0.15)
    if model.can_generate():
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=98, pad_token_id=98)
    return model


def inputs_of(model, labels: bool = False):
    generator = torch.Generator().manual_seed(11)
    name = type(model).__name__
    if "Image" in name:
        batch = {"pixel_values": torch.rand(2, 3, 12, 12, generator=generator).to(model.dtype)}
    else:
        batch = {
            "input_ids": torch.randint(1, 90, (2, 10), generator=generator),
            "attention_mask": torch.ones(2, 10, dtype=torch.long),
        }
        batch["attention_mask"][1, 7:] = 0
    if labels:
        per_token = {"GauForMaskedLM": 99, "GauForCausalLM": 99, "GauForTokenClassification": 3}
        shape = (2, 10) if name in per_token else (2,)
        batch["labels"] = torch.randint(0, per_token.get(name, 3), shape, generator=generator)
    return batch


def first(output):
    return output[0]


@kinds
@heads
def test_saved_equals_reloaded_by_its_own_class_and_the_auto_class(head, kind, tmp_path):
    model = model_of(head, kind)
    model.save_pretrained(tmp_path)
    auto = {name: key for key, name in HEADS.items()}.get(head, "AutoModel")
    for loader in (getattr(hf_attn, head), getattr(transformers, auto)):
        loaded, info = loader.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info[k] for k in ("missing_keys", "unexpected_keys"))
        ours = {**model.config.to_dict(), "architectures": [head], "dtype": "float64"}
        assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**ours, "_name_or_path": ""}
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        with torch.no_grad():
            torch.testing.assert_close(first(loaded(**inputs_of(model))), first(model(**inputs_of(model))))


def test_auto_classes_load_in_a_fresh_process(tmp_path):
    model_of("GauForCausalLM").save_pretrained(tmp_path)
    for head in ("AutoModelForCausalLM", "AutoModel"):
        code = (
            f"import hf_attn; from transformers import {head}; "
            f"print(type({head}.from_pretrained({str(tmp_path)!r})).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == {"AutoModel": "GauModel"}.get(head, "GauForCausalLM")


@heads
def test_missing_parameters_are_at_their_start(head, tmp_path):
    config = config_of()
    config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = getattr(hf_attn, head).from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith((".bias", "beta")):
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("position_scale"):
            torch.testing.assert_close(parameter, torch.full((1,), 32**-0.5))
        else:
            assert 0.01 < parameter.std() < 0.03, name


@heads
@kinds
def test_it_trains_and_checkpointing_changes_no_gradient(head, kind):
    fields = {"hidden_dropout_prob": 0.1} if "Causal" in head else {}
    if "transformer" not in kind:
        # relu2 of few tokens may be zero throughout, and its gradients with it
        fields["attention_fn"] = "laplace"
    model, gradients = model_of(head, kind, **fields).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        out = model(**inputs_of(model, labels=head != "GauModel"))
        (out.loss if head != "GauModel" else out[0].square().mean()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all() and gradient.any(), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12, msg=name)


@heads
@kinds
def test_compiled_equals_eager(head, kind):
    model = model_of(head, kind)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = {**inputs_of(model), **({"use_cache": False} if "Causal" in head else {})}
    with torch.no_grad():
        torch.testing.assert_close(first(compiled(**inputs)), first(model(**inputs)))


@heads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(head, dtype):
    model = model_of(head, dtype=dtype)
    with torch.no_grad():
        out = first(model(**inputs_of(model)))
    assert out.dtype == dtype and torch.isfinite(out).all()


@heads
@kinds
def test_outputs_are_those_of_transformers(head, kind):
    model = model_of(head, kind)
    inputs = {**inputs_of(model), **({"use_cache": False} if "Causal" in head else {})}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], first(out))
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    tokens = out.hidden_states[0].shape[1]
    chunks = -(-tokens // 4)
    shapes = {
        "quadratic": (1, tokens, tokens), "mixed chunk": (chunks, 4, 4), "transformer": (4, tokens, tokens),
        "mixed chunk transformer": (4, tokens, tokens),
    }  # fmt: skip
    assert {tuple(a.shape) for a in out.attentions} == {(2, *shapes[kind])}
    if head == "GauModel":
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model(**inputs).attentions is None and model(**inputs).hidden_states is None


@heads
def test_a_model_pickles(head):
    model = model_of(head)
    copy = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(first(model(**inputs_of(model))), first(copy(**inputs_of(model))))


@pytest.mark.parametrize("head", ["GauForMaskedLM", "GauForCausalLM"])
def test_embeddings_are_tied_and_resized(head):
    model = model_of(head, head_bias=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.config.vocab_size == 120
    assert model.lm_head.bias.shape == (120,) and model(torch.tensor([[119, 3]])).logits.shape == (1, 2, 120)
    loose = model_of(head, tie_word_embeddings=False)
    assert loose.lm_head.weight is not loose.get_input_embeddings().weight


def test_losses_are_those_of_transformers():
    ids = torch.randint(0, 90, (2, 10))
    causal, masked = model_of("GauForCausalLM"), model_of("GauForMaskedLM")
    labels = torch.where(torch.rand(2, 10) < 0.5, ids, -100)
    cross = torch.nn.functional.cross_entropy
    out = causal(ids, labels=ids)
    torch.testing.assert_close(
        out.loss.double(), cross(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), rtol=1e-5, atol=0
    )
    summed = causal(ids, labels=ids, num_items_in_batch=torch.tensor(9)).loss
    torch.testing.assert_close(summed, out.loss * 2)
    out = masked(ids, labels=labels)
    torch.testing.assert_close(out.loss.double(), cross(out.logits.flatten(0, 1), labels.flatten()), rtol=1e-5, atol=0)
    torch.testing.assert_close(causal(ids, logits_to_keep=3, use_cache=False).logits, causal(ids).logits[:, -3:])


@kinds
@pytest.mark.parametrize("head", ["GauModel", "GauForMaskedLM", "GauForCausalLM", "GauForTokenClassification"])
def test_padded_equals_alone(head, kind):
    model = model_of(head, kind)
    ids, mask = torch.randint(0, 99, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        alone = first(model(ids[1:, :9]))
        for filler in (7, 50):
            ids[1, 9:] = filler
            torch.testing.assert_close(first(model(ids, attention_mask=mask))[1:, :9], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@kinds
def test_pooling_sees_real_tokens(pooling, kind):
    model = model_of("GauForSequenceClassification", kind, pooling=pooling)
    ids, mask = torch.randint(0, 99, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(out[1:], model(ids[1:, :9]).logits, rtol=1e-10, atol=1e-10)
        hidden = model.gau(ids[:1]).last_hidden_state[0]
        pooled = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[pooling]
        torch.testing.assert_close(out[0], model.classifier(pooled))


@pytest.mark.parametrize("kind", ["quadratic", "transformer"])
def test_left_padding_equals_alone_in_quadratic_models(kind):
    model = model_of("GauForCausalLM", kind)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    generate = {"max_new_tokens": 12, "do_sample": False}
    both = model.generate(PROMPT, attention_mask=mask, **generate)
    alone = model.generate(PROMPT[1:, 2:], attention_mask=mask[1:, 2:], **generate)
    assert torch.equal(both[1, 6:], alone[0, 4:])
    assert torch.equal(both[0], model.generate(PROMPT[:1], attention_mask=mask[:1], **generate)[0])


@pytest.mark.parametrize("kind", ["mixed chunk", "mixed chunk transformer"])
def test_left_padding_is_refused_where_it_would_shift_chunks(kind):
    model, mask = model_of("GauForCausalLM", kind), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with pytest.raises(Unsupported, match='padding_side="right"'):
        model.generate(PROMPT, attention_mask=mask, max_new_tokens=3)
    with pytest.raises(Unsupported, match="equal length"):
        model.generate(PROMPT, attention_mask=mask.flip(1), max_new_tokens=3)


@causal_kinds
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams"],
)
def test_cached_equals_uncached(kind, how):
    model, found = model_of("GauForCausalLM", kind), []
    for cached in (True, False):
        torch.manual_seed(7)
        call = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "use_cache": cached}
        found.append(model.generate(PROMPT, **call, **how))
    assert torch.equal(*found)


@causal_kinds
def test_step_by_step_equals_the_full_pass(kind):
    model, ids = model_of("GauForCausalLM", kind), torch.randint(1, 90, (2, 20))
    with torch.no_grad():
        full, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
        # prefill, one token, continued prefill of several tokens
        parts = [model(p, past_key_values=cache).logits for p in ids.split((7, 1, 7, 5), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 20


def test_the_mixed_chunk_cache_is_of_constant_size():
    model, cache, sizes = model_of("GauForCausalLM"), DynamicCache(config=config_of()), []
    with torch.no_grad():
        for step in range(40):
            model(PROMPT[:, :1] + step, past_key_values=cache)
            sizes.append(cache_memory(cache))
    width = 16 + 64
    assert sizes[::4] == sizes[:1] * 10 and max(sizes) == 2 * 2 * 8 * (2 * 16 * 64 + 3 * width)
    assert all(isinstance(layer, UnitLayer) for layer in cache.layers)


@kinds
def test_operations_of_the_cache(kind):
    model, cache = model_of("GauForCausalLM", kind), DynamicCache(config=config_of(kind))
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        out = model(PROMPT[:, :1], past_key_values=cache).logits
        expected = model(torch.cat((PROMPT[[1, 0]], PROMPT[:, :1]), dim=1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        with pytest.raises(Unsupported, match="crop"):
            cache.crop(3)
        with pytest.raises(Unsupported, match="use_cache=False"):
            model(PROMPT, past_key_values=cache, output_attentions=True)
        with pytest.raises(Unsupported, match="hides new tokens"):
            model(PROMPT[:, :1], past_key_values=cache, attention_mask=torch.tensor([[1] * 8, [1] * 7 + [0]]))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_memory(cache) == 0
    with pytest.raises(Unsupported, match="StaticLayer"):
        model.generate(PROMPT, cache_implementation="static", max_new_tokens=3)


def test_assisted_generation_is_refused():
    model, other = model_of("GauForCausalLM"), model_of("GauForCausalLM")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    with pytest.raises(Unsupported, match="crop"):
        model.generate(PROMPT[:1], assistant_model=other, max_new_tokens=8)


def packed():
    """Three sequences in a row of 14 tokens, and two in the other."""
    positions = torch.cat([torch.arange(n) for n in (5, 6, 3)]), torch.cat([torch.arange(n) for n in (12, 2)])
    return torch.randint(0, 90, (2, 14)), torch.stack(positions), ((5, 6, 3), (12, 2))


@kinds
@pytest.mark.parametrize("head", ["GauForMaskedLM", "GauForCausalLM"])
def test_packed_equals_alone(head, kind):
    model = model_of(head, kind, packed_segments="exact")
    ids, positions, lengths = packed()
    with torch.no_grad():
        out = model(ids, position_ids=positions, output_hidden_states=True)
        for row, parts in enumerate(lengths):
            expected = torch.cat([model(part[None]).logits for part in ids[row].split(parts)], dim=1)
            torch.testing.assert_close(out.logits[row : row + 1], expected, rtol=1e-10, atol=1e-10)
    assert {h.shape for h in out.hidden_states} == {(2, 14, 32)}


def test_packed_sequences_are_refused_without_the_flag():
    ids, positions, _ = packed()
    for head in ("GauForMaskedLM", "GauForCausalLM"):
        with pytest.raises(Unsupported, match='packed_segments="exact"'):
            model_of(head)(ids, position_ids=positions)
    model = model_of("GauForCausalLM", packed_segments="exact")
    with pytest.raises(Unsupported, match="output_attentions with packed"):
        model(ids, position_ids=positions, output_attentions=True)
    with pytest.raises(Unsupported, match="a cache with packed"):
        model(ids, position_ids=positions, past_key_values=DynamicCache())


def test_dense_masks_that_are_packing_or_padding_are_read_as_such():
    model, (ids, positions, _) = model_of("GauForMaskedLM", packed_segments="exact"), packed()
    segments = (positions == 0).cumsum(1)
    same = (segments[:, None] == segments[..., None])[:, None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention_mask=same).logits, model(ids, position_ids=positions).logits)
    with pytest.raises(Unsupported, match="more than padding"):
        model(ids, attention_mask=same & (torch.rand(same.shape) < 0.9))


def test_no_table_of_all_pairs_in_linear_models():
    for causal in (False, True):
        model = model_of("GauForCausalLM" if causal else "GauForMaskedLM", dtype=torch.float32, chunk_size=16)
        with torch.no_grad(), Largest() as largest:
            model.gau(torch.randint(0, 99, (1, 1024)))
        assert largest.numel < 1024 * 1024 / 4


def test_images():
    for pooling, tokens in (("cls", 10), ("mean", 9)):
        model = model_of("GauForImageClassification", pooling=pooling)
        pixels = inputs_of(model)["pixel_values"]
        out = model(pixels, output_hidden_states=True)
        assert out.logits.shape == (2, 3) and out.hidden_states[0].shape[1] == tokens
        with pytest.raises(InvalidInput, match="pixel_values must be"):
            model(pixels[..., :8])
    with pytest.raises(InvalidOption, match="no order to be causal in"):
        model_of("GauForImageClassification", pooling="last")
    with pytest.raises(InvalidOption, match="makes 10 tokens"):
        model_of("GauForImageClassification", "quadratic", max_position_embeddings=9)
    assert "gau.embeddings.word_embeddings.weight" not in model.state_dict()


def test_positions_are_a_scaled_sinusoid():
    model = model_of("GauModel")
    found, plain = (
        m.embeddings(torch.zeros(1, 7, 32).double(), None, torch.arange(7)[None])[0]
        for m in (model, model_of("GauModel", absolute_positions="none"))
    )
    for position, channel in ((0, 0), (3, 0), (3, 5), (6, 15)):
        angle = position / 10000 ** (2 * channel / 32)
        expected = model.embeddings.position_scale.detach() * torch.tensor([math.sin(angle), math.cos(angle)]).double()
        torch.testing.assert_close(found[position, [channel, 16 + channel]], expected, rtol=0, atol=1e-6)
    assert not plain.any()
    fresh = hf_attn.GauModel(config_of())
    assert fresh.embeddings.position_scale.item() == pytest.approx(32**-0.5)


def test_token_types():
    model = model_of("GauForMaskedLM", type_vocab_size=2)
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    assert not torch.equal(model(PROMPT, token_type_ids=types).logits, model(PROMPT).logits)
    assert torch.equal(model(PROMPT, token_type_ids=0 * types).logits, model(PROMPT).logits)
    plain = model_of("GauForMaskedLM")
    assert torch.equal(plain(PROMPT, token_type_ids=0 * types).logits, plain(PROMPT).logits)
    with pytest.raises(InvalidInput, match="type_vocab_size=0"):
        plain(PROMPT, token_type_ids=types)


def test_a_bidirectional_checkpoint_becomes_causal_only_where_it_says_so(tmp_path):
    model_of("GauForMaskedLM").save_pretrained(tmp_path)
    causal = hf_attn.GauForCausalLM.from_pretrained(tmp_path)
    assert causal.config.is_decoder
    causal.save_pretrained(tmp_path / "causal")
    assert AutoModel.from_pretrained(tmp_path / "causal").config.is_decoder
    with pytest.raises(Unsupported, match="is_decoder=True"):
        hf_attn.GauForMaskedLM.from_pretrained(tmp_path / "causal")
    config = config_of()
    hf_attn.GauForCausalLM(config)
    assert not config.is_decoder, "a config that was given stays as it is"


def test_what_a_model_does_not_define_is_refused():
    with pytest.raises(Unsupported, match="attn_implementation='rfa'.*GauConfig"):
        hf_attn.GauModel(config_of(attn_implementation="rfa"))
    model = model_of("GauModel")
    with pytest.raises(Unsupported, match="attn_implementation='sdpa'"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(InvalidInput, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(Unsupported, match="is_decoder=False"):
        model(PROMPT, use_cache=True)
    training = model_of("GauForCausalLM").train()
    training.gradient_checkpointing_enable()
    with pytest.raises(Unsupported, match="a cache in training"):
        training(PROMPT, use_cache=True)
    assert training(PROMPT).past_key_values is None
    with pytest.raises(InvalidOption, match="quad_norm='length' and is_decoder=True"):
        hf_attn.GauForCausalLM(config_of("quadratic", quad_norm="length"))
    assert model_of("GauForMaskedLM", "quadratic", quad_norm="length")(PROMPT).logits.shape == (2, 6, 99)
    with pytest.raises(Unsupported, match="generating up to 86 tokens.*max_position_embeddings=64"):
        model_of("GauForCausalLM", "quadratic").generate(PROMPT, max_new_tokens=80)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "quad"}, "attention='quad'"),
        ({"block": "bert"}, "block='bert'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"hidden_size": 31}, "hidden_size=31 must be even"),
        ({"is_decoder": True, "pooling": "cls"}, "pooling='cls'"),
        ({"image_size": 13}, "multiple of patch_size"),
        ({"packed_segments": "yes"}, "packed_segments='yes'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"block": "transformer", "query_key_dim": 128, "num_attention_heads": 5}, "num_attention_heads=5"),
        ({"block": "transformer", "query_key_dim": 128, "attention_fn": "laplace"}, "attention_fn='laplace'"),
    ],
)
def test_configs_outside_their_rule_are_refused(fields, message):
    with pytest.raises(InvalidOption, match=message):
        config_of(**fields)


def test_the_bias_is_chosen_by_the_config_and_stored(tmp_path):
    chosen = {
        ("quadratic", 512): "toeplitz", ("quadratic", 513): "rope", ("mixed_chunk", 512): "toeplitz",
        ("mixed_chunk", 1024): "none",
    }  # fmt: skip
    for (attention, size), expected in chosen.items():
        config = hf_attn.GauConfig(attention=attention, chunk_size=size, max_position_embeddings=size)
        assert config.rel_pos_bias == expected and config.n_ref == size
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is hf_attn.GauConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_two_units_replace_a_block():
    units = sum(p.numel() for p in hf_attn.GauModel(config_of("quadratic", num_hidden_layers=2)).layers.parameters())
    block = hf_attn.GauModel(config_of("transformer", num_hidden_layers=1)).layers
    assert 0.9 < units / sum(p.numel() for p in block.parameters()) < 1.25


def test_the_names_of_the_package():
    assert isinstance(hf_attn.GauForCausalLM, type) and issubclass(hf_attn.GauForCausalLM, GauPreTrainedModel)
    assert {"GauConfig", "GauModel", *HEADS.values()} <= set(hf_attn.__all__)
