"""What tests/fixtures holds: a checkpoint and an export of two methods, written before methods had a registry."""

import json
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("dynmoe", "moe-plus-plus")


def unpacked(name: str, folder: Path) -> Path:
    """The fixture's files in a new folder."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def recorded(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Flags and steps of the training; tokens, logits and text of the export."""
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "expected.safetensors")
