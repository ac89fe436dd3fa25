"""One paper, one file. Importing this package registers every mechanism, here and in transformers."""

# ruff: noqa: F401, I001  # the order of the public list
from hf_attn.mechanisms import softmax, rfa, randomized, lara, eva, ripple, topological, mra, hypercube
from hf_attn.mechanisms import gau, mixed_chunk
