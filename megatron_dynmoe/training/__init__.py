"""Pretraining through megatron's own loop: the only room that imports ``megatron.training``."""
