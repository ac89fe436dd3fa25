"""Hypercube attention: the invariants of its specification (numbered as there), decoding, global tokens, costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms import hypercube

B, H, D = 2, 2, 8


def module(block_size=4, **options):
    return hf_attn.build("hypercube", num_heads=H, head_dim=D, block_size=block_size, **options)


def tokens(n, seed=1, grad=False, batch=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, H, n, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)
        for _ in range(3)
    ]


def padding(n, seed=2):
    """Scattered; the first sample is padded at the end only, as most batches are."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0] = torch.arange(n) < max(1, n - 5)
    return mask


def graph(n, block_size=1, is_causal=False, **options):
    """(n,n) bool: who attends to whom, from the definition."""
    built = module(block_size, **options)
    weights = built.attention_weights(*tokens(n, batch=1), is_causal=is_causal)
    return (weights > 0)[0].any(dim=0)


def agree(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def reflected(bits):
    """The reflected Gray code as strings, built by reflection."""
    codes = [""]
    for _ in range(bits):
        codes = ["0" + code for code in codes] + ["1" + code for code in reversed(codes)]
    return codes


# -- the invariants ----------------------------------------------------------------------------------------------------


def test_01_the_graph_is_that_of_the_reflected_gray_code():
    for n in (*range(1, 40), 63, 64, 65, 100, 128, 200):
        codes = reflected(max(n - 1, 0).bit_length())[:n]
        expected = [[sum(a != b for a, b in zip(p, q)) <= 1 for q in codes] for p in codes]
        found = graph(n)
        assert found.tolist() == expected
        assert torch.equal(found, found.T) and found.diagonal().all() and found.diagonal(1).all()
    for bits in range(1, 8):
        found = graph(2**bits)
        assert (found.sum(dim=1) == bits + 1).all()
        assert torch.equal(found, found.flip(0, 1)), "the mirror image of the order is the same graph"
    assert graph(4).int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_01_blocks_are_dense_inside(block_size):
    n = 37
    found, places = graph(n, block_size), graph(-(-n // block_size))
    place = torch.arange(n) // block_size
    assert torch.equal(found, places[place][:, place])


@pytest.mark.parametrize("outside", [0, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_02_efficient_equals_naive(block_size, causal, masked, outside):
    built = module(block_size, num_global_tokens=outside)
    for n in (1, 5, 32, 37, 64, 100):
        if n < outside:
            continue
        qkv, call = tokens(n, grad=True), {"is_causal": causal, "scaling": 0.7}
        if masked:
            call["key_padding_mask"] = padding(n)
        cotangent = tokens(n, seed=9)[0]
        results = []
        for form in (built, built.naive):
            out = form(*qkv, **call)
            results.append((out, *torch.autograd.grad((out * cotangent).sum(), qkv)))
        agree(results[0][0], results[1][0])
        for a, b in zip(results[0][1:], results[1][1:]):
            agree(a, b, 1e-8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size, n", [(32, 150), (64, 330), (128, 520)])
def test_02_efficient_equals_naive_with_larger_blocks(block_size, n, causal):
    built, qkv = module(block_size), tokens(n, batch=1)
    out = built(*qkv, is_causal=causal)
    agree(out, built.naive(*qkv, is_causal=causal))
    exact = hf_attn.build("softmax", num_heads=H, head_dim=D)(*qkv, is_causal=causal)
    assert (out - exact).abs().max() > 0.01, "five blocks or more: some are not seen"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32])
def test_03_two_blocks_are_softmax_attention(n, causal):
    qkv = tokens(n)
    exact = hf_attn.build("softmax", num_heads=H, head_dim=D)
    agree(module(16)(*qkv, is_causal=causal), exact(*qkv, is_causal=causal), 1e-12)
    assert (module(8)(*tokens(33)) - exact(*tokens(33))).abs().max() > 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_04_as_many_layers_as_bits_reach_everything(bits):
    for causal in (False, True):
        step = graph(2**bits, is_causal=causal).double()
        everything = torch.ones_like(step).tril() if causal else torch.ones_like(step)
        reach = [(torch.linalg.matrix_power(step, layers) > 0).double() for layers in (bits - 1, bits)]
        assert torch.equal(reach[1], everything)
        assert not torch.equal(reach[0], everything)


@pytest.mark.parametrize("n", [3, 5, 6, 9, 27, 33, 65, 100, 129])
def test_04_other_lengths_are_connected_within_as_many_layers(n):
    for causal in (False, True):
        reach = torch.linalg.matrix_power(graph(n, is_causal=causal).double(), math.ceil(math.log2(n))) > 0
        assert torch.equal(reach, torch.ones_like(reach).tril() if causal else torch.ones_like(reach))


@pytest.mark.parametrize("outside", [0, 2])
def test_05_the_future_changes_no_bit(outside):
    built, (q, k, v) = module(num_global_tokens=outside), tokens(45)
    before = built(q, k, v, is_causal=True)
    for t in (1, 2, 7, 8, 30, 44):
        changed = [torch.cat((x[:, :, :t], 3 - x[:, :, t:]), dim=2) for x in (q, k, v)]
        assert torch.equal(built(*changed, is_causal=True)[:, :, :t], before[:, :, :t])


@pytest.mark.parametrize("outside", [0, 2])
def test_05_a_prefix_gives_the_rows_of_the_whole(outside):
    built, qkv = module(num_global_tokens=outside), tokens(45)
    whole = built(*qkv, is_causal=True)
    for t in (2, 3, 8, 31, 44):
        agree(built(*(x[:, :, :t] for x in qkv), is_causal=True), whole[:, :, :t], 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_05_padded_content_changes_no_bit(causal):
    built, (q, k, v), mask = module(num_global_tokens=1), tokens(45), padding(45)
    hidden = ~mask[:, None, :, None]
    call = {"is_causal": causal, "key_padding_mask": mask}
    noisy = built(q, k.masked_fill(hidden, 9.0), v.masked_fill(hidden, -7.0), **call)
    assert torch.equal(noisy, built(q, k, v, **call))


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_queries_give_the_last_rows(masked, outside):
    built, (q, k, v) = module(num_global_tokens=outside), tokens(30, grad=True)
    call = {"is_causal": True, "key_padding_mask": padding(30) if masked else None}
    whole = built(q, k, v, **call)
    for n in range(1, 30):
        part = built(q[:, :, -n:], k, v, **call)
        agree(part, whole[:, :, -n:], 1e-12)
        agree(part, built.naive(q[:, :, -n:], k, v, **call), 1e-12)
        gradients = [
            torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (part, whole[:, :, -n:])
        ]
        for a, b in zip(*gradients):
            agree(a, b)


def test_token_by_token_equals_the_whole():
    built, (q, k, v) = module(num_global_tokens=2), tokens(40)
    whole = built(q, k, v, is_causal=True)
    for t in range(2, 40):
        agree(
            built(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], is_causal=True), whole[:, :, t : t + 1], 1e-12
        )


def test_a_step_reads_the_blocks_of_its_place_only():
    built, (q, k, v) = module(), tokens(64)
    unread = ~graph(64, block_size=4)[-1]
    assert unread.sum() == 64 - 5 * 4
    k, v = k.masked_fill(unread[:, None], float("nan")), v.masked_fill(unread[:, None], float("nan"))
    assert built(q[:, :, -1:], k, v, is_causal=True).isfinite().all()


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_padding_at_the_end_equals_alone_whatever_its_length(causal):
    built = module(num_global_tokens=1)
    for real, n in ((5, 9), (16, 17), (17, 33), (21, 64)):
        qkv, mask = tokens(n), (torch.arange(n) < real).expand(B, n)
        alone = built(*(x[:, :, :real] for x in qkv), is_causal=causal)
        agree(built(*qkv, is_causal=causal, key_padding_mask=mask)[:, :, :real], alone, 1e-12)


def test_padding_at_the_start_shifts_the_places_as_recorded():
    built, qkv, mask = module(), tokens(40), (torch.arange(40) >= 3).expand(B, 40)
    out = built(*qkv, key_padding_mask=mask)[:, :, 3:]
    assert built.capabilities.padding_equals_cutting == "at the end"
    assert (out - built(*(x[:, :, 3:] for x in qkv))).abs().max() > 0.01
    agree(built(*qkv, key_padding_mask=mask), built.naive(*qkv, key_padding_mask=mask))


def test_a_query_whose_blocks_are_padded_gives_zeros():
    built, qkv = module(), tokens(64)
    mask = ~graph(64, block_size=4)[20].expand(B, 64)
    out = built(*qkv, key_padding_mask=mask)
    assert not out[:, :, 20:24].any() and out[:, :, 30].any() and out.isfinite().all()


# -- global tokens -----------------------------------------------------------------------------------------------------


def test_global_tokens_see_all_and_are_seen_by_all():
    found = graph(20, block_size=2, num_global_tokens=3)
    assert found[:3].all() and found[:, :3].all()
    assert torch.equal(found[3:, 3:], graph(17, block_size=2))
    causal = graph(20, block_size=2, num_global_tokens=3, is_causal=True)
    assert torch.equal(causal, found.tril())


def test_global_tokens_only_is_softmax_attention():
    qkv, exact = tokens(6), hf_attn.build("softmax", num_heads=H, head_dim=D)
    agree(module(num_global_tokens=6)(*qkv), exact(*qkv), 1e-12)


# -- the layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_mirror_images_are_the_gray_code(causal):
    for places in (*range(1, 70), 100, 128, 200):
        expected = graph(places, is_causal=causal)
        for first in {0, places // 2, places - 1}:
            groups, order = hypercube.layout(first, places, causal, True)
            rows = [row for group in groups for row in group.rows]
            seen = []
            for group in groups:
                table = torch.tensor(group.seen).view(len(group.rows), -1)
                assert ((table[:, -1] == places - 1) == group.last).all()
                seen.extend(table.tolist())
            assert [rows[i] for i in order] == list(range(places - first))
            for row, keys in zip(rows, seen):
                assert keys == expected[first + row].nonzero().flatten().tolist()


def test_the_layout_is_made_once_a_length():
    hypercube._cached_layout.cache_clear()
    for seed in (1, 2, 3):
        module()(*tokens(40, seed=seed))
    assert hypercube._cached_layout.cache_info()[:2] == (2, 1)


class Watch(TorchDispatchMode):
    """Counts operations and remembers the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"key_padding_mask": True}], ids=str)
def test_neither_a_quadratic_tensor_nor_a_loop_over_blocks(options):
    built, counts = module(16), []
    for n in (512, 1024, 2048):
        qkv = tokens(n, dtype=torch.float32, batch=1)
        call = (
            {**options, "key_padding_mask": torch.ones(1, n, dtype=torch.bool)}
            if "key_padding_mask" in options
            else options
        )
        with Watch() as watch:
            built(*qkv, **call)
        # the gathered keys: a block sees log2(n / 16) + 1 blocks
        assert watch.largest <= H * D * n * (math.log2(n / 16) + 1)
        counts.append(watch.operations)
    assert counts[2] - counts[1] < 40 and counts[2] < 250, counts


def test_a_step_of_decoding_makes_nothing_that_grows_with_the_length():
    built, (q, k, v) = module(16), tokens(4096, dtype=torch.float32, batch=1)
    with Watch() as watch:
        built(q[:, :, -1:], k, v, is_causal=True)
    assert watch.largest <= H * D * 16 * (math.log2(4096 / 16) + 1)


# -- compiled, trained, refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_for_changing_lengths(causal):
    torch.compiler.reset()
    built = module(num_global_tokens=1).float()
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    for n in (17, 20, 33):
        qkv = tokens(n, dtype=torch.float32)
        torch.testing.assert_close(compiled(*qkv, is_causal=causal), built(*qkv, is_causal=causal))


def test_training_after_inference_mode():
    built = module()
    hypercube._cached_layout.cache_clear()
    with torch.inference_mode():
        built(*tokens(21))
    qkv = tokens(21, grad=True)
    built(*qkv).sum().backward()
    assert all(x.grad.isfinite().all() for x in qkv)


def test_dropout_drops_weights_and_keeps_their_mean():
    built, (q, k, v) = module(num_global_tokens=1), tokens(33)
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    outs = torch.stack([built(q, k, ones, dropout=0.3) for _ in range(200)])
    assert outs.std(dim=0).min() > 0.05
    assert (outs.mean(dim=0) - 1).abs().max() < 0.25 and abs(outs.mean() - 1) < 0.01


def test_there_is_no_state():
    assert not module().state_dict() and "block_size=4" in repr(module())


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_size": 2.0}, {"block_size": True}, {"num_global_tokens": -1}, {"blocks": 4}],
    ids=str,
)
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="hypercube"):
        hf_attn.build("hypercube", num_heads=H, head_dim=D, **options)


def test_refused_calls():
    q, k, v = tokens(8)
    with pytest.raises(InvalidInput, match=r"num_global_tokens=9 .* M=8 .* smaller"):
        module(num_global_tokens=9)(q, k, v)
    with pytest.raises(Unsupported, match="N=5 queries and M=8 keys"):
        module()(q[:, :, :5], k, v)
    with pytest.raises(Unsupported, match="N=8 queries and M=5 keys"):
        module()(q, k[:, :, :5], v[:, :, :5], is_causal=True)
    with pytest.raises(Unsupported, match="attention_mask"):
        module()(q, k, v, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


def test_grid_and_prefix_tokens_are_ignored():
    qkv = tokens(8)
    assert torch.equal(module()(*qkv, grid=(1, 7), num_prefix_tokens=1), module()(*qkv))
