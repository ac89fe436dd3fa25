"""EVA: the invariants of its specification, a definition written out with loops, padding, decoding, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_attn
from hf_attn.capabilities import Host
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms.eva import EvaAttention

B, H, D = 2, 2, 4


def module(seed=0, dim=D, **options):
    """A float64 module in evaluation mode whose parameters are drawn, not at their start."""
    torch.manual_seed(seed)
    built = hf_attn.build("eva", num_heads=H, head_dim=dim, **{"window_size": 4, "chunk_size": 2, **options}).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return built.eval()


def tokens(n, seed=1, grad=False, batch=B, dim=D):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, H, n, dim)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad) for _ in range(3)]


def padding(n, seed=2):
    """Each sample has padded and real tokens, and a run of padded ones."""
    mask = torch.rand(B, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0], mask[:, -1], mask[1, 2:6] = True, False, False
    return mask


def agree(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def forms_agree(built, qkv, **call):
    results = []
    for form in (built, built.naive):
        out = form(*qkv, **call)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        leaves = [*qkv, *built.parameters()]
        grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        results.append((out, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]))
    agree(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1]):
        agree(a, b, 1e-8)


# -- the invariants ----------------------------------------------------------------------------------------------------

EVERY_KIND = [
    ({}, 13, {}),
    ({"overlap_window": True, "use_rpe": True}, 13, {}),
    ({"adaptive_proj": "none", "exclude_own_chunk": True}, 16, {}),
    ({"adaptive_proj": "no-ln", "overlap_window": True}, 13, {"is_causal": True}),
    ({"use_rpe": True, "rpe_2d": True, "overlap_window": True}, 33, {"grid": (4, 8), "num_prefix_tokens": 1}),
    ({"window_size": 2, "chunk_size": 1, "exclude_own_chunk": True}, 26, {"grid": (4, 6), "num_prefix_tokens": 2}),
]
kinds = pytest.mark.parametrize("options, n, call", EVERY_KIND, ids=str)


@kinds
@pytest.mark.parametrize("masked", [False, True])
def test_01_rows_sum_to_one(options, n, call, masked):
    built, qkv = module(**options), tokens(n)
    mask = padding(n) if masked else None
    weights = built.attention_weights(*qkv, key_padding_mask=mask, **call)
    total = weights.sum(-1)
    agree(total[total > 0], torch.ones_like(total[total > 0]), 1e-12)
    assert masked or (total > 0).all()
    agree(weights @ qkv[2], built(*qkv, key_padding_mask=mask, **call))


def test_02_chunks_of_one_token_with_kbar_equal_to_k_count_local_keys_twice():
    built, (q, k, v) = module(chunk_size=1, adaptive_proj="no-ln"), tokens(8)
    with torch.no_grad():
        built.k_bar_gen.proj.weight.copy_(torch.eye(D))
        built.k_bar_gen.proj.bias.zero_()
    logits = D**-0.5 * q @ k.mT
    same_window = torch.arange(8)[:, None] // 4 == torch.arange(8) // 4
    agree(built(q, k, v), (logits + same_window * torch.tensor(2.0).double().log()).softmax(-1) @ v, 1e-12)


def test_03_kbar_zero_makes_chunks_of_logit_zero():
    built, (q, k, v) = module(adaptive_proj="no-ln"), tokens(8)
    with torch.no_grad():
        built.k_bar_gen.proj.weight.zero_()
        built.k_bar_gen.proj.bias.zero_()
        w = built.q_bar_gen(q.unflatten(2, (4, 2)).mean(3)) / 2
    keys, values = k.unflatten(2, (4, 2)), v.unflatten(2, (4, 2))
    beta = (D**-0.5 * ((w[:, :, :, None] * keys).sum(-1) - keys.square().sum(-1) / 2)).softmax(-1)
    beta = (beta[..., None] * values).sum(3)
    near = (D**-0.5 * q.unflatten(2, (2, 4)) @ k.unflatten(2, (2, 4)).mT).exp()
    expected = (near @ v.unflatten(2, (2, 4)) + beta.sum(2)[:, :, None, None]) / (near.sum(-1, keepdim=True) + 4)
    agree(built(q, k, v), expected.flatten(2, 3), 1e-12)


SPLITS = [(1,) * 23, (7, 1, 1, 9, 5), (4, 4, 3, 1, 11), (23,), (2, 1, 20)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("overlap, exclude", list(itertools.product([False, True], repeat=2)))
def test_04_causal_equals_recurrent(split, overlap, exclude):
    built = module(overlap_window=overlap, exclude_own_chunk=exclude)
    qkv, mask = tokens(23), padding(23)
    for masked in (False, True):
        full = built(*qkv, is_causal=True, key_padding_mask=mask if masked else None)
        state, parts, start = None, [], 0
        for size in split:
            part = slice(start, start + size)
            call = {"key_padding_mask": mask[:, part]} if masked else {}
            out, state = built.step(*(x[:, :, part] for x in qkv), state, **call)
            parts.append(out)
            start += size
        agree(torch.cat(parts, dim=2), full, 1e-12)


@pytest.mark.parametrize("overlap, dim", [(False, 2), (True, 2), (False, 16), (True, 16)])
def test_05_no_future_leak(overlap, dim):
    built, qkv = module(overlap_window=overlap, dim=dim), tokens(14, dim=dim)
    full = built(*qkv, is_causal=True)
    for last in (13, 12, 8):
        changed = [torch.cat((x[:, :, :last], 100 * x[:, :, last:]), dim=2) for x in qkv]
        assert torch.equal(built(*changed, is_causal=True)[:, :, :last], full[:, :, :last])
    for t in range(1, 15):
        agree(built(*(x[:, :, :t] for x in qkv), is_causal=True), full[:, :, :t], 1e-12)


@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"grid": (4, 4)}], ids=str)
def test_06_one_window_without_its_chunk_is_softmax(call):
    size = 4 if "grid" in call else 16
    built, qkv = module(window_size=size, chunk_size=size, exclude_own_chunk=True), tokens(16)
    agree(built(*qkv, **call), hf_attn.build("softmax", num_heads=H, head_dim=D)(*qkv, **call), 1e-12)
    mask = padding(16)
    expected = hf_attn.build("softmax", num_heads=H, head_dim=D)(*qkv, key_padding_mask=mask, **call)
    agree(built(*qkv, key_padding_mask=mask, **call), expected, 1e-12)


# -- the definition, token by token ------------------------------------------------------------------------------------


def by_hand(built, q, k, v, mask=None, is_causal=False, grid=None, prefix=0):
    """The contract's text with loops: places are tuples, sets are lists."""
    o, s, n = built.options, D**-0.5, q.shape[2]
    w, c = o.window_size, o.chunk_size
    ext = max(1, w // 2) if o.overlap_window else 0
    length = -(-n // w) * w
    sides = grid or (length,)
    places = list(itertools.product(*(range(side) for side in sides)))[: n - prefix]
    corners = list(itertools.product(*(range(0, side, c) for side in sides)))
    out = torch.zeros_like(q)

    def within(place, corner, size, before, after):
        return all(a - before <= p < a + size + after for p, a in zip(place, corner))

    for b, h in itertools.product(range(q.shape[0]), range(H)):
        real = [mask is None or bool(mask[b, t]) for t in range(n)]
        chunks = []
        for i, corner in enumerate(corners):
            reach = 0 if is_causal else ext
            member = [t for t in range(prefix, n) if real[t] and within(places[t - prefix], corner, c, reach, reach)]
            if not any(real[t] and within(places[t - prefix], corner, c, 0, 0) for t in range(prefix, n)):
                continue
            kbar = built.k_bar_gen(k[b, h, member].mean(0))
            mean = 0 * kbar
            if built.q_bar_gen is not None:
                mean = (built.q_bar_gen(q[b, h, member].mean(0)) + kbar) / (1 if is_causal else 2)
            inner = s * (k[b, h, member] @ mean - k[b, h, member].square().sum(-1) / 2)
            chunks.append((i, corner, kbar, inner.softmax(0) @ v[b, h, member]))
        for t in range(n):
            seen = [m for m in range(n) if real[m]]
            pairs = []
            if t >= prefix:
                place = places[t - prefix]
                window = tuple(p // w * w for p in place)
                before, after = ((w if o.overlap_window else 0), 0) if is_causal else (ext, ext)
                seen = [m for m in seen if m < prefix or within(places[m - prefix], window, w, before, after)]
                if is_causal:
                    seen = [m for m in seen if m <= t]
                for i, corner, kbar, beta in chunks:
                    meets = all(a < x + w and a + c > x for a, x in zip(corner, window))
                    if (not is_causal or i < t // c) and not (o.exclude_own_chunk and meets):
                        pairs.append((s * q[b, h, t] @ kbar, beta))
            for m in seen:
                bias = 0
                if o.use_rpe and m >= prefix and t >= prefix:
                    other = places[m - prefix]
                    if o.rpe_2d:
                        bias = built.rpe_table[(h, *(y - x + w + ext - 1 for x, y in zip(place, other)))]
                    else:
                        bias = built.rpe_table[h, place[0] - window[0], other[0] - window[0] + ext]
                pairs.append((s * q[b, h, t] @ k[b, h, m] + bias, v[b, h, m]))
            if pairs:
                weights = torch.stack([logit for logit, _ in pairs]).softmax(0)
                out[b, h, t] = weights @ torch.stack([value for _, value in pairs])
    return out


@kinds
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_is_the_text(options, n, call, masked):
    built, qkv = module(**options), tokens(n)
    mask = padding(n) if masked else None
    with torch.no_grad():
        expected = by_hand(
            built, *qkv, mask, call.get("is_causal", False), call.get("grid"), call.get("num_prefix_tokens", 0)
        )
        agree(built.naive(*qkv, key_padding_mask=mask, **call), expected, 1e-12)
        agree(built(*qkv, key_padding_mask=mask, **call), expected, 1e-12)


@kinds
@pytest.mark.parametrize("dim", [4, 32], ids=["fused", "logits"])
@pytest.mark.parametrize("masked", [False, True])
def test_forms_agree_with_gradients(options, n, call, dim, masked):
    mask = padding(n) if masked else None
    if masked:
        mask[0] = False
    qkv = tokens(n, grad=True, dim=dim)
    for noise in (None, "given"):
        built = module(dim=dim, noise_std="exact", **options)
        if noise:
            sides = call.get("grid") or (-(-n // built.options.window_size) * built.options.window_size,)
            chunks = torch.Size(side // built.options.chunk_size for side in sides).numel()
            noise = torch.randn(B, H, chunks, dim, dtype=torch.float64)
        forms_agree(built, qkv, key_padding_mask=mask, noise=noise, **call)


def test_num_landmarks_sets_the_chunks():
    built, qkv = module(window_size=8, chunk_size=None, num_landmarks=4), tokens(32, grad=True)
    assert built.options.chunk((32,)) == 8 and built.options.chunk((8,)) == 2 and built.options.chunk((2,)) == 1
    agree(built(*qkv), module(window_size=8, chunk_size=8)(*qkv), 0)
    grid = module(window_size=4, chunk_size=None, num_landmarks=8)
    assert grid.options.chunk((4, 8)) == 2 and grid.options.chunk((8, 8)) == 2 and grid.options.chunk((1, 1)) == 1
    forms_agree(grid, qkv, grid=(4, 8))


class Watch(TorchDispatchMode):
    """Counts operations and the numbers of the largest result."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(
    "call, options",
    [({}, {}), ({"is_causal": True}, {}), ({}, {"overlap_window": True}), ({"is_causal": True}, {"window_size": 64}),
     ({"grid": True}, {"chunk_size": 8})],
    ids=str,
)  # fmt: skip
def test_no_quadratic_tensor_and_no_loop_over_windows(call, options):
    built = module(dim=8, **{"window_size": 8, "chunk_size": 8, **options})
    seen = []
    for n in (256, 1024):
        if "grid" in call:
            call["grid"] = (16, n // 16)
        qkv = tokens(n, batch=1, dim=8)
        with torch.no_grad(), Watch() as watch:
            built(*qkv, **call)
        seen.append(watch.operations)
        assert watch.largest < H * n * n / 4
    assert seen[0] == seen[1]


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"overlap_window": True}, {"window_size": 4, "chunk_size": 4}], ids=str)
def test_right_padding_equals_cutting_and_left_padding_by_whole_windows_does(call, options):
    built, qkv = module(**options), tokens(19)
    mask = torch.ones(B, 19, dtype=torch.bool)
    mask[:, 6:] = False
    agree(built(*qkv, key_padding_mask=mask, **call)[:, :, :6], built(*(x[:, :, :6] for x in qkv), **call), 1e-12)
    for shift, same in ((8, True), (3, False)):
        mask = torch.arange(19).expand(B, -1) >= shift
        left = built(*qkv, key_padding_mask=mask, **call)[:, :, shift:]
        alone = built(*(x[:, :, shift:] for x in qkv), **call)
        assert torch.allclose(left, alone, rtol=1e-12, atol=1e-12) == same, "windows and chunks keep their places"
    assert built.capabilities.padding_equals_cutting == "at the end"


@kinds
def test_padded_queries_keys_and_values_never_matter(options, n, call):
    built, qkv, mask = module(**options), tokens(n), padding(n)
    noisy = [torch.where(mask[:, None, :, None], x, 50.0) for x in qkv]
    out = built(*qkv, key_padding_mask=mask, **call).transpose(1, 2)[mask]
    agree(built(*noisy, key_padding_mask=mask, **call).transpose(1, 2)[mask], out, 1e-12)


@kinds
@pytest.mark.parametrize("dim", [4, 32], ids=["fused", "logits"])
def test_a_wholly_padded_sample_gives_zeros_and_finite_gradients(options, n, call, dim):
    built, qkv = module(dim=dim, **options), tokens(n, grad=True, dim=dim)
    mask = padding(n)
    mask[1] = False
    for form in (built, built.naive):
        out = form(*qkv, key_padding_mask=mask, **call)
        assert (out[1] == 0).all()
        grads = torch.autograd.grad(out.sum(), [*qkv, *built.parameters()], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("dim", [4, 32], ids=["fused", "logits"])
def test_long_vectors_neither_overflow_nor_lose_a_row(dim):
    for call in ({}, {"is_causal": True}):
        built = module(dim=dim)
        qkv = [x * f for x, f in zip(tokens(14, dim=dim), (1500, 1500, 1), strict=True)]
        agree(built(*qkv, **call), built.naive(*qkv, **call), 1e-9)
        assert built(*qkv, **call).abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@kinds
def test_lower_precision(options, n, call, dtype, tolerance):
    built, qkv = module(**options), tokens(n)
    expected = built(*qkv, **call)
    out = built.to(dtype)(*(x.to(dtype) for x in qkv), **call)
    assert out.dtype == dtype
    agree(out.double(), expected, tolerance)


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_state_holds_a_window_and_one_entry_a_chunk(overlap):
    built, qkv = module(overlap_window=overlap), tokens(31)
    state = None
    for t in range(31):
        _, state = built.step(*(x[:, :, t : t + 1] for x in qkv), state)
        seen = t + 1
        held = seen % 4 + (4 if overlap and seen >= 4 else 0)
        expected = {"query": seen % 2, "key": held, "value": held, "chunk_key": seen // 2, "chunk_value": seen // 2}
        assert {n: state[n].shape for n in expected} == {n: (B, H, size, D) for n, size in expected.items()}
        assert state["real"].shape == (B, held) and state["chunk_real"].shape == (B, seen // 2)
    _, whole = built.step(*qkv, None)
    for name, tensor in whole.items():
        agree(tensor, state[name], 1e-12)
        assert "chunk" in name or tensor.untyped_storage().nbytes() <= tensor.nbytes, "no view of the prompt"


def test_a_step_needs_its_state_and_no_noise():
    built, qkv = module(), tokens(6)
    with pytest.raises(Unsupported, match="noise was given to step"):
        built.step(*qkv, None, noise=torch.randn(B, H, 4, D))
    for options in ({"chunk_size": None}, {"use_rpe": True}, {"adaptive_proj": "none"}):
        other = module(**options)
        assert other.capabilities.decode == "none" and not other.capabilities.causal
        with pytest.raises(Unsupported, match="eva: is_causal=True with"):
            other.step(*qkv, None)
    assert built.capabilities.decode == "growing state"


def test_decoding_in_a_model_with_padding_overlap_and_beams():
    config = hf_attn.AttnGPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=49, pad_token_id=49,
        attn_implementation="eva", attention_options={"window_size": 4, "chunk_size": 2, "overlap_window": True},
    )  # fmt: skip
    model = hf_attn.AttnGPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompt = torch.tensor([[5, 17, 42, 9, 31], [49, 49, 30, 12, 7]])
    call = {"attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]), "max_new_tokens": 14, "pad_token_id": 49}
    for how in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached = model.generate(prompt, **call, **how)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **call, **how))


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_in_training_and_given_noise_is_used_always():
    built, qkv = module(window_size=4, chunk_size=2), tokens(13)
    quiet = built(*qkv)
    noise = torch.randn(B, H, 8, D, dtype=torch.float64)
    given = built(*qkv, noise=noise)
    assert (given - quiet).abs().max() > 1e-3
    built.train()
    agree(built(*qkv, noise=noise), given, 0)
    torch.manual_seed(3)
    drawn = built(*qkv)
    torch.manual_seed(3)
    agree(drawn, built(*qkv, noise=torch.randn(B, H, 8, D, dtype=torch.float64)), 1e-12)
    assert (drawn - quiet).abs().max() > 1e-3
    agree(module(noise_std="none").train()(*qkv, noise=noise), quiet, 0)
    assert module(noise_std="none").capabilities.random == ""
    scaled = module(noise_std="exact")(*qkv, noise=noise, scaling=0.25)
    agree(scaled, built(*qkv, noise=2 * noise, scaling=0.25), 1e-12)
    always = module(noise_at_eval=True)
    assert (always(*qkv) - always(*qkv)).abs().max() > 1e-3
    assert "each forward" in always.capabilities.random


def test_causal_noise_belongs_to_the_chunk_of_its_number():
    built, qkv = module(), tokens(14)
    noise = torch.randn(B, H, 8, D, dtype=torch.float64)
    full = built(*qkv, noise=noise, is_causal=True)
    changed = noise.clone()
    changed[:, :, 3] += 1
    moved = (built(*qkv, noise=changed, is_causal=True) - full).abs().amax((0, 1, 3)) > 1e-9
    assert moved.tolist() == [False] * 8 + [True] * 6


# -- parameters, options, refusals, hosts ------------------------------------------------------------------------------


def test_state_dict_and_start():
    linear = {f"{g}.proj.{n}": s for g in ("q_bar_gen", "k_bar_gen") for n, s in (("weight", (D, D)), ("bias", (D,)))}
    norm = {f"{g}.norm.{n}": (D,) for g in ("q_bar_gen", "k_bar_gen") for n in ("weight", "bias")}
    only_k = {n: s for n, s in {**linear, **norm}.items() if n.startswith("k")}
    for options, expected in (
        ({}, {**linear, **norm}),
        ({"adaptive_proj": "qk"}, {**linear, **norm}),
        ({"adaptive_proj": "no-ln"}, linear),
        ({"adaptive_proj": "none"}, only_k),
        ({"use_rpe": True}, {**linear, **norm, "rpe_table": (H, 4, 4)}),
        ({"use_rpe": True, "overlap_window": True}, {**linear, **norm, "rpe_table": (H, 4, 8)}),
        ({"use_rpe": True, "rpe_2d": True}, {**linear, **norm, "rpe_table": (H, 7, 7)}),
        ({"use_rpe": True, "rpe_2d": True, "overlap_window": True}, {**linear, **norm, "rpe_table": (H, 11, 11)}),
    ):
        built = hf_attn.build("eva", num_heads=H, head_dim=D, **{"window_size": 4, **options})
        assert {n: tuple(t.shape) for n, t in built.state_dict().items()} == expected
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert (parameter == 1).all()
            else:
                assert 0.005 < parameter.std() < 0.04 and parameter.abs().max() < 0.2


@pytest.mark.parametrize(
    "options",
    [{"window_size": 0}, {"num_landmarks": 0}, {"chunk_size": 0}, {"chunk_size": 2.0}, {"overlap_window": 1},
     {"adaptive_proj": "qv"}, {"noise_std": "twice"}, {"noise_at_eval": "no"}, {"use_rpe": None}, {"window": 4}],
    ids=str,
)  # fmt: skip
def test_refused_options(options):
    with pytest.raises(InvalidOption, match="eva"):
        module(**options)


@pytest.mark.parametrize(
    "options, call, n, error, words",
    [
        ({}, {"grid": (4, 4), "is_causal": True}, 16, Unsupported, "grid=.*no order"),
        ({"chunk_size": None}, {"is_causal": True}, 8, Unsupported, "chunk_size=None"),
        ({"window_size": 6, "chunk_size": 4}, {"is_causal": True}, 12, Unsupported, "no multiple of chunk_size=4"),
        ({"adaptive_proj": "none"}, {"is_causal": True}, 8, Unsupported, "adaptive_proj='none'"),
        ({"use_rpe": True}, {"is_causal": True}, 8, Unsupported, "use_rpe=True"),
        ({"chunk_size": 3}, {}, 8, Unsupported, "chunks of 3 tokens .* 8, the length"),
        ({"chunk_size": None, "num_landmarks": 3}, {}, 16, Unsupported, "num_landmarks=3.* 16, the length"),
        ({"window_size": 3}, {"grid": (4, 4)}, 16, Unsupported, "grid 4 x 4. Sizes that do: 1, 2, 4"),
        ({"window_size": 2, "chunk_size": 3}, {"grid": (4, 6)}, 24, Unsupported, "grid 4 x 6. Sizes that do: 1, 2"),
        ({"use_rpe": True}, {"grid": (4, 4)}, 16, Unsupported, "relative bias for sequences. Set rpe_2d=True"),
        ({"use_rpe": True, "rpe_2d": True}, {}, 8, Unsupported, "no grid was given"),
        ({}, {"grid": (4, 4)}, 15, InvalidInput, "16 tokens, and there are N=15"),
        ({}, {"grid": (-4, -4)}, 16, InvalidInput, "at least 1"),
        ({}, {"noise": torch.zeros(B, H, 3, D)}, 8, InvalidInput, r"\(2, 2, 4, 4\); got \(2, 2, 3, 4\)"),
        ({}, {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, 8, Unsupported, "attention_mask"),
    ],
)  # fmt: skip
def test_refused_calls(options, call, n, error, words):
    with pytest.raises(error, match=f"eva.*{words}"):
        module(**options)(*tokens(n), **call)


@pytest.mark.parametrize("is_causal", [False, True])
def test_other_numbers_of_keys_are_refused(is_causal):
    q, k, v = tokens(8)
    with pytest.raises(Unsupported, match="eva.*N=5 queries and M=8 keys"):
        module()(q[:, :, :5], k, v, is_causal=is_causal)


def test_prefix_tokens_without_a_grid_are_ordinary_tokens():
    built, qkv = module(), tokens(8)
    assert torch.equal(built(*qkv, num_prefix_tokens=2), built(*qkv))


def test_host_defaults_fit_the_model():
    def fill(given, **host):
        return EvaAttention.host_defaults(Host("m", H, D, 0, **host), given)

    assert fill({}, grid=(14, 14)) == {"window_size": 7, "chunk_size": 2}
    assert fill({}, grid=(24, 24)) == {"window_size": 8, "chunk_size": 3}
    assert fill({"use_rpe": True}, grid=(6, 8)) == {"window_size": 2, "chunk_size": 2, "rpe_2d": True}
    assert fill({"num_landmarks": 9, "window_size": 3}, grid=(6, 6)) == {}
    assert fill({}, max_length=512) == {"chunk_size": 8, "window_size": 8}
    assert fill({"num_landmarks": 16}, max_length=512) == {"window_size": 16}
    assert fill({"window_size": 12}, max_length=512) == {"chunk_size": 6}
    assert fill({}, causal=True, max_length=1024) == {"chunk_size": 8, "window_size": 128}
    assert fill({}, causal=True, max_length=60) == {"chunk_size": 8, "window_size": 56}
    assert fill({"chunk_size": 12}, causal=True) == {"window_size": 120}
    assert fill({"window_size": 4, "chunk_size": 2}, causal=True) == {}


@pytest.mark.parametrize(
    "given, host, words",
    [
        ({}, {"grid": (37, 37)}, "37 x 37. Sizes that do: 1, 37"),
        ({"window_size": 4}, {"grid": (14, 14)}, "window_size=4 and chunk_size=2 must divide.*14 x 14"),
        ({"num_landmarks": 4}, {"causal": True}, "chunk_size=None"),
        ({"use_rpe": True}, {"causal": True}, "use_rpe=True"),
        ({"use_rpe": True, "rpe_2d": False}, {"grid": (14, 14)}, "Set rpe_2d=True"),
    ],
)
def test_what_a_model_cannot_use_is_refused_at_load(given, host, words):
    with pytest.raises(Unsupported, match=f"eva in Model, layer 3: .*{words}"):
        EvaAttention.host_defaults(Host("Model", H, D, 3, **host), given)


def test_a_vit_with_relative_bias_and_one_with_a_grid_that_fits_nothing():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 2,
    }
    options = {"attn_implementation": "eva", "attention_options": {"use_rpe": True, "overlap_window": True}}
    model = hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(image_size=12, **sizes, **options)).eval()
    chosen = model.config.attention["default"]
    assert (chosen["window_size"], chosen["chunk_size"], chosen["rpe_2d"]) == (6, 2, True)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 12, 12)).logits.isfinite().all()
    with pytest.raises(Unsupported, match="11 x 11"):
        hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(image_size=22, **sizes, **options))
