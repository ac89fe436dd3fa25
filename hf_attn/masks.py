"""The one place that turns what transformers passes as a mask into what mechanisms take.

transformers hands an attention function one of: None, a mask built by the function registered in
`AttentionMaskInterface` (ours: `mask_interface`), or a 4-D mask the user made. Mechanisms take a `key_padding_mask`
(B,M), a packing (`segments`), or a dense `attention_mask`. `interpret` maps the first to the second, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput


class Mask(NamedTuple):
    """At most one of the three is set; `is_causal` is False where the dense mask already holds the order.

    Shapes: key_padding (B,M) bool, True = real token; segments (B,N) integer, equal = same packed sequence;
    dense (B,1|H,N,M), bool (True = visible) or additive.
    """

    key_padding: Tensor | None = None
    segments: Tensor | None = None
    dense: Tensor | None = None
    is_causal: bool = False


def mask_interface(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask function every mechanism registers in `AttentionMaskInterface`.

    Plain causal or bidirectional order over a 2-D padding mask stays 2-D (B,M), so that linear mechanisms never see
    N x M numbers; anything else (packing, sliding windows, overlays, static caches) becomes the exact 4-D bool mask.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    plain = mask_function is None or mask_function in (causal_mask_function, bidirectional_mask_function)
    aligned = not isinstance(q_offset, Tensor) and kv_offset == 0 and q_offset + q_length == kv_length
    # cross-attention and encoders have no offset: every key is a candidate whatever the lengths
    aligned = aligned or (mask_function is bidirectional_mask_function and not isinstance(q_offset, Tensor))
    if plain and aligned and (attention_mask is None or attention_mask.shape[-1] >= kv_length):
        if attention_mask is None:
            return None
        mask = attention_mask[:, -kv_length:].to(torch.bool)
        return mask if torch.compiler.is_compiling() or not mask.all() else None
    kwargs = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def interpret(
    attention_mask: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    is_causal: bool,
    position_ids: Tensor | None = None,
    keep_dense: bool = True,
) -> Mask:
    """What `attention_mask` means for `queries` x `keys` attention.

    A 4-D mask that is nothing but padding or packing (with or without causal order) is recognised as such, so that
    mechanisms without dense masks can take it; `keep_dense` leaves it as it is. `position_ids` (B|1,N) that restart
    mark packed sequences where there is no mask at all, as flash attention in transformers has it.
    """
    if attention_mask is None:
        segments = None
        if position_ids is not None and not is_causal and queries == keys:
            segments = packed_segments(position_ids, batch)
        return Mask(segments=segments, is_causal=is_causal)
    if attention_mask.dim() == 2:
        if attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < keys:
            raise InvalidInput(
                f"attention_mask has shape {tuple(attention_mask.shape)}; a 2-D mask must be (B,M) = ({batch},{keys})."
            )
        return Mask(key_padding=attention_mask[:, -keys:].to(torch.bool).expand(batch, -1), is_causal=is_causal)
    if attention_mask.dim() != 4:
        raise InvalidInput(
            f"attention_mask has {attention_mask.dim()} dimensions; it must have 2 (B,M) or 4 (B,1|H,N,M)."
        )
    dense = attention_mask[..., :keys]
    if dense.shape[-2:] != (queries, keys):
        raise InvalidInput(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a 4-D mask must end in (N,M) = ({queries},{keys})."
        )
    if keep_dense or torch.compiler.is_compiling():
        return Mask(dense=dense)
    return recognise(dense, batch, is_causal) or Mask(dense=dense)


def recognise(dense: Tensor, batch: int, is_causal: bool) -> Mask | None:
    """The padding or packing that `dense` (B,1|H,N,M) is equal to, or None. Exact: the whole mask is compared."""
    visible = visible_pairs(dense)
    if visible is None or visible.shape[1] != 1:
        return None
    visible = visible[:, 0].expand(batch, -1, -1)
    queries, keys = visible.shape[-2:]
    for causal in (True, False) if is_causal else (False,):
        order = causal_order(queries, keys, visible.device) if causal else visible.new_ones(queries, keys)
        padding = visible[:, -1] if causal else visible.any(dim=1)
        if torch.equal(visible, order & padding[:, None]):
            return Mask(key_padding=None if padding.all() else padding, is_causal=causal)
        if queries == keys:
            # a packed row: a token starts a new sequence where it does not see the one before it
            starts = ~torch.diagonal(visible, offset=-1, dim1=1, dim2=2)
            segments = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))
            if torch.equal(visible, order & (segments[:, :, None] == segments[:, None])):
                return Mask(segments=segments, is_causal=causal)
    return None


def visible_pairs(dense: Tensor) -> Tensor | None:
    """A bool mask from a bool or additive one; None where an additive mask holds biases besides 0 and minus infinity."""
    if dense.dtype == torch.bool:
        return dense
    hidden = dense <= torch.finfo(dense.dtype).min / 2
    return ~hidden if ((dense == 0) | hidden).all() else None


def packed_segments(position_ids: Tensor, batch: int) -> Tensor | None:
    """(B,N) numbers of the packed sequences, or None where no row restarts its positions."""
    if position_ids.dim() != 2:
        return None
    if torch.compiler.is_compiling():
        raise InvalidInput(
            "position_ids in a compiled bidirectional model: whether sequences are packed cannot be read while tracing. "
            "Leave position_ids out, or run this model without torch.compile."
        )
    restarts = position_ids.diff(dim=-1) != 1
    if not restarts.any():
        return None
    return torch.nn.functional.pad(restarts.cumsum(-1), (1, 0)).expand(batch, -1)


def causal_order(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(N,M) bool: query n sees key m <= n + (M - N), so that the last query sees every key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Packing(NamedTuple):
    """Where the tokens of packed rows stand when every sequence gets a row of its own."""

    row: Tensor
    """(B,N) row of each token in the unpacked batch."""
    column: Tensor
    """(B,N) its place in that row."""
    key_padding: Tensor
    """(S,L) bool of the unpacked batch: S sequences, the longest has L tokens."""

    @classmethod
    def of(cls, segments: Tensor) -> Packing:
        """From segment numbers (B,N) that are constant on runs."""
        new = torch.nn.functional.pad(segments.diff(dim=-1) != 0, (1, 0), value=True)
        row = new.flatten().cumsum(0).sub(1).view_as(segments)
        place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        start = torch.where(new, place, 0).cummax(dim=-1).values
        column = place - start
        mask = torch.zeros(int(row.max()) + 1, int(column.max()) + 1, dtype=torch.bool, device=segments.device)
        mask[row, column] = True
        return cls(row, column, mask)

    def unpack(self, tokens: Tensor) -> Tensor:
        """(B,H,N,D) -> (S,H,L,D), zeros in the padding."""
        out = tokens.new_zeros(self.key_padding.shape[0], self.key_padding.shape[1], tokens.shape[1], tokens.shape[3])
        return out.index_put((self.row, self.column), tokens.transpose(1, 2)).transpose(1, 2)

    def pack(self, tokens: Tensor) -> Tensor:
        """(S,H,L,D) -> (B,H,N,D)."""
        return tokens.transpose(1, 2)[self.row, self.column].transpose(1, 2)
