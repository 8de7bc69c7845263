"""Documents of a run's data, to compare the exported tokenizer with the one of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from sleeptrain.config.schema import ShardsConfig
from sleeptrain.data.consent import needs_consent
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import UserError

DOCUMENTS = 256  # of all sources together, rounded up for each source
TOKENS = 10_000  # upper bound for a document


@dataclass(frozen=True)
class Document:
    """A text and its ids.

    text: the text.
    ids: its ids as in training: with BOS if the data has one, without EOS.
    """

    text: str
    ids: list[int]


def as_read(text: str, tokenizer: Tokenizer, begins: bool = True) -> Document:
    """A text with its ids. begins: put BOS before it if the tokenizer has one."""
    bos = [tokenizer.bos_id] if begins and tokenizer.bos_id is not None else []
    return Document(text, bos + tokenizer.encode(text))


def sampled_documents(config: ShardsConfig, tokenizer: Tokenizer) -> list[Document]:
    """The first documents of each source, held-out ones if it has any.

    Skips sources that cannot be read, that need a network or a command, or whose shards have another tokenizer.
    """
    per_source = -(-DOCUMENTS // max(len(config.sources), 1))
    places = [source.validation or source.train for source in config.sources]
    return [document for place in places if place for document in _sampled(place, tokenizer, per_source)]


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
            # Encode the text again: a normaliser or the cut at TOKENS may change its ids.
            yield as_read(tokenizer.decode(inner), tokenizer, begins)
