"""Imported once by the fork server of tests/ranks.py: everything slow that a rank needs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Rank tests are about layouts and run on gloo everywhere: several ranks cannot share one GPU through NCCL, and CUDA
# does not survive a fork. Tests that need a GPU run in pytest's own process.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from megatron_dynmoe import host

torch.set_num_threads(1)
host.enable()

import queue  # noqa: E402

import megatron.core.tokenizers.text  # noqa: E402, F401  (the null tokenizer of the tests brings transformers along)
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

import megatron_dynmoe.training.pretrain  # noqa: E402, F401

# Results of checkpoint writers go through a queue in a process of its own, which every saving rank would start anew, at
# three seconds each. Saves that are not asynchronous write from threads of the rank, for which a plain queue does.
filesystem_async._results_queue = queue.Queue()
