"""Decoding with a state: every way of generating gives the tokens of the full forward pass."""

import pytest
import torch
from helpers import GPT2
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel

import hf_attn
from hf_attn import Unsupported
from hf_attn.models.cache import StateLayer, cache_memory

STATES = [n for n in hf_attn.list_mechanisms() if hf_attn.get_mechanism(n).capabilities.keeps_state]
CACHED = [n for n in hf_attn.list_mechanisms() if hf_attn.get_mechanism(n).capabilities.decode != "none"]
states = pytest.mark.parametrize("mechanism", STATES)
cached = pytest.mark.parametrize("mechanism", CACHED)
PROMPT = torch.tensor([[5, 17, 42, 9, 61], [3, 3, 80, 12, 7]])


def model_of(mechanism: str, **sizes):
    torch.manual_seed(2)
    config = hf_attn.AttnGPT2Config(**{**GPT2, **sizes}, attn_implementation=mechanism)
    model = hf_attn.AttnGPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        # far from uniform logits, so that rounding cannot decide between tokens
        torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=98, pad_token_id=98)
    return model


def generate(model, prompt, **arguments):
    mask = arguments.pop("attention_mask", torch.ones_like(prompt))
    torch.manual_seed(7)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=12, **arguments)


def test_there_is_a_mechanism_with_a_state():
    assert "rfa" in STATES and "softmax" in CACHED


@cached
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
def test_cached_equals_uncached(mechanism, how):
    model = model_of(mechanism)
    assert torch.equal(generate(model, PROMPT, **how), generate(model, PROMPT, use_cache=False, **how))


@cached
def test_left_padded_batches_give_what_each_prompt_gives_alone(mechanism):
    if hf_attn.get_mechanism(mechanism).capabilities.padding_equals_cutting != "anywhere":
        pytest.skip("its windows count places: a padded prompt gives something else, by its definition")
    model = model_of(mechanism)
    padded = PROMPT.clone()
    padded[1, :2] = 98
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    both = generate(model, padded, attention_mask=mask)
    alone = generate(model, PROMPT[1:, 2:])
    assert torch.equal(both[1, 5 : 5 + 12], alone[0, 3 : 3 + 12])
    assert torch.equal(both[0], generate(model, PROMPT[:1])[0])


@cached
def test_step_by_step_equals_the_full_pass(mechanism):
    model = model_of(mechanism)
    ids = torch.randint(1, 90, (2, 20))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), []
        # prefill, one token, continued prefill of several tokens
        for part in (slice(0, 7), slice(7, 8), slice(8, 15), slice(15, 20)):
            parts.append(model(ids[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 20


@states
def test_the_state_grows_as_recorded(mechanism):
    model, exact = model_of(mechanism), model_of("softmax")
    sizes = {"state": [], "keys and values": []}
    for kind, m in (("state", model), ("keys and values", exact)):
        cache = DynamicCache(config=m.config)
        with torch.no_grad():
            for step in range(60):
                m(PROMPT[:, :1] + step, past_key_values=cache)
                sizes[kind].append(cache_memory(cache))
        assert cache.get_seq_length() == 60
    assert sizes["keys and values"][59] == 60 * sizes["keys and values"][0]
    if hf_attn.get_mechanism(mechanism).capabilities.decode == "constant state":
        assert len(set(sizes["state"])) == 1


@states
def test_beams_are_reordered_with_their_states(mechanism):
    model = model_of(mechanism)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        swapped = model(PROMPT[:, :1], past_key_values=cache).logits
        expected = model(torch.cat((PROMPT[[1, 1]], PROMPT[:, :1]), dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(swapped, expected, rtol=1e-9, atol=1e-9)


@states
def test_batch_operations_of_the_cache(mechanism):
    model = model_of(mechanism)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert all(t.shape[0] == 4 for layer in cache.layers for t in layer.state.values())
        cache.batch_select_indices(torch.tensor([0, 3]))
        out = model(PROMPT[:, :1], past_key_values=cache).logits
        expected = model(torch.cat((PROMPT, PROMPT[:, :1]), dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_memory(cache) == 0


@states
def test_what_a_state_cannot_do_is_refused(mechanism):
    model = model_of(mechanism)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    with pytest.raises(Unsupported, match="crop"):
        cache.crop(3)
    with pytest.raises(Unsupported, match=f"{mechanism}.*StaticLayer"):
        generate(model, PROMPT, cache_implementation="static")
    filled = DynamicCache()
    filled.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), 0)
    with pytest.raises(Unsupported, match=f"{mechanism}.*already holds"):
        model(PROMPT, past_key_values=filled)


@states
def test_attention_maps_of_a_prompt_are_exact_and_of_later_tokens_refused(mechanism):
    model = model_of(mechanism)
    if not model.transformer.h[0].attn.mechanism.capabilities.attention_weights:
        pytest.skip("no maps under default options: refused in test_integrations.py")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with_cache = model(PROMPT, past_key_values=cache, output_attentions=True).attentions
        without = model(PROMPT, use_cache=False, output_attentions=True).attentions
        for a, b in zip(with_cache, without, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        with pytest.raises(Unsupported, match=f"{mechanism}.*use_cache=False"):
            model(PROMPT[:, :1], past_key_values=cache, output_attentions=True)


def test_softmax_generates_what_gpt2_generates():
    model = model_of("softmax")
    stock = GPT2LMHeadModel(GPT2Config(**GPT2)).double().eval()
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    for how in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert torch.equal(generate(model, PROMPT, **how), generate(stock, PROMPT, **how))


@cached
def test_layers_of_both_kinds_share_one_cache(mechanism):
    model = model_of({"default": mechanism, "1": "softmax"})
    assert torch.equal(generate(model, PROMPT), generate(model, PROMPT, use_cache=False))
