"""Kernels for `hf_attn.analysis.neural_ef_fit.fit`: two classic ones, a model's attention, a model's tangent kernel.

given = attention_kernel(model, batch, layer=0, head=1)     # exp(k . k' / sqrt(D)) over the model's keys
fit(given.inputs, given.kernel, functions=5)

samples = ntk_samples(model, pixels, probes=256)            # K = J J^T, by random projections
fit(pixels.flatten(1), kernel_samples=samples)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_attn.analysis.outputs import run
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported, near
from hf_attn.models.recording import Recorded, exact_copy, mechanisms, real_tokens, recording, require_calls
from hf_attn.module import AttentionModule


def rbf(length: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """exp(-|x - x'|^2 / (2 length^2))."""
    if not length > 0:
        raise InvalidInput(f"length {length} must be above 0.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().div(-2 * length**2).exp()

    return kernel


def polynomial(constant: float = 1.5, degree: int = 4) -> Callable[[Tensor, Tensor], Tensor]:
    """(x . x' + constant)^degree. Its rank over one-dimensional inputs is degree + 1."""
    if not constant >= 0 or isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise InvalidInput(
            f"constant {constant} must be at least 0 and degree {degree} a whole number of at least 1; otherwise the "
            "kernel is not positive semi-definite."
        )
    return lambda x, y: (x @ y.T + constant).pow(degree)


@dataclass(frozen=True)
class TokenKernel:
    """A kernel over the tokens of a batch.

    Attributes:
        inputs: (N,d) what the eigenfunctions are functions of: keys, queries, or the hidden states attention received.
        kernel: a function of two sets of such points, or a matrix (N,N).
    """

    inputs: Tensor
    kernel: Callable[[Tensor, Tensor], Tensor] | Tensor


@torch.no_grad()
def attention_kernel(
    model: PreTrainedModel, batch: Mapping[str, Tensor], *, layer: int = 0, head: int = 0, which: str = "key"
) -> TokenKernel:
    """A symmetric kernel of one attention head on the tokens of `batch`; padding is left out.

    Attention itself, exp(q . k / sqrt(D)), is not symmetric and has no eigenfunctions of this kind. `which` chooses

        "key", "query"    exp(k . k' / sqrt(D)), or with queries: a function of the keys, or queries, of all examples
        "gram"            A^T A of the attention map A of one sequence: its eigenvalues times N are the squared singular
                          values of A; over the hidden states that the attention module received

    Args:
        model: any model whose attention goes through transformers' AttentionInterface, or of this package.
        batch: its inputs.
        layer, head: numbers from 0; `layer` counts attention modules.

    Raises:
        InvalidOption: another `which`; raw attention among them.
        InvalidInput: no such layer or head, "gram" with several sequences, or logits whose exponential overflows.
        Unsupported: the model's attention cannot be recorded, or has no weights.
    """
    if which not in ("key", "query", "gram"):
        why = "The attention map itself is not symmetric. " if which in ("attention", "raw") else ""
        raise InvalidOption(
            f"which {which!r} must be 'key', 'query' or 'gram'{near(which, ('key', 'query', 'gram'))}. {why}"
            "'gram' analyses the map through A^T A."
        )
    recorded = exact_copy(model).eval()
    with recording(recorded) as calls:
        run(recorded, batch)
    require_calls(calls)
    if not 0 <= layer < len(calls):
        raise InvalidInput(f"layer {layer} must be from 0 to {len(calls) - 1}: the model's attention modules.")
    path = list(calls)[layer]
    call = calls[path]
    query, key = call.tensors[:2]
    heads = (key if which == "key" else query).shape[1]
    if not 0 <= head < heads:
        raise InvalidInput(f"head {head} must be from 0 to {heads - 1}.")
    if which == "gram":
        return _gram(mechanisms(recorded)[path], call, head)
    vectors = (key if which == "key" else query)[:, head]
    mask = real_tokens(call)
    if mask.shape != vectors.shape[:2]:
        raise Unsupported(path, "its keys are those of another sequence", "Choose a self-attention layer")
    points = vectors[mask].float() if vectors.dtype.itemsize < 4 else vectors[mask]
    scaling = (call.call or {}).get("scaling")
    scale = points.shape[1] ** -0.5 if scaling is None else float(scaling)
    if float(points.square().sum(1).max()) * scale > math.log(torch.finfo(points.dtype).max) - 1:
        raise InvalidInput(f"{path}: exp(k . k / sqrt(D)) overflows in {points.dtype}. Pass model.double().")
    return TokenKernel(points, lambda x, y: (scale * (x @ y.T)).exp())


def _gram(mechanism: AttentionModule, call: Recorded, head: int) -> TokenKernel:
    """A^T A over the real tokens of one sequence, and the hidden states of those tokens."""
    hidden = call.args[0] if call.args else (call.kwargs or {})["hidden_states"]
    if hidden.shape[0] != 1:
        raise InvalidInput(f"which='gram' needs one sequence; the batch has {hidden.shape[0]}. Pass one of them.")
    weights = mechanism.attention_weights(*call.tensors, **(call.call or {}))[0, head]
    kept = real_tokens(call)[0]
    if weights.shape[0] != weights.shape[1] or kept.shape[0] != hidden.shape[1]:
        raise Unsupported(
            "which='gram'",
            f"the attention map {tuple(weights.shape)} is between two sequences",
            "Choose self-attention",
        )
    weights, points = weights[kept][:, kept], hidden[0, kept]
    dtype = torch.promote_types(torch.float32, points.dtype)
    weights = weights.to(dtype)
    return TokenKernel(points.to(dtype), weights.T @ weights)


def ntk_samples(
    model: nn.Module,
    inputs: Tensor,
    *,
    output: int | Callable[..., Tensor] | None = None,
    probes: int = 256,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """(probes, N): random projections J p_s of the Jacobian J (N, parameters), p_s standard normal.

    samples^T samples / probes estimates the neural tangent kernel J J^T of a scalar output, with a relative error of
    about sqrt(2 / probes). Each row is one forward pass with a tangent; J is never formed. Evaluation mode.

    Args:
        model: called as model(inputs); of its outputs `logits` are taken, or the tensor itself.
        inputs: (N, ...).
        output: the logit (N,labels) to take; the sum of all where None; or a function from the outputs to (N).
        probes: projections, S.
        seed: of the projections.
        progress: show a bar; None shows it on a terminal.

    Raises:
        InvalidInput: no parameters, no probes, or an output that is not (N).
        Unsupported: an operation of the model has no forward-mode derivative.
    """
    parameters = dict(model.named_parameters())
    if probes < 1 or not parameters:
        raise InvalidInput(
            f"probes {probes} must be at least 1, and the model have parameters ({len(parameters)} now)."
        )
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()

    def scalar(values: dict[str, Tensor]) -> Tensor:
        return _scalar(torch.func.functional_call(model, values, (inputs,)), output, inputs.shape[0])

    try:
        # fused attention has no forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            rows = []
            hidden = None if progress is None else not progress
            for _ in tqdm(range(probes), desc="projections", unit="probe", disable=hidden):
                probe = {
                    name: torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
                    for name, value in parameters.items()
                }
                rows.append(torch.func.jvp(scalar, (parameters,), (probe,))[1])
    except NotImplementedError as error:
        reason = f"an operation of its forward pass has no forward-mode derivative ({str(error).splitlines()[0]})"
        remedy = "Convert it to a mechanism without that operation, such as softmax"
        raise Unsupported(f"ntk_samples, {type(model).__name__}", reason, remedy) from error
    finally:
        model.train(training)
    return torch.stack(rows)


def _scalar(outputs: object, output: int | Callable[..., Tensor] | None, points: int) -> Tensor:
    if callable(output):
        value = output(outputs)
    else:
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]  # type: ignore[index]
        if isinstance(output, int) and not 0 <= output < logits.shape[-1]:
            raise InvalidInput(f"output {output} must be from 0 to {logits.shape[-1] - 1}, a logit of the model.")
        value = logits.flatten(1).sum(1) if output is None else logits[..., output]
    if value.shape != (points,):
        raise InvalidInput(f"output gives {tuple(value.shape)}; it must give one number for each of {points} inputs.")
    return value
