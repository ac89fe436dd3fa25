"""AugmentedConv2d: the invariants of the specification (numbered as there), masks, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from hf_attn import AugmentedConv2d
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms import relative_2d
from hf_attn.mechanisms.relative_2d import relative_bias

SIZES = [(4, 4), (3, 5)]


def layer(size=(4, 5), seed=0, **options):
    torch.manual_seed(seed)
    given = {"key_dim": 8, "value_dim": 4, "num_heads": 2, "feature_size": size, **options}
    return AugmentedConv2d(6, 10, **given).double().eval()


def image(size=(4, 5), batch=2):
    return torch.randn(batch, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_01_the_table_index_is_the_displacement():
    length = 6
    table = torch.arange(-(length - 1), length, dtype=torch.float64)[:, None]
    query = torch.ones(1, 1, length, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    expected = torch.arange(length) - torch.arange(length)[:, None]
    assert torch.equal(relative_bias(query, zero, table)[0, 0], expected.double())
    assert torch.equal(relative_bias(query, table, zero)[0, 0], expected.double())


@pytest.mark.parametrize("size", SIZES)
def test_02_relative_logits_equal_the_loops(size):
    (rows, columns), built = size, layer(size)
    query = built.project(image(size))[0]
    bias = relative_bias(query, built.rel_height, built.rel_width)
    for (iy, ix), (jy, jx) in itertools.product(itertools.product(range(rows), range(columns)), repeat=2):
        entry = built.rel_width[jx - ix + columns - 1] + built.rel_height[jy - iy + rows - 1]
        agree(bias[..., iy * columns + ix, jy * columns + jx], query[:, :, iy * columns + ix] @ entry)


def test_03_without_tables_it_is_plain_attention_and_does_not_see_the_order():
    built, x = layer(), image()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))

    def attention(x):
        return built(x)[:, -4:].flatten(2)

    shuffled = x.flatten(2)[:, :, order].unflatten(2, (4, 5))
    assert (attention(shuffled) - attention(x)[:, :, order]).abs().max() > 1e-3
    torch.nn.init.zeros_(built.rel_height)
    torch.nn.init.zeros_(built.rel_width)
    agree(attention(shuffled), attention(x)[:, :, order])
    q, k, v, _ = built.project(x)
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
    agree(attention(x), built.out_proj.weight[:, :, 0, 0] @ mixed)
    agree(layer(relative=False)(x)[:, -4:], built(x)[:, -4:])


def test_04_a_constant_query_gives_logits_of_the_displacement():
    built = layer()
    bias = relative_bias(torch.ones(1, 1, 20, 4, dtype=torch.float64), built.rel_height, built.rel_width)
    bias = bias.view(4, 5, 4, 5)
    agree(bias[1:, 1:, 1:, 1:], bias[:-1, :-1, :-1, :-1])


@pytest.mark.parametrize("axis, table", [(2, "rel_height"), (3, "rel_width")])
def test_05_flipped_tables_flip_the_attention(axis, table):
    built, x = layer(), image()
    expected = built(x)[:, -4:].flip(axis)
    with torch.no_grad():
        getattr(built, table).copy_(getattr(built, table).flip(0).clone())
    agree(built(x.flip(axis))[:, -4:], expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_06_the_first_channels_are_the_convolution(stride):
    built, x = layer(stride=stride), image()
    agree(built(x)[:, :6], functional.conv2d(x, built.conv.weight, stride=stride, padding=1))


def test_07_all_attention_and_no_attention():
    whole, none = layer(value_dim=10), layer(value_dim=0)
    assert {name.partition(".")[0] for name in whole.state_dict()} == {"qkv", "out_proj", "rel_height", "rel_width"}
    assert whole(image()).shape == (2, 10, 4, 5)
    assert set(none.state_dict()) == {"conv.weight"}
    agree(none(image()), functional.conv2d(image(), none.conv.weight, padding=1))


@pytest.mark.parametrize("stride, pool", list(itertools.product([1, 2], repeat=2)))
@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_08_shapes(stride, pool, size):
    built = layer(size, stride=stride, pool=pool)
    assert built(image(size)).shape == (2, 10, *(-(-n // stride) for n in size))
    rows, columns = built.attention_size(*size)
    assert built.rel_height.shape == (2 * rows - 1, 4) and built.rel_width.shape == (2 * columns - 1, 4)


def test_long_maps_take_the_other_path_and_agree(monkeypatch):
    built, x = layer(), image()
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) > 0.3
    expected = built(x), built(x, pixel_mask=mask)
    monkeypatch.setattr(relative_2d, "TILE", 0)
    agree(built(x), expected[0], 1e-10)
    agree(built(x, pixel_mask=mask), expected[1], 1e-10)


def test_masked_pixels_never_matter():
    built, x = layer(), image()
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[:, :, 3:] = False
    changed = torch.where(mask[:, None], x, 1e3)
    agree(built(changed, pixel_mask=mask), built(x, pixel_mask=mask))
    narrow = layer((4, 3))
    narrow.load_state_dict({n: t[2:-2] if n == "rel_width" else t for n, t in built.state_dict().items()})
    agree(built(x, pixel_mask=mask)[..., :3], narrow(x[..., :3]))
    assert torch.isfinite(built(x, pixel_mask=torch.zeros_like(mask))).all()


def test_attention_weights_make_the_output():
    built, x = layer(), image()
    weights = built.attention_weights(x)
    agree(weights.sum(-1), torch.ones_like(weights[..., 0]))
    mixed = (weights @ built.project(x)[2]).transpose(2, 3).flatten(1, 2)
    agree(built(x)[:, -4:].flatten(2), built.out_proj.weight[:, :, 0, 0] @ mixed)


def test_compiles_in_one_piece_and_takes_channels_last():
    built, x = layer().float(), image().float()
    agree(torch.compile(built, fullgraph=True, backend="eager")(x), built(x), 1e-6)
    agree(built(x.to(memory_format=torch.channels_last)), built(x), 1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"value_dim": 12}, "at most out_channels"),
        ({"value_dim": 3}, "multiple of num_heads"),
        ({"key_dim": 7}, "multiple of num_heads"),
        ({"feature_size": None}, "needs feature_size"),
        ({"stride": 3}, "stride=3"),
        ({"pool": 0}, "pool=0"),
        ({"kernel_size": 2}, "must be odd"),
        ({"value_dim": None}, "neither value_dim nor upsilon"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        layer(**options)


def test_wrong_calls_are_refused():
    with pytest.raises(InvalidInput, match="feature_size"):
        layer()(image((4, 4)))
    with pytest.raises(InvalidInput, match="pixel_mask must be bool"):
        layer()(image(), pixel_mask=torch.ones(2, 4, 5))
    with pytest.raises(Unsupported, match="partly masked"):
        layer(pool=2)(image(), pixel_mask=torch.ones(2, 4, 5, dtype=torch.bool))
    with pytest.raises(Unsupported, match="value_dim=0"):
        layer(value_dim=0).attention_weights(image())
