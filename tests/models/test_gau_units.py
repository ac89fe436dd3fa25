"""The gated attention units: the invariants of the paper, decoding, padding, and what they refuse."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn import InvalidOption, Unsupported
from hf_attn.errors import InvalidInput
from hf_attn.mechanisms.gau import laplace, relu2
from hf_attn.models.gau import FlashGatedAttentionUnit, GatedAttentionUnit
from hf_attn.models.gau_layers import rotate, rotation_of

DIM, WIDTH = 8, 6
QUADRATIC = [
    {"attention_fn": fn, "quad_norm": norm, "n_ref": 8, "rel_pos_bias": bias, "max_position_embeddings": 40}
    for (fn, norm), bias in itertools.product(
        [
            *itertools.product(("relu2", "laplace"), ("ref", "valid", "sqrt_s")),
            ("softmax", "ref"),
            ("softmax_plus", "ref"),
        ],
        ("toeplitz", "rope", "none"),
    )
]
MIXED = [
    {"attention_fn": fn, "linear_norm": norm, "chunk_size": size, "rel_pos_bias": bias}
    for fn, norm, (size, bias) in itertools.product(
        ("relu2", "laplace"), ("mean", "chunk"), ((4, "toeplitz"), (5, "none"), (1, "toeplitz"), (64, "toeplitz"))
    )
]
EXTRAS = [
    {"token_shift": True, "norm_type": "scale_norm"},
    {"use_rope": False, "use_bias": False, "offset_bias": False},
    {"rope_dim": 4, "norm_type": "rms_norm", "norm_position": "post"},
]
UNITS = [(GatedAttentionUnit, o) for o in QUADRATIC] + [(FlashGatedAttentionUnit, o) for o in MIXED]
UNITS += [(GatedAttentionUnit, {**QUADRATIC[0], **extra}) for extra in EXTRAS]
UNITS += [(FlashGatedAttentionUnit, {**MIXED[0], **extra}) for extra in EXTRAS]
names = [f"{kind.__name__[:5]} {' '.join(str(v) for v in options.values())}" for kind, options in UNITS]
units = pytest.mark.parametrize("kind, options", UNITS, ids=names)
causally = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def unit_of(kind, dtype=torch.float64, **options):
    """A unit in evaluation mode whose parameters are of a size at which every part of it matters."""
    unit = kind(DIM, query_key_dim=WIDTH, **options).to(dtype).eval()
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=0.5)
    return unit


def inputs(tokens: int = 14, dtype=torch.float64):
    return torch.randn(2, tokens, DIM, dtype=dtype)


def mask_of(tokens: int, real: int):
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, real:] = False
    return mask


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Operations(TorchDispatchMode):
    """Counts what runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def in_loops(unit, x, mask, causal):
    """The unit by the letter of the paper: one token and one key after another."""
    o, (batch, tokens, _) = unit.options, x.shape
    out = torch.zeros(batch, tokens, unit.value_dim, dtype=x.dtype)
    gate, value, z, _ = unit._project(x, mask, None)
    copies = unit._copies(z, 0, None)
    mixed = isinstance(unit, FlashGatedAttentionUnit)
    for b, i in itertools.product(range(batch), range(tokens)):
        seen = [j for j in range(tokens) if (mask is None or mask[b, j]) and (not causal or j <= i)]
        near = [j for j in seen if not mixed or i // o.chunk_size == j // o.chunk_size]
        scores = torch.stack([copies[0, b, i] @ copies[1, b, j] for j in near]) if near else x.new_zeros(0)
        bias = torch.stack([bias_of(unit, i, j, z) for j in near]) if near else scores
        count = max(len(near), 1)
        if o.attention_fn in ("relu2", "laplace"):
            norm = {"ref": "n_ref", "chunk": "chunk_size"}["chunk" if mixed else "ref"]
            divisor = getattr(o, norm) if mixed or o.quad_norm == "ref" else count
            divisor = WIDTH**0.5 if not mixed and o.quad_norm == "sqrt_s" else divisor
            weights = {"relu2": relu2, "laplace": laplace}[o.attention_fn](scores / divisor + bias)
            weights = weights / count if not mixed and o.quad_norm == "sqrt_s" else weights
        else:
            factor = math.log(max(count, 16)) / math.log(512) if o.attention_fn == "softmax_plus" else 1
            weights = (factor * (scores / WIDTH**0.5 + bias)).softmax(dim=0)
        for weight, j in zip(weights, near):
            out[b, i] += weight * value[b, j]
        if mixed:
            past = [j for j in seen if not causal or j // o.chunk_size < i // o.chunk_size]
            divisor = o.chunk_size if o.linear_norm == "chunk" else max(len(past), 1)
            for j in past:
                out[b, i] += copies[2, b, i] @ copies[3, b, j] / divisor * value[b, j]
    y = x + unit.out_proj(gate * out)
    return unit.norm(y) if o.norm_position == "post" else y


def bias_of(unit, i, j, like):
    o = unit.options
    if o.rel_pos_bias == "none":
        return like.new_zeros(())
    if o.rel_pos_bias == "rope":
        rotation = rotation_of(0, 20, WIDTH, o.rope_theta, like)
        row, column = (rotate(v.expand(20, -1), rotation) for v in (unit.rel_bias_a, unit.rel_bias_b))
        return row[i] @ column[j]
    return unit.rel_bias[j - i + (len(unit.rel_bias) - 1) // 2]


@units
@causally
@pytest.mark.parametrize("real", [None, 9], ids=["", "padding"])
def test_01_loops_equal_the_matrix_equal_the_efficient_form(kind, options, causal, real):
    unit, x = unit_of(kind, **options), inputs(11)
    mask = None if real is None else mask_of(11, real)
    valid = torch.ones(2, 11, dtype=torch.bool) if mask is None else mask
    expected = in_loops(unit, x, mask, causal)
    close(unit.naive(x, mask, causal)[valid], expected[valid], 1e-11)
    found = unit(x, mask, causal)
    close(found[valid], expected[valid], 1e-11)
    assert torch.isfinite(found).all()


@units
@causally
def test_01_gradients_are_equal(kind, options, causal):
    unit, x, mask = unit_of(kind, **options), inputs().requires_grad_(), mask_of(14, 9)
    cotangent = torch.randn_like(x) * mask[..., None]
    leaves = [x, *unit.parameters()]
    for found, expected in zip(
        torch.autograd.grad(unit(x, mask, causal), leaves, cotangent),
        torch.autograd.grad(unit.naive(x, mask, causal), leaves, cotangent),
    ):
        close(found, expected, 1e-9)


def test_01_long_inputs_go_through_spans_and_recomputation():
    for options in (QUADRATIC[0], QUADRATIC[3], QUADRATIC[18], QUADRATIC[21], QUADRATIC[22]):
        unit = unit_of(GatedAttentionUnit, **{**options, "max_position_embeddings": 600}).train()
        x = torch.randn(1, 600, DIM, dtype=torch.float64, requires_grad=True)
        for causal in (False, True):
            found, expected = unit(x, is_causal=causal), unit.naive(x, is_causal=causal)
            close(found, expected, 1e-10)
            leaves = [x, *unit.parameters()]
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected))):
                close(a / b.abs().max(), b / b.abs().max(), 1e-9)


