"""Pretraining of language models that sleep: the names of `__all__`, each imported when it is first used.

docs/python.md shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeptrain.api import (
        build_model,
        build_task,
        evaluate_checkpoint,
        load_checkpoint,
        make_plan,
        mean_loss,
        run_training,
    )
    from sleeptrain.config.compose import compose
    from sleeptrain.config.schema import Config
    from sleeptrain.data.batch import Batch
    from sleeptrain.errors import ConfigError, DataError, UserError
    from sleeptrain.hf.model.cache import SleepCache
    from sleeptrain.hf.model.modeling import SleepForCausalLM
    from sleeptrain.model.hybrid import Hybrid

__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "DataError",
    "Hybrid",
    "SleepCache",
    "SleepForCausalLM",
    "UserError",
    "build_model",
    "build_task",
    "compose",
    "evaluate_checkpoint",
    "load_checkpoint",
    "make_plan",
    "mean_loss",
    "run_training",
]
# Names that are not in `sleeptrain.api`.
_MODULES = {
    "Batch": "data.batch",
    "Config": "config.schema",
    "ConfigError": "errors",
    "DataError": "errors",
    "Hybrid": "model.hybrid",
    "SleepCache": "hf.model.cache",
    "SleepForCausalLM": "hf.model.modeling",
    "UserError": "errors",
    "compose": "config.compose",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sleeptrain' has no attribute '{name}'")
    return getattr(import_module(f"sleeptrain.{_MODULES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
