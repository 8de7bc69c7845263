"""The memory of a sleeping model, as a cache that transformers passes from one forward to the next."""

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
SAMPLED = 64  # numbers of each parameter that enter the fingerprint
CACHE_NAME = cache_name()
_ROWS = {"filled": list_of(is_count), "predicted": list_of(is_bool), "boundaries": list_of(is_count)}
_IS_HEADER = has({"format": is_text, "fingerprint": is_text, "sleep": dict_of(lambda _: True), "rows": exactly(_ROWS)})


class SleepCache(Cache):
    """S, keys and values of the windows in progress, and the features that sleep passes will read. It does not grow.

    model: the model that reads.
    sleep: settings of sleep. While the cache is in use, only `passes` and `stop_threshold` can change.
    live: the state after the last forward.
    columns: number of columns that were read and that `generate` expects again in front of its new ids.
    new_text: True if the next ids never repeat the text that was read; `columns` is then 0 (`follow_with_new_text`).
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
        """The number of windows that each row has finished."""
        return self.live.boundaries

    @property
    def passes(self) -> tuple[int, ...]:
        """The passes that each row took in its last window, the wake pass counted; 0 before it and after `load`."""
        return self.live.passes

    @property
    def batch_size(self) -> int:
        return len(self.live.filled)

    @property
    def is_initialized(self) -> bool:
        return self.live.fed_back_BLD is not None

    def check(self, sleep: SleepConfig, num_rows: int) -> None:
        """Raises ConfigError: a forward of so many rows, with these settings, cannot continue from the cache."""
        if num_rows != self.batch_size:
            raise ConfigError(
                f"the cache holds {self.batch_size} rows, not {num_rows}: repeat them with "
                "cache.batch_repeat_interleave(n), or choose some with cache.batch_select_indices(rows)"
            )
        before, now = sleep_dict(self.sleep), sleep_dict(sleep)
        for name, value in now.items():
            if name not in ("passes", "stop_threshold") and value != before[name]:
                raise ConfigError(
                    f"sleep.{name}={value}: the cache was filled with {before[name]}; start with a new cache"
                )

    def follow_with_new_text(self) -> SleepCache:
        """Declare that all later ids are new text, such as questions after a document. Returns the cache.

        `generate` reads the last token of its answer only if this was called before.
        """
        self.columns, self.new_text = 0, True
        return self

    def begin_turn(self, num_columns: int | None = None) -> None:
        """Check a call that reads ids. num_columns: columns of ids that begin with the text read so far; None: new ids.

        Raises ConfigError: the ids cannot repeat that text, or the text is unknown after a beam search.
        """
        if self._holds_beams:
            raise ConfigError(
                "the cache holds the last beams of a search, not the text that was found: read that text with a "
                "copy() of the cache from before the search"
            )
        if num_columns is not None and 0 < self.columns >= num_columns:
            raise ConfigError(
                f"the cache has read {self.columns} columns, and the ids have {num_columns}: give the whole text again "
                "with new tokens after it, or only new text after cache.follow_with_new_text()"
            )

    def copy(self) -> SleepCache:
        """An independent copy: read a text once, and continue from it many times."""
        other = SleepCache(self.model, 0, self.sleep)
        other.live = self.live.rows(range(self.batch_size))
        other.columns, other.new_text, other._holds_beams = self.columns, self.new_text, self._holds_beams
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SleepCache:
        other = self.copy()
        other.model = memo.get(id(self.model), self.model)  # copied together with its model
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
            "a sleeping model cannot forget tokens that it has read: keep a cache.copy() of the point to return to"
        )

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, atomically. Raises ConfigError: the cache has read nothing."""
        live = self.live
        if live.fed_back_BLD is None:
            raise ConfigError("the cache has read nothing: there is no memory to save")
        tensors = {f"state.{name}": t for name, t in live.state.to_state_dict().items()}
        tensors |= {f"at_start.{name}": t for name, t in live.at_start.to_state_dict().items()}
        tensors["fed_back"] = live.fed_back_BLD
        if live.step_BLD is not None:
            tensors["step"] = live.step_BLD
        header = {
            "format": FORMAT,
            "fingerprint": fingerprint(self.model),
            "sleep": sleep_dict(self.sleep),
            "rows": {name: getattr(live, name) for name in ("filled", "predicted", "boundaries")},
        }
        saved = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        header["sha256"] = _checksum(header, saved)
        write_whole(Path(path), save(saved, {"memory": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> SleepCache:
        """Read a file of `save` for this `SleepForCausalLM`. All later ids are new text (`follow_with_new_text`).

        Raises DataError: the file cannot be read, or another model wrote it; ConfigError: the settings of sleep, except
        N and L, differ from the model's.
        """
        header, tensors = _read(Path(path))
        if header["fingerprint"] != fingerprint(model.model):
            raise DataError(
                f"memory {path} was made by another model (other settings, weights or dtype): read the text again"
            )
        saved = from_dict(SleepConfig, header["sleep"], f"memory {path}: sleep")
        cache = cls(model.model, 0, saved)
        cache.check(model.config.sleep_settings(window=saved.window), 0)
        tensors = {name: t.to(model.device) for name, t in tensors.items()}
        rows = {name: tuple(values) for name, values in header["rows"].items()}
        try:
            state, at_start = (_part(tensors, name, model.model.num_layers) for name in ("state", "at_start"))
            passes, step = (0,) * len(rows["filled"]), tensors.get("step")
            cache.live = Live(state, at_start, tensors["fed_back"], **rows, passes=passes, step_BLD=step)
        except (KeyError, StopIteration, TypeError) as error:
            raise DataError(f"memory {path} lacks a tensor of the model: read the text again") from error
        return cache.follow_with_new_text()


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, from either argument. Raises ConfigError: they are two caches, or one is no SleepCache."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ConfigError("cache and past_key_values are two names of the same: give one of them")
    chosen = past_key_values if cache is None else cache
    if chosen is not None and not isinstance(chosen, SleepCache):
        raise ConfigError(f"the cache is a {type(chosen).__name__}: this model keeps a SleepCache")
    return chosen


def _part(tensors: dict[str, torch.Tensor], part: str, num_layers: int) -> FastWeights:
    named = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
    return FastWeights.from_state_dict(named, num_layers)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("memory", "{}"))
            if not _IS_HEADER(header) or header["format"] != FORMAT:
                raise DataError(f"{path} is no memory of this version of sleeptrain")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("sha256", None) not in (None, _checksum(header, tensors)):
            raise DataError(f"memory {path} is damaged: its checksum is not that of its content; read the text again")
        return header, tensors
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"memory {path} cannot be read: {error}") from error


def _checksum(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Hexadecimal sha256 of the header without its checksum, and of all tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: Hybrid) -> str:
    """Hexadecimal sha256 of the settings, and of names, shapes, dtypes and about SAMPLED numbers of each parameter."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
