"""Lightweight and dynamic convolution: the invariants of the specification (numbered as there), forms, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Largest

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported

B, H, D = 2, 2, 4
KINDS = [
    {"dynamic": dynamic, "weight_softmax": softmax, "renormalize": renormalize}
    for dynamic, softmax, renormalize in itertools.product([True, False], repeat=3)
    if softmax or not renormalize
]


def module(seed=0, heads=H, dim=D, **options):
    torch.manual_seed(seed)
    built = hf_attn.build("dynamic_conv", num_heads=heads, head_dim=dim, **options).double().eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    return built


def tokens(n, seed=1, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, dtype=torch.float64, generator=generator).requires_grad_(grad) for _ in range(3)]


def padding(n):
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[:, 0], mask[:, -1] = True, False
    return mask


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# -- the invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3, 4, 7])
@pytest.mark.parametrize("is_causal", [False, True])
def test_08_lightweight_is_a_grouped_convolution(kernel_size, is_causal):
    built, (q, k, v) = module(dynamic=False, kernel_size=kernel_size), tokens(19)
    left = kernel_size - 1 if is_causal else (kernel_size - 1) // 2
    channels = v.transpose(2, 3).flatten(1, 2)
    weight = built.weight.softmax(dim=-1).repeat_interleave(D, dim=0)[:, None]
    padded = torch.nn.functional.pad(channels, (left, kernel_size - 1 - left))
    expected = torch.nn.functional.conv1d(padded, weight, groups=H * D).unflatten(1, (H, D)).transpose(2, 3)
    agree(built(q, k, v, is_causal=is_causal), expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(n for n, on in kind.items() if on) or "plain")
@pytest.mark.parametrize("is_causal,masked", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("n,kernel_size", [(1, 3), (3, 8), (16, 5), (37, 4), (40, 1)])
def test_09_the_band_equals_the_definition_with_gradients(kind, is_causal, masked, n, kernel_size):
    built, qkv = module(kernel_size=kernel_size, **kind), tokens(n, grad=True)
    mask = padding(n) if masked else None
    cotangent = torch.randn(B, H, n, D, dtype=torch.float64)
    results = []
    for form in (built, built.naive):
        out = form(*qkv, is_causal=is_causal, key_padding_mask=mask)
        grads = torch.autograd.grad((out * cotangent).sum(), [*qkv, *built.parameters()], allow_unused=True)
        assert grads[1] is None, "the key takes no part"
        results.append(
            [out, *(torch.zeros_like(x) if g is None else g for x, g in zip((*qkv, *built.parameters()), grads))]
        )
    for efficient, naive in zip(*results):
        agree(efficient, naive, 1e-10)


def test_09_the_definition_is_the_equation_token_by_token():
    built, (q, k, v) = module(kernel_size=4, renormalize=True), tokens(7)
    logits = (q.transpose(1, 2).flatten(2) @ built.weight_linear.weight.T).view(B, 7, H, 4)
    mask, expected = padding(7), torch.zeros_like(v)
    for b, h, n in itertools.product(range(B), range(H), range(7)):
        taps = [t for t in range(4) if 0 <= n + t - 1 < 7 and mask[b, n + t - 1]]
        if taps:
            kernel = logits[b, n, h, taps].softmax(0)
            expected[b, h, n] = sum(w * v[b, h, n + t - 1] for w, t in zip(kernel, taps))
    agree(built.naive(q, k, v, key_padding_mask=mask), expected)


def test_10_no_weights_give_a_moving_average():
    built, (q, k, v) = module(kernel_size=5), tokens(12)
    torch.nn.init.zeros_(built.weight_linear.weight)
    expected = torch.nn.functional.avg_pool1d(v.transpose(2, 3).flatten(0, 1), 5, stride=1, padding=2)
    agree(built(q, k, v), expected.unflatten(0, (B, H)).transpose(2, 3))


@pytest.mark.parametrize("dynamic", [True, False])
def test_11_one_tap_is_the_identity(dynamic):
    q, k, v = tokens(9)
    agree(module(kernel_size=1, dynamic=dynamic)(q, k, v), v)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 4, 20])
def test_12_decoding_equals_the_whole_causal_pass(kind, masked, kernel_size):
    built, qkv = module(kernel_size=kernel_size, **kind), tokens(13)
    mask = padding(13) if masked else None
    full = built(*qkv, is_causal=True, key_padding_mask=mask)
    state, out = None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 13)):
        call = {"key_padding_mask": mask[:, part]} if masked else {}
        step, state = built.step(*(x[:, :, part] for x in qkv), state, **call)
        out.append(step)
        assert state["value"].shape == (B, H, kernel_size - 1, D) and state["real"].shape == (B, kernel_size - 1)
        assert state["value"].untyped_storage().nbytes() == state["value"].numel() * 8, "no view of the prompt"
    agree(torch.cat(out, dim=2), full)
    agree(built(qkv[0][:, :, -3:], *qkv[1:], is_causal=True, key_padding_mask=mask), full[:, :, -3:])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_13_the_future_does_not_change_the_past(kind):
    built, qkv = module(kernel_size=6, **kind), tokens(33)
    changed = [torch.cat((x[:, :, :20], 100 * x[:, :, 20:]), dim=2) for x in qkv]
    assert torch.equal(built(*changed, is_causal=True)[:, :, :20], built(*qkv, is_causal=True)[:, :, :20])


@pytest.mark.parametrize("is_causal,masked", list(itertools.product([False, True], repeat=2)))
def test_14_renormalised_rows_sum_to_one_or_see_nothing(is_causal, masked):
    built, qkv = module(kernel_size=3, renormalize=True), tokens(15)
    call = {"is_causal": is_causal, "key_padding_mask": padding(15) if masked else None}
    if masked:
        call["key_padding_mask"][:, 4:9] = False
    sums = built.attention_weights(*qkv, **call).sum(dim=-1)
    agree(sums, sums.round())
    assert (sums == 0).any() == masked
    assert not built(*qkv, **call)[sums < 0.5].any()


# -- what else the options and calls promise ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("real", [slice(0, 8), slice(5, 13)], ids=["right", "left"])
def test_padding_on_either_side_equals_cutting_it_off(kind, is_causal, real):
    built, qkv = module(kernel_size=4, **kind), tokens(13)
    mask = torch.zeros(B, 13, dtype=torch.bool)
    mask[:, real] = True
    noisy = [torch.where(mask[:, None, :, None], x, float("nan")) for x in qkv]
    out = built(*noisy, key_padding_mask=mask, is_causal=is_causal)[:, :, real]
    agree(out, built(*(x[:, :, real] for x in qkv), is_causal=is_causal))


def test_without_renormalisation_the_edges_weigh_less_than_one():
    built, (q, k, v) = module(kernel_size=5), tokens(11)
    mass = built(q, k, torch.ones_like(v))
    agree(mass[:, :, 2:-2], torch.ones(B, H, 7, D, dtype=torch.float64))
    assert (mass[:, :, [0, 1, -2, -1]] < 0.999).all()
    with pytest.raises(Unsupported, match="dynamic_conv.*output_attentions"):
        built.attention_weights(q, k, v)


@pytest.mark.parametrize("source", ["query", "value", "layer_input"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_comes_from_the_named_vectors(source, is_causal):
    built, (q, k, v) = module(predict_from=source, kernel_size=3), tokens(10)
    layer_input = torch.randn(B, 10, H * D, dtype=torch.float64)
    call = {"is_causal": is_causal, "layer_input": layer_input}
    out = built(q, k, v, **call)
    agree(out, built.naive(q, k, v, **call))
    merged = {"query": q, "value": v}[source].transpose(1, 2).flatten(2) if source != "layer_input" else layer_input
    other = module(predict_from="layer_input", kernel_size=3)
    other.load_state_dict(built.state_dict())
    agree(out, other(q, k, v, is_causal=is_causal, layer_input=merged))
    assert built.capabilities.needs_layer_input == (source == "layer_input")
    if is_causal:
        call["layer_input"] = layer_input[:, -2:]
        agree(built(q[:, :, -2:], k, v, **call), out[:, :, -2:])


def test_position_and_key_and_scaling_do_not_matter():
    built, (q, k, v) = module(), tokens(12)
    out = built(q, k, v)
    assert torch.equal(out, built(q, 5 * k, v, scaling=3.0, grid=(2, 5), num_prefix_tokens=2))


def test_no_tensor_grows_with_the_square_of_the_length():
    built = module(kernel_size=7).float()
    q, k, v = (torch.randn(1, H, 1024, D) for _ in range(3))
    for is_causal in (False, True):
        with Largest() as largest, torch.no_grad():
            built(q, k, v, is_causal=is_causal)
        assert largest.numel <= 1024 * H * 25
    with Largest() as largest, torch.no_grad():
        built(q[:, :, -1:], k, v, is_causal=True)
    assert largest.numel <= k.numel(), "one step does not touch what no tap reaches"


def test_dropout_drops_taps_in_training_only():
    built, qkv = module(kernel_size=3), tokens(2000)
    plain = built(*qkv)
    assert torch.equal(built(*qkv, dropout=0.5), plain)
    value = torch.ones_like(qkv[2])
    dropped = built.train()(qkv[0], qkv[1], value, dropout=0.5)
    assert (dropped == 0).any() and abs(dropped[:, :, 1:-1].mean() - 1) < 0.02


def test_state_dict_and_start():
    dynamic = hf_attn.build("dynamic_conv", num_heads=4, head_dim=8, kernel_size=5)
    assert {n: tuple(t.shape) for n, t in dynamic.state_dict().items()} == {"weight_linear.weight": (20, 32)}
    bound = (6 / 52) ** 0.5
    assert 0.9 * bound < dynamic.weight_linear.weight.abs().max() <= bound
    light = hf_attn.build("dynamic_conv", num_heads=64, head_dim=8, dynamic=False)
    assert {n: tuple(t.shape) for n, t in light.state_dict().items()} == {"weight": (64, 7)}
    bound = (6 / (7 + 64 * 7)) ** 0.5
    assert 0.9 * bound < light.weight.abs().max() <= bound


def test_a_language_model_generates_the_same_with_and_without_its_state():
    torch.manual_seed(0)
    config = hf_attn.AttnGPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=None, attn_implementation="dynamic_conv", attention_options={"predict_from": "layer_input", "kernel_size": 4})  # fmt: skip
    model = hf_attn.AttnGPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    runs = [
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*runs)


def selective_copy(dynamic: bool) -> float:
    """Accuracy on 'copy the symbol s steps back', s = 0..4 written at each position, after 250 steps."""
    torch.manual_seed(0)
    symbols, back, width, length = 12, 5, 32, 24
    net = torch.nn.ModuleDict(
        {
            "symbol": torch.nn.Embedding(symbols, width),
            "steps": torch.nn.Embedding(back, width),
            "qkv": torch.nn.Linear(width, 3 * width),
            "mix": hf_attn.build("dynamic_conv", num_heads=4, head_dim=width // 4, kernel_size=back, dynamic=dynamic),
            "out": torch.nn.Linear(width, symbols),
        }
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(250):
        symbol, steps = torch.randint(symbols, (32, length)), torch.randint(back, (32, length))
        place = torch.arange(length) - steps
        target = symbol.gather(1, place.clamp(min=0))
        x = net["symbol"](symbol) + net["steps"](steps)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in net["qkv"](x).chunk(3, dim=-1))
        scores = net["out"](net["mix"](q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        loss = torch.nn.functional.cross_entropy(scores[place >= 0], target[place >= 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (scores.argmax(-1) == target)[place >= 0].double().mean().item()


def test_a_predicted_kernel_copies_selectively_and_a_fixed_one_cannot():
    assert selective_copy(dynamic=True) > 0.95
    assert selective_copy(dynamic=False) < 0.6


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 0}, {"kernel_size": 2.0}, {"dynamic": 1}, {"renormalize": True, "weight_softmax": False},
     {"predict_from": "key"}, {"predict_from": "value", "dynamic": False}, {"kernelsize": 3}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="dynamic_conv"):
        module(**options)


def test_refused_calls():
    q, k, v = tokens(8)
    built = module(predict_from="layer_input")
    with pytest.raises(Unsupported, match="dynamic_conv.*layer_input"):
        built(q, k, v)
    with pytest.raises(InvalidInput, match=r"dynamic_conv.*\(2, 8, 8\)"):
        built(q, k, v, layer_input=torch.randn(B, 7, H * D))
    with pytest.raises(Unsupported, match="dynamic_conv.*N=5 queries and M=8 keys"):
        module()(q[:, :, :5], k, v)
    with pytest.raises(Unsupported, match="dynamic_conv.*attention_mask"):
        module()(q, k, v, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
