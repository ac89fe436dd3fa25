"""Looking into mechanisms and models."""

from hf_attn.analysis.nip import named_graph, nip

__all__ = ["named_graph", "nip"]
