"""Who computes the rows: grouped GEMMs over ragged groups."""

from megatron_dynmoe.experts.grouped import grouped_mlp

__all__ = ["grouped_mlp"]
