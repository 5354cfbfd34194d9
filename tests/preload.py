"""Imported once by the fork server of tests/ranks.py: everything slow that a rank needs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron_dynmoe import host

torch.set_num_threads(1)
host.enable()

import megatron_dynmoe.training.pretrain  # noqa: E402, F401
