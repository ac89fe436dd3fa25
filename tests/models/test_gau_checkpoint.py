"""Weights of FLASH-pytorch give the numbers of FLASH-pytorch."""

import pytest
import torch

from hf_attn import Unsupported
from hf_attn.errors import InvalidInput
from hf_attn.models.gau_checkpoint import by_distance, flash_unit, from_flash_pytorch, gau_unit

flash_pytorch = pytest.importorskip("flash_pytorch")


def scatter(module):
    """The module in float64 with parameters of a size at which every part of it matters."""
    for name, parameter in module.double().named_parameters():
        if not name.endswith("freqs"):
            torch.nn.init.normal_(parameter, std=0.3)
    # their constants are rounded to float32
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith((".freqs", "inv_freq")):
            count = tensor.numel()
            tensor.data = 10000 ** (-torch.arange(count, dtype=torch.float64) / count)
    return module.eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("laplace", [False, True], ids=["relu2", "laplace"])
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
@pytest.mark.parametrize("length", [5, 22])
def test_a_transformer_gives_the_same_logits(causal, laplace, norm, length):
    sizes = {"num_tokens": 31, "dim": 16, "depth": 2, "query_key_dim": 36, "group_size": 8}
    theirs = scatter(flash_pytorch.FLASHTransformer(**sizes, causal=causal, norm_type=norm, laplace_attn_fn=laplace))
    ours = from_flash_pytorch(theirs.state_dict(), causal=causal, group_size=8, laplace_attn_fn=laplace)
    ids = torch.randint(0, 31, (2, length))
    with torch.no_grad():
        close(ours(ids).logits, theirs(ids))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "token shift"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
def test_a_unit_gives_the_same_outputs_and_gradients(causal, shift, padded):
    if padded and not causal:
        pytest.skip("theirs counts padded tokens in the linear part")
    options = {"group_size": 8, "causal": causal, "shift_tokens": shift}
    theirs = scatter(flash_pytorch.FLASH(dim=12, query_key_dim=10, **options))
    ours = flash_unit(theirs.state_dict(), **options)
    x = torch.randn(2, 22, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 22, dtype=torch.bool)
    mask[1, 22 - 5 * padded :] = False
    cotangent = torch.randn_like(x) * mask[..., None]
    expected, found = theirs(x, mask=mask), ours(x, mask, causal)
    close(found[mask], expected[mask])
    for theirs_grad, ours_grad in zip(*(torch.autograd.grad(y, x, cotangent) for y in (expected, found))):
        close(ours_grad, theirs_grad)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("laplace", [False, True], ids=["relu2", "laplace"])
def test_a_quadratic_unit_gives_the_same_outputs_at_its_length(causal, laplace):
    theirs = scatter(flash_pytorch.GAU(dim=12, query_key_dim=10, causal=causal, laplace_attn_fn=laplace))
    ours = gau_unit(theirs.state_dict(), 200, causal=causal, laplace_attn_fn=laplace)
    x = torch.randn(1, 200, 12, dtype=torch.float64)
    with torch.no_grad():
        close(ours(x, is_causal=causal), theirs(x))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_buckets_become_distances(causal):
    theirs = flash_pytorch.flash_pytorch.T5RelativePositionBias(scale=1.0, causal=causal)
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    table, size = theirs.relative_attention_bias.weight.detach(), 300
    place = torch.arange(size)
    found = by_distance(table, size, causal)[place - place[:, None] + size - 1]
    expected = theirs(torch.zeros(size, size))
    assert torch.equal(found.tril() if causal else found, expected.tril() if causal else expected)


def test_a_converted_model_is_saved_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = flash_pytorch.FLASHTransformer(num_tokens=31, dim=16, depth=2, query_key_dim=32, group_size=8, causal=True)
    ours = from_flash_pytorch(theirs.state_dict(), causal=True, group_size=8, eos_token_id=30, pad_token_id=30)
    ours.save_pretrained(tmp_path)
    ids = torch.randint(1, 30, (2, 11))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, theirs.eval()(ids), rtol=1e-4, atol=1e-4)
    tokens = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12)
    assert tokens.shape == (2, 23)


def test_what_cannot_be_converted_is_refused():
    theirs = flash_pytorch.FLASHTransformer(num_tokens=9, dim=8, depth=1, query_key_dim=32, group_size=4)
    weights = theirs.state_dict()
    with pytest.raises(Unsupported, match="reduce_group_non_causal_attn=False"):
        from_flash_pytorch(weights, group_size=4, reduce_group_non_causal_attn=False)
    with pytest.raises(InvalidInput, match="left over, such as 'extra'"):
        from_flash_pytorch({**weights, "extra": torch.zeros(1)}, group_size=4)
    with pytest.raises(InvalidInput, match="not the weights of a FLASHTransformer"):
        from_flash_pytorch({})
    with pytest.raises(Unsupported, match="freqs"):
        from_flash_pytorch({**weights, "layers.0.rotary_pos_emb.freqs": torch.rand(16)}, group_size=4)
