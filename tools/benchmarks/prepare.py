"""The cost of `tools/prepare.py` for the shortest and for the longest document.

Speed: documents of one word, where the cost per document counts and the tokenizer hardly matters. Memory: one document
of the greatest length. No merge joins its characters, so that there are as many ids as bytes, and one character beyond
16 bits makes Python use four bytes for each character. The memory of a process for short documents is subtracted.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from benchmarks import Row
from benchmarks.process import measure
from benchmarks.timing import round_robin
from sleeptrain.data.tokenizer import train_tokenizer
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.job import Job, prepare
from sleeptrain.prepare.readers import MAX_DOCUMENT_BYTES

METHOD = "one process; speed: CPU time, the least of several preparations; memory: the greatest resident size"
DOCUMENTS, ROUNDS = 100_000, 10  # a million in all
SHORT = 1_000
VOCAB_SIZE = 2048
MIB = 2**20
SHARE = 0.5  # held out
GOAL_SPEED = 20_000
# MiB of a process, and bytes per byte of the longest document, as the documentation promises.
GOAL_BASE, GOALS = 300, {"SentencePiece BPE": 80, "SentencePiece unigram": 80, "Hugging Face": 500}


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return [*_speed(Path(folder), quick), *_memory(Path(folder), quick)]


def _words(count: int) -> Iterator[str]:
    rng = random.Random(0)
    return ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 10))) for _ in range(count))


def _write(path: Path, texts: Iterator[str]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return path


def _speed(folder: Path, quick: bool) -> list[Row]:
    model = train_tokenizer(_words(20_000), VOCAB_SIZE, folder / "words.model")
    sources = named_inputs([str(_write(folder / "words.jsonl", _words(DOCUMENTS)))])
    numbers = itertools.count()

    def action() -> None:
        prepare(Job(sources, folder / f"words-{next(numbers)}", model, validation_share=SHARE))

    seconds = round_robin({"prepare": action}, 2 if quick else ROUNDS)["prepare"]
    return [Row("documents of a word", DOCUMENTS / seconds, "documents/s", GOAL_SPEED)]


def _memory(folder: Path, quick: bool) -> Iterator[Row]:
    longest = MAX_DOCUMENT_BYTES // 4 if quick else MAX_DOCUMENT_BYTES
    rng = random.Random(0)
    room = longest - len(b'{"text": ""}') - len("\U0001f600".encode())
    text = "\U0001f600" + "".join(rng.choices(string.ascii_letters + string.digits + ".,;:!?", k=room))
    short = _write(folder / "short.jsonl", _words(SHORT))
    long = _write(folder / "long.jsonl", iter([*_words(SHORT), text]))
    for name, tokenizer in _tokenizers(folder).items():
        base = _peak(folder, short, tokenizer, longest)
        peak = _peak(folder, long, tokenizer, longest)
        yield Row(f"{name}: short documents", base / MIB, "MiB", GOAL_BASE, "lower")
        yield Row(f"{name}: a document of {longest / MIB:g} MiB", peak / MIB, "MiB", better="lower")
        yield Row(f"{name}: for each byte of it", (peak - base) / longest, "bytes", GOALS[name], "lower")


def _tokenizers(folder: Path) -> dict[str, Path]:
    """Tokenizers that have no merge for nearly all pairs of random characters."""
    for kind in ("bpe", "unigram"):
        train_tokenizer(_words(20_000), VOCAB_SIZE, folder / f"{kind}.model", model_type=kind)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        _words(20_000),
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], initial_alphabet=alphabet),
    )
    (folder / "library").mkdir()
    library.save(str(folder / "library" / "tokenizer.json"))
    (folder / "library" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    paths = (folder / "bpe.model", folder / "unigram.model", folder / "library")
    return dict(zip(GOALS, paths, strict=True))


def _peak(folder: Path, text: Path, tokenizer: Path, longest: int) -> int:
    """The peak resident size of a process of `tools/prepare.py`, in bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        arguments = {
            "--input": text,
            "--out": Path(out) / "out",
            "--tokenizer": tokenizer,
            "--max-document-bytes": longest,
            "--validation-share": SHARE,
            "--workers": 1,
        }
        _, peak = measure("tools.prepare", [part for pair in arguments.items() for part in pair])
    return peak
