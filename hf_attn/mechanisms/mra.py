"""MRA: softmax attention approximated by square blocks of several sides, small where the attention is large.

Paper: Zeng, Pal, Kline, Fung, Singh, "Multi Resolution Analysis (MRA) for Approximate Self-Attention", ICML 2022, in
the form of its code base (MRA-2, MRA-2-s), and for any list of block sides s_0 > s_1 > ... > s_k.

    L_s[x,y] = scaling <qbar_x, kbar_y>       qbar, kbar: means over the real tokens of a block of side s
    at side s_i the budgets[i] blocks of the largest rank are split into blocks of side s_{i+1}; the others stay
    log A_nm = L[x,y] of the one block that holds (n,m)        out_n = sum_m A_nm v_m / sum_m A_nm

MRA-2 has the sides (b, 1): exact in the chosen blocks, one number a block elsewhere. MRA-2-s keeps the last side only.

Shapes: query (B,H,N,D), key and value (B,H,M,D); nx x ny blocks at one side; G = B H; r, the ratio of two sides.
When to use: pretrained bidirectional models on long inputs, with little training or none; there is nothing to learn.
When not: causal models (a block mean holds later tokens, and the choice sees the whole matrix); short inputs, where the
budget covers every block and this is softmax attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.capabilities import Capabilities
from hf_attn.errors import Unsupported
from hf_attn.functional import masked_softmax, recomputed
from hf_attn.kernels import blocks as block_kernels
from hf_attn.kernels import flash
from hf_attn.module import AttentionModule, Call
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

PRIOR, DEAD = 5e3, 1e4
"""Added to the rank of a preferred block; taken from that of a block without a real query or a real key."""
GATHERED = {"cpu": 1 << 19}
"""Numbers in one gathered tensor, by device: more heads and samples take turns, in memory that is warm already."""
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class MraOptions(Options):
    """Options of `mra`.

    Attributes:
        block_size: b, the side of a coarse block.
        block_per_row: budget of split blocks, for each row of blocks on average: any row may get more or fewer.
        num_blocks: the whole budget, in place of block_per_row.
        mode: "full" (MRA-2), or "sparse" (MRA-2-s): the last side only, nothing elsewhere.
        prior_first: the first block rows and block columns are split first.
        prior_diag: blocks with |x - y| <= prior_diag // 2 are split first, if positive.
        selection: the rank is L minus the largest L of its row ("row_normalised"), or L ("plain").
        scales: sides, each dividing the one before; in place of block_size, None = (block_size, 1).
        budgets: blocks to split at every side but the last; in place of the other budgets.
        tile: (rows, columns) of grid tokens that make up a block of the largest side.
        cross_attention: the key padding mask says nothing about the queries, also where N = M.
    """

    mechanism: ClassVar[str] = "mra"

    block_size: int = 32
    block_per_row: int = 4
    num_blocks: int | None = None
    mode: str = "full"
    prior_first: int = 0
    prior_diag: int = 0
    selection: str = "row_normalised"
    scales: list[int] | None = None
    budgets: list[int] | None = None
    tile: tuple[int, int] | None = None
    cross_attention: bool = False

    def check(self) -> None:
        self.integer("block_size", 1)
        self.integer("prior_first", 0)
        self.integer("prior_diag", 0)
        self.integer("block_per_row", 0)
        if self.num_blocks is not None:
            self.integer("num_blocks", 0)
        self.one_of("mode", "full", "sparse")
        self.one_of("selection", "row_normalised", "plain")
        self.boolean("cross_attention")
        for option, minimum in (("scales", 1), ("budgets", 0), ("tile", 1)):
            value = getattr(self, option)
            numbers = value if isinstance(value, (list, tuple)) else [None]
            if value is not None and not all(type(n) is int and n >= minimum for n in numbers):
                raise self.refuse(option, f"must be a list of integers of at least {minimum}")
        sides = self.sides
        if self.scales is not None and (len(sides) < 2 or any(a <= b or a % b for a, b in zip(sides, sides[1:]))):
            raise self.refuse("scales", "must be two or more falling sides, each dividing the one before")
        if (self.scales is None) != (self.budgets is None) or (self.budgets and len(self.budgets) != len(sides) - 1):
            rule = f"does not fit scales={self.scales!r}: one number is needed for every side but the last"
            raise self.refuse("budgets", rule, "Give both, as in scales=[32, 8, 1], budgets=[64, 256].")
        if self.tile is not None and (len(self.tile) != 2 or math.prod(self.tile) != sides[0]):
            raise self.refuse("tile", f"must be (rows, columns) with rows * columns = {sides[0]}, the largest side")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the blocks, from large to small."""
        return (self.block_size, 1) if self.scales is None else tuple(self.scales)

    def splits(self, rows: int, columns: int) -> list[int]:
        """How many blocks are split at every side but the last, of a matrix of rows x columns of the largest blocks."""
        budget = rows * self.block_per_row if self.num_blocks is None else self.num_blocks
        numbers, there = [], rows * columns
        for i, wanted in enumerate([budget] if self.budgets is None else self.budgets):
            numbers.append(min(wanted, there))
            there = numbers[i] * (self.sides[i] // self.sides[i + 1]) ** 2
        return numbers


class Blocks(NamedTuple):
    """The tokens of a call, filled up to whole blocks; masked and filled-up places are zero."""

    query: Tensor
    """(B,H,N',D), scaled."""
    key: Tensor
    value: Tensor
    """(B,H,M',D)."""
    real_query: Tensor | None
    """(B|1,N') bool; None = all."""
    real_key: Tensor | None


class Sums(NamedTuple):
    """What every row of blocks gathers from some of the blocks, relative to exp(top)."""

    top: Tensor
    """(B,H,nx) the largest log weight, minus infinity where there is none."""
    mass: Tensor
    """(B,H,nx) the sum of the weights."""
    total: Tensor
    """(B,H,nx,D) the weighted sum of the values."""


class MultiResolutionAttention(AttentionModule):
    """Multi-resolution attention: exact in the blocks where attention is large, block means elsewhere."""

    name = "mra"
    options_class = MraOptions

    @classmethod
    def describe(cls, options: MraOptions) -> Capabilities:
        tiled = options.tile is not None
        cross = not tiled and not options.prior_diag
        derived = (("cross-attention", cross), ("more than two sides", len(options.sides) > 2), ("CLS token", tiled))
        return Capabilities(
            cross=cross,
            padding=not tiled,
            padding_equals_cutting="nowhere",
            sequence=not tiled,
            grid="used" if tiled else "ignored",
            prefix_tokens=tiled,
            attention_weights=True,
            derived=tuple(mode for mode, defined in derived if defined),
            pays_from="512 (2-core CPU, float32, D = 64, 4 blocks of 32 a row)",
        )

    @classmethod
    def host_defaults(cls, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        # the two sequences may happen to have the same length
        return {"cross_attention": True} if host.cross and "cross_attention" not in given else {}

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        tile, side = self.options.tile, self.options.sides[0]
        prefix, refused = arguments.get("num_prefix_tokens", 0), None
        grid: Any = arguments.get("grid")
        if arguments.get("is_causal"):
            rule = "is_causal=True: a block mean holds later tokens, and the choice of blocks sees the whole matrix"
            refused = rule, "Use a causal mechanism, such as softmax or rfa"
        elif query.dim() == key.dim() == 4 and query.shape[2] != key.shape[2] and not self.capabilities.cross:
            option = "tile" if tile else "prior_diag"
            rule = f"N={query.shape[2]} queries and M={key.shape[2]} keys with {option}={getattr(self.options, option)}"
            refused = f"{rule}, which needs queries and keys at the same places", f"Leave {option} out"
        elif tile and grid is None:
            refused = f"no grid was given, and tile={tile} groups the tokens of one", "Pass grid=(rows, columns)"
        elif tile and (min(grid) < 1 or grid[0] % tile[0] or grid[1] % tile[1]):
            rule = f"grid={tuple(grid)} is no whole number of tiles of {tile}"
            refused = rule, "Choose a tile whose sides divide those of the grid"
        elif tile and prefix > side:
            rule = f"num_prefix_tokens={prefix} with tile={tile}: they share one block of {side} places"
            refused = rule, "Use larger blocks, or fewer prefix tokens"
        elif tile and arguments.get("key_padding_mask") is not None:
            refused = f"key_padding_mask with tile={tile}", "Leave tile out, or pass whole grids"
        if refused:
            raise Unsupported(self.name, *refused)
        return super()._call(query, key, value, **arguments)

    # -- the definition --------------------------------------------------------------------------------------------

    def weights(self, call: Call) -> Tensor:
        call, place = self._in_tiles(call)
        blocks, sides = self._blocks(call), self.options.sides
        shape = blocks.query.shape[2] // sides[0], blocks.key.shape[2] // sides[0]
        there = torch.ones(1, 1, *shape, dtype=torch.bool, device=call.query.device)
        log_weight = call.query.new_full((1, 1, 1, 1), _NEGATIVE_INFINITY)
        for level, (side, number) in enumerate(zip(sides, [*self.options.splits(*shape), 0], strict=True)):
            logits, dead = self._logits(blocks, side), _dead(blocks, side)
            rank = self._rank(logits, dead, level, call).masked_fill(~there, _NEGATIVE_INFINITY).flatten(2)
            first = rank.argsort(dim=-1, descending=True, stable=True)[..., :number]
            split = torch.zeros_like(rank, dtype=torch.bool).scatter(2, first, True).view_as(logits)
            if self.options.mode == "full" or level == len(sides) - 1:
                log_weight = torch.where(_spread(there & ~split & ~dead, side), _spread(logits, side), log_weight)
            if level < len(sides) - 1:
                there = _spread(split, side // sides[level + 1])
        visible = log_weight != _NEGATIVE_INFINITY
        if blocks.real_query is not None:
            visible = visible & blocks.real_query[:, None, :, None]
        if blocks.real_key is not None:
            visible = visible & blocks.real_key[:, None, None]
        weights = masked_softmax(log_weight, visible)[:, :, : call.queries, : call.keys]
        return weights if place is None else weights.index_select(2, place).index_select(3, place)

    # -- shared by the forms ---------------------------------------------------------------------------------------

    def _in_tiles(self, call: Call) -> tuple[Call, Tensor | None]:
        """The call with its tokens in the order of the tiles, and the place (N,) of each; as it is, without tiles.

        Prefix tokens get a block of their own in front, filled up with masked places.
        """
        if self.options.tile is None or call.grid is None:
            return call, None
        (tall, wide), (rows, columns), prefix = self.options.tile, call.grid, call.num_prefix_tokens
        row = torch.arange(rows, device=call.query.device)[:, None]
        column = torch.arange(columns, device=call.query.device)
        tile = row // tall * (columns // wide) + column // wide
        place = (tile * tall * wide + row % tall * wide + column % wide).flatten()
        tokens, mask = rows * columns, None
        if prefix:
            tokens += tall * wide
            place = torch.cat((torch.arange(prefix, device=place.device), place + tall * wide))
            mask = torch.zeros(call.batch, tokens, dtype=torch.bool, device=place.device).index_fill(1, place, True)
        query, key, value = (
            x.new_zeros(*x.shape[:2], tokens, x.shape[3]).index_copy(2, place, x)
            for x in (call.query, call.key, call.value)
        )
        return replace(call, query=query, key=key, value=value, key_padding_mask=mask), place

    def _masks_queries(self, call: Call) -> bool:
        return call.queries == call.keys and not self.options.cross_attention

    def _blocks(self, call: Call) -> Blocks:
        side = self.options.sides[0]
        real_key = _real(call.key_padding_mask, call.key, side)
        real_query = real_key if self._masks_queries(call) else _real(None, call.query, side)
        query = _filled(call.scale * call.query, real_query)
        return Blocks(query, _filled(call.key, real_key), _filled(call.value, real_key), real_query, real_key)

    def _logits(self, blocks: Blocks, side: int) -> Tensor:
        """L (B,H,nx,ny) of all blocks of one side."""
        return _means(blocks.query, blocks.real_query, side) @ _means(blocks.key, blocks.real_key, side).mT

    def _rank(self, logits: Tensor, dead: Tensor, level: int, call: Call) -> Tensor:
        """(B,H,nx,ny) how early a block is split: the largest first."""
        options, rank = self.options, logits.detach()
        if options.selection == "row_normalised":
            rank = rank - rank.amax(dim=-1, keepdim=True)
        # a NaN has no order; first of all, as for topk and argsort, but one that can be compared
        rank = torch.where(rank.isnan(), math.inf, rank) - DEAD * dead
        if level:
            return rank
        x = torch.arange(rank.shape[2], device=rank.device)[:, None]
        y = torch.arange(rank.shape[3], device=rank.device)
        first = max(1, options.prior_first) if options.tile and call.num_prefix_tokens else options.prior_first
        if options.prior_diag:
            rank = rank + PRIOR * ((x - y).abs() <= options.prior_diag // 2)
        return rank + PRIOR * (x < first) + PRIOR * (y < first) if first else rank

    # -- the efficient form ----------------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        call, place = self._in_tiles(call)
        sides = self.options.sides
        rows, columns = (-(-n // sides[0]) for n in (call.queries, call.keys))
        numbers = self.options.splits(rows, columns)
        if sides[-1] == 1 and all(n == rows * columns * (sides[0] // s) ** 2 for n, s in zip(numbers, sides)):
            # every block is split: softmax attention
            mask = call.key_padding_mask
            out = flash.attention(call.query, call.key, call.value, key_padding_mask=mask, scaling=call.scale)
        else:
            out = self._multi_resolution(call, numbers)[:, :, : call.queries]
        if call.key_padding_mask is not None and self._masks_queries(call):
            out = out.masked_fill(~call.key_padding_mask[:, None, :, None], 0)
        return out if place is None else out.index_select(2, place)

    def _multi_resolution(self, call: Call, numbers: list[int]) -> Tensor:
        """(B,H,N',D), side by side: the blocks that stay, then what is inside the split ones."""
        blocks, sides = self._blocks(call), self.options.sides
        sums, split = self._coarse(blocks, 0, numbers[0], None, call)
        for level in range(1, len(numbers)):
            there = _spread(split, sides[level - 1] // sides[level])
            part, split = self._coarse(blocks, level, numbers[level], there, call)
            sums = _merge(sums, part)
        fine = self._fine(blocks, split, numbers[-1])
        sums = _merge(sums, fine) if self.options.mode == "full" else fine
        out = sums.total / torch.where(sums.mass > 0, sums.mass, 1)[..., None]
        return out if sides[-1] == 1 else out.repeat_interleave(sides[-1], dim=2)

    def _coarse(self, blocks: Blocks, level: int, number: int, there: Tensor | None, call: Call) -> tuple[Sums, Tensor]:
        """The blocks of one side that stay, and a mask (B,H,nx,ny) of those that are split. `there`: all of that side."""
        side = self.options.sides[level]
        logits = self._logits(blocks, side)
        rank = self._rank(logits, _dead(blocks, side), level, call)
        if there is not None:
            rank = rank.masked_fill(~there, _NEGATIVE_INFINITY)
        split = _largest(rank.flatten(2), number).view_as(rank)
        gone = split if there is None else split | ~there
        logits = (logits + self._log_count(blocks, side)[:, :, None]).masked_fill(gone, _NEGATIVE_INFINITY)
        top = logits.detach().amax(dim=-1)
        weight = (logits - _finite(top)[..., None]).exp()
        return Sums(top, weight.sum(dim=-1), weight @ _means(blocks.value, blocks.real_key, side)), split

    def _fine(self, blocks: Blocks, split: Tensor, number: int) -> Sums:
        """The blocks of the last side; `number` blocks of the side before it were split in every head."""
        side, block = self.options.sides[-1], blocks.key.shape[2] // split.shape[3]
        request = block_kernels.Request(
            blocks.query, blocks.key, blocks.value, split, blocks.real_key, block, side > 1,
            lambda: self._fine_in_torch(blocks, split, number),
        )  # fmt: skip
        return Sums(*block_kernels.block_sums(request))

    def _fine_in_torch(self, blocks: Blocks, split: Tensor, number: int) -> Sums:
        side, (rows, columns) = self.options.sides[-1], split.shape[2:]
        query = _means(blocks.query, blocks.real_query, side)
        key, value = (_means(x, blocks.real_key, side) for x in (blocks.key, blocks.value))
        count = self._log_count(blocks, side).expand(*split.shape[:2], -1)
        index = _indices(split.flatten(2), number)
        numbers = number * (key.shape[2] // columns) * key.shape[3]
        heads = max(1, GATHERED.get(key.device.type, 1 << 26) // max(1, numbers))
        parts = zip(*(x.flatten(0, 1).split(heads) for x in (query, key, value, count, index)), strict=True)
        sums = [recomputed(_gathered, *part, rows, columns) for part in parts]
        return Sums(*(torch.cat(x).unflatten(0, split.shape[:2]) for x in zip(*sums, strict=True)))

    def _log_count(self, blocks: Blocks, side: int) -> Tensor:
        """(B|1,1,ny) log of the number of real keys in a block, up to a constant."""
        if blocks.real_key is None:
            return blocks.key.new_full((1, 1, blocks.key.shape[2] // side), math.log(side / self.options.sides[-1]))
        return blocks.real_key.unflatten(1, (-1, side)).sum(dim=-1)[:, None].to(blocks.key.dtype).log()


def _real(mask: Tensor | None, x: Tensor, side: int) -> Tensor | None:
    """(B|1,N') where real tokens stand once x (B,H,N,D) is filled up to whole blocks; None = everywhere."""
    empty = -x.shape[2] % side
    if mask is None and not empty:
        return None
    mask = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) if mask is None else mask
    return functional.pad(mask, (0, empty))


def _filled(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B,H,N,D) at the N' places of `real`, zero where no real token stands."""
    if real is None:
        return x
    return functional.pad(x, (0, 0, 0, real.shape[1] - x.shape[2])).masked_fill(~real[:, None, :, None], 0)


def _means(x: Tensor, real: Tensor | None, side: int) -> Tensor:
    """(B,H,n,D) means over the real tokens of every block; zeros in a block without one."""
    if side == 1:
        return x
    parts = x.unflatten(2, (-1, side))
    if real is None:
        return parts.mean(dim=3)
    count = real.unflatten(1, (-1, side)).sum(dim=-1).clamp(min=1)
    return parts.sum(dim=3) / count[:, None, :, None].to(x.dtype)


def _dead(blocks: Blocks, side: int) -> Tensor:
    """(B|1,1,nx,ny) bool: no real query or no real key in the block."""

    def empty(x: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return torch.zeros(1, x.shape[2] // side, dtype=torch.bool, device=x.device)
        return ~real.unflatten(1, (-1, side)).any(dim=-1)

    return empty(blocks.query, blocks.real_query)[:, None, :, None] | empty(blocks.key, blocks.real_key)[:, None, None]


def _spread(x: Tensor, ratio: int) -> Tensor:
    """Every entry of a matrix as a block of ratio x ratio."""
    return x.repeat_interleave(ratio, dim=-2).repeat_interleave(ratio, dim=-1)


def _largest(rank: Tensor, number: int) -> Tensor:
    """bool, the `number` largest of every row; the first among equals, which topk alone does not promise."""
    if not number:
        return torch.zeros_like(rank, dtype=torch.bool)
    smallest = rank.topk(number, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = rank > smallest, rank == smallest
    return above | (equal & (equal.cumsum(dim=-1) <= number - above.sum(dim=-1, keepdim=True)))


def _indices(chosen: Tensor, number: int) -> Tensor:
    """(...,number) the places of the `number` True entries of every row, ascending."""
    length = chosen.shape[-1]
    from_end = torch.where(chosen, torch.arange(length, 0, -1, device=chosen.device), 0)
    return length - from_end.topk(number, dim=-1).values


def _gathered(query: Tensor, key: Tensor, value: Tensor, count: Tensor, index: Tensor, rows: int, columns: int) -> Sums:
    """Sums over the blocks x * columns + y in `index` (G,K): r x r products, added up by row of blocks.

    Args: query (G,rows r,D). key, value (G,columns r,D). count (G,columns r), its logarithm.
    """
    head = torch.arange(index.shape[0], device=index.device)[:, None]
    row, column = (head * rows + index // columns).flatten(), (head * columns + index % columns).flatten()
    query = query.unflatten(1, (rows, -1)).flatten(0, 1)
    key, value, count = (x.unflatten(1, (columns, -1)).flatten(0, 1) for x in (key, value, count))
    # what stays is made before what goes: the memory of the gathered tensors is then free in one piece
    total, mass = torch.zeros_like(query), query.new_zeros(query.shape[:2])
    top = torch.full_like(mass, _NEGATIVE_INFINITY)
    logits = query.index_select(0, row) @ key.index_select(0, column).mT
    logits += count.index_select(0, column)[:, None]
    top.scatter_reduce_(0, row[:, None].expand(-1, top.shape[1]), logits.detach().amax(dim=-1), "amax")
    logits -= _finite(top).index_select(0, row)[..., None]
    weight = logits.exp_()
    mass.index_add_(0, row, weight.sum(dim=-1))
    total.index_add_(0, row, weight @ value.index_select(0, column))
    return Sums(*(x.unflatten(0, (-1, rows)).flatten(1, 2) for x in (top, mass, total)))


def _merge(coarse: Sums, fine: Sums) -> Sums:
    """Both together, for the rows of blocks of `fine`: one row of `coarse` stands for r of them."""
    ratio = fine.top.shape[2] // coarse.top.shape[2]
    first, second = Sums(*(x.unsqueeze(3) for x in coarse)), Sums(*(x.unflatten(2, (-1, ratio)) for x in fine))
    top = torch.maximum(first.top, second.top)
    a, b = ((part.top - _finite(top)).exp() for part in (first, second))
    mass = a * first.mass + b * second.mass
    total = torch.addcmul(b[..., None] * second.total, a[..., None], first.total)
    return Sums(*(x.flatten(2, 3) for x in (top, mass, total)))


def _finite(top: Tensor) -> Tensor:
    """Something to subtract: 0 where there is no weight."""
    return torch.where(top == _NEGATIVE_INFINITY, 0, top)


register(
    Mechanism(
        name="mra",
        title="Multi-resolution attention",
        paper="Zeng, Pal, Kline, Fung, Singh, ICML 2022 (arXiv 2207.10284)",
        equation="out_n = sum_m A_nm v_m / sum_m A_nm,  log A_nm = s <qbar, kbar>, means over the block that holds (n,m); "
        "the blocks with the largest values are split into smaller ones",
        module_class=MultiResolutionAttention,
        example={"block_size": 4, "block_per_row": 2},
    )
)