@units
def test_02_decoding_equals_the_full_pass(kind, options):
    unit, x = unit_of(kind, **options), inputs()
    full = unit(x, is_causal=True)
    for split in ((1,) * 14, (5, 1, 8), (3, 3, 3, 3, 2), (4, 4, 6), (14,)):
        state, parts = None, []
        for part in x.split(split, dim=1):
            out, state = unit(part, past_state=state, use_cache=True)
            parts.append(out)
        close(torch.cat(parts, dim=1), full, 1e-11)
        assert state.seq_length == 14
    last = unit(x[:, :1], past_state=unit(x[:, :13], use_cache=True)[1])
    assert last.shape == (2, 1, DIM), "a state is taken, and none returned"


@units
def test_02_states_follow_their_rows(kind, options):
    unit, x = unit_of(kind, **options), inputs(7)
    _, state = unit(x[:, :6], use_cache=True)
    assert state.reorder(torch.tensor([1, 1])) is state
    found, _ = unit(x[:, 6:], past_state=state, use_cache=True)
    swapped = torch.cat((x[[1, 1], :6], x[:, 6:]), dim=1)
    close(found, unit(swapped, is_causal=True)[:, 6:])


def test_02_the_mixed_chunk_state_is_constant_and_wide():
    unit, sizes = unit_of(FlashGatedAttentionUnit, torch.bfloat16, chunk_size=4), []
    state = None
    for _ in range(21):
        _, state = unit(inputs(1, torch.bfloat16), past_state=state, use_cache=True)
        sizes.append(state.past_kv.shape + state.chunk_kv.shape)
        assert state.chunk_key.shape[1] == state.chunk_value.shape[1] == state.seq_length % 4
        assert state.num_past == state.seq_length // 4 * 4
    assert set(sizes) == {(2, WIDTH, 2 * DIM) * 2}
    assert state.past_kv.dtype == state.chunk_kv.dtype == torch.float32
    with pytest.raises(Unsupported, match="crop"):
        state.crop(3)


