"""Folders of safetensors files, read tensor by tensor and written file by file: memory holds at most one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sleeptrain.checkpoint.read import Form
from sleeptrain.errors import DataError
from sleeptrain.plain_files import named_file
from sleeptrain.small_files import read_json

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 2 * 2**30
WAY_OUT = "fetch it again"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """The tensors of a Hugging Face folder, under their names in `Family.mappings`.

    canonical: maps the name in a file to that name; None leaves the tensor out.
    forms: {name: shape and dtype} of the other tensors.
    left_out: names in the files of the tensors that are left out.

    Raises DataError: the folder has no safetensors files, a file is missing, damaged, or no plain file of the folder, a
    file lacks a tensor of the index, or a tensor is not floating point.
    """

    def __init__(self, folder: Path, canonical: Callable[[str], str | None]):
        self.forms: dict[str, Form] = {}
        self.left_out: list[str] = []
        self._places: dict[str, tuple[Path, str]] = {}
        for path, indexed in _files(folder).items():
            self._read_header(path, indexed, canonical)

    def _read_header(self, path: Path, indexed: set[str], canonical: Callable[[str], str | None]) -> None:
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                if absent := sorted(indexed - names):
                    raise DataError(f"{path} lacks {absent[0]}, which {INDEX_NAME} says is there; fetch it again")
                for name in sorted(names):
                    known = canonical(name)
                    if known is None:
                        self.left_out.append(name)
                        continue
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise DataError(f"{path}: {name} is {part.get_dtype()}; only floating point can be imported")
                    self.forms[known] = Form(tuple(part.get_shape()), dtype)
                    self._places[known] = (path, name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is missing, truncated or damaged ({error}); fetch it again") from error

    def read(self, name: str) -> torch.Tensor:
        path, within = self._places[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(within)


def _files(folder: Path) -> dict[Path, set[str]]:
    """{file of weights: names of its tensors in the index}. Raises DataError for a file outside of the folder."""
    index = folder / INDEX_NAME
    if os.path.lexists(index):
        named_file(folder, INDEX_NAME, folder)
        places = read_json(index, WAY_OUT).get("weight_map")
        if not isinstance(places, dict):
            raise DataError(f"{index} has no weight_map; {WAY_OUT}")
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str):
                raise DataError(f"{index} names no file for {name}, but {file!r}; {WAY_OUT}")
            files.setdefault(file, set()).add(name)
        return {named_file(folder, file, index): names for file, names in files.items()}
    if os.path.lexists(folder / WEIGHTS_NAME):
        return {named_file(folder, WEIGHTS_NAME, folder): set()}
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise DataError(
            f"{folder} holds weights in {pickles[0]} only, a pickle, which can run any code when it is read; take the "
            "safetensors files of the model, or convert it with transformers where you trust it"
        )
    raise DataError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    file_name: Callable[[int, int], str],
    limit: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write tensors into files of at most `limit` bytes, or of one larger tensor. Returns {tensor: file name}.

    sizes: {tensor: bytes} in the order of `tensors`. file_name: maps (number of the file from 1, number of files) to
    its name.
    """
    shards = _cut(sizes, limit)
    stream, places = iter(tensors), dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = file_name(number, len(shards))
        shard = {}
        for name in names:
            actual, tensor = next(stream)
            assert (actual, tensor.nbytes) == (name, sizes[name]), f"{actual} comes where {name} should"
            # Without the clone a view would be saved with its whole storage.
            shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # the default mode; safetensors creates files that only the owner may read
        save_file(shard, path, {"format": "pt"})
        path.chmod(mode)
        places |= dict.fromkeys(names, file)
    return places


def _cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards, filled = list[list[str]](), 0
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_weights(
    folder: Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, torch.Tensor]], limit: int = SHARD_BYTES
) -> None:
    """Like `write_shards`, with the file names of transformers, and an index if there are several files."""

    def name(number: int, count: int) -> str:
        return WEIGHTS_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    places = write_shards(folder, sizes, tensors, name, limit)
    if set(places.values()) != {WEIGHTS_NAME}:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
