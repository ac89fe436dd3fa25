"""The members of a population as stacked tensors: one vectorised pass computes the losses of all of them.

`torch.func.stack_module_state` stacks the models, `torch.func.functional_call` under `torch.func.vmap` runs them. Trained
parameters then lie in two tensors (P, n), those with weight decay and those without, so that an optimiser step takes a
few large operations instead of some for every parameter.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, Trainer

from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.mechanisms.softmax import SoftmaxAttention
from hf_attn.models.family import convert
from hf_attn.recipes.population import adam_state, clip_members, population_adam_step
from hf_attn.registry import list_mechanisms

Batch = Mapping[str, Tensor]


class Members:
    """P models of one architecture, trained together.

    Args:
        models: the members; their weights are copied.
        betas, eps: of Adam.

    Attributes:
        weights: "decayed" and "plain", the trained parameters (P, n).
        state: of `population_adam_step`.

    Raises:
        InvalidInput: the models differ in architecture.
        Unsupported: a model cannot run under vmap, or is not in float32 or float64.
    """

    def __init__(self, models: Sequence[PreTrainedModel], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        _check_alike(models)
        self.template, self.betas, self.eps = models[0], betas, eps
        self.size, self.device = len(models), models[0].device
        self.base = _vectorisable(copy.deepcopy(models[0]))
        parameters, buffers = stack_module_state(list(models))
        trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
        if not trained:
            raise InvalidInput("population: no parameter requires a gradient, so there is nothing to train.")
        # the names do not depend on the trainer
        decayed = set(Trainer.get_decay_parameter_names(None, models[0]))  # type: ignore[arg-type]
        self.shapes: dict[str, dict[str, torch.Size]] = {"decayed": {}, "plain": {}}
        for name in parameters:
            if name in trained:
                self.shapes["decayed" if name in decayed else "plain"][name] = parameters[name].shape[1:]
        self.weights = {
            group: torch.cat([parameters[n].detach().flatten(1) for n in shapes], dim=1)
            for group, shapes in self.shapes.items()
            if shapes
        }
        rest = {n: t.detach() for n, t in parameters.items() if n not in trained} | buffers
        # what is the same in all members, such as the base of adapters, is kept once
        self.shared = {n: t[0].clone() for n, t in rest.items() if bool((t == t[:1]).all())}
        self.own = {n: t.clone() for n, t in rest.items() if n not in self.shared}
        self.state = adam_state(self.weights)

    def leaves(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters (P, ...) under their names, as views."""
        found: dict[str, Tensor] = {}
        for group, flat in weights.items():
            shapes = self.shapes[group]
            parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=1)
            found |= {name: part.unflatten(1, shape or (1,)) for (name, shape), part in zip(shapes.items(), parts)}
            found |= {name: found[name][:, 0] for name, shape in shapes.items() if not shape}
        return found

    def run(self, weights: Mapping[str, Tensor], batch: Batch, same_batch: bool, output: Callable[[Any], Any]) -> Any:
        """`output` of every member's model output.

        Args:
            weights: the trained parameters.
            batch: leaves (P, b, ...), or (b, ...) with `same_batch`.
            output: takes tensors out of a model's output.
        """

        def member(own: dict[str, Tensor], batch: Batch) -> Any:
            return output(functional_call(self.base, {**self.shared, **own}, (), dict(batch)))

        ready = prepare_mask(batch, self.base)
        # the CPU's fused attention has no vectorised rule: it would run member by member, and without some gradients
        exact = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        try:
            with exact:
                return vmap(member, in_dims=(0, None if same_batch else 0), randomness="different")(
                    self.leaves(weights) | self.own, ready
                )
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise Unsupported(
                f"population, {type(self.template).__name__}",
                f"it cannot be vectorised with attention {attention_name(self.template)!r} ({str(error).splitlines()[0]})",
                "Use eager attention, or one of hf_attn's mechanisms that is computed by torch operations",
            ) from error

    def losses(self, batch: Batch, same_batch: bool = False) -> Tensor:
        """(P) losses of a batch, without a gradient."""
        self.base.eval()
        with torch.no_grad():
            return self.run(self.weights, batch, same_batch, lambda out: out.loss)

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P) losses and (P, b, ...) logits of a batch that all members see."""
        self.base.eval()
        with torch.no_grad():
            return self.run(self.weights, batch, True, lambda out: (out.loss, out.logits))

    def step(
        self,
        batch: Batch,
        learning_rate: Tensor,
        weight_decay: Tensor,
        max_grad_norm: float = 0.0,
        same_batch: bool = False,
    ) -> Tensor:
        """One training step of every member; returns the losses (P) before it.

        Args:
            batch: leaves (P, b, ...), or (b, ...) with `same_batch`.
            learning_rate, weight_decay: (P).
            max_grad_norm: of a member's gradient; 0 for no limit.
            same_batch: all members see the same batch.
        """
        self.base.train()
        weights = {group: w.detach().requires_grad_() for group, w in self.weights.items()}
        losses = self.run(weights, batch, same_batch, lambda out: out.loss)
        # members have no weights in common: the gradient of the sum holds the gradient of each
        grads = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values()))))
        if max_grad_norm:
            grads, _ = clip_members(grads, max_grad_norm)
        self.weights, self.state = population_adam_step(
            self.weights, grads, self.state, learning_rate, None, {"decayed": weight_decay}, self.betas, self.eps
        )
        return losses.detach()

    def copy(self, source: Tensor) -> None:
        """Every member becomes a copy of the member `source` (P) names; those that change start Adam anew."""
        changed = source != torch.arange(self.size, device=source.device)
        self.weights = {group: w[source] for group, w in self.weights.items()}
        self.own = {name: t[source] for name, t in self.own.items()}
        for moment in ("m", "v"):
            self.state[moment] = {n: s.masked_fill(changed[:, None], 0) for n, s in self.state[moment].items()}
        self.state["t"] = self.state["t"].masked_fill(changed, 0)

    def model(self, member: int) -> PreTrainedModel:
        """A member as an ordinary model."""
        tensors = {**self.leaves(self.weights), **self.own}
        model = copy.deepcopy(self.template)
        with torch.no_grad():
            for name, target in (*model.named_parameters(), *model.named_buffers()):
                target.copy_(tensors[name][member] if name in tensors else self.shared[name])
        return model.eval()


def prepare_mask(batch: Batch, model: PreTrainedModel) -> dict[str, Tensor]:
    """The batch with its padding mask (..., L) as (..., 1, L, L) bool: models look into a 2-D mask, which vmap forbids."""
    mask = batch.get("attention_mask")
    if mask is None:
        return dict(batch)
    rest = {name: t for name, t in batch.items() if name != "attention_mask"}
    if bool(mask.all()):
        return rest
    length = mask.shape[-1]
    visible = mask.bool()[..., None, None, :].expand(*mask.shape[:-1], 1, length, length)
    # a model takes a mask of pairs as it is: causal order must be in it
    if any(getattr(module, "is_causal", False) for module in model.modules()):
        visible = visible.tril()
    return {**rest, "attention_mask": visible}


def attention_name(model: PreTrainedModel) -> str:
    """The attention implementation of a model, as a message calls it."""
    return str(getattr(model.config, "attention", None) or model.config._attn_implementation)


def _vectorisable(base: PreTrainedModel) -> PreTrainedModel:
    """`base` with its attention in a form that has a vectorised rule."""
    who, implementation = f"population, {type(base).__name__}", base.config._attn_implementation
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise Unsupported(who, "gradient checkpointing is on", "Call gradient_checkpointing_disable() first")
    for path, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Unsupported(who, f"{path} is a batch norm, which changes its statistics in place", "Use layer norm")
    for dtype in {p.dtype for p in base.parameters()} - {torch.float32, torch.float64}:
        raise Unsupported(who, f"a parameter is {dtype}", "Load the members with dtype=torch.float32")
    if implementation not in ("eager", "sdpa", *list_mechanisms()):
        raise Unsupported(
            who, f"attention {implementation!r} has no vectorised rule", "Load the model with sdpa attention"
        )
    backend = "math" if base.device.type == "cpu" else "auto"
    if implementation in ("eager", "sdpa"):
        convert(base, "softmax", backend=backend)
    for module in base.modules():
        if isinstance(module, SoftmaxAttention) and module.options.backend == "auto":
            module.options = replace(module.options, backend=backend)
    if hasattr(base.config, "use_cache"):
        base.config.use_cache = False
    return base


def _check_alike(models: Sequence[PreTrainedModel]) -> None:
    if not models or not all(isinstance(model, PreTrainedModel) for model in models):
        raise InvalidInput("population: models must be one or more transformers models.")
    first = models[0]
    described = [
        (type(m), {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()}) for m in models
    ]
    for i, (model, found) in enumerate(zip(models, described)):
        if found != described[0]:
            raise InvalidInput(
                f"population: member {i} ({type(model).__name__}) differs from member 0 ({type(first).__name__}) in class, or in "
                "name, shape, type, device or requires_grad of a parameter. Members must have one architecture."
            )
