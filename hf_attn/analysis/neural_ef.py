"""NeuralEF: the objective whose optimum is the leading eigenfunctions of a kernel.

Paper: Deng, Shi, Zhu, "NeuralEF: Deconstructing Kernels by Deep Neural Networks", ICML 2022 (arXiv 2205.00165).

Sought are the functions psi_1, ..., psi_k with the largest eigenvalues of

    (T psi)(x) = E_x'[ kernel(x, x') psi(x') ]

Features F (B,k) are the outputs of k networks on B points, column j of network j; K (B,B) is the kernel there.

    psi_j = F_j / n_j,  n_j^2 = mean F_j^2        L2 batch normalisation
    R_ij  = psi_i^T K psi_j / B^2
    maximise R_jj - sum_{i<j} R_ij^2 / R_ii for every j, with psi_i a constant                        (1)

At the optimum psi_j is the j-th eigenfunction, with mean square 1, and R_jj is its eigenvalue. The paper states (1) with
constraints; its official code has the gradient, which is that of (1) up to the factor 2 / B^2.
`hf_attn.analysis.neural_ef_fit` trains networks with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput

SYMMETRY = 1e-5
"""The largest |K - K^T| that counts as symmetric, relative to the largest |K|."""
FLOOR = 1e-8
"""R_ii is at least this part of R_11 where it divides."""


def l2_batch_norm(
    features: Tensor, running_norm: Tensor | None = None, momentum: float = 0.9, training: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale every column of `features` to mean square 1.

    Args:
        features: (B,k).
        running_norm: (k) the norms so far; None before the first call.
        momentum: the part of `running_norm` that a call keeps.
        training: divide by the norms of this batch, with gradient through them; otherwise by `running_norm`.

    Returns:
        psi (B,k) and the new running norm (k), without gradient.

    Raises:
        InvalidInput: wrong shapes, or evaluation without a running norm.
    """
    _check_features(features)
    if running_norm is not None and running_norm.shape != features.shape[1:]:
        raise InvalidInput(
            f"running_norm {tuple(running_norm.shape)} must have one number for each of the {features.shape[1]} "
            "columns of features."
        )
    if not 0 <= momentum <= 1:
        raise InvalidInput(f"momentum {momentum} must be between 0 and 1.")
    if training:
        norm = _norms(features, None)
        last = norm.detach()
        return features / norm, last if running_norm is None else momentum * running_norm + (1 - momentum) * last
    if running_norm is None or not bool((running_norm > 0).all()):
        raise InvalidInput(
            "running_norm: evaluation divides by positive norms of earlier calls, and there are none. "
            "Call with training=True first, or pass running_norm."
        )
    return features / running_norm, running_norm


def neural_ef_matrix(psi: Tensor, kernel: Tensor) -> Tensor:
    """R (k,k) = psi^T K psi / B^2, from psi (B,k) and the kernel K (B,B).

    Raises:
        InvalidInput: wrong shapes, or the kernel is not symmetric.
    """
    _check_features(psi)
    check_kernel(kernel, psi.shape[0])
    psi, kernel = _widened(psi, kernel)
    return psi.T @ (kernel @ psi) / psi.shape[0] ** 2


