"""The fragments of parameters in DeepSpeed's flat partitions, and checks that they are as expected.

They come from DeepSpeed's interface for partitioned parameters (`deepspeed.utils`): under ZeRO-1 and 2 from the
fragment addresses linked to each parameter, under ZeRO-3 from the local fp32 part of each parameter, which is a view of
its partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sleeptrain.parallel.zero.flat_optimizer import FlatOptimizer, Partition
from sleeptrain.parallel.zero.matrix_exchange import Fragment, LayoutError

Parameters = Mapping[str, torch.nn.Parameter]
_MISSING: Any = object()


def whole_partitions(optimizer: FlatOptimizer, parameters: Parameters) -> list[Partition]:
    """ZeRO-0: every process holds every parameter in full."""
    partitions = []
    for group in optimizer.param_groups:
        fragments, offset = [], 0
        for name in group["names"]:
            fragments.append(Fragment(name, 0, parameters[name].numel(), offset))
            offset += parameters[name].numel()
        partitions.append(Partition(group["kind"], group["names"], tuple(group["params"]), tuple(fragments)))
    return partitions


def group_partitions(optimizer: FlatOptimizer, parameters: Parameters) -> list[Partition]:
    """ZeRO-1 and 2: each group is one flat tensor, of which each data rank keeps an equal part."""
    partitions = []
    for index, group in enumerate(optimizer.param_groups):
        require(len(group["params"]) == 1 and group["params"][0].dim() == 1, "each group is one flat partition")
        (flat,) = group["params"]
        fragments = []
        for name in group["names"]:
            mapping = getattr(parameters[name], "_hp_mapping", _MISSING)
            require(mapping is not _MISSING, f"{name} is linked to its partition")
            if mapping is None:
                continue  # other data ranks hold all of it
            require(mapping.param_group_index == index, f"{name} stays in its group")
            source, target = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            require(_offset_in(flat, mapping.get_hp_fragment()) == target.start, f"{name} is in its group's partition")
            require(source.numel == target.numel, f"{name} has one fragment")
            fragments.append(Fragment(name, source.start, source.numel, target.start))
        partitions.append(_checked(group["kind"], group["names"], flat, fragments, parameters))
    return partitions


def parameter_partitions(
    optimizer: FlatOptimizer, flats: Sequence[torch.Tensor], parameters: Parameters, rank: int
) -> list[Partition]:
    """ZeRO-3: each parameter is cut over the data ranks separately, and its last part is padded.

    flats: DeepSpeed's fp32 partitions, one or several for each group. rank: the data rank.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    partitions: dict[int, tuple[str, list[str], list[Fragment]]] = {}
    for group in optimizer.param_groups:
        for name in group["names"]:
            p: Any = parameters[name]  # ZeRO-3 adds attributes to a parameter
            part = safe_get_local_fp32_param(p)
            holders = [i for i, flat in enumerate(flats) if 0 <= _offset_in(flat, part) < flat.numel()]
            require(len(holders) == 1, f"the fp32 part of {name} is a view of one partition")
            kind, names, fragments = partitions.setdefault(holders[0], (group["kind"], [], []))
            require(kind == group["kind"], f"the partition of {name} holds parameters of one group")
            names.append(name)
            numel = min(part.numel(), p.ds_numel - rank * part.numel())
            if numel > 0:
                fragments.append(Fragment(name, rank * part.numel(), numel, _offset_in(flats[holders[0]], part)))
    require(set(partitions) == set(range(len(flats))), "every fp32 partition holds parameters")
    return [
        _checked(kind, tuple(names), flats[i], fragments, parameters)
        for i, (kind, names, fragments) in sorted(partitions.items())
    ]


def local_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also under ZeRO-3, where a parameter that is not gathered is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This data rank's part [numel] of a parameter that ZeRO-3 has cut; the end of the last part is padding."""
    part = getattr(parameter, "ds_tensor", None)
    require(isinstance(part, torch.Tensor) and part.dim() == 1, "ZeRO-3 keeps a flat part of each parameter")
    assert part is not None
    return part.data


def region(tensors: Sequence[torch.Tensor], fragment: Fragment) -> torch.Tensor:
    """A view of a fragment's elements in the tensors of its partition, or in other tensors of the same shapes."""
    offset = fragment.offset
    for tensor in tensors:
        if offset < tensor.numel():
            return tensor.view(-1)[offset : offset + fragment.numel]
        offset -= tensor.numel()
    raise ValueError(f"{fragment} is beyond the end of its partition")


def _offset_in(flat: torch.Tensor, part: torch.Tensor) -> int:
    return (part.data_ptr() - flat.data_ptr()) // flat.element_size()


def _checked(
    kind: str, names: tuple[str, ...], flat: torch.Tensor, fragments: list[Fragment], parameters: Parameters
) -> Partition:
    """The partition, after a check that its fragments do not overlap and hold the values of the parameters."""
    require(flat.dtype == torch.float32, "master weights are fp32")
    end = 0
    for f in sorted(fragments, key=lambda f: f.offset):
        require(f.offset >= end and f.offset + f.numel <= flat.numel(), f"{f.name} does not overlap others")
        end = f.offset + f.numel
        p = parameters[f.name]
        if p.numel() == torch.Size(local_shape(p)).numel():
            values = p.detach().reshape(-1)[f.start : f.start + f.numel]
            require(torch.equal(values, flat.detach()[f.offset : end]), f"the partition holds the values of {f.name}")
    return Partition(kind, names, (flat,), tuple(fragments))


def require(condition: bool, expectation: str) -> None:
    """Raise LayoutError, which names DeepSpeed's version, if an expectation of its layout does not hold."""
    if not condition:
        import deepspeed

        raise LayoutError(
            f"deepspeed {deepspeed.__version__} lays out its partitions in another way than expected: not true that "
            f"{expectation}. sleeptrain supports deepspeed 0.19; install that version"
        )
