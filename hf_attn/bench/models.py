"""Whole models: a model with a mechanism in every layer against the same model with its stock attention.

Both run in evaluation mode, also where the backward pass is timed: dropout on attention weights would take the stock
model's fast kernel away. The mechanisms themselves draw as they do in training.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from hf_attn.bench.checks import Mismatch, Place, exact, finite, largest, rounding
from hf_attn.bench.timing import Step
from hf_attn.bench.workload import DTYPES, SMALL, Case, Contest, Workload, seeded, written
from hf_attn.errors import HfAttnError, InvalidInput, InvalidOption, Unsupported, near
from hf_attn.models.configuration import AttnConfigMixin
from hf_attn.models.family import convert
from hf_attn.models.spec import canonical
from hf_attn.models.wrapping import attention_modules, host_of, token_grid
from hf_attn.module import AttentionModule

SAME = 1e-6
"""How far `softmax` may be from the stock model, relative to the largest output, in float32."""
STORED = "stored"
"""Stands for the mechanisms a checkpoint of hf_attn was saved with."""


def _bert(case: Case, layers: int) -> BertConfig:
    dim = case.heads * case.head_dim
    return BertConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * dim,
        max_position_embeddings=case.length,
    )


def _gpt2(case: Case, layers: int) -> GPT2Config:
    return GPT2Config(n_embd=case.heads * case.head_dim, n_layer=layers, n_head=case.heads, n_positions=case.length)


def _vit(case: Case, layers: int) -> ViTConfig:
    side, dim = math.isqrt(case.length), case.heads * case.head_dim
    if side**2 != case.length:
        reason = f"length {case.length} is no square grid of patches"
        raise Unsupported("model='vit'", reason, "Take lengths such as 196 or 1024")
    return ViTConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * dim,
        image_size=16 * side,
        patch_size=16,
    )


FAMILIES: dict[str, Callable[[Case, int], PreTrainedConfig]] = {"bert": _bert, "gpt2": _gpt2, "vit": _vit}
"""Models built from the sizes of a case, with random weights."""


def checkpoint(source: str) -> PreTrainedModel:
    """The model of a folder or a Hub id, in float32 and evaluation mode.

    Raises:
        InvalidInput: it cannot be loaded.
    """
    try:
        known = AutoConfig.from_pretrained(source)
        own = {} if isinstance(known, AttnConfigMixin) else {"attn_implementation": "sdpa"}
        return AutoModel.from_pretrained(source, dtype=torch.float32, **own).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, HfAttnError):
            raise
        raise InvalidInput(
            f"model={source!r} cannot be loaded{near(source, FAMILIES)}: {error} "
            f"Give one of {', '.join(FAMILIES)}, resnet, a folder, or a Hub id."
        ) from error


class ModelWorkload(Workload):
    """A model with a mechanism against the same model with scaled_dot_product_attention.

    Args:
        model: a key of FAMILIES, or a loaded model.
        mechanism: a registered name, or STORED for the mechanisms the model has.
        given: options of the mechanism.
        layers: layers of a model from FAMILIES.
    """

    def __init__(
        self, model: str | PreTrainedModel, mechanism: str, given: dict[str, Any] | None = None, layers: int = 4
    ):
        self.model, self.mechanism, self.given, self.layers = model, mechanism, dict(given or {}), layers
        self.label = f"{mechanism}:{written(self.given)}" if self.given else mechanism
        if mechanism != STORED:
            canonical(mechanism, self.given)
        elif self.given:
            raise InvalidOption(f"{STORED} takes no options: they are in the checkpoint. Name a mechanism instead.")
        elif isinstance(model, str) or not isinstance(model.config, AttnConfigMixin):
            raise InvalidOption(f"{STORED}: the model carries no mechanisms of hf_attn. Name one to put into it.")
        self._verified: set[tuple[Any, ...]] = set()

    def modes(self, causal: bool | None, case: Case) -> Sequence[None]:
        return (None,)

    def baseline(self, case: Case) -> str:
        return "stock model, SDPA"

    def load(self, case: Case) -> PreTrainedModel:
        """A fresh copy of the model as it comes, in float32 and evaluation mode."""
        if not isinstance(self.model, str):
            return copy.deepcopy(self.model).float().eval()
        config = FAMILIES[self.model](case, self.layers)
        return AutoModel.from_config(config, attn_implementation="sdpa").eval()

    def pair(self, case: Case) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The stock model and the one with the mechanism: equal weights, float32, evaluation mode."""
        with seeded(case):
            loaded: Any = self.load(case)
            wrapped = isinstance(loaded.config, AttnConfigMixin)
            stock: Any = stock_twin(loaded) if wrapped else copy.deepcopy(loaded)
            if self.mechanism != STORED:
                convert(loaded, self.mechanism, **self.given)
        for model in (stock, loaded):
            model.to(case.device).eval()
            model.config.use_cache = False
        return stock, loaded

    def setup(self, case: Case) -> Contest:
        stock, candidate = self.pair(case)
        with seeded(case):
            inputs = model_inputs(stock, case, DTYPES[case.dtype])
        for module in candidate.modules():
            if isinstance(module, AttentionModule):
                module.train(case.backward)
        first, second = (model_step(m.to(DTYPES[case.dtype]), inputs, case.backward) for m in (stock, candidate))
        return Contest(first, second, described(candidate))

    def verify(self, case: Case) -> str:
        stock, candidate = self.pair(case)
        with seeded(case), torch.no_grad():
            inputs = model_inputs(stock, case, torch.float32)
            expected, found = stock(**inputs)[0], candidate(**inputs)[0]
        if found.shape != expected.shape:
            raise Mismatch(f"output of shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        finite([found], "output of the model")
        layers = mechanisms(candidate)
        names = {mechanism.name for mechanism in layers.values()}
        if names == {"softmax"}:
            error = largest(found - expected) / largest(expected)
            if not error <= SAME:
                raise Mismatch(f"softmax differs from the stock model by {error:.2g} of the largest output")
        for path, mechanism in layers.items():
            self._verify_layer(candidate, path, mechanism, case)
        how = "equal to the stock model" if names == {"softmax"} else "finite"
        return f"{how}; its layers in float64 and {case.dtype}"

    def _verify_layer(self, model: PreTrainedModel, path: str, mechanism: AttentionModule, case: Case) -> None:
        """The mechanism of one layer against its definition, at a length the definition can take; equal ones once."""
        key = mechanism.name, repr(mechanism.options), case.length, case.dtype, case.device
        if key in self._verified:
            return
        host = host_of(model, path, model.get_submodule(path))
        rows, columns = host.grid or (1, min(case.length, SMALL))
        prefix = host.num_prefix_tokens if host.grid else 0
        place = Place(rows * columns + prefix, 1, host.causal, host.grid, prefix)
        with seeded(case):
            exact(mechanism, place, case.device, case.seed)
            rounding(mechanism, place, DTYPES[case.dtype], case.device)
        self._verified.add(key)


def stock_twin(model: Any) -> PreTrainedModel:
    """The stock model with the weights of a model of an attn family, without its mechanisms."""
    stock_config = type(model.config).stock_class
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("attention", "model_type", "architectures")}
    config = stock_config.from_dict(fields, attn_implementation="sdpa")
    twin = type(model).stock_class(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".mechanism." not in name}
    twin.load_state_dict(weights, strict=True)
    return twin


