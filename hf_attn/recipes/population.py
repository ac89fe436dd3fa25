"""Populations: many models trained at once, and the rules by which they replace each other.

Paper: Flajolet, Bizon Monroc, Beguir, Pierrot, "Fast Population-Based Reinforcement Learning on a Single Machine",
ICML 2022 (arXiv 2206.08888). The published code was read for the rules; where it has bugs, the docs page says so.

P members are tensors with a leading axis of P. One optimiser step moves all of them, each by its own learning rate:

    p <- p - lr_p (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr_p wd_p p

Here stand the pure functions; every random number is an argument. `hf_attn.recipes.population_trainer` trains Hugging
Face models with them, `hf_attn.recipes.population_rl` agents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput, InvalidOption, near

Space = Mapping[str, Sequence[Any]]
"""name -> (kind, low, high) of a hyperparameter's prior; kinds are "loguniform", "uniform" and "int"."""
KINDS = ("loguniform", "uniform", "int")
EXPLORE = ("resample", "perturb")
FACTORS = (0.8, 1.2)
"""What "perturb" multiplies a winner's hyperparameter by."""


def population_adam_step(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Any],
    lr: Tensor,
    active: Tensor | None = None,
    weight_decay: Tensor | Mapping[str, Tensor] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One AdamW step of every member at its own rate; equal to P steps of `torch.optim.AdamW`.

    Args:
        params, grads: leaves (P, ...).
        state: "m" and "v", dicts of leaves, and "t" (P), the number of steps taken; see `adam_state`.
        lr: (P) learning rates.
        active: (P) bool; the others keep parameters, moments and count. Default: all are active.
        weight_decay: (P), decoupled: lr * weight_decay * p is subtracted. A dict of them decays only the leaves it names.
        betas: decay of the moments.
        eps: added to the root of the second moment.

    Returns:
        (params, state), new.

    Raises:
        InvalidInput: leaves and members do not fit together.
    """
    if set(params) != set(grads):
        raise InvalidInput(f"population_adam_step: params has {sorted(params)}, grads has {sorted(grads)}.")
    count = state["t"] + 1
    if any(leaf.shape[:1] != lr.shape for leaf in params.values()) or count.shape != lr.shape:
        raise InvalidInput(
            f"population_adam_step: leaves must be (P, ...) and state['t'] (P), with P = {len(lr)} as lr has; got "
            f"{ {name: tuple(leaf.shape) for name, leaf in params.items()} } and {tuple(count.shape)}."
        )
    first, second = betas
    # the corrections in float64: 1 - b2^t loses digits in float32
    steps = count.double()
    corrections = 1 - first**steps, 1 - second**steps
    new: dict[str, Tensor] = {}
    moments: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, old in params.items():
        grad = grads[name]
        m = first * state["m"][name] + (1 - first) * grad
        v = second * state["v"][name] + (1 - second) * grad * grad
        size, root = _over(lr.double() / corrections[0], old), _over(corrections[1].sqrt(), old)
        value = old - size * m / (v.sqrt() / root + eps)
        decay = weight_decay.get(name) if isinstance(weight_decay, Mapping) else weight_decay
        if decay is not None:
            value = value - _over(lr * decay, old) * old
        if active is not None:
            on = _over(active, old, dtype=torch.bool)
            m, v = torch.where(on, m, state["m"][name]), torch.where(on, v, state["v"][name])
            value = torch.where(on, value, old)
        new[name], moments[0][name], moments[1][name] = value, m, v
    t = count if active is None else torch.where(active, count, state["t"])
    return new, {"m": moments[0], "v": moments[1], "t": t}


def adam_state(params: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of `population_adam_step` before the first step."""
    leaf = next(iter(params.values()))
    moments = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in "mv")
    return {**dict(zip("mv", moments)), "t": leaf.new_zeros(leaf.shape[0])}


