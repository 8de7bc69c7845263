"""A new run that begins with the weights of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sleeptrain.checkpoint.compatibility import check_compatible
from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.fit import WEIGHTS, check_start
from sleeptrain.checkpoint.folder import CONFIG
from sleeptrain.checkpoint.read import SavedTensors, Take, TensorFiles
from sleeptrain.checkpoint.vocabulary import check_start_tokenizer
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.train.engine import Engine


def start_from(config: Config, engine: Engine, world: World, tokenizer: str | None = None) -> None:
    """Takes the weights of `run.init_from`; all else begins anew. All processes call it.

    tokenizer: the sha256 of the data's, if it has one.
    Raises DataError where there is no whole checkpoint, where the newest is damaged (but for `run.allow_older`), or
    where its parameters are not those of the model, but for `run.init_new` and the blocks of `run.init_inserted`, which
    keep their initial values, and `run.init_dropped`. ConfigError where a setting or the tokenizer differs with which
    its weights mean something else, and `run.allow_changes` lacks it.
    """
    place = named_checkpoint(Path(config.run.init_from), world, "run.init_from", config.run.allow_older)

    def take() -> None:
        inserted = config.run.init_inserted
        files = Renumbered(TensorFiles(place), inserted, len(config.model.layers)) if inserted else TensorFiles(place)
        new = [*config.run.init_new, *(f"blocks.{block}.*" for block in inserted)]
        check_start(files.forms, config.model, new, config.run.init_dropped)
        check_compatible(load_resolved(place / CONFIG).model, config.model, inserted, config.run.allow_changes)
        check_start_tokenizer(place, tokenizer, config.data.source, config.run.allow_changes)
        engine.load_weights(files)

    world.all_or_raise(take)


class Renumbered:
    """A checkpoint of a model without some blocks, whose tensors get the numbers of a model that has these, too.

    inserted: the blocks that the checkpoint lacks, of the `num_blocks` of the model.
    """

    def __init__(self, saved: SavedTensors, inserted: Sequence[int], num_blocks: int):
        self._saved = saved
        kept = [block for block in range(num_blocks) if block not in inserted]
        self._theirs = {_renumbered(name, kept): name for name in saved.forms}
        self.forms = {name: saved.forms[theirs] for name, theirs in self._theirs.items()}

    def read(self, takes: Mapping[str, Take]) -> None:
        self._saved.read({self._theirs[name]: take for name, take in takes.items()})


def _renumbered(name: str, kept: Sequence[int]) -> str:
    """A block that the model does not have keeps its number, and is refused as unexpected, behind all others."""
    match = re.match(rf"{WEIGHTS}blocks\.(\d+)\.", name)
    if match is None:
        return name
    block = int(match[1])
    number = kept[block] if block < len(kept) else block - len(kept) + max(kept, default=0) + 1
    return f"{WEIGHTS}blocks.{number}.{name[match.end() :]}"
