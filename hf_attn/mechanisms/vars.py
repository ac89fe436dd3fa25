"""VARS: attention as the sparse reconstruction of the values from a dictionary of templates, by a few recurrent steps.

Paper: Shi, Song, Joshi, Darrell, Wang, "Visual Attention Emerges from Recurrent Sparse Reconstruction", ICML 2022; the
equations are those of its published code (bfshi/VARS).

    E(u) = |v - P u|^2 / 2 + lambda |u|_1                     v (N,D) the values, a column of P (N,m) is a template
    u = S_lambda(y),  then K times  u = S_{lambda/L}(u - (G u - y) / L),  out = P u            (ISTA)
    G = P^T P,  y = P^T v,  S_t(x) = sign(x) max(|x| - t, 0),  L = 1 + max over rows of sum |G|

dynamic (VARS-D): columns exp(q_n . w_r - |q_n|^2 / 2), w_r drawn once, each divided by its norm over the tokens.
both (VARS-SD): learned templates of a grid beside them. static (VARS-S): P^T v are circular convolutions of the value
maps with learned kernels as large as the grid; L is the largest eigenvalue of G, one a channel.

Shapes: query and value (B,H,N,D); key is not used (queries are their own keys). m = template_ratio * D.
When to use: vision transformers trained from scratch, N well above m.
When not: causal models and cross-attention (every template mixes all tokens); as a drop-in for pretrained attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import draw_
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

DEFAULTS = {"dynamic": (0.3, 5), "both": (0.3, 5), "static": (3.5, 3)}
"""lambda and K of each kind, as in the published code."""
_EPS = 1e-12
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class VarsOptions(Options):
    """Options of `vars`.

    Attributes:
        kind: "dynamic" (VARS-D), "both" (VARS-SD) or "static" (VARS-S).
        sparsity: lambda; None = 0.3, and 3.5 for "static".
        num_steps: K; None = 5, and 3 for "static".
        template_ratio: templates a head as a multiple of D; "both" has as many static ones besides.
        unit_norm: features of unit-length queries.
        learned: learned recurrence (LISTA); not for "static".
        grid_size: (rows, columns) of the learned templates; "both" and "static" need it.
        num_prefix_tokens: "both": rows of the learned templates before the grid (CLS).
        num_templates: "static": kernels a channel.
        output_kernel: "static": one more learned circular filter at the end.
    """

    mechanism: ClassVar[str] = "vars"

    kind: str = "dynamic"
    sparsity: float | None = None
    num_steps: int | None = None
    template_ratio: int = 2
    unit_norm: bool = False
    learned: bool = False
    grid_size: tuple[int, int] | list[int] | None = None
    num_prefix_tokens: int = 0
    num_templates: int = 5
    output_kernel: bool = False

    def check(self) -> None:
        self.one_of("kind", *DEFAULTS)
        if self.sparsity is not None:
            self.number("sparsity", 0)
        if self.num_steps is not None:
            self.integer("num_steps", 0)
        self.integer("template_ratio", 1)
        self.integer("num_templates", 1)
        self.integer("num_prefix_tokens", 0)
        self.boolean("unit_norm", "learned", "output_kernel")
        if self.learned and self.kind == "static":
            raise self.refuse("learned", "belongs to the kinds 'dynamic' and 'both'", "Leave it out.")
        if self.num_prefix_tokens and self.kind == "static":
            rule = "before the grid with kind='static': a Fourier transform needs the bare grid"
            raise self.refuse("num_prefix_tokens", rule, "Use kind='both' or 'dynamic', or a model without CLS token.")
        if self.kind != "dynamic" and self.grid_size is None:
            rule = f"and kind={self.kind!r} has learned templates of a fixed size"
            raise self.refuse("grid_size", rule, "Give grid_size=(rows, columns).")
        if self.grid_size is not None:
            sides = self.grid_size
            if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(_is_count(side) for side in sides):
                raise self.refuse("grid_size", "must be two integers of at least 1: (rows, columns)")


class VarsAttention(AttentionModule):
    """Recurrent sparse reconstruction of the values from templates made of the queries, learned, or both."""

    name = "vars"
    options_class = VarsOptions

    def __init__(self, num_heads: int, head_dim: int, options: VarsOptions):
        super().__init__(num_heads, head_dim, options)
        sparsity, steps = DEFAULTS[options.kind]
        self.sparsity = sparsity if options.sparsity is None else options.sparsity
        self.num_steps = steps if options.num_steps is None else options.num_steps
        rows, columns = options.grid_size or (0, 0)
        if options.kind == "static":
            half, channels = columns // 2 + 1, num_heads * head_dim
            self.kernel = nn.Parameter(torch.empty(channels, options.num_templates, rows, half, 2))
            if options.output_kernel:
                self.output_kernel_weight = nn.Parameter(torch.empty(channels, rows, half, 2))
            return
        templates = options.template_ratio * head_dim
        self.random_matrix: Tensor
        self.register_buffer("random_matrix", torch.empty(num_heads, head_dim, templates))
        if options.kind == "both":
            tokens = options.num_prefix_tokens + rows * columns
            self.static_templates = nn.Parameter(torch.empty(num_heads, tokens, templates))
        if options.learned:
            total = templates * (1 + (options.kind == "both"))
            self.gram_transform = nn.Parameter(torch.empty(total, total))
            self.sparsity_scale = nn.Parameter(torch.empty(()))
            self.step_scale = nn.Parameter(torch.empty(()))

    @classmethod
    def describe(cls, options: VarsOptions) -> Capabilities:
        dynamic, both = options.kind == "dynamic", options.kind == "both"
        prefix = both and options.num_prefix_tokens > 0
        derived = (("key padding", dynamic), ("CLS token", prefix), ("grids of another size", both))
        return Capabilities(
            padding=dynamic,
            packed=dynamic,
            grid="ignored" if dynamic else "used",
            prefix_tokens=prefix,
            learned=not dynamic or options.learned,
            random="" if options.kind == "static" else "template directions: once at construction, saved",
            derived=tuple(mode for mode, defined in derived if defined),
            pays_from="1024 (2-core CPU, float32, D = 64, dynamic)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("kind", VarsOptions.kind) == "dynamic":
            return {}
        filled = {"grid_size": list(host.grid), "num_prefix_tokens": host.num_prefix_tokens} if host.grid else {}
        return {option: value for option, value in filled.items() if option not in given}

    def reset_parameters(self) -> None:
        options = self.options
        if options.kind == "static":
            kernel = 0.06 * torch.randn_like(self.kernel)
            energy = 2 * kernel.square().sum(dim=(1, 4), keepdim=True).mean(dim=(2, 3), keepdim=True)
            draw_(self.kernel, kernel * kernel.shape[2] / energy.sqrt())
            if options.output_kernel:
                nn.init.normal_(self.output_kernel_weight, std=0.02)
            return
        draw_(self.random_matrix, torch.randn_like(self.random_matrix))
        if options.kind == "both":
            nn.init.normal_(self.static_templates)
        if options.learned:
            nn.init.eye_(self.gram_transform)
            nn.init.ones_(self.sparsity_scale)
            nn.init.ones_(self.step_scale)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        options, refused = self.options, None
        if options.kind == "dynamic":
            if (arguments.get("scaling") or 0) < 0:
                raise InvalidInput(f"vars: scaling={arguments['scaling']} must be at least 0: queries take its root.")
            return super()._call(query, key, value, **arguments)
        size, prefix = tuple(options.grid_size), arguments.get("num_prefix_tokens", 0)
        grid = tuple(arguments.get("grid") or size)
        if arguments.get("key_padding_mask") is not None:
            rule = f"key_padding_mask with kind={options.kind!r}: learned templates belong to places of the grid"
            refused = rule, "Leave the mask out, or use kind='dynamic'"
        elif prefix and options.kind == "static":
            rule = f"num_prefix_tokens={prefix} with kind='static': a Fourier transform needs the bare grid"
            refused = rule, "Drop the prefix tokens (mean pooling), or use kind='both' or 'dynamic'"
        elif options.kind == "static" and grid != size:
            rule = f"grid={grid} with kind='static' and grid_size={size}: its kernels are as large as the grid"
            refused = rule, f"Pass a grid of {size[0]} x {size[1]} tokens, or use kind='both' or 'dynamic'"
        elif prefix != options.num_prefix_tokens:
            rule = f"num_prefix_tokens={prefix} in the call and {options.num_prefix_tokens} in the options"
            refused = rule, "Build it with the model's num_prefix_tokens, and pass the same"
        elif query.dim() == 4 and query.shape[2] != prefix + grid[0] * grid[1]:
            rule = f"N={query.shape[2]} tokens, and its templates are for {prefix} and a grid of {grid[0]} x {grid[1]}"
            refused = rule, "Pass grid=(rows, columns) of the tokens"
        if refused:
            raise Unsupported(self.name, *refused)
        return super()._call(query, key, value, **arguments)

    # -- the definition --------------------------------------------------------------------------------------------

    def define(self, call: Call) -> Tensor:
        if self.options.kind == "static":
            return self._define_static(call)
        dictionary, value = self._norm_by_log_sum_exp(call), _real_rows(call, call.value)
        adjoint = dictionary.transpose(-1, -2)
        bound = 1 + (adjoint @ dictionary).detach().abs().sum(dim=-1).amax(dim=-1)[..., None, None]
        transform = torch.eye(dictionary.shape[-1]).to(dictionary)
        learned = self.options.learned
        sparsity: float | Tensor = self.sparsity
        if learned:
            transform, bound = self.gram_transform.to(value.dtype), bound / self.step_scale.to(value.dtype)
            sparsity = sparsity * self.sparsity_scale.to(value.dtype)
        target = adjoint @ value
        code = shrink(target, sparsity, learned)
        for _ in range(self.num_steps):
            gradient = transform @ (adjoint @ (dictionary @ (transform @ code))) - target
            code = shrink(code - gradient / bound, sparsity / bound, learned)
        return dictionary @ code

    def _norm_by_log_sum_exp(self, call: Call) -> Tensor:
        """P (B,H,N,m), the columns normalised in log space."""
        log_features = self.log_features(call)
        mask = call.key_padding_mask
        if mask is not None:
            log_features = log_features.masked_fill(~mask[:, None, :, None], _NEGATIVE_INFINITY)
        dictionary = _real_rows(call, ((2 * log_features).log_softmax(dim=2) / 2).exp())
        if self.options.kind == "dynamic":
            return dictionary
        static = self.templates(call)
        static = static / static.square().sum(dim=1, keepdim=True).sqrt().clamp(min=_EPS)
        return torch.cat((dictionary, static.expand(call.batch, -1, -1, -1)), dim=-1)

    def _define_static(self, call: Call) -> Tensor:
        """The convolutions as (N,N) matrices, one for every channel and kernel."""
        rows, columns = self.options.grid_size
        place = torch.arange(rows * columns, device=call.value.device)
        row, column = place // columns, place % columns
        offset = (row[:, None] - row) % rows * columns + (column[:, None] - column) % columns

        def matrices(weight: Tensor) -> Tensor:
            kernel = torch.fft.irfft2(self.spectra(weight, call.value.dtype), s=(rows, columns))
            return kernel.flatten(-2)[..., offset]

        adjoint, value = matrices(self.kernel), call.value.transpose(2, 3).flatten(1, 2)
        gram = torch.einsum("ctxy,ctxz->cyz", adjoint, adjoint)
        bound = torch.linalg.eigvalsh(gram.detach())[:, -1, None, None].clamp(min=torch.finfo(gram.dtype).tiny)
        target = torch.einsum("ctxy,bcy->bctx", adjoint, value)
        code = shrink(target, self.sparsity)
        for _ in range(self.num_steps):
            image = torch.einsum("ctxy,bctx->bcy", adjoint, code)
            gradient = torch.einsum("ctxy,bcy->bctx", adjoint, image) - target
            code = shrink(code - gradient / bound, self.sparsity / bound)
        out = torch.einsum("ctxy,bctx->bcy", adjoint, code)
        if self.options.output_kernel:
            out = torch.einsum("cxy,bcy->bcx", matrices(self.output_kernel_weight), out)
        return out.unflatten(1, (self.num_heads, self.head_dim)).transpose(2, 3)

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def log_features(self, call: Call) -> Tensor:
        """(B,H,N,m) logarithms of the dynamic templates, up to a constant a column."""
        query = call.query * call.scale**0.5
        if self.options.unit_norm:
            query = query / query.norm(dim=-1, keepdim=True).clamp(min=_EPS)
        return query @ self.random_matrix.to(query.dtype) - query.square().sum(dim=-1, keepdim=True) / 2

    def templates(self, call: Call) -> Tensor:
        """(H,N,m) learned templates, resized to the grid of the call."""
        templates, size = self.static_templates.to(call.query.dtype), tuple(self.options.grid_size)
        grid, prefix = size if call.grid is None else tuple(call.grid), self.options.num_prefix_tokens
        if grid == size:
            return templates
        maps = templates[:, prefix:].transpose(1, 2).unflatten(2, size)
        maps = functional.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        return torch.cat((templates[:, :prefix], maps.flatten(2).transpose(1, 2)), dim=1)

    def spectra(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(...,rows,columns//2+1) complex half spectra of real kernels, from (...,rows,columns//2+1,2)."""
        spectrum, columns = torch.complex(*weight.to(dtype).unbind(-1)), self.options.grid_size[1]
        # these columns hold each frequency together with its negative
        column = torch.arange(spectrum.shape[-1], device=spectrum.device)
        paired = (column == 0) | (2 * column == columns)
        negative = spectrum.flip(-2).roll(1, dims=-2)
        return torch.where(paired, (spectrum + negative.conj()) / 2, spectrum)

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        if self.options.kind == "static":
            return self._attend_static(call)
        dictionary, value = self.dictionary(call), _real_rows(call, call.value)
        adjoint = dictionary.transpose(-1, -2)
        gram, target = adjoint @ dictionary, adjoint @ value
        step = 1 / (1 + gram.detach().abs().sum(dim=-1).amax(dim=-1))[..., None, None]
        if not self.options.learned:
            return dictionary @ ista(gram, target, self.sparsity, step, self.num_steps)
        transform = self.gram_transform.to(gram.dtype)
        gram, step = transform @ gram @ transform, step * self.step_scale.to(gram.dtype)
        sparsity = self.sparsity * self.sparsity_scale.to(gram.dtype)
        return dictionary @ ista(gram, target, sparsity, step, self.num_steps, smooth=True)

    def dictionary(self, call: Call) -> Tensor:
        """P (B,H,N,m), its columns of unit length."""
        log_features, mask = self.log_features(call), call.key_padding_mask
        if mask is not None:
            log_features = log_features.masked_fill(~mask[:, None, :, None], _NEGATIVE_INFINITY)
        # a factor common to a column cancels in its norm
        top = log_features.detach().amax(dim=2, keepdim=True)
        templates = (log_features - torch.where(top == _NEGATIVE_INFINITY, 0, top)).exp()
        if self.options.kind == "both":
            static = self.templates(call).expand(call.batch, -1, -1, -1)
            templates = torch.cat((templates, static), dim=-1)
        return functional.normalize(templates, dim=2, eps=_EPS)

    def _attend_static(self, call: Call) -> Tensor:
        size = tuple(self.options.grid_size)
        maps = call.value.transpose(2, 3).flatten(1, 2).unflatten(2, size)
        spectrum, tiny = self.spectra(self.kernel, maps.dtype), torch.finfo(maps.dtype).tiny
        bound = spectrum.detach().abs().square().sum(dim=1).amax(dim=(-1, -2))[:, None, None, None].clamp(min=tiny)

        def analyse(image: Tensor) -> Tensor:
            """P^T of an image given by its spectrum (B,C,...): (B,C,T,rows,columns)."""
            return torch.fft.irfft2(spectrum * image[:, :, None], s=size, norm="ortho")

        def synthesise(code: Tensor) -> Tensor:
            """The spectrum of P u."""
            return (spectrum.conj() * torch.fft.rfft2(code, norm="ortho")).sum(dim=2)

        target = analyse(torch.fft.rfft2(maps, norm="ortho"))
        code = shrink(target, self.sparsity)
        for _ in range(self.num_steps):
            code = shrink(code - (analyse(synthesise(code)) - target) / bound, self.sparsity / bound)
        out = synthesise(code)
        if self.options.output_kernel:
            out = self.spectra(self.output_kernel_weight, maps.dtype) * out
        out = torch.fft.irfft2(out, s=size, norm="ortho")
        return out.flatten(2).unflatten(1, (self.num_heads, self.head_dim)).transpose(2, 3)


