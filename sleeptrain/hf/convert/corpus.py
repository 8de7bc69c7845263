"""Documents of a run's own data, on which its tokenizer is compared with what it has become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from sleeptrain.config.schema import ShardsConfig
from sleeptrain.data.consent import needs_consent
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import UserError

DOCUMENTS = 256  # of all sources together, about
TOKENS = 10_000  # of a document, at most


@dataclass(frozen=True)
class Document:
    """ids: of the text as training reads it, BOS before it where the data has one; no EOS after it."""

    text: str
    ids: list[int]


def as_read(text: str, tokenizer: Tokenizer, begins: bool = True) -> Document:
    """A text with the ids that a tokenizer gives it. begins: with BOS, if the tokenizer has one."""
    bos = [tokenizer.bos_id] if begins and tokenizer.bos_id is not None else []
    return Document(text, bos + tokenizer.encode(text))


def sampled_documents(config: ShardsConfig, tokenizer: Tokenizer) -> list[Document]:
    """The first documents of each source, held-out ones where it has any; none of what cannot be read here.

    Nothing is fetched over a network, no command is run, and shards that another tokenizer made are passed over.
    """
    each = -(-DOCUMENTS // max(len(config.sources), 1))
    places = [source.validation or source.train for source in config.sources]
    return [document for place in places if place for document in _sampled(place, tokenizer, each)]


def _sampled(place: str, tokenizer: Tokenizer, count: int) -> list[Document]:
    try:
        if needs_consent(place):
            return []
        return list(islice(_documents(TokenShards(place, tokenizer.hash), tokenizer), count))
    except UserError:
        return []


def _documents(shards: TokenShards, tokenizer: Tokenizer) -> Iterator[Document]:
    marks = {tokenizer.bos_id, tokenizer.eos_id}
    for shard in range(shards.num_shards):
        for index in range(int(shards.shard_documents_S[shard])):
            ids = shards.document(shard, index)[:TOKENS].tolist()
            inner = [id for id in ids if id not in marks]
            begins = ids[:1] == [tokenizer.bos_id]
            # A normaliser, or the cut after the last token, may give the text that comes back other ids.
            yield as_read(tokenizer.decode(inner), tokenizer, begins)
