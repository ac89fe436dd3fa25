"""Attention layers of other packages, timed in rows of their own where they are installed.

A peer maps (B,N,H*D) to (B,N,H*D) and brings its own projections, so its baseline is a layer as well: one fused
query-key-value projection, scaled_dot_product_attention, one output projection. Two gated units replace one block of
attention and feed-forward, so they are timed against that.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_attn.bench.checks import Mismatch, finite, largest
from hf_attn.bench.workload import DTYPES, Case, Contest, Workload, forward_step, gradient_step, seeded
from hf_attn.errors import Unsupported

LEAK = 1e-3
"""How far, relative to the largest output, later tokens may move earlier ones: a package's epsilon, not attention."""


class AttentionLayer(nn.Module):
    """(B,N,H*D) -> (B,N,H*D): projections around scaled_dot_product_attention."""

    def __init__(self, case: Case):
        super().__init__()
        self.heads, self.causal = case.heads, bool(case.causal)
        dim = case.heads * case.head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(out.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """A pre-norm block: attention, then a feed-forward layer four times as wide."""

    def __init__(self, case: Case):
        super().__init__()
        dim = case.heads * case.head_dim
        self.attention = nn.Sequential(nn.LayerNorm(dim), AttentionLayer(case))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Both with their residuals."""
        x = x + self.attention(x)
        return x + self.feed_forward(x)


BASELINES: dict[str, Callable[[Case], nn.Module]] = {"SDPA layer": AttentionLayer, "SDPA block": AttentionBlock}


@dataclass(frozen=True)
class Peer:
    """One layer of one package.

    Attributes:
        package: the distribution.
        module: what to import.
        baseline: a key of BASELINES.
        causal: it has a causal form.
        options: what the row shows.
        build: called with the imported module, the case and H*D.
        layer: which one, where a package has several here.
    """

    package: str
    module: str
    baseline: str
    causal: bool
    options: str
    build: Callable[[ModuleType, Case, int], nn.Module]
    layer: str = ""

    @property
    def name(self) -> str:
        """What it is called in a run and in its row."""
        return f"{self.package}-{self.layer}" if self.layer else self.package


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "performer-pytorch",
            "performer_pytorch",
            "SDPA layer",
            causal=True,
            options="",
            build=lambda m, case, dim: m.SelfAttention(dim, heads=case.heads, causal=bool(case.causal)),
        ),
        Peer(
            "linear-attention-transformer",
            "linear_attention_transformer.linear_attention_transformer",
            "SDPA layer",
            causal=True,
            options="",
            build=lambda m, case, dim: m.SelfAttention(dim, heads=case.heads, causal=bool(case.causal)),
        ),
        Peer(
            "nystrom-attention",
            "nystrom_attention",
            "SDPA layer",
            causal=False,
            options="num_landmarks=64",
            build=lambda m, case, dim: m.NystromAttention(
                dim, dim_head=case.head_dim, heads=case.heads, num_landmarks=64
            ),
        ),
        Peer(
            "FLASH-pytorch",
            "flash_pytorch",
            "SDPA block",
            causal=True,
            options="two units,group_size=256",
            build=lambda m, case, dim: nn.Sequential(*(m.FLASH(dim=dim, causal=bool(case.causal)) for _ in range(2))),
        ),
        Peer(
            "FLASH-pytorch",
            "flash_pytorch",
            "SDPA block",
            causal=True,
            options="two units",
            build=lambda m, case, dim: nn.Sequential(*(m.GAU(dim=dim, causal=bool(case.causal)) for _ in range(2))),
            layer="GAU",
        ),
    )
}
"""Name -> layer. The extra `bench` installs the packages."""


class PeerWorkload(Workload):
    """A layer of another package against the same layer with scaled_dot_product_attention.

    A peer has no definition here to agree with. It is verified to be finite, to depend on its input, to have gradients,
    and, where it is causal, to see no later token.
    """

    def __init__(self, peer: Peer):
        self.peer, self.label = peer, peer.name

    def absent(self) -> str | None:
        try:
            importlib.import_module(self.peer.module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and (error.name or "") in self.peer.module
            return "not installed" if missing else f"importing {self.peer.module} fails: {error}"
        return None

    def modes(self, causal: bool | None, case: Case) -> Sequence[bool]:
        return (causal,) if causal is not None else (False, True) if self.peer.causal else (False,)

    def baseline(self, case: Case) -> str:
        return f"causal {self.peer.baseline}" if case.causal else self.peer.baseline

    def module(self, case: Case) -> nn.Module:
        """The peer's layer for a case."""
        if case.causal and not self.peer.causal:
            raise Unsupported(self.label, "causal=True: it has no causal form", "Leave it out of a causal run")
        # some packages print what they could not import
        with contextlib.redirect_stdout(io.StringIO()):
            layer = self.peer.build(importlib.import_module(self.peer.module), case, case.heads * case.head_dim)
        return layer.to(case.device, DTYPES[case.dtype])

    def setup(self, case: Case) -> Contest:
        with seeded(case):
            candidate = self.module(case).train(case.backward)
            baseline = BASELINES[self.peer.baseline](case).to(case.device, DTYPES[case.dtype]).train(case.backward)
            x, cotangent = self._tokens(case), self._tokens(case)
        if not case.backward:
            return Contest(forward_step(lambda: baseline(x)), forward_step(lambda: candidate(x)), self.peer.options)
        x.requires_grad_()
        return Contest(
            gradient_step(lambda: baseline(x), [x, *baseline.parameters()], cotangent),
            gradient_step(lambda: candidate(x), [x, *candidate.parameters()], cotangent),
            self.peer.options,
        )

    def _tokens(self, case: Case) -> Tensor:
        dim = case.heads * case.head_dim
        return torch.randn(case.batch, case.length, dim, device=case.device, dtype=DTYPES[case.dtype])

    def verify(self, case: Case) -> str:
        with seeded(case):
            layer, x = self.module(case).eval(), self._tokens(case).requires_grad_()
        output = layer(x)
        if output.shape != x.shape:
            raise Mismatch(f"output of shape {tuple(output.shape)} instead of {tuple(x.shape)}")
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        finite([output, gradient], "output and gradient")
        if not largest(gradient):
            raise Mismatch("its output does not depend on its input")
        if not case.causal:
            return f"finite, uses its input, at {case.length}"
        half = case.length // 2
        changed = torch.cat((x[:, :half], -x[:, half:]), dim=1)
        moved = largest((layer(changed) - output)[:, :half]) / largest(output)
        if not moved <= LEAK:
            raise Mismatch(f"not causal: later tokens change earlier outputs by {moved:.2g} of the largest output")
        return f"finite, uses its input, causal, at {case.length}"
