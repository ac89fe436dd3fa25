"""Transformer++ and MC-TFM++, the baselines of the gated attention units: against Llama, against each other, in loops."""

import itertools

import pytest
import torch
import transformers

import hf_attn
from hf_attn.models.gau_baselines import TransformerBlock

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "norm_type": "rms_norm", "use_bias": False, "absolute_positions": "none", "tie_word_embeddings": False,
    "block": "transformer",
}  # fmt: skip


def model_of(**fields):
    torch.manual_seed(3)
    model = hf_attn.GauForCausalLM(hf_attn.GauConfig(**{**SIZES, **fields})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_transformer_plus_plus_is_a_llama():
    ours = model_of(attention="quadratic")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        rms_norm_eps=1e-5, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    # llama's frequencies are rounded to float32
    inverse = 10000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    theirs.model.rotary_emb.inv_freq = inverse
    weights = {
        "model.embed_tokens.weight": ours.gau.embeddings.word_embeddings.weight,
        "lm_head.weight": ours.lm_head.weight,
    }
    for index, layer in enumerate(ours.gau.layers):
        names = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
        parts = *layer.query_key_value.weight.chunk(3), *layer.gate_up.weight.chunk(2)
        named = {
            **dict(zip(names, parts)),
            "self_attn.o_proj": layer.attention_out.weight,
            "mlp.down_proj": layer.down.weight,
        }
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in named.items()}
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert all("norm" in name for name in missing), "our norms have no factors, and theirs start at 1"
    ids = torch.randint(61, (2, 19))
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids).logits
    # its rotations are computed in float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mc_tfm_plus_plus_without_its_linear_part_is_transformer_plus_plus_within_a_chunk():
    ids = torch.randint(61, (2, 16))
    plain, mixed = model_of(attention="quadratic"), model_of(attention="mixed_chunk", chunk_size=8)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    for layer in mixed.gau.layers:
        for name, parameter in layer.mechanism.named_parameters():
            assert name.startswith("lin_"), "nothing else is added to the block"
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        first, second = plain(ids).logits, mixed(ids).logits
    torch.testing.assert_close(first[:, :8], second[:, :8], rtol=1e-10, atol=1e-10)
    assert (first - second)[:, 8:].abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_mc_tfm_plus_plus_in_loops(causal):
    config = hf_attn.GauConfig(**{**SIZES, "attention": "mixed_chunk", "chunk_size": 4, "use_bias": True})
    block = TransformerBlock(config).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, tokens, part = torch.randn(1, 11, 32, dtype=torch.float64), 11, block.mechanism
    query, key, value = block._heads(x, 0, None)
    out = torch.zeros_like(query)
    for head, i in itertools.product(range(4), range(tokens)):
        q, k, v = query[0, head], key[0, head], value[0, head]
        near = [j for j in range(tokens) if j // 4 == i // 4 and (not causal or j <= i)]
        past = [j for j in range(tokens) if not causal or j // 4 < i // 4]
        weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in near]).softmax(dim=0)
        out[0, head, i] = sum(w * v[j] for w, j in zip(weights, near))
        linear_query = q[i] * part.lin_query_gamma[head] + part.lin_query_beta[head]
        for j in past:
            linear_key = k[j] * part.lin_key_gamma[head] + part.lin_key_beta[head]
            out[0, head, i] += linear_query @ linear_key / len(past) * v[j]
    y = x + block.attention_out(out.transpose(1, 2).flatten(2))
    gate, up = block.gate_up(block.feed_forward_norm(y)).chunk(2, dim=-1)
    expected = y + block.down(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(block(x, is_causal=causal), expected, rtol=1e-10, atol=1e-10)
