"""Shards to indexed datasets: layouts by hand, bad input, interruptions, and the command line."""

import gzip
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatron_dynmoe.data import encode
from megatron_dynmoe.data import preprocess as room
from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.indexed import validate_indexed
from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.shards import read_batches
from megatron_dynmoe.data.tokenizers import TokenizerFile

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TokenizerFile:
    """Words to ids by hand: a 0, b 1, c 2, any other word 3, end of document 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return TokenizerFile.find(path)


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a b c", "meta": {}}\n{"text": "b"}\n{"text": "c x </s>"}')
    return path


@pytest.fixture
def many(tmp_path) -> Path:
    """A shard of several batches: 4,000 documents, each another mixture of words, 3 MB."""
    path = tmp_path / "many.jsonl"
    texts = ("abc"[i % 3] + " b" * (i % 700) for i in range(4_000))
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("out*"))}


def test_layout_by_hand(shard, tokenizer, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    summary = preprocess([shard], tmp_path / "out", tokenizer=tokenizer, append_eod=True)
    data = IndexedDataset(str(tmp_path / "out"))
    # a literal "</s>" in the text is an unknown word like "x"; only the end of the document is token 4
    assert [document.tolist() for document in data] == [[0, 1, 2, 4], [1, 4], [2, 3, 3, 4]]
    assert data.document_indices.tolist() == [0, 1, 2, 3]
    assert (summary.documents, summary.tokens, summary.text_bytes, summary.max_token_id) == (3, 10, 14, 4)
    info = validate_indexed(tmp_path / "out", vocab_size=5, tokenizer_model=tokenizer.path)
    assert (info.documents, info.tokens, info.dtype, info.max_token_id) == (3, 10, "uint16", 4)
    assert info.metadata["vocab_size"] == 5 and info.metadata["append_eod"] is True
    assert sorted(outputs(tmp_path)) == ["out.bin", "out.idx", "out.json"]


def test_without_eod_and_with_another_key(tokenizer, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = tmp_path / "in.jsonl"
    path.write_text('{"content": "b c", "text": 7}\r\n')
    preprocess([path], tmp_path / "out", tokenizer=tokenizer, json_key="content")
    assert [document.tolist() for document in IndexedDataset(str(tmp_path / "out"))] == [[1, 2]]


def test_large_vocabulary_takes_int32(shard, tmp_path):
    from tokenizers import Tokenizer, models

    vocab = {"?": 0} | {f"w{i}": i for i in range(1, 65_500)}
    Tokenizer(models.WordLevel(vocab, unk_token="?")).save(str(tmp_path / "large.json"))
    # Megatron stores uint16 below 65,500 tokens
    assert preprocess([shard], tmp_path / "out", tokenizer=TokenizerFile.find(tmp_path / "large.json")).dtype == "int32"


def test_every_kind_of_bad_line(tokenizer, tmp_path, capsys):
    lines = [
        b'{"text": "a"}',
        b"",
        b'{"text": "b"',
        b'{"text": null}',
        b'{"title": "b"}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'["a"]',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "c", "score": NaN}',
        b'{"text": "c"}',
    ]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    summary = preprocess([path], tmp_path / "out", tokenizer=tokenizer)
    assert (summary.documents, summary.tokens, summary.bad_lines) == (2, 2, 10)
    reasons = ["blank", "not JSON", "is null", "no field 'text'", "is int", "not UTF-8 (byte 0xff at offset 10)"]
    reasons += ["not a JSON object but list", "is empty", "", "not JSON"]
    reported = capsys.readouterr().err
    for number, (reason, example) in enumerate(zip(reasons, summary.bad_line_examples, strict=True), start=2):
        assert example.startswith(f"{path}:{number}: ") and reason in example
        assert f"left out: {example}" in reported


def test_json_without_orjson_agrees(monkeypatch):
    monkeypatch.setitem(sys.modules, "orjson", None)
    monkeypatch.setattr(encode, "_loads", encode._json_loads())
    assert encode.text_of(b'{"text": "a\\u00e9"}', "text") == "aé"
    for line in (b'{"text": "c", "score": NaN}', b'{"text": "\\ud800"}', b'{"text": "a"', b'{"text": "a\nb"}'):
        with pytest.raises(ValueError):
            encode.text_of(line, "text")


def test_too_many_bad_lines(tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    assert preprocess([path], tmp_path / "out", tokenizer=tokenizer, max_bad_lines=2).bad_lines == 2
    for file in tmp_path.glob("out*"):
        file.unlink()
    with pytest.raises(DataError, match=r"in\.jsonl:3: blank line; that is bad line 2, and at most 1 are allowed"):
        preprocess([path], tmp_path / "out", tokenizer=tokenizer, max_bad_lines=1)
    assert outputs(tmp_path) == {}


def test_compressed_inputs_give_the_same(many, tokenizer, tmp_path):
    text = many.read_bytes()
    half = text.index(b"\n", len(text) // 2) + 1
    pack = zstandard.ZstdCompressor()
    # several gzip members and zstd frames in one file are common: parts that were put together with cat
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]))
    (tmp_path / "two.jsonl.zst").write_bytes(pack.compress(text[:half]) + pack.compress(text[half:]))
    plain, gz, zst = (
        b"\n".join(b.data for b in read_batches(p))
        for p in (many, tmp_path / "two.jsonl.gz", tmp_path / "two.jsonl.zst")
    )
    assert plain + b"\n" == text and gz == plain and zst == plain
    for path in (many, tmp_path / "two.jsonl.gz", tmp_path / "two.jsonl.zst"):
        assert sum(b.disk_bytes for b in read_batches(path, batch_bytes=1 << 16)) == path.stat().st_size


@pytest.mark.parametrize("batch_bytes", [1, 7, 100, 1 << 19])
def test_batches_are_whole_lines_with_their_numbers(tmp_path, batch_bytes, monkeypatch):
    monkeypatch.setattr("megatron_dynmoe.data.shards._READ_BYTES", 5)
    lines = [b"one", b"", b"three is longer than a block", b"4", b"", b"six"]
    for ending in (b"", b"\n"):
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"\n".join(lines) + ending)
        found = {}
        for batch in read_batches(path, batch_bytes=batch_bytes):
            found.update(enumerate(batch.data.split(b"\n"), batch.first_line))
        assert found == dict(enumerate(lines, 1))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("workers", [1, 2])
def test_truncated_input_is_an_error(suffix, workers, many, tokenizer, tmp_path):
    packed = (gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress)(many.read_bytes())
    cut = tmp_path / f"cut.jsonl{suffix}"
    cut.write_bytes(packed[:-10])
    with pytest.raises(DataError, match=rf"cut\.jsonl\{suffix}: the .* stream is truncated"):
        preprocess([cut], tmp_path / "out", tokenizer=tokenizer, workers=workers)
    cut.write_bytes(b"")
    with pytest.raises(DataError, match="truncated"):
        preprocess([cut], tmp_path / "out", tokenizer=tokenizer)
    cut.write_bytes(packed[:200] + b"????" + packed[204:])
    with pytest.raises(DataError, match=rf"cut\.jsonl\{suffix}: the .* stream is damaged"):
        preprocess([cut], tmp_path / "out", tokenizer=tokenizer)
    assert outputs(tmp_path) == {} and multiprocessing.active_children() == []


def test_workers_change_nothing(many, shard, tokenizer, tmp_path):
    written = []
    for workers in (1, 2):
        preprocess(
            [many, shard], tmp_path / "out", tokenizer=tokenizer, append_eod=True, workers=workers, overwrite=True
        )
        written.append(outputs(tmp_path))
    assert written[0] == written[1]
    assert multiprocessing.active_children() == []


@pytest.fixture
def interruptible():
    """A shell starts what runs in the background with SIGINT ignored, and the tests may be run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_interrupted_leaves_nothing(signum, error, many, tokenizer, tmp_path, monkeypatch, interruptible):
    count = room._count
    monkeypatch.setattr(encode, "MAX_BATCHES_IN_FLIGHT", 2)

    def interrupt(batch, summary, *rest):
        count(batch, summary, *rest)
        assert list(tmp_path.glob("out.bin.tmp-*"))  # it really is under way
        signal.raise_signal(signum)

    monkeypatch.setattr(room, "_count", interrupt)
    with pytest.raises(error):
        preprocess([many], tmp_path / "out", tokenizer=tokenizer, workers=2)
    assert outputs(tmp_path) == {} and multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_failure_keeps_the_dataset_that_was_there(shard, many, tokenizer, tmp_path):
    preprocess([shard], tmp_path / "out", tokenizer=tokenizer)
    before = outputs(tmp_path)
    with pytest.raises(DataError, match=r"out\.bin: already exists"):
        preprocess([many], tmp_path / "out", tokenizer=tokenizer)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(many.read_bytes())[:-1])
    with pytest.raises(DataError, match="truncated"):
        preprocess([many, broken], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert outputs(tmp_path) == before
    preprocess([many], tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert validate_indexed(tmp_path / "out").documents == 4_000


def test_a_dead_worker_is_an_error(many, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_BATCHES_IN_FLIGHT", 2)
    count = room._count

    def kill_one(*args):
        count(*args)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(room, "_count", kill_one)
    with pytest.raises(DataError, match="worker died"):
        preprocess([many], tmp_path / "out", tokenizer=tokenizer, workers=2)
    assert outputs(tmp_path) == {}


ABANDONING = """
import multiprocessing, os, signal, sys
from pathlib import Path
from megatron_dynmoe.data.encode import EncodeJob, encode_all
from megatron_dynmoe.data.shards import read_batches
from megatron_dynmoe.data.tokenizers import TokenizerFile
if __name__ == "__main__":
    job = EncodeJob(TokenizerFile.find(sys.argv[1]), "text", False)
    encoded = encode_all(read_batches(Path(sys.argv[2])), job, workers=2)
    next(encoded)
    assert not {"torch", "megatron"} & set(sys.modules), "preprocessing imports torch or megatron before it must"
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_parent(many, tokenizer, tmp_path):
    script = tmp_path / "abandon.py"
    script.write_text(ABANDONING)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(tokenizer.path), str(many)]
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=60)
    workers = [int(pid) for pid in run.stdout.split()]
    assert run.returncode == -signal.SIGKILL and workers
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # an ended orphan may wait for a container's init to collect it


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"workers": 0}, "workers is 0"),
        ({"max_bad_lines": -1}, "max_bad_lines is -1"),
        ({"inputs": ["gone.jsonl"]}, "gone.jsonl: no such file"),
        ({"inputs": ["."]}, "holds no training shard"),
        ({"inputs": ["empty.jsonl"]}, "holds no document"),
        ({"inputs": ["bad.jsonl"]}, r"the first of 1 bad lines is bad\.jsonl:1: blank"),
        ({"output_prefix": "folder/"}, "folder/: is a folder"),
    ],
)
def test_refusals(options, reason, shard, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard.rename("other.txt")
    Path("folder").mkdir()
    if options.get("inputs") not in (None, ["."], ["gone.jsonl"]):
        Path("empty.jsonl").touch()
        Path("bad.jsonl").write_text("\n")
    with pytest.raises(DataError, match=reason):
        preprocess(**{"inputs": ["other.txt"], "output_prefix": "out", "tokenizer": tokenizer} | options)
    assert outputs(tmp_path) == {}


def test_eod_needs_a_token(shard, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save(str(tmp_path / "bare.json"))
    with pytest.raises(DataError, match=r"bare\.json: has no end-of-document token"):
        preprocess([shard], tmp_path / "out", tokenizer=TokenizerFile.find(tmp_path / "bare.json"), append_eod=True)


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_lines_from_text_to_dataset(many, tmp_path, capsys):
    model = tmp_path / "t.model"
    assert tool("train_tokenizer")(["--corpus", str(many), "--output", str(model), "--vocab-size", "264"]) == 1
    assert "vocab_size is 264" in capsys.readouterr().err
    assert tool("train_tokenizer")(["--corpus", str(many), "--output", str(model), "--vocab-size", "300"]) == 1
    assert "cannot train a vocabulary of 300" in capsys.readouterr().err  # three letters do not make 300 pieces
    stdlib = tmp_path / "code.jsonl"
    stdlib.write_text(json.dumps({"text": Path(encode.__file__).read_text() * 3}) + "\n")
    assert tool("train_tokenizer")(["--corpus", str(stdlib), "--output", str(model), "--vocab-size", "400"]) == 0
    main = tool("preprocess_data")
    common = ["--tokenizer-model", str(model), "--append-eod", "--workers", "1"]
    first, second = ["--input", str(stdlib), "--output-prefix"], ["--input", str(many), "--output-prefix"]
    assert main([*first, str(tmp_path / "out1"), *second, str(tmp_path / "out2"), *common]) == 0
    assert "out2: 4000 documents" in capsys.readouterr().out
    assert validate_indexed(tmp_path / "out1", vocab_size=400, tokenizer_model=model).documents == 1
    assert main([*first, str(tmp_path / "out1"), *common]) == 1
    assert capsys.readouterr().err.strip().endswith("pass --overwrite to replace it.")
    with pytest.raises(SystemExit):
        main([*first, str(tmp_path / "out3"), "--input", str(many), *common])


def test_collect_command_line(tmp_path, capsys):
    main = tool("collect_corpus")
    assert main(["--output", str(tmp_path / "corpus"), "--megabytes", "0.1", "--zstd", "docs"]) == 0
    assert "docs/train-*" in capsys.readouterr().out
    assert main(["--output", str(tmp_path / "corpus")]) == 1
    assert "already holds a corpus" in capsys.readouterr().err
