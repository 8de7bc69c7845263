"""A new run that begins with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.fit import check_start
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.config.schema import Config
from sleeptrain.parallel.world import World
from sleeptrain.train.engine import Engine


def start_from(config: Config, engine: Engine, world: World) -> None:
    """Takes the weights of `run.init_from`; all else begins anew. All processes call it.

    Raises DataError where there is no whole checkpoint, or where its parameters are not those of the model, but for
    `run.init_new`, which keep their initial values, and `run.init_dropped`.
    """
    place = named_checkpoint(Path(config.run.init_from), world)

    def take() -> None:
        files = TensorFiles(place)
        check_start(files.forms, config.model, config.run.init_new, config.run.init_dropped)
        engine.load_weights(files)

    world.together(take)
