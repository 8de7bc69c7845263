"""What a sleeping model has read, as transformers hands it from one forward to the next."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import Cache

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import SleepConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.files import write_whole
from sleeptrain.hf.convert.native import cache_name
from sleeptrain.hf.model.configuration import sleep_dict
from sleeptrain.kinds import dict_of, exactly, has, is_bool, is_count, is_text, list_of
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.live import Live, begin
from sleeptrain.small_files import parse_json

FORMAT = "sleeptrain-memory-1"
SAMPLED = 64  # numbers of each parameter that its model is known by
CACHE_NAME = cache_name()
_ROWS = {"filled": list_of(is_count), "predicted": list_of(is_bool), "boundaries": list_of(is_count)}
_ARE_FACTS = has({"format": is_text, "fingerprint": is_text, "sleep": dict_of(lambda _: True), "rows": exactly(_ROWS)})


class SleepCache(Cache):
    """S, the keys and values of the windows in progress and the features that will be slept on. It does not grow.

    live: the value that the last forward has left. window: L; as long as the cache is in use, it cannot be changed, and
    nor can the other settings of sleep but `passes`. columns: of what has been read, as many as `generate` will find in
    front of the new tokens in the ids that it is given: none where new_text says that those ids never repeat what was
    read (see `follow_with_new_text`).
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, model: Hybrid, num_rows: int, sleep: SleepConfig) -> None:
        super().__init__(layers=[])
        self.model, self.sleep = model, sleep
        self.live = begin(model, num_rows)
        self.columns, self.new_text = 0, False
        self._holds_beams = False

    @property
    def window(self) -> int:
        return self.sleep.window

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Windows that each row has behind it."""
        return self.live.boundaries

    @property
    def batch_size(self) -> int:
        return len(self.live.filled)

    @property
    def is_initialized(self) -> bool:
        return self.live.fed_back_BLD is not None

    def check(self, sleep: SleepConfig, num_rows: int) -> None:
        """Raises ConfigError unless the next forward can go on from here."""
        if num_rows != self.batch_size:
            raise ConfigError(
                f"the cache holds {self.batch_size} rows, not {num_rows}: repeat them with "
                "cache.batch_repeat_interleave(n), or choose some with cache.batch_select_indices(rows)"
            )
        before, now = sleep_dict(self.sleep), sleep_dict(sleep)
        for name, value in now.items():
            if name != "passes" and value != before[name]:
                raise ConfigError(
                    f"sleep.{name}={value}: what the cache holds was read with {before[name]}; begin anew"
                )

    def follow_with_new_text(self) -> SleepCache:
        """What comes next, now and later, does not repeat what has been read: questions after a document.

        Returns itself. The last token that `generate` has given is read only where this was said before the call.
        """
        self.columns, self.new_text = 0, True
        return self

    def begin_turn(self, num_columns: int | None = None) -> None:
        """Before ids of so many columns are read, of which those at the front may have been read before (None: not).

        Raises ConfigError where they cannot repeat what was read, or it is not known what that was.
        """
        if self._holds_beams:
            raise ConfigError(
                "the cache holds the last beams of a search, not the text that was found: read that text with a "
                "copy() of the cache from before the search"
            )
        if num_columns is not None and 0 < self.columns >= num_columns:
            raise ConfigError(
                f"the cache has read {self.columns} columns, and the ids have {num_columns}: give the whole text again "
                "with new tokens behind it, or only new text after cache.follow_with_new_text()"
            )

    def copy(self) -> SleepCache:
        """One that goes on by itself: to answer many times from what was read once."""
        other = SleepCache(self.model, 0, self.sleep)
        other.live = self.live.rows(range(self.batch_size))
        other.columns, other.new_text, other._holds_beams = self.columns, self.new_text, self._holds_beams
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SleepCache:
        other = self.copy()
        other.model = memo.get(id(self.model), self.model)  # a copy of both goes together
        return other

    def __len__(self) -> int:
        return self.model.num_layers

    def __repr__(self) -> str:
        return f"SleepCache(rows={self.batch_size}, window={self.window}, boundaries={self.boundaries})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.live, self.columns, self._holds_beams = begin(self.model, self.batch_size), 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.live, self._holds_beams = self.live.rows(beam_idx.tolist()), True

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.live = self.live.rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.live = self.live.rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        raise ConfigError(
            "what a sleeping model has read cannot be taken back: keep cache.copy() of where to go back to"
        )

    def save(self, path: str | Path) -> None:
        """Writes the memory to a safetensors file, whole or not at all."""
        live = self.live
        if live.fed_back_BLD is None:
            raise ConfigError("the cache has read nothing: there is no memory to save")
        tensors = {f"state.{name}": t for name, t in live.state.to_state_dict().items()}
        tensors |= {f"at_start.{name}": t for name, t in live.at_start.to_state_dict().items()}
        tensors["fed_back"] = live.fed_back_BLD
        facts = {
            "format": FORMAT,
            "fingerprint": fingerprint(self.model),
            "sleep": sleep_dict(self.sleep),
            "rows": {name: getattr(live, name) for name in ("filled", "predicted", "boundaries")},
        }
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        facts["sha256"] = _checksum(facts, whole)
        write_whole(Path(path), save(whole, {"memory": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> SleepCache:
        """The memory in a file that `save` wrote, for this `SleepForCausalLM`; new text is to follow.

        Raises DataError where the file cannot be read or was made by another model, ConfigError where the model's
        settings of sleep, but for N and L, are others.
        """
        facts, tensors = _read(Path(path))
        if facts["fingerprint"] != fingerprint(model.model):
            raise DataError(
                f"memory {path} was made by another model (other settings, weights or dtype): read the text again"
            )
        saved = from_dict(SleepConfig, facts["sleep"], f"memory {path}: sleep")
        cache = cls(model.model, 0, saved)
        cache.check(model.config.sleep_settings(window=saved.window), 0)
        tensors = {name: t.to(model.device) for name, t in tensors.items()}
        rows = {name: tuple(values) for name, values in facts["rows"].items()}
        try:
            parts = [_part(tensors, name, model.model.num_layers) for name in ("state", "at_start")]
            cache.live = Live(parts[0], parts[1], tensors["fed_back"], **rows)
        except (KeyError, StopIteration, TypeError) as error:
            raise DataError(f"memory {path} lacks a tensor of the model: read the text again") from error
        return cache.follow_with_new_text()


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache under either of its names. Raises ConfigError where they name two, or no SleepCache."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ConfigError("cache and past_key_values are two names of the same: give one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, SleepCache):
        raise ConfigError(f"the cache is a {type(found).__name__}: this model keeps a SleepCache")
    return found


def _part(tensors: dict[str, torch.Tensor], part: str, num_layers: int) -> FastWeights:
    named = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
    return FastWeights.from_state_dict(named, num_layers)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get("memory", "{}"))
            if not _ARE_FACTS(facts) or facts["format"] != FORMAT:
                raise DataError(f"{path} is no memory of this version of sleeptrain")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.pop("sha256", None) not in (None, _checksum(facts, tensors)):
            raise DataError(f"memory {path} is damaged: its checksum is not that of its content; read the text again")
        return facts, tensors
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"memory {path} cannot be read: {error}") from error


def _checksum(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Of all in a file but itself."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: Hybrid) -> str:
    """Hexadecimal sha256 of the model's settings, and of names, shapes, dtypes and some numbers of its parameters."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
