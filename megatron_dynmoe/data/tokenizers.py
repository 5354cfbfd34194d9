"""Tokenizers: training one with SentencePiece, and encoding text with SentencePiece or Hugging Face models.

The trained tokenizer is a byte-pair encoding in LLaMA's manner: byte fallback (no text is unknown), every digit a
token of its own, no normalisation, runs of spaces as tokens, ``<unk> <s> </s>`` as ids 0, 1, 2. In one thing it
differs: **no space is put before the text** (``add_dummy_prefix=False``), so decoding an encoding gives the text back
exactly (only U+2581, SentencePiece's own sign for a space, comes back as a space).

Encoders here add no token of their own: no BOS, and EOS only where the caller appends it. Text that happens to
contain ``</s>`` or another control token's name stays text. This is how Megatron's SentencePieceTokenizer behaves;
its Hugging Face path does prepend BOS.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.hf_tokenizer import differing_documents, to_hf_tokenizer
from megatron_dynmoe.data.shards import read_lines

__all__ = ["Encoder", "TokenizerFile", "differing_documents", "sample_texts", "to_hf_tokenizer", "train_tokenizer"]

Kind = Literal["sentencepiece", "huggingface"]
_KIND_BY_SUFFIX: dict[str, Kind] = {".model": "sentencepiece", ".json": "huggingface"}
# SentencePiece skips longer lines in training; the usual default of 4192 bytes would drop docstrings written as one
# line
MAX_TRAINING_LINE_BYTES = 16_384


class Encoder(Protocol):
    """What preprocessing needs of a tokenizer. vocab_size: one more than the largest id. eod_id: end of document, or
    None.
    """

    vocab_size: int
    eod_id: int | None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, nothing added before or after."""
        ...


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer on disk; small and picklable, so that worker processes can each load their own.

    path: a SentencePiece ``tokenizer.model``, or a Hugging Face ``tokenizer.json``. kind: which, never "auto".
    """

    path: Path
    kind: Kind

    @classmethod
    def find(cls, path: str | Path, kind: Kind | Literal["auto"] = "auto") -> "TokenizerFile":
        """Resolve a file, or the folder of a Hugging Face model. Raises DataError when there is none, or its kind is
        not clear.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"{path}: no such tokenizer file; give a SentencePiece .model or a Hugging Face tokenizer.json."
            )
        if kind == "auto":
            if path.suffix not in _KIND_BY_SUFFIX:
                raise DataError(
                    f"{path}: the extension {path.suffix!r} tells no tokenizer type;"
                    " name it: sentencepiece or huggingface."
                )
            return cls(path, _KIND_BY_SUFFIX[path.suffix])
        return cls(path, kind)

    def load(self) -> Encoder:
        """Raises DataError when the file is not a tokenizer of its kind."""
        try:
            return _SentencePiece(self.path) if self.kind == "sentencepiece" else _HuggingFace(self.path)
        except DataError:
            raise
        except Exception as error:  # both libraries raise bare RuntimeError or Exception for a damaged file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{self.path}: not a readable {self.kind} tokenizer ({reason}).") from None


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # one thread: the caller's worker processes are the parallelism
        return self._processor.encode(texts, num_threads=1)


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._find_eod(path.with_name("tokenizer_config.json"))

    def _find_eod(self, config: Path) -> int | None:
        names = ["</s>", "<|endoftext|>", "<|end_of_text|>"]
        if config.is_file():
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            names = [token["content"] if isinstance(token, dict) else token] if token else []
        return next((i for i in map(self._tokenizer.token_to_id, names) if i is not None), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def train_tokenizer(
    shards: list[Path], output: str | Path, *, vocab_size: int, sample_megabytes: float = 8.0, overwrite: bool = False
) -> Path:
    """Train a SentencePiece BPE model on a sample of jsonl shards; the same shards and settings give the same model.

    output: the model is written to ``<output>.model``, which is returned. sample_megabytes: text to train on, in
    millions of UTF-8 bytes. Raises DataError for a vocabulary that cannot be reached on this text, or an existing
    output without ``overwrite``.
    """
    import sentencepiece

    target = Path(f"{str(output).removesuffix('.model')}.model")
    if target.exists() and not overwrite:
        raise DataError(f"{target}: already exists; name another output, or pass --overwrite to replace it.")
    if vocab_size < 300:
        raise DataError(
            f"vocab_size is {vocab_size}; it must be at least 300, as 256 byte tokens and the characters need room."
        )
    lines = (line for text in sample_texts(shards, megabytes=sample_megabytes) for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, **_LLAMA_SETTINGS
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train a vocabulary of {vocab_size} on this sample: {_reason(error)}"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, target)
    return target


_LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "add_dummy_prefix": False,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "max_sentence_length": MAX_TRAINING_LINE_BYTES,
    "shuffle_input_sentence": False,
    "minloglevel": 2,
}


def sample_texts(shards: Iterable[Path], *, megabytes: float) -> Iterator[str]:
    """Texts from the beginning of every shard, in equal parts, up to ``megabytes`` million UTF-8 bytes together."""
    shards = list(shards)
    for shard in shards:
        room = megabytes * 1e6 / len(shards)
        for line in read_lines(shard):
            if room <= 0:
                break
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                continue  # preprocessing counts and reports bad lines
            if isinstance(text, str):
                room -= len(text.encode("utf-8", "replace"))
                yield text


def _reason(error: RuntimeError) -> str:
    # "INTERNAL: src/trainer_interface.cc(123) [condition] Vocabulary size too high (...)": the sentence follows the
    # bracket
    return str(error).strip().rpartition("] ")[2] or str(error).strip()
