"""Routers that are not in megatron_dynmoe; each module registers one."""
