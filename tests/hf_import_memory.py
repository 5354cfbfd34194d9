"""Measures the memory of an import: makes a folder of MB megabytes and imports it; hf_import_memory.py OUT MB SHARD_MB.

Prints one line of JSON: what resident memory rose to above what it was before, and the time it took.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTH, FFN, EXPERTS = 256, 512, 8


def make_folder(folder: Path, megabytes: int, shard_bytes: int) -> None:
    """Layers of experts until there are so many bytes; zeros would be pages that nobody holds, so they are drawn."""
    from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
    from megatron_dynmoe.hf.export import _write_shards
    from megatron_dynmoe.hf.mapping import table
    from megatron_dynmoe.hf.training_args import model_fields

    layer = 4 * (4 * WIDTH * WIDTH + 3 * EXPERTS * WIDTH * FFN)
    layers = max(1, round(megabytes * 1e6 / layer))
    config = DynMoEHFConfig(
        **{"vocab_size": 512, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH // 4, "num_experts": EXPERTS},
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    fields = model_fields(config.to_dict(), folder / "config.json")
    parts = (part for row in table(fields, 512) for part in row.parts)
    _write_shards(((part.name, torch.randn(part.shape)) for part in parts), folder, shard_bytes)


def resident(line: str) -> float:
    """Megabytes: VmRSS now, VmHWM the most since the process began or the count was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1000


def main() -> None:
    from megatron_dynmoe.hf.importing import import_model

    out, megabytes, shard_mb = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    save_file({"warm": torch.zeros(1)}, out / "warm.safetensors")
    make_folder(out / "small", 1, 10_000_000)  # all that is imported late, and threads
    import_model(out / "small", out / "small-imported", progress=False)
    make_folder(out / "model", megabytes, int(shard_mb * 1e6))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, start = resident("VmRSS"), time.monotonic()
    done = import_model(out / "model", out / "imported", max_file_bytes=int(shard_mb * 1e6), progress=False)
    found = {"folder_mb": done.bytes / 1e6, "shards": done.shards, "peak_mb": resident("VmHWM") - before}
    print(json.dumps(found | {"seconds": time.monotonic() - start}))


if __name__ == "__main__":
    main()
