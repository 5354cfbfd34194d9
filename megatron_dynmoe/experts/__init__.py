"""Who computes the rows: grouped GEMMs over ragged groups, chunks of rows on a CPU; and experts that need no row."""

from megatron_dynmoe.experts.grouped import grouped_mlp
from megatron_dynmoe.experts.zero_computation import zero_computation

__all__ = ["grouped_mlp", "zero_computation"]
