"""The three calls of transformers' MRA kernel in plain torch, with gradients, so that its model runs without CUDA.

Layouts are read off `transformers.models.mra.modeling_mra`: tokens of a block last, products stored (key, query).
"""

import torch
from torch import Tensor


class Substitute:
    """Stands in for `modeling_mra.mra_cuda_kernel`."""

    @staticmethod
    def mm_to_sparse(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        """(G,K,32,32) key-query products of the blocks x * columns + y in `indices` (G,K). query, key (G,n,D,32)."""
        columns, rows = key.shape[1], torch.arange(len(indices))[:, None]
        return key[rows, indices.long() % columns].mT @ query[rows, indices.long() // columns]

    @staticmethod
    def sparse_dense_mm(sparse: Tensor, indices: Tensor, dense: Tensor, rows: int) -> Tensor:
        """(G,rows,D,32) sum over the blocks of each row of dense (G,n,D,32) times sparse (G,K,32,32)."""
        group, columns = torch.arange(len(indices))[:, None], dense.shape[1]
        parts = dense[group, indices.long() % columns] @ sparse
        out = dense.new_zeros(len(indices), rows, *dense.shape[2:])
        return out.index_put((group.expand_as(indices), indices.long() // columns), parts, accumulate=True)

    @staticmethod
    def index_max(values: Tensor, indices: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The largest of values (G,32,K) for every query (G,rows*32), and the same for every block (G,32,K)."""
        place = (indices.long() // columns)[:, None].expand_as(values)
        top = values.new_full((len(indices), 32, rows), -1e5).scatter_reduce(2, place, values, "amax")
        return top.mT.flatten(1), top.gather(2, place)
