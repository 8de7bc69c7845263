"""Texts of a run's own data, on which its tokenizer is compared with what it has become."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sleeptrain.config.schema import ShardsConfig
from sleeptrain.data.consent import needs_consent
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import UserError

DOCUMENTS = 256  # of all sources together, about
TOKENS = 10_000  # of a document, at most


def sampled_texts(config: ShardsConfig, tokenizer: Tokenizer) -> list[str]:
    """The first documents of each source, held-out ones where it has any; none of what cannot be read here.

    Nothing is fetched over a network, no command is run, and shards that another tokenizer made are passed over.
    """
    each = -(-DOCUMENTS // max(len(config.sources), 1))
    places = [source.validation or source.train for source in config.sources]
    return [text for place in places if place for text in _texts(place, tokenizer, each)]


def _texts(place: str, tokenizer: Tokenizer, count: int) -> list[str]:
    try:
        if needs_consent(place):
            return []
        return list(islice(_documents(TokenShards(place, tokenizer.hash), tokenizer), count))
    except UserError:
        return []


def _documents(shards: TokenShards, tokenizer: Tokenizer) -> Iterator[str]:
    marks = {tokenizer.bos_id, tokenizer.eos_id}
    for shard in range(shards.num_shards):
        for index in range(int(shards.shard_documents_S[shard])):
            ids = shards.document(shard, index)[:TOKENS].tolist()
            yield tokenizer.decode(id for id in ids if id not in marks)
