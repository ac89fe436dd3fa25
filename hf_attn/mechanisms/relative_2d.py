"""Softmax attention on a token grid with learned relative logits, one table for rows and one for columns.

Paper: Bello, Zoph, Vaswani, Shlens, Le, "Attention Augmented Convolutional Networks", ICCV 2019, the attention of its
augmented convolution. Prefix tokens, smaller grids and the start at zero are choices made here.

    logit_nm = s * ( <q_n, k_m> + <q_n, rel_width[jx - ix + columns - 1]> + <q_n, rel_height[jy - iy + rows - 1]> )
    out_n = softmax_m(logit_nm) . v        over the visible keys; (iy, ix) is the patch of n, (jy, jx) that of m

Shapes: query, key and value (B,H,N,D), N = prefix tokens + rows * columns in raster order; rel_height (2 rows - 1, D)
and rel_width (2 columns - 1, D), shared by the heads.
When to use: vision models on a token grid; a pretrained ViT is unchanged at the start and learns positions from there.
When not: images larger than the tables; text; to save work, which is quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import one_hot, pad

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import masked_softmax
from hf_attn.kernels import flash
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

TILE = 256
"""Tokens up to which a CPU takes the relative logits of a head as one matrix, which stays in its caches."""


@dataclass(frozen=True)
class Relative2dOptions(Options):
    """Options of `relative_2d`.

    Attributes:
        grid_size: required: (rows, columns) of the largest grid, for which the tables are made.
    """

    mechanism: ClassVar[str] = "relative_2d"

    grid_size: tuple[int, int] | list[int] | None = None

    def check(self) -> None:
        size = self.grid_size
        if size is None:
            raise self.refuse("grid_size", "is required", "Set (rows, columns) of the largest grid.")
        if not isinstance(size, (tuple, list)) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
            raise self.refuse("grid_size", "must be two integers of at least 1, (rows, columns)")

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of `grid_size`."""
        rows, columns = self.grid_size or (0, 0)
        return rows, columns


