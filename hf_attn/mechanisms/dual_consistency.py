"""Consistent attention: the attention maps of several layers are tied to common marginals by dual variables.

Paper: Ron, Hazan, "Dual Decomposition of Convex Optimization Layers for Consistent Attention in Medical Images", ICML
2022 (arXiv 2206.02761); the layers and the loss as in its public code, the derivation from the convex problem below.

    maximise  sum_k <theta_k, p_k> + entropy(p_k)   such that the sums of the finer map's blocks equal the coarser map
    D(lambda) = logsumexp_x(theta_fine(x) - lambda(y(x))) + logsumexp_y(theta_coarse(y) + lambda(y))       to minimise
    lambda* = (a - theta_coarse) / 2 + const,   a(y) = logsumexp of block y of theta_fine     one pair, closed form

Shapes: maps are logits, fine (B, f h, f w), coarse (B, h, w), f the factor of their sizes; lambda, the dual witness,
(1, h, w) or (B, h, w). tau = softmax of a map over all positions of one sample.
When to use: attention maps serve as explanations, and layers should point to the same places.
When not: to gain accuracy; and without a task loss, as uniform maps are consistent too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption, near

NAME = "dual_consistency"
MODES = ("learned", "closed_form", "none")


def sum_pool(probabilities: Tensor, factor: int) -> Tensor:
    """(B, h, w) sums of the f x f blocks of (B, f h, f w); the mass stays."""
    return _blocks(probabilities, factor).sum(dim=-1)


def block_logsumexp(logits: Tensor, factor: int) -> Tensor:
    """(B, h, w) logarithm of the mass of every f x f block of a map of logits (B, f h, f w)."""
    return _blocks(logits, factor).logsumexp(dim=-1)


def dual_value(fine_logits: Tensor, coarse_logits: Tensor, witness: Tensor, factor: int) -> Tensor:
    """(B) D(lambda): never below the primal value, and equal to it where both marginals agree."""
    block = _pair(fine_logits, coarse_logits, factor)
    _check_witness(witness, coarse_logits)
    return (block - witness).flatten(1).logsumexp(dim=1) + (coarse_logits + witness).flatten(1).logsumexp(dim=1)


def consistency_marginals(
    fine_logits: Tensor, coarse_logits: Tensor, witness: Tensor, factor: int
) -> tuple[Tensor, Tensor]:
    """Both marginals (B, h, w) under the multiplier, each summing to one per sample.

    normalise(sum_pool(tau_fine) exp(-witness)) and normalise(tau_coarse exp(witness)), in the log domain.
    """
    fine, coarse = _log_marginals(fine_logits, coarse_logits, witness, factor)
    return fine.exp(), coarse.exp()


def consistency_loss(
    fine_logits: Tensor,
    coarse_logits: Tensor,
    witness: Tensor,
    factor: int,
    detach_targets: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Scalar KL(coarse marginal || fine marginal).

    Args:
        fine_logits: (B, f h, f w).
        coarse_logits: (B, h, w).
        witness: (1, h, w) for all samples, or (B, h, w).
        factor: f.
        detach_targets: no gradient through the coarse marginal.
        reduction: "mean" over samples; "released" normalises over the whole batch, as the public code does.

    Raises:
        InvalidInput: shapes that do not fit, or an unknown reduction.
    """
    if reduction not in ("mean", "released"):
        raise InvalidInput(
            f"{NAME}: reduction={reduction!r} must be 'mean' or 'released'{near(reduction, ('mean', 'released'))}."
        )
    released = reduction == "released"
    fine, coarse = _log_marginals(fine_logits, coarse_logits, witness, factor, over_batch=released)
    if detach_targets:
        coarse = coarse.detach()
    divergence = (coarse.exp() * (coarse - fine)).sum()
    return divergence if released else divergence / len(fine_logits)


