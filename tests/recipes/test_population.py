"""Population rules: Adam against torch.optim, PBT, CEM and DvD by the invariants of the paper's page."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.population import (
    adam_state,
    cem_sample,
    cem_update,
    cem_weights,
    clip_members,
    dvd_logdet,
    pbt_exploit,
    pbt_step,
    population_adam_step,
    resample,
)

SPACE = {"learning_rate": ("loguniform", 3e-5, 3e-3), "delay": ("int", 1, 5), "gamma": ("uniform", 0.9, 1.0)}
SHAPES = {"a": (3, 2), "b": (4,)}


def leaves(members: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(members, *s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}


def test_01_steps_equal_separate_adamw():
    lr = torch.tensor([1e-3, 1e-2, 0.3], dtype=torch.float64)
    decay = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    params = leaves(3)
    alone = [{n: p[i].clone().requires_grad_() for n, p in params.items()} for i in range(3)]
    optimizers = [
        torch.optim.AdamW(list(member.values()), lr[i].item(), weight_decay=decay[i].item())
        for i, member in enumerate(alone)
    ]
    state = adam_state(params)
    for step in range(5):
        grads = leaves(3, seed=1 + step)
        params, state = population_adam_step(params, grads, state, lr, weight_decay=decay)
        for i, (member, optimizer) in enumerate(zip(alone, optimizers)):
            for name, p in member.items():
                p.grad = grads[name][i]
            optimizer.step()
            for name, p in member.items():
                torch.testing.assert_close(params[name][i], p.detach(), rtol=0, atol=1e-12)


def test_02_permuting_members_permutes_results():
    order = torch.tensor([2, 0, 3, 1])
    params, grads, lr = leaves(4), leaves(4, 1), torch.tensor([1e-3, 1e-2, 1e-1, 1.0]).double()
    new, _ = population_adam_step(params, grads, adam_state(params), lr)
    moved, grads = ({n: x[order] for n, x in tree.items()} for tree in (params, grads))
    permuted, _ = population_adam_step(moved, grads, adam_state(moved), lr[order])
    assert all(torch.equal(new[n][order], permuted[n]) for n in new)


def test_03_a_member_with_learning_rate_0_is_unchanged():
    params = leaves(2)
    new, state = population_adam_step(
        params, leaves(2, 1), adam_state(params), torch.tensor([0.0, 0.1]).double(), weight_decay=torch.ones(2).double()
    )
    assert all(torch.equal(new[n][0], params[n][0]) and not torch.equal(new[n][1], params[n][1]) for n in new)
    assert state["t"].tolist() == [1, 1]


def test_04_an_inactive_member_keeps_parameters_moments_and_count():
    params, lr = leaves(2), torch.full((2,), 0.1, dtype=torch.float64)
    params, state = population_adam_step(params, leaves(2, 1), adam_state(params), lr)
    new, after = population_adam_step(params, leaves(2, 2), state, lr, active=torch.tensor([False, True]))
    for name in params:
        for now, before in ((new, params), (after["m"], state["m"]), (after["v"], state["v"])):
            assert torch.equal(now[name][0], before[name][0]) and not torch.equal(now[name][1], before[name][1])
    assert after["t"].tolist() == [1, 2]


def test_a_dict_decays_only_the_leaves_it_names():
    params, lr = leaves(2), torch.full((2,), 0.1, dtype=torch.float64)
    some, _ = population_adam_step(params, leaves(2, 1), adam_state(params), lr, weight_decay={"a": lr})
    none, _ = population_adam_step(params, leaves(2, 1), adam_state(params), lr)
    assert torch.equal(some["b"], none["b"]) and torch.allclose(some["a"], none["a"] - 0.01 * params["a"])


def test_gradients_are_clipped_by_member_as_torch_does():
    grads = leaves(3)
    clipped, norms = clip_members(grads, 1.5)
    for i in range(3):
        alone = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES.values()]
        for p, g in zip(alone, grads.values()):
            p.grad = g[i].clone()
        norm = torch.nn.utils.clip_grad_norm_(alone, 1.5)
        torch.testing.assert_close(norms[i], norm)
        for p, g in zip(alone, clipped.values()):
            torch.testing.assert_close(g[i], p.grad)


@given(st.lists(st.integers(-3, 3) | st.just(math.nan), min_size=1, max_size=9), st.floats(0, 0.99), st.integers(0, 99))
def test_05_losers_are_strictly_below_and_winners_stay(values, fraction, seed):
    returns = torch.tensor(values, dtype=torch.float64)
    choices = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    source = pbt_exploit(returns, choices, fraction)
    ranked = returns.nan_to_num(-math.inf)
    lost = source != torch.arange(len(values))
    assert lost.sum() <= int(fraction * len(values))
    threshold = ranked.sort().values[int(fraction * len(values))]
    assert torch.equal(lost, ranked < threshold)
    assert (ranked[source] >= threshold).all() and not lost[source].any()


def test_05_equal_returns_change_nothing():
    assert pbt_exploit(torch.ones(6), torch.rand(6), 0.5).tolist() == list(range(6))


def test_a_choice_that_rounds_up_still_names_a_winner():
    returns, choices = torch.arange(8.0), torch.full((8,), 1 - 2**-24)
    assert pbt_exploit(returns, choices, 0.4)[0] == 7


def test_hyperparameters_of_winners_stay_and_losers_draw():
    returns, uniforms = torch.arange(5.0), torch.rand(5, 3, dtype=torch.float64)
    old = resample(SPACE, torch.rand(5, 3, dtype=torch.float64))
    source, new = pbt_step(returns, old, torch.rand(5), uniforms, SPACE)
    drawn = resample(SPACE, uniforms)
    for name in SPACE:
        assert torch.equal(new[name][2:], old[name][2:]) and torch.equal(new[name][:2], drawn[name][:2])
    source, new = pbt_step(returns, old, torch.rand(5), uniforms, SPACE, explore="perturb")
    for name, (kind, low, high) in SPACE.items():
        factor = torch.where(uniforms[:, list(SPACE).index(name)] < 0.5, 0.8, 1.2)
        expected = old[name][source] * factor
        expected = (expected.round() if kind == "int" else expected).clamp(low, high)
        torch.testing.assert_close(new[name][:2], expected[:2])


def test_06_cem_weights_sum_to_1_and_fall_and_the_variance_holds_its_noise():
    for n in (1, 5, 20):
        weights = cem_weights(n)
        assert abs(weights.sum().item() - 1) < 1e-15 and (weights.diff() < 0).all()
    mean = torch.randn(6, dtype=torch.float64)
    _, variance, noise = cem_update(mean, torch.randn(5, 6, dtype=torch.float64), 1e-2)
    assert noise.item() == pytest.approx(0.95e-2 + 0.05e-5) and (variance >= noise).all()


def test_samples_are_mirrored():
    mean, variance = torch.randn(6), torch.rand(6)
    samples = cem_sample(mean, variance, torch.randn(4, 6))
    torch.testing.assert_close((samples[:4] + samples[4:]) / 2, mean.expand(4, 6))


def test_07_the_volume_of_behaviours():
    actions = torch.randn(4, 3, 2, dtype=torch.float64)
    volume = dvd_logdet(actions)
    assert volume <= 0
    torch.testing.assert_close(dvd_logdet(actions[torch.tensor([2, 0, 3, 1])]), volume)
    assert dvd_logdet(torch.cat([actions, actions[:1]])) < -30
    twins = torch.cat([actions, actions[:1]]).requires_grad_()
    value = dvd_logdet(twins, jitter=1e-6)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(twins.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pbt_exploit(torch.ones(3), torch.ones(2)), "returns and choices"),
        (lambda: pbt_exploit(torch.ones(3), torch.zeros(3), 1.0), "bottom_frac=1.0"),
        (lambda: resample({"lr": ("loguniform", 0, 1)}, torch.rand(2, 1)), "lr goes from 0 to 1"),
        (lambda: resample({"lr": ("uniform", 2, 1)}, torch.rand(2, 1)), "low first"),
        (lambda: resample({"lr": ("loguniforme", 1, 2)}, torch.rand(2, 1)), "did you mean 'loguniform'"),
        (lambda: resample({"lr": ("uniform", 1)}, torch.rand(2, 1)), "kind, low, high"),
        (lambda: resample(SPACE, torch.rand(2, 2)), r"must be \(P,3\)"),
        (lambda: pbt_step(torch.ones(2), {}, torch.ones(2), torch.ones(2, 3), SPACE), "hyperparameters has"),
        (lambda: pbt_step(torch.ones(2), {}, torch.ones(2), torch.ones(2, 3), {}, explore="mutate"), "explore='mutate'"),
        (lambda: cem_weights(0), "num_elites=0"),
        (lambda: cem_sample(torch.ones(3), torch.ones(2), torch.ones(2, 3)), "mean and variance"),
        (lambda: cem_update(torch.ones(3), torch.ones(2, 2), 0.1), "elites"),
        (lambda: dvd_logdet(torch.ones(3, 2)), "P,states,A"),
        (lambda: dvd_logdet(torch.ones(3, 2, 1), scale=0.0), "scale=0.0"),
        (lambda: population_adam_step(leaves(2), {}, adam_state(leaves(2)), torch.ones(2)), "grads has"),
        (lambda: population_adam_step(leaves(2), leaves(2), adam_state(leaves(2)), torch.ones(3)), "P = 3"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_refused(call, message):
    with pytest.raises((InvalidInput, InvalidOption), match=message):
        call()
