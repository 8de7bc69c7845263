"""Reading a checkpoint tensor by tensor, with torch.distributed.checkpoint: no pickled code is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from sleeptrain.checkpoint.write import first_failure
from sleeptrain.errors import DataError

# Receives a whole tensor on the CPU, and may keep it.
Take = Callable[[torch.Tensor], object]


class Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class SavedTensors(Protocol):
    """The tensors of a checkpoint. forms: {tensor name: shape and dtype}."""

    @property
    def forms(self) -> Mapping[str, Form]: ...

    def read(self, takes: Mapping[str, Take]) -> None:
        """Calls takes[name] with each named tensor, one at a time. Each process reads independently."""


class TensorFiles:
    """The tensors in a checkpoint's folder. Raises DataError if they cannot be read."""

    def __init__(self, path: Path):
        self._path = path
        self._reader = _Reader(str(path))
        try:
            metadata = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # safetensors raises its own exception class
            raise DataError(f"checkpoint {path} cannot be read: {error}") from error
        self.forms = {
            name: Form(tuple(tensor.size), tensor.properties.dtype)
            for name, tensor in metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        tensors: list[torch.Tensor] = []
        self.read({name: tensors.append})
        return tensors[0]

    def read(self, takes: Mapping[str, Take]) -> None:
        meta_tensors = {
            name: torch.empty(f.shape, dtype=f.dtype, device="meta") for name, f in self.forms.items() if name in takes
        }
        try:
            # no_dist: each process reads independently, and none waits if another cannot read.
            dcp.load(meta_tensors, storage_reader=self._reader, planner=_OneByOne(takes), no_dist=True)
        except CheckpointException as error:
            raise DataError(f"checkpoint {self._path} cannot be read: {first_failure(error)}") from error


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of the files once."""

    _headers: Metadata | None = None

    def read_metadata(self) -> Metadata:
        self._headers = self._headers or super().read_metadata()
        return self._headers


class _OneByOne(DefaultLoadPlanner):
    """Allocates memory for one tensor at a time: from its read until it has been taken."""

    def __init__(self, takes: Mapping[str, Take]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._takes = takes

    def set_up_planner(
        self, state_dict: dict[str, torch.Tensor], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Not super(), which would allocate memory for all tensors at once.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty_like(self.state_dict[read_item.dest_index.fqn], device="cpu")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._takes[read_item.dest_index.fqn](tensor)
