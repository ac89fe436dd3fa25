"""mixed_chunk: the invariants of the paper's page, every combination of options, the decoding state, the refusals."""

import functools

import pytest
import torch
from helpers import DIM, HEADS, Largest, agree, module_of, qkv

import hf_attn

NAME = "mixed_chunk"
OPTIONS = [
    {},
    {"rel_pos_bias": True, "offset_scale": True},
    {"local_attention": "relu2", "linear_norm": "chunk", "rel_pos_bias": True},
    {"local_attention": "laplace", "offset_scale": True},
]
options = pytest.mark.parametrize("given", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")


close = functools.partial(agree, tolerance=1e-12)


def padding(keys: int) -> torch.Tensor:
    """Everything real; padding that begins within a chunk; nothing real."""
    mask = torch.ones(3, keys, dtype=torch.bool)
    mask[1, keys // 2 :] = mask[2] = False
    return mask


# -- the invariants of the paper's page --------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal, queries", [(False, 14), (True, 14), (True, 9), (True, 2), (True, 1)])
@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_01_the_forms_agree(size, is_causal, queries, padded, given):
    module = module_of(NAME, chunk_size=size, **given)
    inputs = qkv(queries, 14, requires_grad=True)
    leaves, results = [*inputs, *module.parameters()], []
    call = {"is_causal": is_causal, "key_padding_mask": padding(14) if padded else None, "scaling": 0.7}
    cotangent = torch.randn_like(inputs[0])
    for form in (module, module.naive):
        out = form(*inputs, **call)
        gradients = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
        results.append((out, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]))
    agree(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1]):
        agree(a, b, 1e-8)


@options
@pytest.mark.parametrize("parts", [[1] * 14, [4, 4, 4, 2], [3, 6, 5], [13, 1], [14]])
def test_02_decoding_equals_the_full_pass(parts, given):
    module, (q, k, v), mask = module_of(NAME, chunk_size=4, **given), qkv(14), padding(14)
    for real in (None, mask):
        full = module(q, k, v, is_causal=True, key_padding_mask=real)
        state, results, sizes, start = None, [], set(), 0
        for n in parts:
            part = slice(start, start + n)
            new = None if real is None else real[:, part]
            out, state = module.step(q[:, :, part], k[:, :, part], v[:, :, part], state, key_padding_mask=new)
            results.append(out)
            sizes.add(sum(t.numel() for t in state.values()))
            start += n
        close(torch.cat(results, dim=2), full)
        assert len(sizes) == 1, "the state does not grow"


def test_03_one_chunk_is_plain_attention_in_causal_order():
    q, k, v = qkv(14)
    close(module_of(NAME, chunk_size=14)(q, k, v, is_causal=True), module_of("softmax")(q, k, v, is_causal=True))
    for local in ("relu2", "laplace"):
        mixed = module_of(NAME, chunk_size=14, local_attention=local)
        close(mixed(q, k, v, is_causal=True), module_of(local, n_ref=14)(q, k, v, is_causal=True))


def test_04_chunks_of_one_token_leave_strictly_causal_linear_attention():
    q, k, v = qkv(14)
    past = torch.ones(14, 14, dtype=torch.float64).tril(-1)
    mean = past / past.sum(dim=1, keepdim=True).clamp(min=1)
    # a softmax over the token itself is 1
    close(module_of(NAME, chunk_size=1)(q, k, v, is_causal=True) - v, (q @ k.transpose(-1, -2) * mean) @ v)


@options
@pytest.mark.parametrize("token", [7, 8, 9, 13])
def test_05_changing_a_token_changes_no_bit_before_it(token, given):
    module, (q, k, v) = module_of(NAME, torch.float32, chunk_size=4, **given), qkv(14)
    q, k, v = q.float(), k.float(), v.float()
    before = module(q, k, v, is_causal=True)
    for x in (q, k, v):
        x[:, :, token:] = 1e4
    assert torch.equal(module(q, k, v, is_causal=True)[:, :, :token], before[:, :, :token])


