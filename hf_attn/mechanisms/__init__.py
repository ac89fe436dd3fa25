"""One paper, one file. Importing this package registers every mechanism, here and in transformers."""

# the order of the public list
from hf_attn.mechanisms import softmax, rfa, randomized, lara, eva, ripple, topological, mra, hypercube  # noqa: F401, I001
from hf_attn.mechanisms import deformable, dynamic_conv  # noqa: F401
