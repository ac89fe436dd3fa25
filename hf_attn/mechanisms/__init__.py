"""One paper, one file. Importing this package registers every mechanism, here and in transformers."""

from hf_attn.mechanisms import (  # noqa: F401, I001  # the order of the public list
    softmax,
    rfa,
    randomized,
    lara,
    eva,
    ripple,
    topological,
    mra,
    hypercube,
    generalized,
    relative_2d,
)
