"""One paper, one file. Importing this package registers every mechanism, here and in transformers."""

# ruff: noqa: F401, I001  # the order is that of the public list
from hf_attn.mechanisms import softmax
from hf_attn.mechanisms import rfa
from hf_attn.mechanisms import randomized
from hf_attn.mechanisms import lara
from hf_attn.mechanisms import eva
from hf_attn.mechanisms import ripple
from hf_attn.mechanisms import topological
from hf_attn.mechanisms import mra
from hf_attn.mechanisms import hypercube
from hf_attn.mechanisms import context_pool
from hf_attn.mechanisms import vars
from hf_attn.mechanisms import generalized
from hf_attn.mechanisms import deformable
from hf_attn.mechanisms import dynamic_conv
from hf_attn.mechanisms import relative_2d
from hf_attn.mechanisms import gau
from hf_attn.mechanisms import mixed_chunk
