"""Processes around training: the nodes' supervisors (``python -m megatron_dynmoe.launch``), and ends with a parent.

Imports neither torch nor megatron: a supervisor starts at once, and a rank is watched while it still imports.
"""
