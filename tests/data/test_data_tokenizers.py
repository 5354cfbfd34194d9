"""Training, encoders, and the Hugging Face tokenizer against SentencePiece."""

import io
import json
import random
import re
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from megatron_dynmoe.data import tokenizers
from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.tokenizers import TokenizerFile, differing_documents, to_hf_tokenizer, train_tokenizer

TRICKY = [
    "",
    " ",
    "\n",
    "a literal </s> and <s> and <unk>",
    "</s>",
    "<0x0A>",
    "def f(x):\n        return x\n\n\n\tpass  ",
    "  two before, two after  ",
    "12345 3.14",
    "naïve Ωmega 漢字 🦜 \u200b\0\r",
    "a" * 300,
    " " * 300,
    "\n" * 50 + " " * 7,
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """2,000 pieces of the standard library: its sources cut at top-level definitions."""
    pieces = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        pieces += re.split(r"(?m)^(?=def |class )", path.read_text(encoding="utf-8", errors="replace"))
    assert len(pieces) >= 2_000
    return pieces[:2_000]


@pytest.fixture(scope="module")
def shard(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "train-00000.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


@pytest.fixture(scope="module")
def model(shard, tmp_path_factory) -> Path:
    return train_tokenizer(
        [shard], tmp_path_factory.mktemp("model") / "tokenizer", vocab_size=2_000, sample_megabytes=1
    )


@pytest.fixture(scope="module")
def llama_model(documents, tmp_path_factory) -> Path:
    """As LLaMA's own: a space is put before the text."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(documents[:300]).split("\n")),
        model_writer=content,
        vocab_size=1_000,
        **{**tokenizers._LLAMA_SETTINGS, "add_dummy_prefix": True},
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(content.getvalue())
    return path


def adversarial(processor, count: int) -> list[str]:
    """Random strings of what makes merges ambiguous: repeated characters, runs of spaces, pieces glued together."""
    rng = random.Random(0)
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(processor.get_piece_size())]
    alphabets = [
        "ab",
        "- =_.",
        "elfs \u2581",
        [" ", "  ", "\n", "    ", "self"],
        ["</s>", "<s>", "<unk>", " ", "s"],
        pieces,
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(count)]


def test_trained_like_llama(model):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert processor.get_piece_size() == 2_000
    assert [processor.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert sum(processor.is_byte(i) for i in range(2_000)) == 256
    assert processor.encode("x 2024", out_type=str)[-4:] == ["2", "0", "2", "4"]
    assert len(processor.encode("        ")) == 1  # indentation is one token


@pytest.mark.parametrize("text", TRICKY)
def test_decoding_gives_the_text_back(model, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # text never becomes a control token


def test_training_is_deterministic(shard, model, tmp_path):
    again = train_tokenizer([shard], tmp_path / "again.model", vocab_size=2_000, sample_megabytes=1)
    assert again.read_bytes() == model.read_bytes()


def test_training_refuses(shard, model, tmp_path):
    with pytest.raises(DataError, match="vocab_size is 100; it must be at least 300"):
        train_tokenizer([shard], tmp_path / "t", vocab_size=100)
    with pytest.raises(DataError, match=r"cannot train a vocabulary of 90000 .*Vocabulary size"):
        train_tokenizer([shard], tmp_path / "t", vocab_size=90_000, sample_megabytes=0.05)
    with pytest.raises(DataError, match="already exists"):
        train_tokenizer([shard], model, vocab_size=300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["model", "llama_model"])
def test_hf_tokenizer_gives_the_same_ids(which, request, documents, tmp_path):
    path = request.getfixturevalue(which)
    to_hf_tokenizer(path, tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = documents + TRICKY + adversarial(processor, 1_000)
    assert differing_documents(path, tmp_path, texts) == (0, len(texts))


def test_differing_documents_can_count(model, llama_model, tmp_path):
    to_hf_tokenizer(llama_model, tmp_path)
    assert differing_documents(model, tmp_path, ["some text", ""]) == (1, 2)


def test_hf_tokenizer_knows_its_special_tokens(model, tmp_path):
    from transformers import AutoTokenizer

    to_hf_tokenizer(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 2_000
    ids = tokenizer("some text")["input_ids"]
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "some text"


def test_both_encoders_agree(model, tmp_path):
    to_hf_tokenizer(model, tmp_path)
    ours, hugging = TokenizerFile.find(model).load(), TokenizerFile.find(tmp_path).load()
    assert ours.encode_batch(TRICKY) == hugging.encode_batch(TRICKY)
    assert (ours.vocab_size, ours.eod_id) == (hugging.vocab_size, hugging.eod_id) == (2_000, 2)


def test_unusable_tokenizers(tmp_path):
    with pytest.raises(DataError, match=r"gone\.model: no such tokenizer file"):
        TokenizerFile.find(tmp_path / "gone.model")
    other = tmp_path / "tokenizer.bin"
    other.write_bytes(b"?")
    with pytest.raises(DataError, match=r"extension '\.bin' tells no tokenizer type"):
        TokenizerFile.find(other)
    for kind in ("sentencepiece", "huggingface"):
        with pytest.raises(DataError, match=f"not a readable {kind} tokenizer"):
            TokenizerFile.find(other, kind).load()
    with pytest.raises(DataError, match="not a readable SentencePiece model"):
        to_hf_tokenizer(other, tmp_path / "out")


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"user_defined_symbols": ["<tool>"]}, "user-defined symbols"),
    ],
)
def test_models_that_cannot_be_converted(settings, reason, documents, tmp_path):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(documents[:50]).split("\n")),
        model_writer=content,
        vocab_size=500,
        **{**tokenizers._LLAMA_SETTINGS, **settings},
    )
    path = tmp_path / "other.model"
    path.write_bytes(content.getvalue())
    with pytest.raises(DataError, match=reason):
        to_hf_tokenizer(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
