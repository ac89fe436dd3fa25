"""Train networks to be the leading eigenfunctions of a kernel, and say which of them got there.

    found = fit(inputs, rbf(), functions=5)
    found.eigenvalues, found.converged        # (5), and one bool for each
    found.networks(other_inputs)              # (n,5): values anywhere, at a cost that does not grow with the inputs
    print(found.table())

The objective is `hf_attn.analysis.neural_ef`'s; kernels of models are in `hf_attn.analysis.neural_ef_kernels`. Later
functions need more: the noise of a batch in R_ij is about lambda_1 / sqrt(B), and what lies below it is not learned.
Train on all points (`batch_size=None`) and for longer where functions are marked as not converged.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attn.analysis.neural_ef import check_kernel, check_one_kernel, check_samples, closed_form, l2_batch_norm
from hf_attn.errors import InvalidInput

Kernel = Callable[[Tensor, Tensor], Tensor]
"""From points (n,d) and (m,d) to the kernel between them (n,m)."""

CHECKED = 256
"""Points on which a kernel function is checked before training."""
BLOCK = 1024
"""Rows of a kernel function that are computed at once."""
OFF_DIAGONAL, RESIDUAL, RISE = 0.05, 0.1, 0.01
"""A function has converged below these: |R_ij| / sqrt(R_ii R_jj), relative residual, rise over the eigenvalue before."""


class ParallelLinear(nn.Module):
    """k linear layers side by side: (k,in,B) to (k,out,B)."""

    def __init__(self, functions: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(functions, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(functions, outputs, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight.shape[2]))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, self.weight, x)


class EigenFunctions(nn.Module):
    """k separate networks with L2 batch normalisation: x (B,d) to psi (B,k).

    In training psi is divided by the norms of the batch, which are tracked; in evaluation by `eigennorm`.

    Attributes:
        eigennorm: (k) running norms.
        eigenvalues: (k) running R_jj of training.
        num_calls: calls in training so far.
    """

    eigennorm: Tensor
    eigenvalues: Tensor
    num_calls: Tensor

    def __init__(
        self, input_size: int, functions: int, hidden_size: int = 32, num_layers: int = 3, momentum: float = 0.9
    ):
        """Raises `InvalidInput` for sizes that are not positive, or an odd hidden size (half sines, half cosines)."""
        super().__init__()
        for name, value in {"input_size": input_size, "functions": functions, "hidden_size": hidden_size}.items():
            if value < 1:
                raise InvalidInput(f"{name} {value} must be at least 1.")
        if num_layers < 2:
            raise InvalidInput(f"num_layers {num_layers} must be at least 2: a hidden layer and the output.")
        if hidden_size % 2:
            raise InvalidInput(f"hidden_size {hidden_size} must be even: half the units are sines, half cosines.")
        self.momentum = momentum
        sizes = [input_size, *[hidden_size] * (num_layers - 1), 1]
        self.layers = nn.ModuleList(
            ParallelLinear(functions, inside, outside) for inside, outside in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.register_buffer("eigennorm", torch.zeros(functions))
        self.register_buffer("eigenvalues", torch.zeros(functions))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def raw(self, x: Tensor) -> Tensor:
        """(B,k) before normalisation."""
        hidden = x.T.expand(len(self.eigennorm), -1, -1)
        for layer in self.layers[:-1]:
            first, second = layer(hidden).chunk(2, dim=1)
            hidden = torch.cat([first.sin(), second.cos()], dim=1)
        return self.layers[-1](hidden)[:, 0].T

    def forward(self, x: Tensor) -> Tensor:
        """psi (B,k).

        Raises:
            InvalidInput: evaluation before any training.
        """
        first = not int(self.num_calls)
        psi, norm = l2_batch_norm(self.raw(x), None if first else self.eigennorm, self.momentum, self.training)
        if self.training:
            self.eigennorm.copy_(norm)
            self.num_calls += 1
        return psi

    def track(self, eigenvalues: Tensor) -> None:
        """Take R_jj (k) of the last training call into the running eigenvalues."""
        keep = self.momentum if int(self.num_calls) > 1 else 0.0
        self.eigenvalues.mul_(keep).add_(eigenvalues, alpha=1 - keep)

    @torch.no_grad()
    def calibrate(self, inputs: Tensor) -> None:
        """Set the norms to those on all of `inputs` (N,d), so that psi has mean square 1 there in evaluation."""
        self.eigennorm.copy_(l2_batch_norm(self.raw(inputs))[1])
        self.num_calls.clamp_(min=1)


@dataclass(frozen=True)
class Spectrum:
    """Learned eigenfunctions and what is known about them. Numbers are over all inputs, after calibration.

    Attributes:
        networks: the functions, in evaluation mode.
        inputs: (N,d) the points.
        functions: (N,k) their values there.
        eigenvalues: (k) R_jj.
        off_diagonal: (k) the largest |R_ij| / sqrt(R_ii R_jj) over the functions i before j.
        residual: (k) the root mean square of K psi_j / N - R_jj psi_j, over R_jj.
        ordered: (k) bool: at most `RISE` above the eigenvalue before.
    """

    networks: EigenFunctions
    inputs: Tensor
    functions: Tensor
    eigenvalues: Tensor
    off_diagonal: Tensor
    residual: Tensor
    ordered: Tensor

    @property
    def converged(self) -> Tensor:
        """(k) bool. A function counts only if all three flags hold."""
        return (self.off_diagonal < OFF_DIAGONAL) & (self.residual < RESIDUAL) & self.ordered & (self.eigenvalues > 0)

    def cosines(self, exact: Exact) -> Tensor:
        """(k) |cosine| between each learned function and the exact one of its number, on the inputs."""
        learned = nn.functional.normalize(self.functions.double(), dim=0)
        wanted = nn.functional.normalize(exact.functions[:, : learned.shape[1]].double(), dim=0)
        return (learned[:, : wanted.shape[1]] * wanted).sum(0).abs()

    def table(self, exact: Exact | None = None) -> str:
        """A line for each function, for people."""
        header = ["function", "eigenvalue", "off-diagonal", "residual", "ordered", "converged"]
        columns = [self.eigenvalues, self.off_diagonal, self.residual]
        rows = [
            [str(j + 1), *(f"{float(column[j]):.5g}" for column in columns), *(_yes(flag[j]) for flag in flags)]
            for flags in [(self.ordered, self.converged)]
            for j in range(len(self.eigenvalues))
        ]
        if exact is not None:
            header += ["exact", "cosine"]
            cosines = self.cosines(exact)
            for j, row in enumerate(rows[: len(cosines)]):
                row += [f"{float(exact.eigenvalues[j]):.5g}", f"{float(cosines[j]):.4f}"]
        widths = [max(len(row[i]) for row in [header, *rows] if i < len(row)) for i in range(len(header))]
        return "\n".join(
            "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)) for row in [header, *rows]
        )


@dataclass(frozen=True)
class Exact:
    """Eigenvalues (k), decreasing, and functions (N,k) of mean square 1, from the matrix itself."""

    eigenvalues: Tensor
    functions: Tensor


def fit(
    inputs: Tensor,
    kernel: Kernel | Tensor | None = None,
    kernel_samples: Tensor | None = None,
    *,
    functions: int = 5,
    steps: int = 6000,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    hidden_size: int = 32,
    num_layers: int = 3,
    momentum: float = 0.9,
    seed: int = 0,
    progress: bool | None = None,
) -> Spectrum:
    """Train `functions` networks on `inputs` with Adam, calibrate them, and measure what they became.

    Args:
        inputs: (N,d) the points, of roughly unit size; their dtype and device are those of the networks.
        kernel: a function of two sets of points, or the matrix (N,N). Symmetric, positive semi-definite.
        kernel_samples: (S,N) instead: the kernel is samples^T samples / S and is never formed.
        steps: of Adam.
        batch_size: points of a step, drawn without replacement; all of them where None.
        schedule: "cosine" (to 0 over `steps`) or "constant".
        hidden_size, num_layers, momentum: of the networks.
        seed: of their start and of the batches.
        progress: show a bar; None shows it on a terminal.

    Raises:
        InvalidInput: an argument outside its rule; both or none of `kernel` and `kernel_samples`; an asymmetric kernel.

    Warns:
        UserWarning: an eigenvalue came out negative, so the kernel is not positive semi-definite.
    """
    points = _check(inputs, kernel, kernel_samples, steps, batch_size, learning_rate, schedule)
    size = points if batch_size is None else batch_size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        networks = EigenFunctions(inputs.shape[1], functions, hidden_size, num_layers, momentum).to(inputs)
    optimizer = torch.optim.Adam(networks.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
    )
    generator = torch.Generator().manual_seed(seed)
    every = size == points
    image_of = _operator(inputs, kernel, kernel_samples) if every else None
    for _ in tqdm(range(steps), desc="eigenfunctions", unit="step", disable=None if progress is None else not progress):
        batch = inputs
        if not every:
            rows = torch.randperm(points, generator=generator)[:size].to(inputs.device)
            batch, image_of = inputs[rows], _operator(inputs, kernel, kernel_samples, rows)
        psi = networks(batch)
        with torch.no_grad():
            update, matrix = closed_form(psi, image_of(psi))
            networks.track(matrix.diagonal())
        optimizer.zero_grad()
        psi.backward(update)
        optimizer.step()
        decay.step()
    networks.calibrate(inputs)
    return measure(networks.eval(), inputs, kernel, kernel_samples)


@torch.no_grad()
def measure(
    networks: EigenFunctions,
    inputs: Tensor,
    kernel: Kernel | Tensor | None = None,
    kernel_samples: Tensor | None = None,
) -> Spectrum:
    """What calibrated `networks` in evaluation mode are on all of `inputs` (N,d); the kernel is given as in `fit`."""
    _check_one(inputs, kernel, kernel_samples)
    psi = networks(inputs)
    points = psi.shape[0]
    image = _full_image(psi, inputs, kernel, kernel_samples)
    matrix = psi.T @ image / points**2
    values = matrix.diagonal().clone()
    if bool((values < 0).any()):
        warnings.warn(
            f"eigenvalue {int(values.argmin()) + 1} came out as {float(values.min()):.3g}: the kernel is not positive "
            "semi-definite, and the functions found are not its leading eigenfunctions.",
            stacklevel=2,
        )
    size = values.clamp(min=torch.finfo(values.dtype).tiny)
    relative = (matrix / size.sqrt() / size.sqrt()[:, None]).abs().triu(1)
    residual = (image / points - values * psi).square().mean(0).sqrt() / size
    before = torch.cat([values.new_tensor([math.inf]), values[:-1]])
    ordered = values <= (1 + RISE) * before
    return Spectrum(networks, inputs, psi, values, relative.amax(0), residual, ordered)


def exact_spectrum(
    inputs: Tensor,
    kernel: Kernel | Tensor | None = None,
    kernel_samples: Tensor | None = None,
    functions: int | None = None,
) -> Exact:
    """The reference, in float64: eigh of the kernel matrix over N, or the SVD of the samples. Costs N^3 or N S^2."""
    _check_one(inputs, kernel, kernel_samples)
    points = inputs.shape[0]
    if kernel_samples is not None:
        samples = kernel_samples.double() / math.sqrt(kernel_samples.shape[0] * points)
        _, singular, vectors = torch.linalg.svd(samples, full_matrices=False)
        values, vectors = singular.square(), vectors.T
    else:
        matrix = (kernel if isinstance(kernel, Tensor) else kernel(inputs, inputs)).double()
        check_kernel(matrix, points)
        values, vectors = torch.linalg.eigh(matrix / points)
        values, vectors = values.flip(0), vectors.flip(1)
    return Exact(values[:functions], vectors[:, :functions] * math.sqrt(points))


def draw(found: Spectrum, path: str | os.PathLike[str], exact: Exact | None = None, title: str = "") -> None:
    """Draw the eigenvalues (pale: not converged) and the functions, or for inputs of several dimensions their cosines.

    Raises:
        InvalidInput: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2) if found.inputs.shape[1] == 1 or exact is not None else [figure.subplots()]
    _bars(panels[0], found, exact)
    if found.inputs.shape[1] == 1:
        _curves(panels[1], found, exact)
    elif exact is not None:
        _agreement(figure, panels[1], found, exact)
    figure.suptitle(title)
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidInput(f"the picture cannot be written to {str(path)!r}: {error.strerror or error}.") from error


