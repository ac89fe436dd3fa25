"""What is timed: a workload sets up a baseline and a candidate for a case, runs them, and verifies the candidate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hf_attn.mechanisms  # noqa: F401  # registers them
from hf_attn.bench.checks import Place, exact, rounding, sample
from hf_attn.bench.timing import Step
from hf_attn.capabilities import Host
from hf_attn.errors import HfAttnError, InvalidOption, Unsupported
from hf_attn.options import Options
from hf_attn.registry import build, get_mechanism

SMALL = 64
"""Length of the float64 check: an 8 x 8 grid, or one sequence."""
MODEST = 256
"""Length at which the check in the dtype of the benchmark begins; it goes on up to the timed length while it is cheap."""
NAIVE_SECONDS = 1.0
"""What the definition may take in float64 at one length of that check; it needs quadratic time at least."""
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Case:
    """One size and mode.

    Attributes:
        length: N, tokens.
        causal: the mode; None where the model decides it.
        backward: forward and backward pass, in training mode; otherwise the forward pass alone, without gradients.
    """

    length: int
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool | None = False
    backward: bool = False
    seed: int = 0

    @property
    def mode(self) -> str:
        return {True: "causal", False: "bidirectional", None: "as in the model"}[self.causal]

    @property
    def work(self) -> str:
        return "forward+backward" if self.backward else "forward"


@dataclass(frozen=True)
class Contest:
    """Two steps for the same inputs. A step returns the tensors it computed.

    Attributes:
        options: the options the candidate ended up with, for the report.
    """

    baseline: Step
    candidate: Step
    options: str = ""


class Workload:
    """A line of the table. Subclasses say what runs.

    Attributes:
        label: name of the candidate.
    """

    label: str

    def absent(self) -> str | None:
        """Why there is nothing to run on this machine, or None."""
        return None

    def modes(self, causal: bool | None, case: Case) -> Sequence[bool | None]:
        """The modes to run: the one asked for, or (None) every one that is defined."""
        raise NotImplementedError

    def baseline(self, case: Case) -> str:
        """Name of the baseline."""
        raise NotImplementedError

    def setup(self, case: Case) -> Contest:
        """The steps of a case. Raises `Unsupported` where it is not defined."""
        raise NotImplementedError

    def verify(self, case: Case) -> str:
        """What was verified, in a few words. Raises `Mismatch` where the candidate is wrong."""
        raise NotImplementedError


class MechanismWorkload(Workload):
    """A mechanism against torch's scaled_dot_product_attention, on query, key and value (B,H,N,D).

    Args:
        name: a registered mechanism.
        given: options on top of the record's example and of what the mechanism takes from a model of this length.
    """

    def __init__(self, name: str, given: dict[str, Any] | None = None):
        self.record = get_mechanism(name)
        self.given = dict(given or {})
        self.record.options_class.parse(**{**self.record.example, **self.given})
        self.label = f"{name}:{written(self.given)}" if self.given else name
        self._checked: dict[Case | tuple[Case, int], float] = {}

    def modes(self, causal: bool | None, case: Case) -> Sequence[bool]:
        if causal is not None:
            return (causal,)
        try:
            capabilities = self.record.module_class.describe(self.resolve(case)[0])
        except HfAttnError:
            return (False,)
        return [mode for mode, defined in ((False, capabilities.bidirectional), (True, capabilities.causal)) if defined]

    def baseline(self, case: Case) -> str:
        return "causal SDPA" if case.causal else "SDPA"

    def resolve(self, case: Case) -> tuple[Options, tuple[int, int] | None]:
        """The options for a case, and its grid: a square one, where the mechanism has no form without."""
        try:
            options = self._options(case, None)
            if self.record.module_class.describe(options).sequence:
                return options, None
        except HfAttnError:
            if math.isqrt(case.length) ** 2 != case.length:
                raise
        side = math.isqrt(case.length)
        if side**2 != case.length:
            raise Unsupported(
                self.record.name,
                f"length {case.length} is no square grid of tokens, and it needs one",
                "Take lengths such as 1024 or 4096",
            )
        return self._options(case, (side, side)), (side, side)

    def _options(self, case: Case, grid: tuple[int, int] | None) -> Options:
        host = Host("benchmark", case.heads, case.head_dim, 0, bool(case.causal), grid=grid, max_length=case.length)
        filled = self.record.module_class.host_defaults(host, self.given)
        options = {**filled, **self.given}
        try:
            return self.record.options_class.parse(**options)
        except InvalidOption:
            # an option without a default, or a wrong one: the second attempt says which
            return self.record.options_class.parse(**{**self.record.example, **options})

    def module(self, case: Case) -> tuple[Any, Place]:
        """The mechanism for a case, and the call it is made for."""
        options, grid = self.resolve(case)
        values = {name: getattr(options, name) for name in options.names()}
        module = build(self.record.name, num_heads=case.heads, head_dim=case.head_dim, **values)
        if case.dtype not in module.capabilities.dtypes:
            known = ", ".join(module.capabilities.dtypes)
            raise Unsupported(self.record.name, f"dtype={case.dtype!r} is not defined", f"Take one of {known}")
        return module, Place(case.length, case.batch, bool(case.causal), grid)

    def setup(self, case: Case) -> Contest:
        with seeded(case):
            module, place = self.module(case)
            module = module.to(case.device, DTYPES[case.dtype]).train(case.backward)
            given = sample(module, place, DTYPES[case.dtype], case.device)
        inputs, call = given.inputs, given.call
        qkv = given.query, given.key, given.value

        def sdpa() -> Tensor:
            return F.scaled_dot_product_attention(*qkv, is_causal=place.causal)

        def attention() -> Tensor:
            return module(**inputs, **call)

        if case.backward:
            leaves = [*inputs.values(), *module.parameters()]
            baseline = gradient_step(sdpa, qkv, given.cotangent)
            candidate = gradient_step(attention, leaves, given.cotangent)
        else:
            baseline, candidate = forward_step(sdpa), forward_step(attention)
        return Contest(baseline, candidate, written(module.options.changed()))

    def verify(self, case: Case) -> str:
        case = replace(case, backward=False, batch=1)
        self._verify_exact(replace(case, length=SMALL))
        lengths = self.ladder(case.length)
        verified = 0
        for length in lengths:
            growth = (length / verified) ** 2 if verified else 1
            if verified and self._checked[replace(case, length=verified)] * growth > NAIVE_SECONDS:
                break
            self._verify_rounding(replace(case, length=length))
            verified = length
        return f"float64 at {SMALL}, {case.dtype} at {verified}"

    def ladder(self, length: int) -> list[int]:
        """Lengths up to `length`, from about MODEST on: halves, or squares of halves where a grid is needed."""
        lengths = [length]
        while lengths[0] > MODEST:
            grid = self.resolve(Case(lengths[0]))[1]
            lengths.insert(0, (grid[0] // 2) ** 2 if grid else lengths[0] // 2)
        return lengths

    def _verify_exact(self, case: Case) -> None:
        key = case, SMALL
        if key not in self._checked:
            with seeded(case):
                module, place = self.module(case)
                exact(module, replace(place, batch=2), case.device, case.seed)
            self._checked[key] = 0.0

    def _verify_rounding(self, case: Case) -> None:
        if case not in self._checked:
            with seeded(case):
                # one head: the definition is quadratic at least
                module, place = self.module(replace(case, heads=1))
                self._checked[case] = rounding(module, place, DTYPES[case.dtype], case.device)


def forward_step(form: Any) -> Step:
    """Runs `form` without gradients."""

    def step() -> list[Tensor]:
        with torch.no_grad():
            return [form()]

    return step


def gradient_step(form: Any, leaves: Sequence[Tensor], cotangent: Tensor) -> Step:
    """Runs `form` and its backward pass; the leaves' own .grad stays empty."""

    def step() -> list[Tensor]:
        output = form()
        gradients = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True)
        return [output.detach(), *(g for g in gradients if g is not None)]

    return step


@contextlib.contextmanager
def seeded(case: Case) -> Iterator[None]:
    """Random numbers from the seed of the case; the caller's generators stay as they are."""
    device = torch.device(case.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(case.seed)
        yield


def written(options: dict[str, Any]) -> str:
    """Options as `key=value,key=value`."""
    return ",".join(f"{key}={value}" for key, value in options.items())