def ista(
    gram: Tensor, target: Tensor, sparsity: Tensor | float, step: Tensor, num_steps: int, smooth: bool = False
) -> Tensor:
    """u (...,m,D) of `num_steps` steps of length `step` towards the sparse code of `target` (...,m,D)."""
    code, threshold = shrink(target, sparsity, smooth), sparsity * step
    for _ in range(num_steps):
        code = shrink(code - step * (gram @ code - target), threshold, smooth)
    return code


def shrink(x: Tensor, threshold: Tensor | float, smooth: bool = False) -> Tensor:
    """sign(x) max(|x| - threshold, 0); `smooth`: the exact GELU in place of the maximum."""
    rest = x.abs() - threshold
    return x.sign() * (functional.gelu(rest) if smooth else rest.relu())


def _real_rows(call: Call, x: Tensor) -> Tensor:
    """x (B,H,N,...) with zeros at padded tokens."""
    return x if call.key_padding_mask is None else torch.where(call.key_padding_mask[:, None, :, None], x, 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


register(
    Mechanism(
        name="vars",
        title="Visual attention from recurrent sparse reconstruction",
        paper="Shi, Song, Joshi, Darrell, Wang, ICML 2022 (arXiv 2204.10962)",
        equation="out = P u,  u = S_{lambda/L}(u - (P^T P u - P^T v) / L) repeated K times from u = S_lambda(P^T v),  "
        "S_t(x) = sign(x) max(|x| - t, 0)",
        module_class=VarsAttention,
        example={},
    )
)