def _bars(axes: Any, found: Spectrum, exact: Exact | None) -> None:
    place = torch.arange(1, len(found.eigenvalues) + 1).numpy()
    width = 0.8 if exact is None else 0.4
    left = place if exact is None else place - width / 2
    heights = found.eigenvalues.double().cpu().clamp(min=0).numpy()
    for flag, alpha, label in ((True, 1.0, "learned"), (False, 0.35, "learned, not converged")):
        chosen = found.converged.cpu().numpy() == flag
        if chosen.any():
            axes.bar(left[chosen], heights[chosen], width, color="C0", alpha=alpha, label=label)
    if exact is not None:
        values = exact.eigenvalues[: len(place)].cpu().clamp(min=0).numpy()
        axes.bar(place[: len(values)] + width / 2, values, width, color="0.6", label="exact")
    axes.set_yscale("log")
    axes.set_xticks(place)
    axes.set_xlabel("function")
    axes.set_ylabel("eigenvalue")
    axes.legend(fontsize="small")


def _curves(axes: Any, found: Spectrum, exact: Exact | None) -> None:
    """Learned functions of one variable, and the exact ones dashed, with the sign of the learned."""
    order = found.inputs[:, 0].argsort()
    x = found.inputs[order, 0].cpu().numpy()
    learned = found.functions[order].double().cpu().numpy()
    for j in range(learned.shape[1]):
        axes.plot(x, learned[:, j], color=f"C{j}", label=f"{j + 1}")
        if exact is not None and j < exact.functions.shape[1]:
            wanted = exact.functions[order, j].cpu().numpy()
            sign = 1.0 if float(wanted @ learned[:, j]) >= 0 else -1.0
            axes.plot(x, sign * wanted, color="black", linestyle="--", linewidth=0.8)
    axes.set_xlabel("input")
    axes.set_ylabel("eigenfunction" + (" (dashed: exact)" if exact is not None else ""))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _agreement(figure: Any, axes: Any, found: Spectrum, exact: Exact) -> None:
    learned = nn.functional.normalize(found.functions.double().cpu(), dim=0)
    wanted = nn.functional.normalize(exact.functions[:, : learned.shape[1]].cpu(), dim=0)
    ends = (0.5, wanted.shape[1] + 0.5, learned.shape[1] + 0.5, 0.5)
    image = axes.imshow((learned.T @ wanted).abs().numpy(), vmin=0, vmax=1, cmap="viridis", extent=ends)
    axes.set_xlabel("exact function")
    axes.set_ylabel("learned function")
    figure.colorbar(image, ax=axes, label="|cosine|")


