"""Typed settings: `Config`, its validation, and the file that records the settings of a run."""

from sleeptrain.config.resolved import config_diff, load_resolved, resolved_yaml, run_folder, save_resolved
from sleeptrain.config.schema import Config
from sleeptrain.config.validate import validate

__all__ = ["Config", "config_diff", "load_resolved", "resolved_yaml", "run_folder", "save_resolved", "validate"]
