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

# Is given a whole tensor on the CPU, which it may keep.
Take = Callable[[torch.Tensor], object]


class Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class SavedTensors(Protocol):
    """The tensors of a checkpoint. forms: of all of them, by name."""

    @property
    def forms(self) -> Mapping[str, Form]: ...

    def read(self, takes: Mapping[str, Take]) -> None:
        """Hands over the named tensors, one by one. Each process reads for itself."""


class TensorFiles:
    """The tensors in a checkpoint's folder. Raises DataError where they cannot be read."""

    def __init__(self, path: Path):
        self._path = path
        self._reader = _Reader(str(path))
        try:
            found = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # safetensors raises its own kind
            raise DataError(f"checkpoint {path} cannot be read: {error}") from error
        self.forms = {
            name: Form(tuple(tensor.size), tensor.properties.dtype)
            for name, tensor in found.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        found: list[torch.Tensor] = []
        self.read({name: found.append})
        return found[0]

    def read(self, takes: Mapping[str, Take]) -> None:
        wanted = {
            name: torch.empty(f.shape, dtype=f.dtype, device="meta") for name, f in self.forms.items() if name in takes
        }
        try:
            # Alone: what one process reads depends on no other, and none waits where another cannot read.
            dcp.load(wanted, storage_reader=self._reader, planner=_OneByOne(takes), no_dist=True)
        except CheckpointException as error:
            raise DataError(f"checkpoint {self._path} cannot be read: {first_failure(error)}") from error


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of the files once."""

    _headers: Metadata | None = None

    def read_metadata(self) -> Metadata:
        self._headers = self._headers or super().read_metadata()
        return self._headers


class _OneByOne(DefaultLoadPlanner):
    """Memory for a tensor is there from its reading until it has been taken."""

    def __init__(self, takes: Mapping[str, Take]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._takes = takes

    def set_up_planner(
        self, state_dict: dict[str, torch.Tensor], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Not the parent's, which would make memory for everything at once.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty_like(self.state_dict[read_item.dest_index.fqn], device="cpu")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._takes[read_item.dest_index.fqn](tensor)