def closed_form_witness(fine_logits: Tensor, coarse_logits: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The witness (B, h, w) of a pair, mean 0 per sample, and the common marginal, the geometric mean of both."""
    block = _pair(fine_logits, coarse_logits, factor)
    return _centred((block - coarse_logits) / 2), _softmax((block + coarse_logits) / 2)


def witness_chain(logits: list[Tensor], factor: int, num_sweeps: int = 200) -> tuple[list[Tensor], list[Tensor]]:
    """Witnesses and consistent maps of a chain of layers, each tied to the next, by block-coordinate descent of D.

    A sweep goes over the pairs and adds the closed form of the pair under the other witnesses. Converges linearly.

    Args:
        logits: maps, finest first, each `factor` times the size of the next.
        factor: f.
        num_sweeps: sweeps over all pairs.

    Returns:
        The witness of every pair, of the size of its coarser map, and the probabilities of every layer.
    """
    logits = list(logits)
    if len(logits) < 2:
        raise InvalidInput(f"{NAME}: logits must be at least two maps, finest first; got {len(logits)}.")
    if isinstance(num_sweeps, bool) or not isinstance(num_sweeps, int) or num_sweeps < 0:
        raise InvalidInput(f"{NAME}: num_sweeps={num_sweeps!r} must be an integer of at least 0.")
    for fine, coarse in zip(logits, logits[1:], strict=False):
        _pair(fine, coarse, factor)
    witness = [torch.zeros_like(coarse) for coarse in logits[1:]]
    for _ in range(num_sweeps):
        for k in range(len(witness)):
            fine, coarse = (_effective(logits, witness, layer, factor) for layer in (k, k + 1))
            witness[k] = witness[k] + closed_form_witness(fine, coarse, factor)[0]
    return witness, [_softmax(_effective(logits, witness, k, factor)) for k in range(len(logits))]


def consensus_map(logits: Tensor) -> Tensor:
    """(B, h, w) the common map of L layers of one size, logits (L, B, h, w): softmax of their mean."""
    if logits.dim() != 4:
        raise InvalidInput(f"{NAME}: logits must be (L,B,h,w); got {tuple(logits.shape)}.")
    return _softmax(logits.mean(dim=0))


class AdditiveAttention2d(nn.Module):
    """Gates a feature map (B,C,h,w) by one attention map: theta = score(relu(normalise(proj x))), x * softmax(theta).

    Args:
        channels: C.
        embed_dim: E, channels of the scorer.
        rescale: multiply by h * w, so that a uniform map changes nothing; not in the paper.
    """

    def __init__(self, channels: int, embed_dim: int, rescale: bool = False):
        super().__init__()
        _positive(channels=channels, embed_dim=embed_dim)
        self.rescale = rescale
        self.proj = nn.Conv2d(channels, embed_dim, 1)
        self.score = nn.Conv2d(embed_dim, 1, 1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gated map (B,C,h,w), the probabilities (B,h,w), and their logits."""
        if hidden_states.dim() != 4 or hidden_states.shape[1] != self.proj.in_channels:
            raise InvalidInput(
                f"AdditiveAttention2d: hidden_states must be (B,{self.proj.in_channels},h,w); got {tuple(hidden_states.shape)}."
            )
        embedded = functional.normalize(self.proj(hidden_states), dim=1, eps=1e-12).relu()
        logits = self.score(embedded)[:, 0]
        probabilities = _softmax(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits)
        gate = probabilities * probabilities[0].numel() if self.rescale else probabilities
        return hidden_states * gate[:, None].to(hidden_states.dtype), probabilities, logits


class DualConsistency(nn.Module):
    """The consistency loss of a chain of layers.

    Args:
        sizes: (rows, columns) of the layers' maps, finest first.
        factor: f, of the sizes of neighbours.
        mode: "learned", one witness a pair for the whole data set; "closed_form", the exact witness of every sample,
            without gradient through it; "none", witness 0.
        alpha: weight of the loss.
        detach_targets: no gradient through the coarser marginal of a pair.

    Raises:
        InvalidOption: sizes that are not `factor` times the next, or a value outside its rule.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        factor: int,
        mode: str = "learned",
        alpha: float = 10.0,
        detach_targets: bool = False,
    ):
        super().__init__()
        _positive(factor=factor)
        if mode not in MODES:
            raise InvalidOption(
                f"DualConsistency: mode={mode!r} must be one of {', '.join(map(repr, MODES))}{near(mode, MODES)}."
            )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
            raise InvalidOption(f"DualConsistency: alpha={alpha!r} must be a number of at least 0.")
        self.sizes = [(int(rows), int(columns)) for rows, columns in sizes]
        if len(self.sizes) < 2 or min(min(size) for size in self.sizes) < 1:
            raise InvalidOption(f"DualConsistency: sizes={sizes!r} must be at least two pairs of positive numbers.")
        for fine, coarse in zip(self.sizes, self.sizes[1:], strict=False):
            if fine != (factor * coarse[0], factor * coarse[1]):
                raise InvalidOption(
                    f"DualConsistency: sizes {fine} and {coarse} are neighbours, and factor={factor}; "
                    "each map must be factor times the size of the next."
                )
        self.factor, self.mode, self.alpha, self.detach_targets = factor, mode, alpha, detach_targets
        shapes = self.sizes[1:] if mode == "learned" else []
        self.witness = nn.ParameterList(nn.Parameter(torch.empty(1, *shape)) for shape in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every witness starts at zero; constants in it change nothing."""
        for witness in self.witness:
            nn.init.zeros_(witness)

    def forward(self, logits: list[Tensor]) -> Tensor:
        """alpha times the sum of the neighbours' losses; `logits` (B, rows, columns), as in `sizes`."""
        logits = list(logits)
        given = [tuple(x.shape[1:]) for x in logits]
        if given != self.sizes:
            raise InvalidInput(
                f"DualConsistency: logits must have the sizes {self.sizes} it was built for; got {given}."
            )
        loss = logits[0].new_zeros(())
        for k, (fine, coarse) in enumerate(zip(logits, logits[1:], strict=False)):
            if self.mode == "learned":
                # centred: constants have no gradient, so nothing else holds them back
                witness = _centred(self.witness[k])
            elif self.mode == "closed_form":
                witness = closed_form_witness(fine.detach(), coarse.detach(), self.factor)[0]
            else:
                witness = torch.zeros_like(coarse[:1])
            loss = loss + consistency_loss(fine, coarse, witness, self.factor, self.detach_targets)
        return self.alpha * loss


# -- shared by the functions -------------------------------------------------------------------------------------------


def _blocks(map_: Tensor, factor: int) -> Tensor:
    """(B, h, w, f f): the blocks of a map."""
    _positive(factor=factor)
    if map_.dim() != 3 or map_.shape[1] % factor or map_.shape[2] % factor:
        raise InvalidInput(
            f"{NAME}: factor={factor} must divide both sides of a map (B,rows,columns); got {tuple(map_.shape)}."
        )
    return map_.unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).transpose(2, 3).flatten(3)