def _operator(
    inputs: Tensor, kernel: Kernel | Tensor | None, samples: Tensor | None, rows: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """psi -> K psi over the points `rows`, or over all."""
    if samples is not None:
        chosen = samples if rows is None else samples[:, rows]
        return lambda psi: chosen.T @ (chosen @ psi) / chosen.shape[0]
    if isinstance(kernel, Tensor):
        block = kernel if rows is None else kernel[rows[:, None], rows]
    else:
        points = inputs if rows is None else inputs[rows]
        block = kernel(points, points)
    return block.matmul


def _full_image(psi: Tensor, inputs: Tensor, kernel: Kernel | Tensor | None, samples: Tensor | None) -> Tensor:
    """K psi over all points, a block of rows of a kernel function at a time."""
    if samples is None and not isinstance(kernel, Tensor):
        return torch.cat([kernel(rows, inputs) @ psi for rows in inputs.split(BLOCK)])
    return _operator(inputs, kernel, samples)(psi)


def _check_one(inputs: Tensor, kernel: Kernel | Tensor | None, samples: Tensor | None) -> None:
    """The points, and exactly one kernel that fits them; a function is checked on some of the points."""
    if inputs.dim() != 2 or 0 in inputs.shape or inputs.dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"inputs {tuple(inputs.shape)} {inputs.dtype} must be (N,d) float32 or float64 points.")
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidInput("inputs has entries that are not finite.")
    check_one_kernel(kernel, samples)
    if samples is not None:
        check_samples(samples, inputs.shape[0])
    elif isinstance(kernel, Tensor):
        check_kernel(kernel, inputs.shape[0])
    else:
        some = inputs[:CHECKED]
        check_kernel(kernel(some, some), some.shape[0])
    given = samples if samples is not None else kernel
    if isinstance(given, Tensor) and (given.dtype != inputs.dtype or given.device != inputs.device):
        raise InvalidInput(
            f"the kernel is {given.dtype} on {given.device} and inputs {inputs.dtype} on {inputs.device}: pass both alike."
        )


def _check(
    inputs: Tensor,
    kernel: Kernel | Tensor | None,
    samples: Tensor | None,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    schedule: str,
) -> int:
    """The arguments of `fit`; the number of points."""
    _check_one(inputs, kernel, samples)
    points = inputs.shape[0]
    if steps < 1:
        raise InvalidInput(f"steps {steps} must be at least 1.")
    if batch_size is not None and not 1 <= batch_size <= points:
        raise InvalidInput(f"batch_size {batch_size} must be between 1 and the {points} inputs, or None for all.")
    if not learning_rate > 0:
        raise InvalidInput(f"learning_rate {learning_rate} must be above 0.")
    if schedule not in ("cosine", "constant"):
        raise InvalidInput(f"schedule {schedule!r} must be 'cosine' or 'constant'.")
    return points


def _yes(flag: Tensor) -> str:
    return "yes" if bool(flag) else "no"
