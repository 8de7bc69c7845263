"""Whether ids mean the same to weights and to data: the sha256 of the tokenizer that they were made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.folder import CONFIG, read_state
from sleeptrain.config import load_resolved
from sleeptrain.config.changes import consent
from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import ConfigError, DataError

TOKENIZER = "tokenizer"  # in state.json; null for a task without one


def tokenizer_of(checkpoint: Path) -> str | None:
    """The sha256 of the tokenizer that the weights were trained with; None where there is none, or nobody knows it.

    Checkpoints of versions that did not write it have the tokenizer beside them (an import), in the task's settings, or
    where their configuration names it.
    """
    state = read_state(checkpoint)
    if TOKENIZER in state:
        return state[TOKENIZER]
    if isinstance(state.get("data"), dict) and (found := state["data"].get("the tokenizer's sha256")):
        return found
    data = load_resolved(checkpoint / CONFIG).data
    places = [checkpoint] if (checkpoint / TOKENIZER_JSON).is_file() else []
    places += [Path(data.shards.tokenizer)] if data.source == "shards" and data.shards.tokenizer else []
    for place in places:
        try:
            return load_tokenizer(place).hash
        except DataError:
            continue
    return None


def check_start_tokenizer(checkpoint: Path, data: str | None, source: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError where the weights of `run.init_from` were trained with another tokenizer than the data's.

    data: the sha256 of that one; None: it has none. source: `data.source`. allowed: `run.allow_changes`.
    """
    weights, setting = tokenizer_of(checkpoint), f"data.{source}.tokenizer"
    if None in (weights, data) or weights == data or setting in allowed:
        return
    added = consent([setting])
    raise ConfigError(
        "the weights of run.init_from were trained with another tokenizer than the data's, whose ids mean something "
        "else to them; prepare the data with theirs (tools/prepare.py --tokenizer)"
        + (f", or, where the change is meant, add {added}" if added else ""),
        [f"{setting}: sha256 {weights} -> {data}"],
    )


def check_same_tokenizer(checkpoint: Path, data: str | None) -> None:
    """Raises DataError where a run's own data is now that of another tokenizer than its weights'. data: its sha256."""
    weights = tokenizer_of(checkpoint)
    if None not in (weights, data) and weights != data:
        raise DataError(
            f"the data of {checkpoint} was made anew with another tokenizer (sha256 {data}) than its weights were "
            f"trained with ({weights}): bring back what it was trained on"
        )


def check_text_tokenizer(checkpoint: Path, tokenizer: str, place: Path) -> None:
    """Raises DataError where a text's ids would mean something else to the weights than what they were trained on.

    tokenizer: the sha256 of the one that text is read and written with, which lies at `place`.
    """
    weights = tokenizer_of(checkpoint)
    if weights not in (None, tokenizer):
        raise DataError(
            f"tokenizer {place} (sha256 {tokenizer}) is not the one that the weights of {checkpoint} were trained with "
            f"({weights}): name that one, or export the run while it is there and open the export"
        )
