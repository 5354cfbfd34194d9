"""A small indexed dataset and its tokenizer, made of the checkout's own documents (or a package's sources).

python examples/smoke_data.py FOLDER    # FOLDER/tokenizer.model, FOLDER/text.bin, FOLDER/text.idx
"""

import json
import sys
from pathlib import Path

from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.tokenizers import TokenizerFile, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 512


def main(folder: Path) -> None:
    """Write the files, unless they are there."""
    if (folder / "text.idx").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "text.jsonl"
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] or ROOT.glob("*.py")  # a wheel has no documents
    documents = [path.read_text(encoding="utf-8") for path in sorted(paths)]
    parts = [part for document in documents for part in document.split("\n\n") if part.strip()]
    shard.write_text("".join(f"{json.dumps({'text': part})}\n" for part in parts), encoding="utf-8")
    model = train_tokenizer([shard], folder / "tokenizer", vocab_size=VOCABULARY, overwrite=True)
    preprocess(
        [shard], folder / "text", tokenizer=TokenizerFile.find(model), append_eod=True, workers=1, overwrite=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
