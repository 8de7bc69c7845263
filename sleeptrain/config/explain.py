"""Composition errors of hydra and omegaconf in one line that names the setting and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from sleeptrain.config.schema import Config
from sleeptrain.config.suggest import suggest, suggest_setting
from sleeptrain.errors import ConfigError

# Exceptions that a user's mistake causes (hydra raises a bare ValueError for `group=null` and some flags).
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

# Groups of hydra that are no section of the schema.
OTHER_GROUPS = ("experiment",)
# Section of the settings of mixers from other packages, which no schema lists.
BROUGHT = "model.mixers."


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """A ConfigError that explains `error`, which hydra or omegaconf raised while composing `overrides`."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_option(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"cannot read '{error.override}': {_reason(error)}; settings are written as key=value")
    message = str(error)
    if message.startswith("Ambiguous value"):
        override = message.splitlines()[0].partition("'")[2].rstrip("'")
        return ConfigError(f"{override}: add -m to sweep over the values, or write a list as key=[value1,value2]")
    if message.startswith("Config group override must be a string"):
        groups = [override for override in overrides if "." not in override.partition("=")[0]]
        return ConfigError(f"{' '.join(groups)}: a group takes the name of one of its options, as in model=tiny")
    if message.startswith("Multiple values for ") or "more than once in the final defaults list" in message:
        name = message.removeprefix("Multiple values for ").partition(" ")[0].rstrip(".")
        return ConfigError(f"{name} is given twice, or with a needless '+': write {name}=... once")
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, OmegaConfBaseException):
        return _refused_setting(error.__cause__, message)
    if isinstance(error, OmegaConfBaseException):
        return _refused_setting(error, message)
    return ConfigError(" ".join(message.split()) or type(error).__name__)


def _unknown_option(path: str, options: Sequence[str]) -> ConfigError:
    group, _, option = path.rpartition("/")
    return ConfigError(f"{group}={option}: there is no such option; {suggest(option, options)}")


def _reason(error: OverrideParseException) -> str:
    lines = [line for line in error.message.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Error parsing override", "See https:"))]
    return lines[0].rstrip(".") if lines else "not understood"


def _refused_setting(error: OmegaConfBaseException, context: str) -> ConfigError:
    """context: hydra's line about the override or the file that holds the setting."""
    name = str(error.full_key or error.key or "")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        if name.startswith(BROUGHT):
            return ConfigError(f"{name}: settings of a mixer from another package are added: write +{name}=...")
        section = error.object_type
        if isinstance(section, type) and section is not Config and name == error.key:
            # An item of a list (a stage of the curriculum): the user can only mean one of its fields.
            return ConfigError(f"unknown setting '{name}' in {_override(context)}; {suggest_setting(name, section)}")
        return ConfigError(f"unknown setting '{name}'; {suggest_setting(name, Config, OTHER_GROUPS)}")
    reason = str(error).splitlines()[0]
    if isinstance(error, ValidationError) and "is not Optional" in reason:
        reason = "it needs a value, null is none"
    if isinstance(error, ValidationError) and "could not be converted to Integer" in reason:
        reason += " (write a whole number, such as 1_000_000)"
    return ConfigError(f"{name}: {reason}" if name else reason)


def _override(context: str) -> str:
    """The setting that hydra's message quotes."""
    return context.partition("'")[2].partition("'")[0] or "the configuration"