class Relative2dAttention(AttentionModule):
    """Softmax attention on a token grid, with learned relative logits by row and by column."""

    name = "relative_2d"
    options_class = Relative2dOptions

    def __init__(self, num_heads: int, head_dim: int, options: Relative2dOptions):
        super().__init__(num_heads, head_dim, options)
        rows, columns = options.sides
        self.rel_height = nn.Parameter(torch.empty(2 * rows - 1, head_dim))
        self.rel_width = nn.Parameter(torch.empty(2 * columns - 1, head_dim))

    @classmethod
    def describe(cls, options: Relative2dOptions) -> Capabilities:
        return Capabilities(
            sequence=False,
            grid="used",
            prefix_tokens=True,
            learned=True,
            attention_weights=True,
            dropout=True,
            derived=("CLS token", "grids smaller than the tables"),
            pays_from="none up to 4096 (2-core CPU, float32, D = 64)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        if "grid_size" in given:
            return {}
        # a sequence model has no grid, and is refused for that and not for an option it cannot know
        return {"grid_size": list(host.grid or (1, 1))}

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.rel_height)
        torch.nn.init.zeros_(self.rel_width)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        grid, size = arguments.get("grid"), self.options.sides
        if grid is not None:
            if min(grid) < 1:
                raise InvalidInput(f"relative_2d: grid={tuple(grid)} must be two numbers of at least 1.")
            if any(n > largest for n, largest in zip(grid, size, strict=True)):
                raise Unsupported(
                    self.name,
                    f"grid={tuple(grid)} is larger than grid_size={size}, for which the tables were made",
                    "Resize the image, or set a larger grid_size",
                )
        return super()._call(query, key, value, **arguments)

    def tables(self, call: Call) -> tuple[Tensor, Tensor]:
        """The central parts of the tables that the grid of this call reads: (2 rows - 1, D), (2 columns - 1, D)."""
        dtype, (rows, columns) = call.query.dtype, _grid(call)
        return _centre(self.rel_height, rows).to(dtype), _centre(self.rel_width, columns).to(dtype)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        prefix, (rows, columns) = call.num_prefix_tokens, _grid(call)
        patch = torch.arange(rows * columns, device=call.query.device)
        row, column = patch // columns, patch % columns
        height, width = self.rel_height.to(call.query.dtype), self.rel_width.to(call.query.dtype)
        most_rows, most_columns = self.options.sides
        relative = height[row - row[:, None] + most_rows - 1] + width[column - column[:, None] + most_columns - 1]
        logits = call.query @ call.key.transpose(-1, -2)
        relative = (call.query[:, :, prefix:, None] * relative).sum(dim=-1)
        return masked_softmax(call.scale * (logits + pad(relative, (prefix, 0, prefix, 0))), call.visible())

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        return relative_attention(
            call.query,
            call.key,
            call.value,
            self.tables(call),
            call.scale,
            prefix=call.num_prefix_tokens,
            key_padding_mask=call.key_padding_mask,
            dropout=call.dropout,
        )


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    scaling: float,
    *,
    prefix: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention on a grid with relative logits by row and column.

    Up to TILE tokens on a CPU: the relative logits of a head are one matrix, which SDPA adds. Otherwise plain attention over
    D + rows + columns channels: the relative logits of a query become channels of the query, and the key marks its row
    and its column by ones. So any kernel adds them, and nothing N x N is stored.

    Args:
        query, key: (B,H,N,D). value: (B,H,N,E), E channels.
        tables: (2 rows - 1, D) and (2 columns - 1, D); None = no relative logits.
        scaling: factor of all logits.
        prefix: tokens before the grid.
        key_padding_mask: bool (B,N). dropout: probability of dropping a weight.

    Returns:
        (B,H,N,E). Without visible keys zeros.
    """
    if query.device.type == "cpu" and query.shape[2] <= TILE:
        bias = None
        if tables is not None:
            height, columns_table = (scaling * table.to(query.dtype) for table in tables)
            bias = relative_bias(query[:, :, prefix:], height, columns_table)
            if prefix:
                bias = pad(bias, (prefix, 0, prefix, 0))
        if key_padding_mask is not None:
            bias = query.new_zeros(()) if bias is None else bias
            bias = torch.where(key_padding_mask[:, None, None], bias, float("-inf"))
        return functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    width = value.shape[3]
    if tables is not None:
        height, columns_table = (table.to(query.dtype) for table in tables)
        by_row, by_column = relative_logits(query[:, :, prefix:], height, columns_table)
        rows, columns = by_row.shape[-1], by_column.shape[-1]
        patch = torch.arange(rows * columns, device=query.device)
        place = torch.cat((one_hot(patch // columns, rows), one_hot(patch % columns, columns)), dim=-1)
        place = pad(place.to(key.dtype), (0, 0, prefix, 0)).expand(*key.shape[:2], -1, -1)
        query = torch.cat((query, pad(torch.cat((by_row, by_column), dim=-1), (0, 0, prefix, 0))), dim=-1)
        key = torch.cat((key, place), dim=-1)
    # kernels want values as wide as keys
    wide = max(width, query.shape[3])
    query, key, value = (pad(x, (0, wide - x.shape[3])) for x in (query, key, value))
    out = flash.attention(query, key, value, key_padding_mask=key_padding_mask, scaling=scaling, dropout=dropout)
    return out[..., :width]


def relative_bias(query: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """(B,H,N,N) relative logits of all pairs of patches, without the scaling. Arguments of `relative_logits`."""
    by_row, by_column = _by_key(query, height, width)
    return (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


def relative_logits(query: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """<q_n, height[jy - iy + rows - 1]> for every row jy of keys, and the same for columns, without the scaling.

    Args:
        query: (B,H,rows*columns,D) in raster order. height: (2 rows - 1, D). width: (2 columns - 1, D).

    Returns:
        (B,H,N,rows) and (B,H,N,columns). The relative logit of a pair is the sum of one number of each.
    """
    by_row, by_column = _by_key(query, height, width)
    return by_row.flatten(2, 3), by_column.flatten(2, 3)


def _by_key(query: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """`relative_logits` as (B,H,rows,columns,rows) and (B,H,rows,columns,columns).

    Views of one product with both tables: where a query moves by one, the window into its displacements moves back by one.
    """
    rows, columns = (height.shape[0] + 1) // 2, (width.shape[0] + 1) // 2
    # a product is a new tensor, so its first number is the first of its storage
    displaced = (query @ torch.cat((height, width)).T).contiguous()
    sample, head, patch, _ = displaced.stride()
    shape, row = (*query.shape[:2], rows, columns), columns * patch
    by_row = displaced.as_strided((*shape, rows), (sample, head, row - 1, patch, 1), rows - 1)
    start = height.shape[0] + columns - 1
    return by_row, displaced.as_strided((*shape, columns), (sample, head, row, patch - 1, 1), start)


def _centre(table: Tensor, length: int) -> Tensor:
    """The 2 length - 1 entries around displacement 0."""
    start = (table.shape[0] + 1) // 2 - length
    return table[start : start + 2 * length - 1]


def _grid(call: Call) -> tuple[int, int]:
    """Rows and columns of a checked call, which has a grid."""
    rows, columns = call.grid or (0, 0)
    return rows, columns


register(
    Mechanism(
        name="relative_2d",
        title="Attention with 2-D relative logits",
        paper="Bello et al., ICCV 2019 (arXiv 1904.09925)",
        equation="out_n = softmax_m(s (<q_n, k_m> + <q_n, rel_width[jx - ix + columns - 1]> "
        "+ <q_n, rel_height[jy - iy + rows - 1]>)) . v",
        module_class=Relative2dAttention,
        example={"grid_size": [3, 5]},
    )
)
