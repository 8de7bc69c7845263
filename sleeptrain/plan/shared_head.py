"""The bytes of a head that pipeline stages share (`parallel.split_head`), on one tensor rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sleeptrain.config.schema import Config
from sleeptrain.model.hybrid import keeps_logits
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.parallel.pipeline.graph import Kind
from sleeptrain.parallel.pipeline.stage_split import splits_head
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.parameters import WIDE
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.precision import product_bytes
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class SharedHead:
    """Sizes of what stages send and keep for the loss of a round.

    dim: D. vocab_size: of a tensor rank, padding included. num_stages: that share it. narrow: bytes of an element that
    products read. targets_of: the number of targets of a round.
    """

    dim: int
    vocab_size: int
    num_stages: int
    narrow: int
    targets_of: Callable[[Round], int]

    @staticmethod
    def of(config: Config, workload: Workload) -> SharedHead | None:
        """None if one stage has the whole head."""
        if not splits_head(config, config.parallel.pipeline):
            return None
        model = local_config(config.model, config.parallel.tensor)
        narrow = product_bytes(config.train)
        return SharedHead(model.dim, model.vocab_size, config.parallel.pipeline, narrow, workload.targets_of)

    def rows(self, stage: int) -> int:
        """The rows of the head's matrix that a stage holds."""
        return len(VocabularyPart(stage, self.num_stages).rows(self.vocab_size))

    def message(self, kind: Kind, r: Round) -> int:
        """Bytes of a message about a part of the head in a round."""
        each = {Kind.STATISTICS: 2 * WIDE, Kind.LOG_SUMS: WIDE}.get(kind, self.dim * self.narrow)
        return self.targets_of(r) * each

    def logits(self, r: Round, stage: int) -> int:
        """Bytes of the logits that a stage keeps from the head's forward in a round to its backward."""
        num_targets, rows = self.targets_of(r), self.rows(stage)
        return num_targets * rows * self.narrow if keeps_logits(num_targets, rows, self.narrow) else 0