def clip_members(grads: Mapping[str, Tensor], max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Scale every member's gradient to a norm of at most `max_norm`; returns it and the norms (P) before."""
    squares = [g.flatten(1).square().sum(dim=1) for g in grads.values()]
    norm = torch.stack(squares).sum(dim=0).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    return {name: g * _over(factor, g) for name, g in grads.items()}, norm


def pbt_exploit(returns: Tensor, choices: Tensor, bottom_frac: float = 0.4) -> Tensor:
    """(P) int64: the member that each member copies; itself where it stays.

    Losers are strictly below the return of rank int(bottom_frac P), counted from the lowest; each takes a member that does
    not lose.

    Args:
        returns: (P), higher is better; NaN is the worst.
        choices: (P) uniform in [0, 1): which winner a loser takes.
        bottom_frac: from 0 (nobody loses) to below 1.
    """
    _check_members("pbt_exploit", returns=returns, choices=choices)
    if not 0 <= bottom_frac < 1:
        raise InvalidOption(f"pbt_exploit: bottom_frac={bottom_frac!r} must be at least 0 and below 1.")
    returns = torch.where(returns.isnan(), -math.inf, returns)
    lost = returns < returns.sort().values[int(bottom_frac * len(returns))]
    winners = (~lost).nonzero()[:, 0]
    # a choice just below 1 times the number may round up to it
    taken = winners[(choices * len(winners)).long().clamp(max=len(winners) - 1)]
    return torch.where(lost, taken, torch.arange(len(returns), device=returns.device))


def resample(space: Space, uniforms: Tensor) -> dict[str, Tensor]:
    """Hyperparameters (P) float64 from their priors.

    Args:
        space: name -> (kind, low, high).
        uniforms: (P, number of names) in [0, 1), columns in the order of `space`.
    """
    check_space(space)
    if uniforms.dim() != 2 or uniforms.shape[1] != len(space):
        raise InvalidInput(f"resample: uniforms must be (P,{len(space)}); got {tuple(uniforms.shape)}.")
    return {
        name: _draw(kind, low, high, uniforms[:, i].double())
        for i, (name, (kind, low, high)) in enumerate(space.items())
    }


def pbt_step(
    returns: Tensor,
    hyperparameters: Mapping[str, Tensor],
    choices: Tensor,
    uniforms: Tensor,
    space: Space,
    bottom_frac: float = 0.4,
    explore: str = "resample",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Exploit and explore: who copies whom, and the hyperparameters afterwards. Winners keep theirs.

    Args:
        returns, choices, bottom_frac: as in `pbt_exploit`.
        hyperparameters: name -> (P), the names of `space`.
        uniforms: (P, number of names) in [0, 1).
        space: name -> (kind, low, high).
        explore: "resample" draws a loser's anew; "perturb" takes the winner's times 0.8 (u < 0.5) or 1.2, within the range.

    Returns:
        (source, hyperparameters); source is `pbt_exploit`'s result.
    """
    if explore not in EXPLORE:
        raise InvalidOption(f"pbt_step: explore={explore!r} must be one of {', '.join(EXPLORE)}.")
    if set(hyperparameters) != set(space):
        raise InvalidInput(f"pbt_step: hyperparameters has {sorted(hyperparameters)}, space has {sorted(space)}.")
    source = pbt_exploit(returns, choices, bottom_frac)
    lost = source != torch.arange(len(source), device=source.device)
    drawn = resample(space, uniforms)
    if explore == "perturb":
        for i, (name, (kind, low, high)) in enumerate(space.items()):
            value = hyperparameters[name].double()[source] * torch.where(uniforms[:, i] < 0.5, *FACTORS)
            drawn[name] = (value.round() if kind == "int" else value).clamp(low, high)
    return source, {name: torch.where(lost, drawn[name], hyperparameters[name].double()) for name in space}


def cem_weights(num_elites: int) -> Tensor:
    """(n) float64: the weight of the i-th best, proportional to log((n + 1) / i); sum 1."""
    if isinstance(num_elites, bool) or not isinstance(num_elites, int) or num_elites < 1:
        raise InvalidOption(f"cem_weights: num_elites={num_elites!r} must be a whole number of at least 1.")
    raw = math.log(num_elites + 1) - torch.arange(1, num_elites + 1, dtype=torch.float64).log()
    return raw / raw.sum()


def cem_sample(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    """(P, D) mirrored samples: mean + sqrt(variance) noise, then mean - sqrt(variance) noise.

    Args:
        mean, variance: (D).
        noise: (P/2, D), standard normal.
    """
    if mean.dim() != 1 or variance.shape != mean.shape or noise.dim() != 2 or noise.shape[1] != len(mean):
        raise InvalidInput(
            "cem_sample: mean and variance must be (D) and noise (P/2,D); got "
            f"{tuple(mean.shape)}, {tuple(variance.shape)} and {tuple(noise.shape)}."
        )
    step = variance.sqrt() * noise
    return torch.cat([mean + step, mean - step])


def cem_update(
    mean: Tensor, elites: Tensor, variance_noise: Tensor | float, tau: float = 0.95, final_noise: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The distribution after a generation.

    Args:
        mean: (D), of the distribution that was sampled.
        elites: (n, D), best first.
        variance_noise: what is added to the variance; it goes to `final_noise` by the factor `tau`.

    Returns:
        (mean, variance, variance_noise): sum w e, sum w (e - old mean)^2 / n + new noise, the new noise.
    """
    if elites.dim() != 2 or elites.shape[1:] != mean.shape:
        raise InvalidInput(
            f"cem_update: mean must be (D) and elites (n,D); got {tuple(mean.shape)} and {tuple(elites.shape)}."
        )
    noise = tau * torch.as_tensor(variance_noise, dtype=mean.dtype, device=mean.device) + (1 - tau) * final_noise
    weights = cem_weights(len(elites)).to(mean)
    variance = weights @ (elites - mean).square() / len(elites) + noise
    return weights @ elites, variance, noise


def dvd_logdet(actions: Tensor, scale: float = 1.0, jitter: float = 0.0) -> Tensor:
    """log det of exp(-|e_i - e_j|^2 / (2 scale)) + jitter I: the volume that the policies' behaviours span.

    Args:
        actions: (P, states, A): what each policy does in the same states; e_i is flattened.
        scale: of the squared distance.
        jitter: keeps the matrix regular when policies act alike; with 0, duplicates give minus infinity.
    """
    if actions.dim() != 3:
        raise InvalidInput(f"dvd_logdet: actions must be (P,states,A); got {tuple(actions.shape)}.")
    if not scale > 0 or not jitter >= 0:
        raise InvalidOption(f"dvd_logdet: scale={scale!r} must be positive and jitter={jitter!r} at least 0.")
    flat = actions.flatten(1)
    kernel = (-(flat[:, None] - flat).square().sum(dim=-1) / (2 * scale)).exp()
    return torch.linalg.slogdet(kernel + jitter * torch.eye(len(flat), dtype=flat.dtype, device=flat.device)).logabsdet


def check_space(space: Space) -> None:
    """Raise `InvalidOption` unless every entry is (kind, low, high) with a range that its kind allows."""
    for name, rule in space.items():
        if len(rule) != 3:
            raise InvalidOption(f"space: {name}={rule!r} must be (kind, low, high).")
        kind, low, high = rule
        if kind not in KINDS:
            raise InvalidOption(f"space: kind {kind!r} of {name}{near(kind, KINDS)} must be one of {', '.join(KINDS)}.")
        if not -math.inf < low <= high < math.inf or (kind == "loguniform" and low <= 0):
            above = " of positive numbers" if kind == "loguniform" else ""
            raise InvalidOption(f"space: {name} goes from {low!r} to {high!r}; it must be a range{above}, low first.")


def _draw(kind: str, low: float, high: float, uniform: Tensor) -> Tensor:
    if kind == "loguniform":
        return (math.log(low) + uniform * (math.log(high) - math.log(low))).exp()
    if kind == "int":
        return low + (uniform * (high - low + 1)).floor()
    return low + uniform * (high - low)


def _over(value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(P) -> (P, 1, ...) with as many axes as `like`."""
    return value.to(dtype or like.dtype).view(-1, *[1] * (like.dim() - 1))


def _check_members(who: str, **vectors: Tensor) -> None:
    shapes = {name: tuple(v.shape) for name, v in vectors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 or not shape[0] for shape in shapes.values()):
        raise InvalidInput(f"{who}: {' and '.join(shapes)} must be (P), with at least one member; got {shapes}.")
