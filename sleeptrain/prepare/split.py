"""Which side a document is on: train or validation."""

from __future__ import annotations

import hashlib

SIDES = ("train", "validation")


def side(text: str, validation_share: float) -> str:
    """The side of `text`, one of SIDES: a hash of its words, compared with the share.

    All copies of a text are on one side, whatever their file, format and whitespace are. Other documents do not matter,
    so that a document stays on its side when the corpus grows.
    """
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return "validation" if int.from_bytes(digest[:6], "big") < validation_share * 2**48 else "train"
