"""Gated attention units, timed two at a time: they replace one block of attention and feed-forward.

The baseline is that block, pre-norm, with scaled_dot_product_attention and a feed-forward layer four times as wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.bench.checks import agreement
from hf_attn.bench.peers import AttentionBlock
from hf_attn.bench.workload import DTYPES, Case, Contest, Workload, forward_step, gradient_step, seeded, written

UNITS = ("gau", "flash_gau")
"""Names of the units: full attention (FLASH-Quad), and mixed chunks (FLASH)."""
LENGTH = 608
"""Tokens of the checks, or the timed length if that is shorter: beyond two chunks, cheap for the definition, and of a
number at which the same kernels run as in the timed calls."""


class TwoUnits(nn.Module):
    """(B,N,d) -> (B,N,d).

    Args:
        name: of `UNITS`.
        case: its size and mode.
        options: of the unit.
    """

    def __init__(self, name: str, case: Case, options: dict[str, Any]):
        from hf_attn.models.gau import FlashGatedAttentionUnit, GatedAttentionUnit

        super().__init__()
        dim, self.causal = case.heads * case.head_dim, bool(case.causal)
        if name == "gau":
            options = {"max_position_embeddings": max(512, case.length), **options}
        kind = GatedAttentionUnit if name == "gau" else FlashGatedAttentionUnit
        self.units = nn.ModuleList(kind(dim, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Both units; the rotations are computed once, as in a model."""
        first: Any = self.units[0]
        rotation = first.rotation(0, x.shape[1], x) if first.options.use_rope else None
        for unit in self.units:
            x = unit(x, None, self.causal, None, False, rotation)
        return x

    def naive(self, x: Tensor) -> Tensor:
        """Both units by their definition."""
        for unit in self.units:
            x = unit.naive(x, is_causal=self.causal)  # type: ignore[operator]
        return x


class UnitWorkload(Workload):
    """Two units against one block.

    Args:
        name: of `UNITS`.
        given: options of the unit.
    """

    def __init__(self, name: str, given: dict[str, Any] | None = None):
        from hf_attn.models.gau_config import UNITS as KINDS

        self.name, self.given = name, dict(given or {})
        KINDS["quadratic" if name == "gau" else "mixed_chunk"].parse(**self.given)
        self.label = f"{name}:{written(self.given)}" if self.given else name

    def modes(self, causal: bool | None, case: Case) -> Sequence[bool]:
        return (False, True) if causal is None else (causal,)

    def baseline(self, case: Case) -> str:
        return "causal SDPA block" if case.causal else "SDPA block"

    def setup(self, case: Case) -> Contest:
        dtype = DTYPES[case.dtype]
        with seeded(case):
            block: Any = AttentionBlock(case).to(case.device, dtype).train(case.backward)
            units: Any = TwoUnits(self.name, case, self.given).to(case.device, dtype).train(case.backward)
            x, cotangent = (torch.randn(self._shape(case), device=case.device).to(dtype) for _ in range(2))
        options = written({"units": 2, **units.units[0].options.changed()})
        if not case.backward:
            return Contest(forward_step(lambda: block(x)), forward_step(lambda: units(x)), options)
        x.requires_grad_()
        return Contest(
            gradient_step(lambda: block(x), [x, *block.parameters()], cotangent),
            gradient_step(lambda: units(x), [x, *units.parameters()], cotangent),
            options,
        )

    def _shape(self, case: Case) -> tuple[int, int, int]:
        return case.batch, case.length, case.heads * case.head_dim

    def verify(self, case: Case) -> str:
        length, dtype = min(LENGTH, case.length), DTYPES[case.dtype]
        with seeded(case):
            low = TwoUnits(self.name, case, self.given).to(case.device, dtype)
            with torch.no_grad():
                for parameter in low.parameters():
                    # off their start, where a unit is close to the identity
                    parameter.add_(0.1 * torch.randn_like(parameter))
            x, cotangent = (
                torch.randn(1, length, case.heads * case.head_dim, dtype=torch.float64, device=case.device)
                for _ in range(2)
            )
        agreement(low, TwoUnits.naive, x, cotangent, dtype, length, f"at length {length}")
        return f"float64 and {case.dtype} at {length}"
