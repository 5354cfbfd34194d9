"""The check of indexed datasets, on files written byte by byte after the format."""

import json
import struct

import numpy as np
import pytest

from megatron_dynmoe.data import indexed
from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.indexed import validate_indexed

# two documents: [5, 1, 7] in two sequences, and [2]
LENGTHS, OFFSETS, BOUNDS, TOKENS = [2, 1, 1], [0, 4, 6], [0, 2, 3], [5, 1, 7, 2]


def index_bytes(*, code=8, lengths=LENGTHS, offsets=OFFSETS, bounds=BOUNDS) -> bytes:
    header = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code)
    header += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(bounds))
    return header + np.int32(lengths).tobytes() + np.int64(offsets).tobytes() + np.int64(bounds).tobytes()


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "data.bin").write_bytes(np.uint16(TOKENS).tobytes())
    (tmp_path / "data.idx").write_bytes(index_bytes())
    return tmp_path / "data"


def refusal(prefix, **options) -> str:
    with pytest.raises(DataError) as caught:
        validate_indexed(prefix, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and str(prefix) in sentence
    return sentence


def test_whole_dataset(prefix):
    info = validate_indexed(prefix, vocab_size=8)
    assert (info.documents, info.sequences, info.tokens, info.bin_bytes) == (2, 3, 4, 8)
    assert (info.dtype, info.max_token_id, info.metadata) == ("uint16", 7, {})
    assert validate_indexed(prefix).max_token_id is None


@pytest.mark.parametrize("missing, other", [(".idx", "data.bin"), (".bin", "data.idx")])
def test_missing_file(prefix, missing, other):
    prefix.with_suffix(missing).unlink()
    assert f"data{missing}: no such file, though {other} is there" in refusal(prefix)


def test_missing_dataset(tmp_path):
    assert "give a path prefix that has both" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("kept", [0, 5, 33, 34, 60, len(index_bytes()) - 1])
def test_truncated_index(prefix, kept):
    prefix.with_suffix(".idx").write_bytes(index_bytes()[:kept])
    assert f"is truncated, {kept} bytes where" in refusal(prefix)


def test_longer_index(prefix):
    prefix.with_suffix(".idx").write_bytes(index_bytes() + b"\0" * 3)
    validate_indexed(prefix)  # one mode per sequence: a multimodal dataset
    prefix.with_suffix(".idx").write_bytes(index_bytes() + b"\0" * 2)
    assert "header announces" in refusal(prefix)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"text": "jsonl"}' * 9, "not an index of Megatron's format"),
        (index_bytes(code=6), "dtype code 6"),
        (index_bytes(offsets=[0, 4, 5]), "contradict"),
        (index_bytes(bounds=[0, 2, 2]), "contradict"),
        (index_bytes(lengths=[2, 3, -1], offsets=[0, 4, 10]), "contradict"),
    ],
)
def test_broken_index(prefix, content, reason):
    prefix.with_suffix(".idx").write_bytes(content)
    assert reason in refusal(prefix)


@pytest.mark.parametrize(
    "tokens, reason", [(TOKENS[:-1], "is truncated, 6 bytes"), ([*TOKENS, 1], "do not belong together")]
)
def test_bin_of_another_size(prefix, tokens, reason):
    prefix.with_suffix(".bin").write_bytes(np.uint16(tokens).tobytes())
    assert reason in refusal(prefix)


def test_token_beyond_vocabulary(prefix):
    assert "holds token 7, but the vocabulary has 7 tokens" in refusal(prefix, vocab_size=7)


def test_sidecar_is_believed_when_it_describes_the_data(prefix):
    sidecar = prefix.with_suffix(".json")
    sidecar.write_text(json.dumps({"tokens": 4, "max_token_id": 9}))
    assert "holds token 9" in refusal(prefix, vocab_size=8)
    sidecar.write_text(json.dumps({"tokens": 5, "max_token_id": 9}))
    assert validate_indexed(prefix, vocab_size=8).metadata == {}
    sidecar.write_text("{")
    assert validate_indexed(prefix, vocab_size=8).metadata == {}


def test_sidecar_that_the_tokens_contradict(prefix):
    prefix.with_suffix(".json").write_text(json.dumps({"tokens": 4, "max_token_id": 2}))
    assert "holds token 7, but the vocabulary has 7 tokens" in refusal(prefix, vocab_size=7)
    assert "max_token_id is 2, but data.bin holds token 7" in refusal(prefix, vocab_size=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_token_id": "7"},
        {"max_token_id": [7]},
        {"max_token_id": None},
        {"max_token_id": True},
        {"max_token_id": 7.5},
        {"vocab_size": "x" * 1000},
        {"tokenizer": "file"},
        {"tokenizer": {"sha256": 3}},
    ],
)
def test_sidecar_with_a_wrong_type(prefix, tmp_path, wrong):
    prefix.with_suffix(".json").write_text(json.dumps({"tokens": 4, "max_token_id": 7} | wrong))
    message = refusal(prefix, vocab_size=8, tokenizer_model=tmp_path / "none")
    assert next(iter(wrong)) in message and "accepted" in message and len(message) < 400


def test_negative_token(prefix):
    prefix.with_suffix(".bin").write_bytes(np.int16([5, 1, -7, 2]).tobytes())
    prefix.with_suffix(".idx").write_bytes(index_bytes(code=3))
    assert "holds token -7" in refusal(prefix, vocab_size=8)


def test_ranks_together_read_all_of_large_data(prefix, monkeypatch):
    monkeypatch.setattr(indexed, "SCAN_BYTES", 4)
    monkeypatch.setattr(indexed, "_SCAN_WINDOWS", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found.append(validate_indexed(prefix, vocab_size=8).max_token_id)
    assert found == [7, 2]  # tokens 5 and 7, tokens 1 and 2


def test_large_data_is_sampled_to_its_ends(prefix, monkeypatch):
    monkeypatch.setattr(indexed, "SCAN_BYTES", 4)
    monkeypatch.setattr(indexed, "_SCAN_WINDOWS", 2)
    # two windows of one token: the first and the last; 7 lies between them
    assert validate_indexed(prefix, vocab_size=6).max_token_id == 5


def test_other_tokenizer(prefix, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"one")
    made_by = {"file": "tokenizer.model", "sha256": indexed.file_sha256(model)}
    prefix.with_suffix(".json").write_text(
        json.dumps({"tokens": 4, "max_token_id": 7, "vocab_size": 8, "tokenizer": made_by})
    )
    validate_indexed(prefix, vocab_size=8, tokenizer_model=model)
    validate_indexed(prefix, vocab_size=8, tokenizer_model="organisation/a-name-on-a-hub")
    model.write_bytes(b"two")
    assert "was made with another tokenizer (tokenizer.model, 8 tokens)" in refusal(prefix, tokenizer_model=model)
