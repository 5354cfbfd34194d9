"""Exports of checkpoints that were written before, and exports that were written before, are what they were."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM
from tests.written_before import NAMES, recorded, unpacked


def check(model, expected: dict[str, torch.Tensor]) -> None:
    """Logits of magnitude one within 1e-6, which is float32 sums in another order, and the same greedy text."""
    with torch.no_grad():
        logits = model.eval()(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)
    prompt = expected["tokens"][:1, :4]
    run = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **run), expected["text"])


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_is_exported_to_the_same_model(tmp_path: Path, name: str) -> None:
    folder = unpacked(name, tmp_path / "before")
    export(folder / "save", tmp_path / "out", progress=False)
    before, now = (load_file(place / "model.safetensors") for place in (folder / "export", tmp_path / "out"))
    assert before.keys() == now.keys()
    assert all(torch.equal(before[key], now[key]) for key in before)
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder / "export", tmp_path / "out"))
    # What another method reads has no place in the new one; all else has the same name and value.
    gone = {key: value for key, value in old.items() if key not in new}
    unread = {"cosine_scale": 1.0, "num_experts_per_tok": 2, "top_p_threshold": 0.4, "trained_cosine_scale": False}
    assert gone.items() <= unread.items()
    assert {key: value for key, value in old.items() if key in new} == {k: v for k, v in new.items() if k in old}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    check(model, recorded(folder)[1])


@pytest.mark.parametrize("name", NAMES)
def test_an_old_export_loads_with_its_own_code_and_with_todays(tmp_path: Path, name: str) -> None:
    folder = unpacked(name, tmp_path / "before")
    _, expected = recorded(folder)
    check(AutoModelForCausalLM.from_pretrained(folder / "export", trust_remote_code=True), expected)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / "export" / file, bare)
    check(DynMoEForCausalLM.from_pretrained(bare, config=DynMoEHFConfig.from_pretrained(bare)), expected)