@options
def test_06_a_prefix_gives_the_rows_of_the_whole(given):
    module, (q, k, v) = module_of(NAME, chunk_size=4, **given), qkv(14)
    full = module(q, k, v, is_causal=True)
    for n in range(1, 14):
        close(module(*(x[:, :, :n] for x in (q, k, v)), is_causal=True), full[:, :, :n])


@options
@pytest.mark.parametrize("is_causal", [False, True])
def test_07_padding_at_the_end_equals_cutting(is_causal, given):
    module, (q, k, v) = module_of(NAME, chunk_size=4, **given), qkv(14)
    for n in range(1, 15):
        mask = (torch.arange(14) < n).expand(3, -1)
        alone = module(*(x[:, :, :n] for x in (q, k, v)), is_causal=is_causal)
        close(module(q, k, v, key_padding_mask=mask, is_causal=is_causal)[:, :, :n], alone)


def test_08_the_bias_depends_on_the_distance_within_a_chunk():
    module, (q, k, v) = module_of(NAME, chunk_size=4, local_attention="relu2", rel_pos_bias=True), qkv(14)
    local = module.attention_weights(torch.zeros_like(q), k, v)
    for i in range(14):
        for j in range(14):
            inside = module.rel_bias[:, j - i + 3].relu().square() if i // 4 == j // 4 else torch.zeros(HEADS).double()
            close(local[0, :, i, j], inside)


def test_11_the_bidirectional_linear_part_knows_no_chunks_and_no_order():
    q, k, v = qkv(14)
    by_token = module_of(NAME, chunk_size=1)(q, k, v) - v
    close(by_token, module_of(NAME, chunk_size=14)(q, k, v) - module_of("softmax")(q, k, v))
    order = torch.randperm(14)
    close(by_token, module_of(NAME, chunk_size=1)(q, k[:, :, order], v[:, :, order]) - v[:, :, order])


def test_12_bfloat16_stays_near_float32():
    module, (q, k, v) = module_of(NAME, torch.float32, chunk_size=16), (x.float() for x in qkv(64))
    out, low = module(q, k, v), module.bfloat16()(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (low.float() - out).norm() / out.norm() < 2e-2


# -- what the options mean ---------------------------------------------------------------------------------------------


def test_the_norms_differ_by_the_number_of_keys():
    q, k, v = qkv(14)
    mean, chunk = (module_of(NAME, chunk_size=7, linear_norm=n)(q, k, v) for n in ("mean", "chunk"))
    local = mean - q @ (k.transpose(-1, -2) @ v) / 14
    close(chunk, local + q @ (k.transpose(-1, -2) @ v) / 7)


def test_learned_copies_that_copy_change_nothing():
    module, (q, k, v) = module_of(NAME, chunk_size=4, offset_scale=True), qkv(14)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "gamma" in name else 0.0)
    close(module(q, k, v), module_of(NAME, chunk_size=4)(q, k, v))


def test_scaling_acts_within_chunks_only():
    q, k, v = qkv(14)
    module = module_of(NAME, chunk_size=4)
    close(module(q, k, v), module(q, k, v, scaling=DIM**-0.5))
    linear = q @ (k.transpose(-1, -2) @ v) / 14
    close(module(q, k, v, scaling=0.0) - linear, module(torch.zeros_like(q), k, v))


def test_what_is_learned_and_how_it_starts():
    assert not hf_attn.build(NAME, num_heads=HEADS, head_dim=DIM).state_dict()
    module = hf_attn.build(NAME, num_heads=16, head_dim=64, chunk_size=64, offset_scale=True, rel_pos_bias=True)
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    copies = dict.fromkeys(("lin_query_gamma", "lin_query_beta", "lin_key_gamma", "lin_key_beta"), (16, 64))
    assert shapes == {**copies, "rel_bias": (16, 127)}
    assert not module.lin_query_beta.any() and not module.lin_key_beta.any()
    for parameter in (module.lin_query_gamma, module.lin_key_gamma, module.rel_bias):
        assert abs(parameter.std() - 0.02) < 2e-3


# -- the decoding state ------------------------------------------------------------------------------------------------


