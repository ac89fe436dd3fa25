"""masks.interpret: everything transformers can hand over, and what it means."""

import pytest
import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

import hf_attn
from hf_attn.errors import InvalidInput
from hf_attn.masks import Packing, causal_order, interpret, mask_interface, packed_segments, visible_pairs

PADDING = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)


def read(mask, queries=5, keys=5, is_causal=False, **arguments):
    return interpret(mask, batch=3, queries=queries, keys=keys, is_causal=is_causal, **arguments)


def test_none_means_nothing_to_mask():
    assert read(None) == (None, None, None, False)
    assert read(None, is_causal=True).is_causal


def test_two_dimensions_are_padding():
    for mask in (PADDING, PADDING.long(), PADDING.float()):
        found = read(mask)
        assert torch.equal(found.key_padding, PADDING) and found.dense is None and not found.is_causal
    # a cache longer than the keys: the last columns count
    longer = torch.cat((torch.zeros(3, 2, dtype=torch.bool), PADDING), dim=1)
    assert torch.equal(read(longer).key_padding, PADDING)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("additive", [None, float("-inf"), torch.finfo(torch.float32).min])
def test_four_dimensional_padding_is_recognised(is_causal, additive):
    order = causal_order(5, 5) if is_causal else torch.ones(5, 5, dtype=torch.bool)
    dense = (PADDING[:, None] & order)[:, None]
    given = dense if additive is None else torch.zeros(dense.shape).masked_fill(~dense, additive)
    found = read(given, is_causal=is_causal, keep_dense=False)
    assert torch.equal(found.key_padding, PADDING) and found.is_causal == is_causal and found.dense is None
    kept = read(given, is_causal=is_causal, keep_dense=True)
    assert kept.dense is not None and not kept.is_causal


@pytest.mark.parametrize("is_causal", [False, True])
def test_four_dimensional_packing_is_recognised(is_causal):
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    order = causal_order(5, 5) if is_causal else torch.ones(5, 5, dtype=torch.bool)
    dense = ((segments[:, :, None] == segments[:, None]) & order)[:, None]
    found = read(dense, is_causal=is_causal, keep_dense=False)
    assert torch.equal(found.segments, segments) and found.is_causal == is_causal


def test_anything_else_stays_dense():
    torch.manual_seed(0)
    dense = torch.rand(3, 1, 5, 5) > 0.4
    assert read(dense, keep_dense=False).dense is not None
    biases = torch.randn(3, 1, 5, 5)
    assert read(biases, keep_dense=False).dense is not None and visible_pairs(biases) is None
    by_head = (PADDING[:, None, None] & causal_order(5, 5)).expand(3, 2, 5, 5)
    assert read(by_head, is_causal=True, keep_dense=False).dense is not None
    # one pair off a causal mask is no causal mask
    almost = causal_order(5, 5)[None, None].expand(3, 1, 5, 5).clone()
    almost[0, 0, 1, 3] = True
    assert read(almost, is_causal=True, keep_dense=False).dense is not None


def test_cached_decoding_keeps_the_offset():
    mask = torch.cat((PADDING, torch.ones(3, 2, dtype=torch.bool)), dim=1)
    dense = (mask[:, None] & causal_order(2, 7))[:, None]
    found = read(dense, queries=2, keys=7, is_causal=True, keep_dense=False)
    assert torch.equal(found.key_padding, mask) and found.is_causal


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(3, 4), r"\(3, 4\).*\(B,M\) = \(3,5\)"),
        (torch.ones(2, 5), r"\(2, 5\)"),
        (torch.ones(3, 5, 5), "3 dimensions"),
        (torch.ones(3, 1, 4, 5), r"\(3, 1, 4, 5\).*\(5,5\)"),
    ],
)
def test_wrong_shapes_are_named(mask, words):
    with pytest.raises(InvalidInput, match=words):
        read(mask)


def test_positions_that_restart_are_packing():
    positions = torch.tensor([[0, 1, 0, 1, 2], [2, 3, 4, 5, 6]])
    assert torch.equal(packed_segments(positions, 2), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    assert packed_segments(torch.arange(5)[None], 2) is None
    # RoBERTa counts from 2, and padding repeats a number
    assert torch.equal(read(None, position_ids=positions[:1]).segments, torch.tensor([[0, 0, 1, 1, 1]] * 3))
    # a padding mask that was given wins
    assert read(PADDING, position_ids=positions[:1]).segments is None


def test_packing_goes_there_and_back():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    packing = Packing.of(segments)
    assert packing.key_padding.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    tokens = torch.randn(2, 3, 5, 4)
    apart = packing.unpack(tokens)
    assert apart.shape == (4, 3, 4, 4) and torch.equal(packing.pack(apart), tokens)
    assert not apart[0, :, 2:].any()


class Config:
    _attn_implementation = "rfa"
    is_causal = True
    num_hidden_layers = 2


def test_transformers_hands_our_functions_the_two_dimensional_mask():
    assert "rfa" in hf_attn.list_mechanisms()
    embeds = torch.zeros(3, 5, 8)
    for create in (create_causal_mask, create_bidirectional_mask):
        arguments = {"config": Config(), "inputs_embeds": embeds, "attention_mask": PADDING.long()}
        if create is create_causal_mask:
            arguments["past_key_values"] = None
        mask = create(**arguments)
        assert mask.dtype == torch.bool and torch.equal(mask, PADDING)
        assert create(**{**arguments, "attention_mask": None}) is None
        assert create(**{**arguments, "attention_mask": torch.ones(3, 5, dtype=torch.long)}) is None


def test_a_mask_function_that_is_not_plain_order_becomes_dense():
    def window(batch, head, q, k):
        return (q - k).abs() < 2

    mask = mask_interface(3, 5, 5, mask_function=window, attention_mask=PADDING, device="cpu")
    place = torch.arange(5)
    expected = ((place[:, None] - place).abs() < 2) & PADDING[:, None]
    assert torch.equal(mask[:, 0], expected)
