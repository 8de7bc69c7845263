"""Made-up documents."""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece

from sleeptrain.data.tokenizer import SentencePieceTokenizer

WORDS = ["def", "return", "self", "value", "for", "in", "range", "print", "import", "None", "True", "while", "class"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 120 words with indents, so that documents are of very different lengths."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice(WORDS) + rng.choice([" ", "\n", "\n    ", "\t"]) for _ in range(rng.randint(1, 120)))
        for _ in range(count)
    ]


def default_sentencepiece(path: Path, **settings: object) -> SentencePieceTokenizer:
    """A model with SentencePiece's defaults: it puts a space before each text. It knows cat, dog and the."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*make_texts(20), *["the cat and the dog see a cat and a dog"] * 50]),
        model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True, num_threads=1, minloglevel=2,
        **settings,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)