def test_the_state_is_selected_by_row():
    module, (q, k, v) = module_of(NAME, chunk_size=4), qkv(14)
    _, state = module.step(*(x[:, :, :6] for x in (q, k, v)), None)
    beams = torch.tensor([2, 0, 0])
    chosen = {n: t.index_select(0, beams) for n, t in state.items()}
    out, _ = module.step(*(x[beams, :, 6:] for x in (q, k, v)), chosen)
    close(out, module(q, k, v, is_causal=True)[beams, :, 6:])


def test_the_state_of_a_half_precision_model_sums_in_float32():
    module, inputs = module_of(NAME, torch.bfloat16, chunk_size=4), [x.bfloat16() for x in qkv(14)]
    out, state = module.step(*inputs, None)
    assert out.dtype == torch.bfloat16 and state["total"].dtype == torch.float32


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [slice(0, 1), slice(0, 13), slice(6, 7)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_before_real_tokens_is_refused(is_causal, hidden):
    module, (q, k, v) = module_of(NAME, chunk_size=4), qkv(14)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[1, hidden] = False
    for form in (module, module.naive):
        with pytest.raises(hf_attn.Unsupported, match=f'{NAME}.*key_padding_mask.*padding_side="right"'):
            form(q, k, v, key_padding_mask=mask, is_causal=is_causal)


def test_compiled_code_refuses_it_too():
    module, (q, k, v) = module_of(NAME, chunk_size=4), qkv(14)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    close(compiled(q, k, v, key_padding_mask=padding(14)), module(q, k, v, key_padding_mask=padding(14)))
    with pytest.raises(RuntimeError, match=f"{NAME}.*padding_side"):
        compiled(q, k, v, key_padding_mask=padding(14).flip(1))


def test_a_real_token_after_padding_of_an_earlier_step_is_refused():
    module, (q, k, v) = module_of(NAME, chunk_size=4), qkv(14)
    start, rest = ([x[:, :, part] for x in (q, k, v)] for part in (slice(0, 6), slice(6, 14)))
    _, state = module.step(*start, None, key_padding_mask=padding(6))
    hidden = torch.tensor([True, False, False])[:, None].expand(-1, 8)
    module.step(*rest, state, key_padding_mask=hidden)
    for mask in (None, padding(8)):
        with pytest.raises(hf_attn.Unsupported, match=f"{NAME}.*prompts of equal length"):
            module.step(*rest, state, key_padding_mask=mask)


def test_two_sequences_have_no_common_chunks():
    with pytest.raises(hf_attn.Unsupported, match=f"{NAME}.*N=9.*M=14"):
        module_of(NAME)(*qkv(9, 14))


@pytest.mark.parametrize(
    "given",
    [
        {"chunk_size": 0},
        {"chunk_size": 2.0},
        {"local_attention": "gelu"},
        {"linear_norm": "sum"},
        {"offset_scale": 1},
        {"rel_pos_bias": "yes"},
    ],
)
def test_wrong_options_are_named(given):
    with pytest.raises(hf_attn.InvalidOption, match=f"{NAME}.*{next(iter(given))}"):
        hf_attn.build(NAME, num_heads=HEADS, head_dim=DIM, **given)


# -- the efficient form ------------------------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_table_of_all_pairs(is_causal, given):
    q, k, v = qkv(512, batch=1, requires_grad=True)
    with Largest() as largest:
        module_of(NAME, chunk_size=8, **given)(q, k, v, is_causal=is_causal).sum().backward()
    assert largest.numel <= HEADS * 512 * max(8, DIM) + HEADS * DIM * DIM


def test_a_step_reads_one_chunk_whatever_came_before():
    module, work = module_of(NAME, chunk_size=8), []
    for length in (65, 1025):
        q, k, v = qkv(length, batch=1)
        _, state = module.step(*(x[:, :, :-1] for x in (q, k, v)), None)
        with Largest() as largest:
            module.step(*(x[:, :, -1:] for x in (q, k, v)), state)
        work.append(largest.numel)
    assert work[0] == work[1]