def model_inputs(model: PreTrainedModel, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tokens or pixels that make `case.length` tokens (patches, without the CLS token)."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False) or model.main_input_name not in ("input_ids", "pixel_values"):
        reason = f"it takes {model.main_input_name}" + (" for an encoder and a decoder" * config.is_encoder_decoder)
        raise Unsupported(name, reason, "Benchmark an encoder, a decoder or a vision model")
    if model.main_input_name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and case.length > longest:
            raise Unsupported(name, f"length {case.length} is over its {longest} positions", "Take a shorter length")
        tokens = torch.randint(config.vocab_size, (case.batch, case.length), device=case.device)
        return {"input_ids": tokens}
    grid, _ = token_grid(model)
    if grid is None or grid[0] * grid[1] != case.length:
        patches = "of an unknown grid" if grid is None else f"{grid[0] * grid[1]} patches"
        raise Unsupported(name, f"length {case.length}: its images make {patches}", "Take that length")
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(case.batch, config.num_channels, height, width, device=case.device, dtype=dtype)
    return {"pixel_values": pixels}


def model_step(model: PreTrainedModel, inputs: dict[str, Tensor], backward: bool) -> Step:
    """One forward pass, or one with the gradients of all parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [model(**inputs)[0]]
        output = model(**inputs)[0]
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
        return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return step


def mechanisms(model: PreTrainedModel) -> dict[str, AttentionModule]:
    """Path of each attention module -> its mechanism."""
    return {path: cast(AttentionModule, module.mechanism) for path, module in attention_modules(model).items()}


def described(model: PreTrainedModel) -> str:
    """The mechanisms of a model with their options, each once."""
    found = (f"{m.name}({written(m.options.changed())})".replace("()", "") for m in mechanisms(model).values())
    return ", ".join(dict.fromkeys(found))


def title(source: str) -> str:
    """The name of a model for reports: no folders of this machine."""
    return Path(source).name if os.path.isdir(source) else source
