"""A checkpoint of many processes in the format of one: stages merged, memory joined over rows, layers and heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sleeptrain.data.batch import Part
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.sharding import ModelSharding
from sleeptrain.train.optim import KINDS

Tensors = Mapping[str, torch.Tensor]


def named_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """{"model", "optim"} of a stage, flat: a path of keys names each tensor."""
    flat = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    for kind, parameters in state["optim"].items():
        for name, tensors in parameters.items():
            flat |= {f"optim/{kind}/{name}/{key}": tensor for key, tensor in tensors.items()}
    return flat


def merge_stages(found: Sequence[Tensors]) -> dict[str, Any]:
    """One state of all stages, from what each process gave (most give nothing), first stage first.

    Of tied embeddings, which two stages hold, the first stage's are kept.
    """
    model: dict[str, torch.Tensor] = {}
    optim: dict[str, dict[str, dict[str, torch.Tensor]]] = {kind: {} for kind in KINDS}
    for tensors in found:
        for path, tensor in tensors.items():
            match path.split("/"):
                case ["model", name]:
                    model.setdefault(name, tensor)
                case ["optim", kind, name, key]:
                    optim[kind].setdefault(name, {}).setdefault(key, tensor)
    return {"model": model, "optim": optim}


def join_carried(found: Sequence[Tensors], sharding: ModelSharding, replicas: int) -> FastWeights | None:
    """The memory of all rows and layers, from each process's: `place` (data, pipeline and tensor rank) and tensors.

    None where no process has any. Rows of a replica that has none are empty.
    """
    num_layers = len(sharding.config.layers)
    shards: dict[int, dict[int, dict[int, FastWeights]]] = defaultdict(lambda: defaultdict(dict))
    for tensors in found:
        data, pipeline, tensor = tensors["place"].tolist()
        named = {name: t for name, t in tensors.items() if name != "place"}
        shards[data][pipeline][tensor] = FastWeights.from_state_dict(named, num_layers)
    sizes = [t.shape[0] for tensors in found for name, t in tensors.items() if name != "place"]
    if not sizes:
        return None
    num_rows, whole = sizes[0] * replicas, FastWeights((None,) * num_layers)
    for data, stages in shards.items():
        rows = torch.tensor(list(Part(data, replicas).rows(num_rows)))
        for ranks in stages.values():
            joined = sharding.join_state([ranks[tensor] for tensor in sorted(ranks)])
            whole = whole.put_rows(rows, joined, num_rows)
    return whole


def own_carried(whole: FastWeights, part: Part, layers: range) -> FastWeights:
    """The memory of a replica's rows in the layers that a stage holds, from that of all."""
    sizes = [t.shape[0] for t in whole.to_state_dict().values()]
    own = whole.rows(torch.tensor(list(part.rows(sizes[0])))) if sizes else whole
    return FastWeights(tuple(state if index in layers else None for index, state in enumerate(own.layers)))
