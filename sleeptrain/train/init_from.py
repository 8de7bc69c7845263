"""Start of a new run with the weights of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from sleeptrain.checkpoint.compatibility import check_compatible
from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.fit import WEIGHTS, check_start
from sleeptrain.checkpoint.folder import CONFIG
from sleeptrain.checkpoint.place import Place
from sleeptrain.checkpoint.read import SavedTensors, TensorFiles
from sleeptrain.checkpoint.vocabulary import check_start_tokenizer
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.remote import named_place
from sleeptrain.train.engine import Engine


def start_from(config: Config, engine: Engine, world: World, tokenizer: str | None = None) -> None:
    """Load the weights of `run.init_from`; all other state begins anew. All processes call it together.

    Parameters of `run.init_new` and of the blocks of `run.init_inserted` keep their initial values; parameters of
    `run.init_dropped` are not loaded. tokenizer: sha256 of the data's tokenizer; None without one.
    Raises DataError if there is no whole checkpoint, if the newest is damaged and `run.allow_older` is not set, or if
    its other parameters are not those of the model. Raises ConfigError if the tokenizer or a setting that changes the
    meaning of the weights differs and is not in `run.allow_changes`.
    """
    place = named_checkpoint(named_place(config.run.init_from), world, "run.init_from", config.run.allow_older)

    saved, inserted = TensorFiles(place, world), config.run.init_inserted
    files = Renumbered(saved, inserted, len(config.model.layers)) if inserted else saved

    def check() -> None:
        new = [*config.run.init_new, *(f"blocks.{block}.*" for block in inserted)]
        check_start(files.forms, config.model, new, config.run.init_dropped)
        check_compatible(load_resolved(place / CONFIG).model, config.model, inserted, config.run.allow_changes)
        check_start_tokenizer(place, tokenizer, config.data.source, config.run.allow_changes)

    # First all that may fail in one process alone, since processes wait for each other while the engine loads.
    world.all_or_raise(check)
    world.all_or_raise(lambda: engine.load_weights(files))


class Renumbered:
    """A checkpoint without some blocks of the model; its blocks are renumbered to those of the model.

    inserted: the blocks that the checkpoint lacks, out of the model's `num_blocks` blocks.
    """

    def __init__(self, saved: SavedTensors, inserted: Sequence[int], num_blocks: int):
        self._saved = saved
        numbers = [block for block in range(num_blocks) if block not in inserted]
        self._saved_names = {_renumber(name, numbers): name for name in saved.forms}
        self.forms = {name: saved.forms[saved_name] for name, saved_name in self._saved_names.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._saved.tensor(self._saved_names[name])

    def elements(self, name: str, place: Place) -> torch.Tensor:
        return self._saved.elements(self._saved_names[name], place)


def _renumber(name: str, numbers: Sequence[int]) -> str:
    """The name with the block's number in the model; numbers: those of the checkpoint's blocks, in order.

    A block beyond them gets a number above all others, so that it is refused as unexpected.
    """
    match = re.match(rf"{WEIGHTS}blocks\.(\d+)\.", name)
    if match is None:
        return name
    block = int(match[1])
    number = numbers[block] if block < len(numbers) else block - len(numbers) + max(numbers, default=0) + 1
    return f"{WEIGHTS}blocks.{number}.{name[match.end() :]}"