@pytest.mark.parametrize("fn", ["relu2", "laplace"])
@pytest.mark.parametrize("size", [14, 20])
def test_03_one_causal_chunk_is_quadratic_attention(fn, size):
    mixed = unit_of(FlashGatedAttentionUnit, attention_fn=fn, chunk_size=size)
    quadratic = GatedAttentionUnit(
        DIM, query_key_dim=WIDTH, attention_fn=fn, n_ref=size, max_position_embeddings=size
    ).double()
    weights = mixed.state_dict()
    quadratic.load_state_dict({n: t[:2] if n in ("gamma", "beta") else t for n, t in weights.items()})
    x = inputs()
    close(mixed(x, is_causal=True), quadratic(x, is_causal=True))


def test_04_chunks_of_one_token_are_strictly_causal_linear_attention():
    unit, x = unit_of(FlashGatedAttentionUnit, chunk_size=1, linear_norm="chunk", rel_pos_bias="none"), inputs()
    with torch.no_grad():
        unit.gamma[:2], unit.beta[:2] = 0, 0
        gate, value, z, _ = unit._project(x, None, None)
        _, _, query, key = unit._copies(z, 0, None)
        sums = torch.einsum("bns,bne->bnse", key, value).cumsum(dim=1)
        before = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=1)
        expected = x + unit.out_proj(gate * torch.einsum("bns,bnse->bne", query, before))
    close(unit(x, is_causal=True), expected)


@units
def test_05_later_tokens_change_nothing_before_them_exactly(kind, options):
    unit, x = unit_of(kind, **options), inputs()
    before = unit(x, is_causal=True)
    for t in (1, 4, 7, 13):
        changed = x.clone()
        changed[:, t:] = 1e4 * torch.randn_like(changed[:, t:])
        assert torch.equal(unit(changed, is_causal=True)[:, :t], before[:, :t])


@units
def test_06_a_prefix_gives_the_prefix(kind, options):
    unit, x = unit_of(kind, **options), inputs()
    full = unit(x, is_causal=True)
    for t in (1, 4, 6, 13):
        close(unit(x[:, :t], is_causal=True), full[:, :t])


def test_06_a_prefix_gives_something_else_with_the_length_as_normaliser():
    unit, x = unit_of(GatedAttentionUnit, quad_norm="length"), inputs()
    _, value, z, _ = unit._project(x, None, None)
    copies = unit._copies(z, 0, None)
    short = unit.weights(copies[:, :, :7], None, True) @ value[:, :7]
    full = (unit.weights(copies, None, True) @ value)[:, :7]
    assert (short - full).abs().max() > 1e-3