def neural_ef_loss(
    features: Tensor, kernel: Tensor | None = None, kernel_samples: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """The negated objective (1), summed over the functions. Its gradient is that of the paper's update.

    Args:
        features: (B,k) raw outputs of the networks; they are normalised here.
        kernel: (B,B), symmetric and positive semi-definite.
        kernel_samples: (S,B) instead of `kernel`: K = samples^T samples / S, which is never formed.
        weights: (B) of the points, summing to 1; equal ones where None.

    Raises:
        InvalidInput: wrong shapes, both or none of `kernel` and `kernel_samples`, an asymmetric kernel, or weights that
            are negative or do not sum to 1.
    """
    _check_features(features)
    check_one_kernel(kernel, kernel_samples)
    points = features.shape[0]
    if weights is not None:
        _check_weights(weights, points)
    psi = features / _norms(features, weights)
    weighted = psi / points if weights is None else psi * weights[:, None]
    if kernel is not None:
        check_kernel(kernel, points)
        weighted, kernel = _widened(weighted, kernel)
        image = kernel @ weighted
        matrix = weighted.detach().T @ image
        rayleigh = (weighted * image).sum(0)
    else:
        weighted, samples = _widened(weighted, check_samples(kernel_samples, points))
        image = samples @ weighted
        matrix = image.detach().T @ image / samples.shape[0]
        rayleigh = image.square().mean(0)
    penalty = (matrix.square() / _divisor(rayleigh.detach())[:, None]).triu(1)
    return penalty.sum() - rayleigh.sum()


def neural_ef_update(psi: Tensor, kernel: Tensor) -> Tensor:
    """(B,k): the gradient of the loss with respect to psi (B,k), in closed form.

    (2 / B^2) G with G = -(K psi) M and M = I - striu(R_ij / R_ii).

    Raises:
        InvalidInput: wrong shapes, or the kernel is not symmetric.
    """
    _check_features(psi)
    check_kernel(kernel, psi.shape[0])
    psi, kernel = _widened(psi, kernel)
    return closed_form(psi, kernel @ psi)[0]


def closed_form(psi: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """The update (B,k) and R (k,k) from psi (B,k) and `image` = K psi, unchecked."""
    points, functions = psi.shape
    matrix = psi.T @ image / points**2
    mixing = torch.eye(functions, dtype=psi.dtype, device=psi.device)
    mixing = mixing - (matrix / _divisor(matrix.diagonal())[:, None]).triu(1)
    return image @ mixing * (-2 / points**2), matrix


def polynomial_spectrum(constant: float, degree: int) -> Tensor:
    """(degree+1), float64: the eigenvalues of (x x' + constant)^degree for x uniform on [-1, 1], decreasing.

    They are those of C_mn = sqrt(c_m c_n) [m + n even] / (m + n + 1) with c_m = binomial(degree, m)
    constant^(degree - m).

    Raises:
        InvalidInput: a negative constant, whose kernel has negative eigenvalues, or a degree that is no natural number.
    """
    if not constant >= 0 or math.isinf(constant):
        raise InvalidInput(f"constant {constant!r} must be a number of at least 0; below, the kernel is not positive.")
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise InvalidInput(f"degree {degree!r} must be a whole number of at least 0.")
    power = torch.arange(degree + 1, dtype=torch.float64)
    root = torch.tensor([math.comb(degree, m) * constant ** (degree - m) for m in range(degree + 1)]).double().sqrt()
    total = power[:, None] + power
    moments = (total % 2 == 0) / (total + 1)
    return torch.linalg.eigvalsh(root[:, None] * moments * root).flip(0)


def check_one_kernel(kernel: object, kernel_samples: object) -> None:
    """Exactly one of the two is given."""
    if (kernel is None) == (kernel_samples is None):
        given = "neither" if kernel is None else "both"
        raise InvalidInput(f"kernel and kernel_samples: exactly one is needed, {given} was given.")


def check_kernel(kernel: Tensor, points: int) -> None:
    """`kernel` is a finite symmetric (points, points) matrix."""
    if kernel.shape != (points, points):
        raise InvalidInput(
            f"kernel {tuple(kernel.shape)} must be ({points}, {points}), a row and a column for a point."
        )
    if not bool(torch.isfinite(kernel).all()):
        raise InvalidInput("kernel has entries that are not finite. Scale the inputs down, or use float64.")
    gap, largest = float((kernel - kernel.T).abs().max()), float(kernel.abs().max())
    if gap > SYMMETRY * largest:
        raise InvalidInput(
            f"kernel is not symmetric: max|K - K^T| is {gap:.3g} and max|K| is {largest:.3g} (allowed: {SYMMETRY:g} of "
            "it). Pass a symmetric kernel, such as K^T K."
        )


def check_samples(samples: Tensor | None, points: int) -> Tensor:
    """`samples`, which is a finite (S, points) matrix."""
    if samples is None or samples.dim() != 2 or samples.shape[1] != points or not samples.shape[0]:
        shape = None if samples is None else tuple(samples.shape)
        raise InvalidInput(f"kernel_samples {shape} must be (S, {points}): a row for a sample, a column for a point.")
    if not bool(torch.isfinite(samples).all()):
        raise InvalidInput("kernel_samples has entries that are not finite.")
    return samples


def _check_features(features: Tensor) -> None:
    if features.dim() != 2 or 0 in features.shape or not features.is_floating_point():
        raise InvalidInput(
            f"features {tuple(features.shape)} {features.dtype} must be floating-point (B,k): a row for a point, a column "
            "for a function."
        )


def _check_weights(weights: Tensor, points: int) -> None:
    if weights.shape != (points,):
        raise InvalidInput(f"weights {tuple(weights.shape)} must be ({points},), one for each point.")
    total = float(weights.sum())
    if bool((weights < 0).any()) or not abs(total - 1) <= 1e-5:
        raise InvalidInput(
            f"weights must be at least 0 and sum to 1; they sum to {total:.6g}. Divide them by their sum."
        )


def _norms(features: Tensor, weights: Tensor | None) -> Tensor:
    """(k) root mean squares; a function that is zero everywhere stays zero."""
    square = features.square()
    mean = square.mean(0) if weights is None else (weights[:, None] * square).sum(0)
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).sqrt()


def _divisor(rayleigh: Tensor) -> Tensor:
    """R_ii, kept away from zero."""
    smallest = (FLOOR * rayleigh[:1]).clamp(min=torch.finfo(rayleigh.dtype).tiny)
    return torch.maximum(rayleigh, smallest)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype of at least float32, in which R is computed."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)
