"""Softmax attention along the edges of a hypercube of blocks: our Triton kernel, flex_attention, or gathered blocks.

    out_n = softmax_m(s <q_n, k_m>) . v    over the keys m with popcount(gray(place(n)) xor gray(place(m))) <= 1

Shapes: query (B,H,N,D), key and value (B,H,M,D). Every backend reads the blocks that are joined only. What they read is
listed once a length, and kept.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn.kernels import Backend, always, choose, on_cuda, probe
from hf_attn.kernels.random_features import INTERPRETED, missing_triton

SIDES = (16, 32, 64, 128)
"""Block sizes of the Triton kernel."""


class Request(NamedTuple):
    """The arguments of one call of `hypercube_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    is_causal: bool
    scaling: float
    dropout: float
    block_size: int
    outside: int
    gathered: Callable[[], Tensor]


def hypercube_attention(request: Request, backend: str = "auto") -> Tensor:
    """Attention along the edges of the cube.

    Args:
        request: the tensors; `outside` leading tokens are global; `gathered` computes the call from gathered blocks.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        (B,H,N,D). A query that sees no key gives zeros.

    Raises:
        KernelUnavailable: the backend asked for cannot run this call.
    """
    return choose("hypercube_attention", backend, _TABLE, request).run(request)


def neighbours(places: int, device: torch.device) -> Tensor:
    """int32 (1,P,K): the places joined with each place, -1 for none.

    Flipping bit b of a Gray code mirrors the place within its aligned run of 2^(b+1) places: p xor (2^(b+1) - 1).
    """
    mirrors = [0, *((2 << bit) - 1 for bit in range((places - 1).bit_length()))]
    # a table made in inference mode could not be kept for a backward pass
    with torch.inference_mode(False):
        place = torch.arange(places, dtype=torch.int32, device=device)
        joined = place[:, None] ^ torch.tensor(mirrors, dtype=torch.int32, device=device)
        return torch.where(joined < places, joined, -1)[None]


_kept_neighbours = functools.lru_cache(maxsize=128)(neighbours)


def _triton_accepts(request: Request) -> str | None:
    query, key, block = request.query, request.key, request.block_size
    if not (on_cuda(query) or INTERPRETED):
        return f"it needs CUDA tensors, and query is on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, and there is {query.dtype}"
    if block not in SIDES:
        return f"it needs a block_size of {', '.join(map(str, SIDES))}, and it is {block}"
    if request.outside:
        return f"it has no global tokens, and num_global_tokens={request.outside}"
    if query.shape[2] != key.shape[2]:
        return f"it needs as many queries as keys, and there are {query.shape[2]} and {key.shape[2]}"
    if query.shape[3] > 128:
        return f"it takes up to 128 numbers a head, and there are {query.shape[3]}"
    return f"it has no dropout, and dropout={request.dropout}" if request.dropout else None


def _triton(request: Request) -> Tensor:
    from hf_attn.kernels.block_sparse import block_sparse_attention

    query, key, value, real, is_causal, scaling, _, block, _, _ = request
    listed = neighbours if torch.compiler.is_compiling() else _kept_neighbours
    table = listed(-(-key.shape[2] // block), query.device)
    return block_sparse_attention(query, key, value, table, real, scaling, block, is_causal)[0]


def _missing_flex() -> str | None:
    """Why torch has no flex_attention here, or None."""
    try:
        importlib.import_module("torch.nn.attention.flex_attention")
    except ImportError as error:
        return f"this torch has no flex_attention ({error})"
    return None


def _flex_accepts(request: Request) -> str | None:
    if request.dropout:
        return f"it has no dropout, and dropout={request.dropout}"
    device = request.query.device.type
    if device not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA, and query is on {device}"
    tensors = request.query, request.key, request.value
    if device == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no backward pass on a CPU, and an input requires a gradient"
    return None


def block_mask(queries: int, keys: int, block: int, outside: int, is_causal: bool, device: torch.device) -> Any:
    """flex_attention's BlockMask of the graph, without padding."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + (keys - queries)
        # global tokens have numbers below 0 here, and their places do not count
        place, other = (torch.div(x - outside, block, rounding_mode="floor") for x in (query, key))
        different = (place ^ (place >> 1)) ^ (other ^ (other >> 1))
        seen = (different & (different - 1) == 0) | (query < outside) | (key < outside)
        return seen & (key <= query) if is_causal else seen

    with torch.inference_mode(False):
        return flex.create_block_mask(visible, None, None, queries, keys, device=device)


_kept_block_mask = functools.lru_cache(maxsize=32)(block_mask)


@functools.cache
def _compiled_flex() -> Any:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(flex.flex_attention, dynamic=False)


def _flex(request: Request) -> Tensor:
    query, key, value, real, is_causal, scaling, _, block, outside, _ = request
    compiling = torch.compiler.is_compiling()
    masks = block_mask if compiling else _kept_block_mask
    mask = masks(query.shape[2], key.shape[2], block, outside, is_causal, query.device)
    plain = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    # compiled for CUDA alone: on a CPU that takes a C++ compiler
    attend = _compiled_flex() if on_cuda(query) and not compiling else plain

    def hide(score: Tensor, batch: Tensor, head: Tensor, n: Tensor, m: Tensor) -> Tensor:
        return score if real is None else torch.where(real[batch, m], score, float("-inf"))

    return attend(query, key, value, score_mod=None if real is None else hide, block_mask=mask, scale=scaling)


_TABLE = (
    # these two only when asked for by name, until their speed has been measured on a GPU
    Backend("triton", missing_triton, _triton_accepts, _triton, automatic=False),
    Backend("flex", _missing_flex, _flex_accepts, _flex, builtin=True, automatic=False),
    Backend("gathered", always, always, lambda request: request.gathered(), builtin=True),
)
BACKENDS = tuple(backend.name for backend in _TABLE)
"""Names of the backends. "auto" takes gathered."""

probe("hypercube_attention", _TABLE)
