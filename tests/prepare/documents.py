"""All documents of token shards."""

from __future__ import annotations

import numpy as np

from sleeptrain.data.shards import TokenShards


def all_documents(shards: TokenShards) -> list[np.ndarray]:
    places = [(shard, index) for shard, count in enumerate(shards.shard_documents_S) for index in range(count)]
    return [shards.document(*place) for place in places]
