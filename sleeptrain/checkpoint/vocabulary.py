"""Checks that weights and data were made with the same tokenizer, by its sha256."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.folder import CONFIG, read_state
from sleeptrain.config import load_resolved
from sleeptrain.config.changes import consent
from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.remote import Location

TOKENIZER = "tokenizer"  # in state.json; null for a task without one


def tokenizer_of(checkpoint: Location) -> str | None:
    """The sha256 of the tokenizer that the weights were trained with; None if there was none or it is unknown.

    Older versions did not write it. For their checkpoints it comes from the task's settings, from a tokenizer in the
    checkpoint's folder (an import), or from the tokenizer that the configuration names.
    """
    state = read_state(checkpoint)
    if TOKENIZER in state:
        return state[TOKENIZER]
    if isinstance(state.get("data"), dict) and (sha256 := state["data"].get("the tokenizer's sha256")):
        return sha256
    data = load_resolved(checkpoint / CONFIG).data
    # An import, which has its tokenizer beside it, is in a local folder.
    local = isinstance(checkpoint, Path) and (checkpoint / TOKENIZER_JSON).is_file()
    places = [Path(str(checkpoint))] if local else []
    places += [Path(data.shards.tokenizer)] if data.source == "shards" and data.shards.tokenizer else []
    for place in places:
        try:
            return load_tokenizer(place).hash
        except DataError:
            continue
    return None


def check_start_tokenizer(checkpoint: Location, data: str | None, source: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError if the weights of `run.init_from` were trained with another tokenizer than that of the data.

    data: the sha256 of the data's tokenizer; None: it has none.
    source: `data.source`.
    allowed: `run.allow_changes`.
    """
    weights, setting = tokenizer_of(checkpoint), f"data.{source}.tokenizer"
    if None in (weights, data) or weights == data or setting in allowed:
        return
    added = consent([setting])
    raise ConfigError(
        "the weights of run.init_from were trained with another tokenizer than the data's, whose ids differ; "
        "prepare the data with the weights' tokenizer (tools/prepare.py --tokenizer)"
        + (f", or, where the change is meant, add {added}" if added else ""),
        [f"{setting}: sha256 {weights} -> {data}"],
    )


def check_same_tokenizer(checkpoint: Location, data: str | None) -> None:
    """Raises DataError if a run's data now has another tokenizer than its weights. data: the sha256 of the data's."""
    weights = tokenizer_of(checkpoint)
    if None not in (weights, data) and weights != data:
        raise DataError(
            f"the data of {checkpoint} was made anew with another tokenizer (sha256 {data}) than its weights were "
            f"trained with ({weights}): bring back what it was trained on"
        )


def check_text_tokenizer(checkpoint: Location, tokenizer: str, place: Path) -> None:
    """Raises DataError if the weights were trained with another tokenizer than that of the text.

    tokenizer: the sha256 of the tokenizer at `place`, which encodes and decodes the text.
    """
    weights = tokenizer_of(checkpoint)
    if weights not in (None, tokenizer):
        raise DataError(
            f"tokenizer {place} (sha256 {tokenizer}) is not the one that the weights of {checkpoint} were trained with "
            f"({weights}): give the path of that tokenizer, or export the run where it exists and open the export"
        )