@units
@causally
def test_07_right_padding_equals_truncation(kind, options, causal):
    unit, x, mask = unit_of(kind, **options), inputs(), mask_of(14, 9)
    both = unit(x, mask, causal)
    close(both[1, :9], unit(x[1:, :9], None, causal)[0])
    x[1, 9:] = 1e3
    assert torch.equal(unit(x, mask, causal)[mask], both[mask])
    close(both[0], unit(x[:1], None, causal)[0])


@pytest.mark.parametrize("options", [*QUADRATIC, {**QUADRATIC[0], "token_shift": True}], ids=str)
def test_07_left_padding_equals_truncation_in_quadratic_attention(options):
    unit, x = unit_of(GatedAttentionUnit, **options), inputs()
    mask = mask_of(14, 9).flip(1)
    for causal in (False, True):
        close(unit(x, mask, causal)[1, 5:], unit(x[1:, 5:], None, causal)[0], 1e-11)
    _, state = unit(x[:, :10], mask[:, :10], use_cache=True)
    late, _ = unit(x[:, 10:], past_state=state, use_cache=True)
    close(late[1], unit(x[1:, 5:], None, True)[0, 5:], 1e-11)


def test_08_biases_and_rotated_scores_depend_on_the_distance_only():
    def is_toeplitz(table):
        close(table[1:, 1:], table[:-1, :-1])

    for bias in ("toeplitz", "rope"):
        unit = unit_of(GatedAttentionUnit, rel_pos_bias=bias)
        is_toeplitz(unit._bias(12, unit.gamma))
    vectors = torch.randn(2, WIDTH, dtype=torch.float64)
    rotation = rotation_of(0, 12, WIDTH, 10000.0, vectors)
    query, key = (rotate(v.expand(12, -1), rotation) for v in vectors)
    is_toeplitz(query @ key.T)
    assert not torch.allclose((query @ key.T)[0], (query @ key.T)[0, 0])


def test_09_the_laplace_function_touches_relu2():
    x = torch.tensor(0.5**0.5, dtype=torch.float64, requires_grad=True)
    for function in (relu2, laplace):
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        close(value.detach(), torch.tensor(0.5, dtype=torch.float64))
        close(slope, torch.tensor(2**0.5, dtype=torch.float64))
    assert laplace(torch.tensor(50.0)) == 1


def test_10_without_attention_it_is_a_gated_linear_unit():
    unit, x = unit_of(GatedAttentionUnit), inputs()
    gate, value, _, _ = unit._project(x, None, None)
    eye = torch.eye(14, dtype=torch.float64).expand(2, -1, -1)
    unit.weights = lambda *_: eye
    close(unit.naive(x), x + unit.out_proj(gate * value))


@pytest.mark.parametrize("kind", [GatedAttentionUnit, FlashGatedAttentionUnit])
def test_10_queries_of_zero_leave_the_input(kind):
    unit, x = unit_of(kind, rel_pos_bias="none"), inputs()
    with torch.no_grad():
        unit.gamma.zero_(), unit.beta.zero_()
    close(unit(x), x + unit.out_proj.bias)


def linear_part(unit, x, order=slice(None)):
    """The linear part alone: relu2 of zero scores is zero."""
    with torch.no_grad():
        unit.gamma[:2], unit.beta[:2] = 0, 0
    _, value, z, _ = unit._project(x, None, None)
    copies = unit._copies(z, 0, None)
    copies = torch.cat((copies[:3], copies[3:, :, order]))
    return unit.attend(copies, value[:, order], None, False, None, False)[0]


def test_11_the_bidirectional_linear_part_knows_no_order_and_no_chunks():
    unit, x = unit_of(FlashGatedAttentionUnit, chunk_size=4, rel_pos_bias="none"), inputs()
    expected = linear_part(unit, x)
    close(linear_part(unit, x, torch.randperm(14)), expected)
    for size in (1, 3, 7, 14, 50):
        other = unit_of(FlashGatedAttentionUnit, chunk_size=size, rel_pos_bias="none")
        other.load_state_dict(unit.state_dict())
        close(linear_part(other, x), expected)


