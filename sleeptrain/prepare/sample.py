"""The text that a tokenizer is trained on: a sample of the training side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sleeptrain.prepare.readers import MAX_DOCUMENT_BYTES, documents
from sleeptrain.prepare.split import side
from sleeptrain.prepare.units import Unit

SAMPLE_CHARACTERS = 32 * 2**20
SAMPLE_UNITS = 256  # at most so many are opened


def sample(
    units: Sequence[Unit],
    text_field: str,
    validation_share: float,
    max_documents: int | None = None,
    characters: int = SAMPLE_CHARACTERS,
    wanted: str = "train",
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[str]:
    """Documents of the side `wanted`, at most `characters` in total, from units spread evenly over the corpus.

    Every unit gives an equal share of the characters, from its beginning; later units share what a short unit does not
    fill. With `max_documents` only that many documents are read, from the first one on. Bad documents and documents of
    more than `max_bytes` are skipped. Raises DataError if a file cannot be read.
    """
    step = 1 if max_documents is not None else -(-len(units) // SAMPLE_UNITS) or 1
    chosen = units[::step]
    documents_left = max_documents
    for index, unit in enumerate(chosen):
        share = characters if max_documents is not None else -(-characters // (len(chosen) - index))
        for text in _texts(unit, text_field, max_bytes):
            if share <= 0 or documents_left == 0:
                break
            if documents_left is not None:
                documents_left -= 1
            if side(text, validation_share) == wanted:
                yield text[:share]
                characters -= len(text[:share])
                share -= len(text)


def _texts(unit: Unit, text_field: str, max_bytes: int) -> Iterator[str]:
    for part in unit.slices:
        for text in documents(part, text_field, max_bytes):
            if isinstance(text, str) and text.strip():
                yield text
