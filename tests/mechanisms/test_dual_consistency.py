"""dual_consistency: the invariants of its specification (numbered as there), the functions of a pair, the layers, refusals."""

import pytest
import torch
from torch import nn

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.mechanisms.dual_consistency import (
    AdditiveAttention2d,
    DualConsistency,
    block_logsumexp,
    closed_form_witness,
    consensus_map,
    consistency_loss,
    consistency_marginals,
    dual_value,
    sum_pool,
    witness_chain,
)

B, F = 3, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair():
    return 2 * draw(B, 8, 6), 2 * draw(B, 4, 3, seed=1)


def softmax(logits):
    return logits.flatten(1).softmax(1).view_as(logits)


def enlarge(witness):
    return nn.functional.interpolate(witness[:, None], scale_factor=F)[:, 0]


def agree(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_01_pooling_keeps_the_mass():
    fine, _ = pair()
    agree(sum_pool(softmax(fine), F).sum((1, 2)), torch.ones(B, dtype=torch.float64))
    agree(sum_pool(softmax(fine), F)[:, 1, 2], softmax(fine)[:, 2:4, 4:6].sum((1, 2)))
    agree(block_logsumexp(fine, F).exp(), sum_pool(fine.exp(), F))


def test_02_reweighted_marginals_are_those_of_the_reparametrised_softmax():
    (fine, coarse), witness = pair(), draw(B, 4, 3, seed=2)
    a, b = consistency_marginals(fine, coarse, witness, F)
    agree(a, sum_pool(softmax(fine - enlarge(witness)), F))
    agree(b, softmax(coarse + witness))


def test_03_constants_in_the_witness_change_nothing():
    (fine, coarse), witness = pair(), draw(1, 4, 3, seed=2)
    for function in (consistency_loss, dual_value):
        agree(function(fine, coarse, witness + 5, F), function(fine, coarse, witness, F))
    agree(
        consistency_loss(fine, coarse, witness + 5, F, reduction="released"),
        consistency_loss(fine, coarse, witness, F, reduction="released"),
    )


def test_04_the_gradient_of_the_dual_is_the_difference_of_the_marginals():
    (fine, coarse), witness = pair(), draw(B, 4, 3, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(dual_value(fine, coarse, witness, F).sum(), witness)
    a, b = consistency_marginals(fine, coarse, witness, F)
    agree(gradient, b - a)


def test_05_the_closed_form_is_the_minimum():
    fine, coarse = pair()
    witness, consensus = closed_form_witness(fine, coarse, F)
    witness.requires_grad_()
    value = dual_value(fine, coarse, witness, F)
    assert torch.autograd.grad(value.sum(), witness, retain_graph=True)[0].abs().max() < 1e-12
    a, b = consistency_marginals(fine, coarse, witness, F)
    agree(a, b)
    agree(a, consensus)
    assert consistency_loss(fine, coarse, witness, F).abs() < 1e-12
    for seed in range(20):
        assert (dual_value(fine, coarse, witness + 0.1 * draw(B, 4, 3, seed=seed), F) > value).all()
    agree(witness.mean((1, 2)), torch.zeros(B, dtype=torch.float64))


def test_06_strong_duality():
    fine, coarse = pair()
    witness, _ = closed_form_witness(fine, coarse, F)
    primal = 0
    for theta, p in ((fine, softmax(fine - enlarge(witness))), (coarse, softmax(coarse + witness))):
        primal = primal + (p * (theta - p.log())).sum((1, 2))
    agree(primal, dual_value(fine, coarse, witness, F), 1e-10)


def test_07_blocks_keep_their_conditionals():
    fine, coarse = pair()
    _, (changed, _) = witness_chain([fine, coarse], F)
    agree(changed / enlarge(sum_pool(changed, F)), softmax(fine) / enlarge(sum_pool(softmax(fine), F)))


def test_08_consistent_maps_have_witness_zero():
    fine, _ = pair()
    witness, _ = closed_form_witness(fine, block_logsumexp(fine, F) + 3, F)
    assert witness.abs().max() < 1e-12


def test_09_gradient_steps_on_the_loss_reach_the_closed_form():
    fine, coarse = pair()
    witness = torch.zeros(B, 4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([witness], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        consistency_loss(fine, coarse, witness, F).backward()
        optimizer.step()
    found = witness.detach() - witness.detach().mean((1, 2), keepdim=True)
    agree(found, closed_form_witness(fine, coarse, F)[0], 1e-2)


def test_10_a_chain_ends_consistent_and_its_dual_falls():
    logits = [2 * draw(B, 16, 8), draw(B, 8, 4, seed=1), 3 * draw(B, 4, 2, seed=2)]
    _, (fine, middle, coarse) = witness_chain(logits, F)
    agree(sum_pool(fine, F), middle, 1e-9)
    agree(sum_pool(middle, F), coarse, 1e-9)
    values = []
    for sweeps in range(6):
        first, second = witness_chain(logits, F, num_sweeps=sweeps)[0]
        effective = logits[0] - enlarge(first), logits[1] + first - enlarge(second), logits[2] + second
        values.append(sum(x.flatten(1).logsumexp(1) for x in effective))
    steps = torch.stack(values).diff(dim=0)
    assert (steps <= 1e-12).all() and (steps[0] < 0).all()


def test_11_a_chain_of_equal_sizes_is_the_softmax_of_the_mean():
    logits = 2 * draw(4, B, 3, 5)
    _, found = witness_chain(list(logits), 1, num_sweeps=500)
    for probabilities in found:
        agree(probabilities, consensus_map(logits), 1e-8)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0}, {"mode": "none", "alpha": 0.0}])
def test_12_without_weight_the_gradients_are_those_of_the_plain_network(options):
    layer, fine = DualConsistency([(8, 6), (4, 3)], F, **options).double(), pair()[0].requires_grad_()
    coarse = pair()[1].requires_grad_()
    task = fine.square().sum() + coarse.sum()
    plain = torch.autograd.grad(task, (fine, coarse), retain_graph=True)
    both = torch.autograd.grad(task + layer([fine, coarse]), (fine, coarse))
    for a, b in zip(plain, both, strict=True):
        agree(a, b, 0)


# -- precision, the layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_stay_finite(dtype):
    fine, coarse = (200 * draw(*s).sign().to(dtype).requires_grad_() for s in ((B, 8, 6), (B, 4, 3)))
    witness = closed_form_witness(fine, coarse, F)[0]
    for reduction in ("mean", "released"):
        loss = consistency_loss(fine, coarse, 0 * witness, F, reduction=reduction)
        assert loss.isfinite() and all(
            g.isfinite().all() for g in torch.autograd.grad(loss, (fine, coarse), retain_graph=True)
        )
    assert all(x.isfinite().all() for part in witness_chain([fine, coarse], F) for x in part)


def test_gradients_are_those_of_finite_differences():
    leaves = [x.requires_grad_() for x in (draw(2, 4, 4), draw(2, 2, 2, seed=1), draw(1, 2, 2, seed=2))]
    for reduction in ("mean", "released"):
        torch.autograd.gradcheck(lambda *x: consistency_loss(*x, F, reduction=reduction), leaves)  # noqa: B023
    torch.autograd.gradcheck(lambda *x: witness_chain(list(x), F, num_sweeps=5)[1], leaves[:2])


def test_the_released_reduction_is_one_distribution_over_the_batch():
    (fine, coarse), witness = pair(), draw(1, 4, 3, seed=2)
    a = sum_pool(softmax(fine), F) * (-witness).exp()
    b = softmax(coarse) * witness.exp()
    a, b = a / a.sum(), b / b.sum()
    agree(consistency_loss(fine, coarse, witness, F, reduction="released"), (b * (b / a).log()).sum())


def test_targets_can_be_detached():
    (fine, coarse), witness = pair(), torch.zeros(1, 4, 3, dtype=torch.float64)
    coarse.requires_grad_()
    fine.requires_grad_()
    loss = consistency_loss(fine, coarse, witness, F, detach_targets=True)
    first, second = torch.autograd.grad(loss, (fine, coarse), allow_unused=True)
    assert first.any() and (second is None or not second.any())


def test_modes_of_the_layer():
    fine, coarse = pair()
    sizes = [(8, 6), (4, 3)]
    agree(DualConsistency(sizes, F, mode="closed_form")([fine, coarse]), torch.zeros((), dtype=torch.float64))
    none, learned = (DualConsistency(sizes, F, mode=mode, alpha=2.0).double() for mode in ("none", "learned"))
    expected = 2 * consistency_loss(fine, coarse, torch.zeros(1, 4, 3, dtype=torch.float64), F)
    agree(none([fine, coarse]), expected)
    agree(learned([fine, coarse]), expected)
    assert not none.state_dict() and [tuple(x.shape) for x in learned.state_dict().values()] == [(1, 4, 3)]
    compiled = torch.compile(learned, fullgraph=True, backend="eager")
    agree(compiled([fine, coarse]), expected)


def test_rescaled_uniform_attention_changes_nothing():
    layer, x = AdditiveAttention2d(5, 7, rescale=True).double(), draw(2, 5, 4, 3)
    nn.init.zeros_(layer.score.weight)
    gated, probabilities, _ = layer(x)
    agree(gated, x)
    agree(probabilities, torch.full((2, 4, 3), 1 / 12, dtype=torch.float64))


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: sum_pool(draw(1, 5, 4), 2), InvalidInput),
        (lambda: sum_pool(draw(1, 4, 4), 0), InvalidOption),
        (lambda: consistency_loss(draw(1, 4, 4), draw(1, 4, 4), draw(1, 4, 4), 2), InvalidInput),
        (lambda: consistency_loss(draw(1, 4, 4), draw(1, 2, 2), draw(1, 4, 4), 2), InvalidInput),
        (lambda: consistency_loss(draw(1, 4, 4), draw(1, 2, 2), draw(1, 2, 2), 2, reduction="sum"), InvalidInput),
        (lambda: witness_chain([draw(1, 4, 4)], 2), InvalidInput),
        (lambda: witness_chain([draw(1, 4, 4), draw(1, 2, 2)], 2, num_sweeps=-1), InvalidInput),
        (lambda: consensus_map(draw(1, 4, 4)), InvalidInput),
        (lambda: DualConsistency([(8, 8), (4, 3)], 2), InvalidOption),
        (lambda: DualConsistency([(8, 8)], 2), InvalidOption),
        (lambda: DualConsistency([(8, 8), (4, 4)], 2, mode="fixed"), InvalidOption),
        (lambda: DualConsistency([(8, 8), (4, 4)], 2, alpha=-1), InvalidOption),
        (lambda: DualConsistency([(8, 8), (4, 4)], 2)([draw(1, 8, 8), draw(1, 8, 8)]), InvalidInput),
        (lambda: AdditiveAttention2d(0, 4), InvalidOption),
        (lambda: AdditiveAttention2d(3, 4)(draw(1, 4, 4, 4)), InvalidInput),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error, match=r"must"):
        call()