@pytest.mark.parametrize("kind", [GatedAttentionUnit, FlashGatedAttentionUnit])
@causally
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_12_half_precision_is_close(kind, causal, dtype):
    unit = kind(64, query_key_dim=32, **({"chunk_size": 16} if kind is FlashGatedAttentionUnit else {"n_ref": 16}))
    for parameter in unit.parameters():
        nn.init.normal_(parameter, std=0.15)
    for parameter in (unit.gamma, unit.norm.weight):
        nn.init.ones_(parameter)
    x = torch.randn(2, 50, 64)
    expected = unit(x, is_causal=causal)
    assert (expected - x).norm() > 0.3 * x.norm(), "the residual must not hide what the unit adds"
    low = unit.to(dtype)
    found = low(x.to(dtype), is_causal=causal)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < 2e-2


@causally
def test_chunks_are_no_loop(causal):
    unit, counts = unit_of(FlashGatedAttentionUnit, chunk_size=4), []
    for tokens in (8, 16, 160):
        with Operations() as operations:
            unit(inputs(tokens), is_causal=causal)
        counts.append(operations.count)
    assert len(set(counts)) == 1, "as many operations for 2 chunks as for 40"


@pytest.mark.parametrize("kind", [GatedAttentionUnit, FlashGatedAttentionUnit])
def test_autocast_keeps_scores_and_sums_in_float32(kind):
    unit, x = unit_of(kind, torch.float32), inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = unit(x, use_cache=True)
        unit(x[:, :1], past_state=state, use_cache=True)
    assert {t.dtype for t in vars(state).values() if isinstance(t, torch.Tensor)} == {torch.float32}
    expected = unit(x, is_causal=True)
    assert (out.float() - expected).norm() / expected.norm() < 5e-2


@units
def test_it_compiles_to_one_graph(kind, options):
    unit, x, mask = unit_of(kind, **options), inputs(), mask_of(14, 9)
    torch.compiler.reset()
    compiled = torch.compile(unit, fullgraph=True, backend="eager")
    close(compiled(x, mask, True), unit(x, mask, True))


@units
def test_dropout_is_drawn_in_training_only(kind, options):
    unit, x = unit_of(kind, **{**options, "attention_dropout": 0.5, "hidden_dropout": 0.2}), inputs()
    assert torch.equal(unit(x), unit(x))
    unit.train()
    assert not torch.equal(unit(x), unit(x))
    draws = torch.stack([unit(x) for _ in range(300)])
    mean, deviation = draws.mean(0), draws.std(0) / 300**0.5
    if unit.options.norm_position == "pre":
        assert ((mean - unit.eval()(x)).abs() < 6 * deviation + 1e-9).all()


def test_parameters_start_where_they_should():
    for kind in (GatedAttentionUnit, FlashGatedAttentionUnit):
        unit = kind(64)
        for name, parameter in unit.named_parameters():
            if name.endswith("bias") and name != "rel_bias" or name == "beta":
                assert not parameter.any(), name
            elif name == "norm.weight":
                assert (parameter == 1).all()
            else:
                assert 0.017 < parameter.std() < 0.023, name
        x = torch.randn(1, 50, 64)
        assert (unit(x) - x).abs().max() < 0.05, "a new unit is close to the identity"


def test_the_state_of_a_golden_case():
    from test_golden import GOLDEN, load, resolve

    meta, tensors = load(GOLDEN / "flash_gau" / "causal_decode.safetensors")
    unit, state, parts = resolve(meta, tensors), None, []
    for step, token in enumerate(tensors["hidden_states"].split(1, dim=1), start=1):
        out, state = unit(token, past_state=state, use_cache=True)
        parts.append(out)
        if step == int(meta["state_after"]):
            for name in ("past_kv", "chunk_kv", "chunk_key", "chunk_value"):
                close(getattr(state, name), tensors[f"state.{name}"], 1e-9)
    close(torch.cat(parts, dim=1), tensors["decode_output"], 1e-9)