def _pair(fine: Tensor, coarse: Tensor, factor: int) -> Tensor:
    """The block masses' logarithms of `fine`, checked to fit `coarse`."""
    block = block_logsumexp(fine, factor)
    if block.shape != coarse.shape:
        raise InvalidInput(
            f"{NAME}: coarse_logits must be {tuple(block.shape)}, one number a block of fine_logits {tuple(fine.shape)} "
            f"with factor={factor}; got {tuple(coarse.shape)}."
        )
    return block


def _check_witness(witness: Tensor, coarse: Tensor) -> None:
    if witness.shape not in (coarse.shape, (1, *coarse.shape[1:])):
        raise InvalidInput(
            f"{NAME}: witness must be (1,h,w) or (B,h,w) with (B,h,w) = {tuple(coarse.shape)}; got {tuple(witness.shape)}."
        )


def _log_marginals(
    fine: Tensor, coarse: Tensor, witness: Tensor, factor: int, over_batch: bool = False
) -> tuple[Tensor, Tensor]:
    """Logarithms of both marginals; `over_batch` makes each one distribution over samples and cells together."""
    block = _pair(fine, coarse, factor)
    _check_witness(witness, coarse)
    if over_batch:
        fine, coarse = _log_softmax(block) - witness, _log_softmax(coarse) + witness
        return fine - fine.flatten().logsumexp(dim=0), coarse - coarse.flatten().logsumexp(dim=0)
    return _log_softmax(block - witness), _log_softmax(coarse + witness)


def _effective(logits: list[Tensor], witness: list[Tensor], layer: int, factor: int) -> Tensor:
    """The logits of a layer under both of its witnesses: of the finer neighbour, and of the coarser one."""
    total = logits[layer]
    if layer > 0:
        total = total + witness[layer - 1]
    if layer < len(witness):
        total = total - witness[layer].repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return total


def _softmax(logits: Tensor) -> Tensor:
    return logits.flatten(1).softmax(dim=1).view_as(logits)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.flatten(1).log_softmax(dim=1).view_as(logits)


def _centred(witness: Tensor) -> Tensor:
    return witness - witness.mean(dim=(1, 2), keepdim=True)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidOption(f"{NAME}: {name}={value!r} must be an integer of at least 1.")
