"""A SentencePiece BPE model as a Hugging Face tokenizer that gives the same ids.

SentencePiece keeps no list of merges: it joins, again and again, the two neighbours whose joined piece has the
highest score. A ``tokenizer.json`` wants the merges listed by rank, so every way to split every piece is listed here,
ordered by **the piece's score**. (transformers 5's own conversion of a bare ``tokenizer.model`` orders by id; with
LLaMA's models about a third of documents then differ.)

The special tokens stay text when they occur in text, in training as in the exported tokenizer:
``split_special_tokens`` is set in ``tokenizer_config.json``. To feed one, pass its id.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dynmoe.data.errors import DataError

SPACE = "\u2581"  # SentencePiece's visible space


def to_hf_tokenizer(model: str | Path, out_dir: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` to ``out_dir``, for ``transformers.AutoTokenizer``.

    The tokenizer adds neither BOS nor EOS, as in pretraining. Raises DataError for a model that is not a BPE without
    normalisation.
    """
    processor, settings = _load(Path(model))
    tokenizer = _tokenizer(processor, dummy_prefix=settings.normalizer_spec.add_dummy_prefix)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": processor.id_to_piece(i) for name, i in _special_ids(processor).items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def differing_documents(model: str | Path, folder: str | Path, texts: Iterable[str]) -> tuple[int, int]:
    """Encode texts with both tokenizers, the folder's through AutoTokenizer: how many differ in ids or decoded text,
    of how many.
    """
    from transformers import AutoTokenizer

    processor, _ = _load(Path(model))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    differing = count = 0
    for text in texts:
        count += 1
        ids = processor.encode(text)
        differing += tokenizer(text)["input_ids"] != ids or tokenizer.decode(ids) != processor.decode(ids)
    return differing, count


def _load(model: Path):
    """The SentencePiece processor and the model's settings (the ModelProto), checked."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time

    if not model.is_file():
        raise DataError(f"{model}: no such file; a SentencePiece tokenizer.model is needed.")
    settings = ModelProto()
    try:
        settings.ParseFromString(model.read_bytes())
        processor = SentencePieceProcessor(model_file=str(model))
    except Exception:  # protobuf's DecodeError, SentencePiece's bare RuntimeError
        raise DataError(f"{model}: not a readable SentencePiece model.") from None
    if settings.trainer_spec.model_type != settings.trainer_spec.BPE:
        raise DataError(
            f"{model}: is not a BPE model; only SentencePiece models trained with model_type=bpe can be converted."
        )
    spec = settings.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise DataError(
            f"{model}: normalises text ({spec.name}, remove_extra_whitespaces={spec.remove_extra_whitespaces});"
            " only models with normalization_rule_name=identity and remove_extra_whitespaces=false can be converted."
        )
    user_defined = [p.piece for p in settings.pieces if p.type == p.USER_DEFINED]
    if user_defined:
        raise DataError(
            f"{model}: has user-defined symbols ({user_defined[0]!r} first); only models without them can be converted."
        )
    return processor, settings


def _tokenizer(processor, *, dummy_prefix: bool):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    size = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(size)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_merges(processor, vocab)),
            unk_token=processor.id_to_piece(processor.unk_id()),
            fuse_unk=True,
            byte_fallback=any(processor.is_byte(i) for i in range(size)),
        )
    )
    visible_space = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), visible_space] if dummy_prefix else [visible_space]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    special = [processor.id_to_piece(i) for i in sorted(set(_special_ids(processor).values()))]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(processor, vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, best score first; among the ways to split one piece, the leftmost-
    longest last.
    """
    normal = [
        i for i in vocab.values() if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    known = {processor.id_to_piece(i) for i in normal}
    for i in sorted(normal, key=lambda i: (-processor.get_score(i), i)):
        piece = processor.id_to_piece(i)
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]


def _special_ids(processor) -> dict[str, int]:
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    return {name: i for name, i in ids.items() if i >= 0}