def test_weights_for_looking_at():
    x, mask = inputs(), mask_of(14, 9)
    quadratic = unit_of(GatedAttentionUnit)
    maps = quadratic.attention_weights(x, mask, True)
    assert maps.shape == (2, 1, 14, 14) and not maps.triu(1).any() and not maps[1, 0, :, 9:].any()
    mixed = unit_of(FlashGatedAttentionUnit, chunk_size=4)
    local = mixed.attention_weights(x, mask, True)
    assert local.shape == (2, 4, 4, 4)
    _, _, z, _ = mixed._project(x, mask, None)
    table = mixed._local_weights(*mixed._copies(z, 0, None)[:2], mask, True)
    close(local[:, 1], table[:, 4:8, 4:8])


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (GatedAttentionUnit, {"attention_fn": "relu3"}, "attention_fn='relu3'.*relu2"),
        (GatedAttentionUnit, {"quad_norm": "len"}, "quad_norm='len'"),
        (GatedAttentionUnit, {"chunk_size": 4}, "unknown option 'chunk_size'"),
        (GatedAttentionUnit, {"query_key_dim": 7}, "query_key_dim=7 must be even"),
        (GatedAttentionUnit, {"query_key_dim": 7, "use_rope": False, "rel_pos_bias": "rope"}, "query_key_dim=7"),
        (GatedAttentionUnit, {"rope_dim": 5}, "rope_dim=5 must be even"),
        (GatedAttentionUnit, {"norm_type": "batch"}, "norm_type='batch'"),
        (GatedAttentionUnit, {"attention_dropout": 2.0}, "attention_dropout=2.0"),
        (FlashGatedAttentionUnit, {"attention_fn": "softmax"}, "attention_fn='softmax'"),
        (FlashGatedAttentionUnit, {"rel_pos_bias": "rope"}, "rel_pos_bias='rope'"),
        (FlashGatedAttentionUnit, {"chunk_size": 0}, "chunk_size=0"),
        (FlashGatedAttentionUnit, {"query_key_dim": 7}, "query_key_dim=7"),
    ],
)
def test_options_outside_their_rule_are_refused(kind, options, message):
    with pytest.raises(InvalidOption, match=message):
        kind(DIM, **options)


def test_calls_without_a_definition_are_refused():
    x, mask = inputs(), mask_of(14, 9)
    length = unit_of(GatedAttentionUnit, quad_norm="length")
    for call in ({"is_causal": True}, {"use_cache": True}):
        with pytest.raises(Unsupported, match="quad_norm='length'.*quad_norm='ref'"):
            length(x, **call)
    for kind in (GatedAttentionUnit, FlashGatedAttentionUnit):
        unit = unit_of(kind)
        _, state = unit(x, use_cache=True)
        with pytest.raises(Unsupported, match="key_padding_mask with a past_state"):
            unit(x, mask, past_state=state)
        with pytest.raises(InvalidInput, match="hidden_states must be"):
            unit(x[..., :5])
        with pytest.raises(InvalidInput, match="key_padding_mask must be bool"):
            unit(x, mask.long())
    with pytest.raises(Unsupported, match="14 tokens.*max_position_embeddings=9"):
        unit_of(GatedAttentionUnit, max_position_embeddings=9)(x)
    short = unit_of(GatedAttentionUnit, max_position_embeddings=14)
    with pytest.raises(Unsupported, match="15 tokens"):
        short(x[:, :1], past_state=short(x, use_cache=True)[1])
    mixed = unit_of(FlashGatedAttentionUnit, chunk_size=4)
    for wrong in (mask.flip(1), torch.arange(14).expand(2, -1) % 3 > 0):
        with pytest.raises(Unsupported, match='padding_side="right"'):
            mixed(x, wrong)
    _, state = mixed(x, mask, use_cache=True)
    with pytest.raises(Unsupported, match="end with padding"):
        mixed(x[:, :1], past_state=state)
