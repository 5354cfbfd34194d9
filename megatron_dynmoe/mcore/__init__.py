"""The adapter to megatron-core: the only room that imports it.  Nothing here computes what a room above could."""
