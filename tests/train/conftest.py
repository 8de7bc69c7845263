from __future__ import annotations

import pytest

from sleeptrain.data.shards import write_shards
from sleeptrain.data.tokenizer import train_tokenizer
from tests.data.texts import make_texts


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of a run on a small corpus of long documents: steps of 2 rows of 40 tokens, windows of 16."""
    folder = tmp_path_factory.mktemp("shards")
    texts = make_texts(40)
    tokenizer = train_tokenizer(texts, 320, folder / "tokenizer.model")
    for side, part in (("train", texts[:30]), ("validation", texts[30:])):
        write_shards(folder / side, part, tokenizer, name=side)
    return (
        "data=stdlib",
        "sleep=every",
        f"data.shards.sources=[{{train: {folder / 'train'}, validation: {folder / 'validation'}}}]",
        f"data.shards.tokenizer={folder / 'tokenizer.model'}",
        "data.sequence=40",
        "data.batch=2",
        "sleep.window=16",
        f"train.tokens={12 * 80}",
    )
