"""Which side a document is on: train or validation."""

from __future__ import annotations

import hashlib

SIDES = ("train", "validation")


def side(text: str, validation_share: float) -> str:
    """The side of `text`, one of SIDES: a hash of its words, compared with the share.

    Every copy of a text is on the same side, under whatever name and in whatever format, also where only its runs of
    whitespace differ; what else the corpus holds has no influence, so the sides stay as it grows.
    """
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return "validation" if int.from_bytes(digest[:6], "big") < validation_share * 2**48 else "train"
