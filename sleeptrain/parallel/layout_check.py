"""Checks that a configuration can be spread over a number of processes. Every error names a layout that works."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.config.task_rows import row_length
from sleeptrain.config.validate import values_in_force
from sleeptrain.errors import ConfigError
from sleeptrain.model.mixers.registry import mixer_specs
from sleeptrain.model.shards import padded_size
from sleeptrain.parallel.pipeline.stage_split import split_stages
from sleeptrain.sleep.rounds import window_spans

ZERO_STAGES = (0, 1, 2, 3)


def check_layout(config: Config, world_size: int) -> int:
    """Return the number of data-parallel replicas of `config.parallel` on `world_size` processes.

    Raises ConfigError at the first setting that does not go with another.
    """
    parallel = config.parallel
    _check_tensor(config, world_size)
    num_layers = len(config.model.layers)
    if parallel.pipeline > num_layers:
        raise ConfigError(
            f"parallel.pipeline ({parallel.pipeline}) is more than the blocks of model.layers ({num_layers}): a stage "
            f"needs at least one; use parallel.pipeline={num_layers} or less"
        )
    model_parallel_size = parallel.tensor * parallel.pipeline
    if world_size % model_parallel_size:
        raise ConfigError(
            f"parallel.tensor ({parallel.tensor}) times parallel.pipeline ({parallel.pipeline}) is "
            f"{model_parallel_size}, which must divide the number of processes ({world_size}): start "
            f"{_next_multiple(world_size, model_parallel_size)} processes, or make one of the two smaller"
        )
    _check_zero(config)
    _check_shards(config, world_size // model_parallel_size)
    _check_rows(config, world_size)
    _check_one_backward(config, world_size // model_parallel_size)
    _check_recompute(config)
    _check_sequence(config)
    _check_stop(config)
    _check_bptt_passes(config)
    _check_head(config)
    _check_cuda_graphs(config, world_size // model_parallel_size)
    return world_size // model_parallel_size


def too_few_micro_batches(config: Config, replicas: int) -> str | None:
    """A warning if a curriculum stage has fewer micro-batches than the pipeline stages of the core; else None.

    Pipeline stages that features are fed back over then wait for each other. The warning names a way out.
    """
    sleep, pipeline = config.sleep, config.parallel.pipeline
    passes = max(value for _, value in values_in_force(config, "passes", sleep.passes, "sleep.passes"))
    if pipeline == 1 or sleep.feedback == "none" or passes == 1:
        return None
    stages = split_stages(config, pipeline)
    rows_of = {
        name: batch // replicas for name, batch in values_in_force(config, "batch", config.data.batch, "data.batch")
    }
    name, rows = min(rows_of.items(), key=lambda item: item[1])
    num_micro_batches = rows // (config.train.micro_batch or rows)
    if num_micro_batches > stages.last_core - stages.first_core:
        return None
    sizes = [
        size for size in range(1, rows + 1) if rows // size >= pipeline and not any(r % size for r in rows_of.values())
    ]
    # If even micro-batches of one row are too few, the batch is too small.
    more_rows = [] if sizes else [f"{name}={pipeline * replicas}"]
    size = max(sizes, default=1)
    changed = [f"train.micro_batch={size}"] if size != config.train.micro_batch else []
    way_out = f"set {' and '.join([*changed, *more_rows])}"
    micro_batches = "1 micro-batch" if num_micro_batches == 1 else f"{num_micro_batches} micro-batches"
    return (
        f"a step has {micro_batches} (train.micro_batch={config.train.micro_batch}) for the {pipeline} stages of "
        f"parallel.pipeline, which wait for each other; {way_out}"
    )


def tensor_obstacles(model: ModelConfig, size: int) -> Iterator[str]:
    """Yield the settings of the model that cannot be cut over `size` tensor ranks, each as `<setting> (<value>)`.

    The vocabulary is never one of them: its last part is padded.
    """
    if model.ffn_dim % size:
        yield f"model.ffn_dim ({model.ffn_dim})"
    # Two kinds of attention share their settings; name each setting once.
    yield from dict.fromkeys(line for spec in mixer_specs(model) for line in spec.obstacles(size))


def _check_tensor(config: Config, world_size: int) -> None:
    size = config.parallel.tensor
    if obstacles := list(tensor_obstacles(config.model, size)):
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
        fitting = [str(n) for n in sizes if not any(tensor_obstacles(config.model, n))]
        raise ConfigError(
            f"parallel.tensor ({size}) does not go with {', '.join(obstacles)}; "
            f"with this model and {world_size} processes parallel.tensor can be {', '.join(fitting)}"
        )


def _check_zero(config: Config) -> None:
    parallel = config.parallel
    if parallel.zero not in ZERO_STAGES:
        raise ConfigError(f"parallel.zero must be one of 0, 1, 2, 3, not {parallel.zero}; 1 suits every layout")
    if parallel.zero == 3 and parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.zero=3 does not go with parallel.pipeline={parallel.pipeline}: DeepSpeed gathers a parameter "
            "over all processes, and the stages would wait for each other; use parallel.zero=1"
        )
    if parallel.zero == 3 and config.train.compile:
        raise ConfigError(
            "train.compile=true does not go with parallel.zero=3, which gathers the weights of each module inside a "
            "block as it is called; use train.compile=false, or parallel.zero=1 or 2"
        )
    if parallel.zero == 0 and parallel.tensor * parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.zero=0 does not go with parallel.tensor={parallel.tensor} and parallel.pipeline="
            f"{parallel.pipeline}: DeepSpeed's gradient norm would be wrong there; use parallel.zero=1"
        )


def _check_shards(config: Config, replicas: int) -> None:
    size, zero = config.parallel.shard_replicas, config.parallel.zero
    if size is None:
        return
    if zero != 1:
        raise ConfigError(
            f"parallel.shard_replicas ({size}) does not go with parallel.zero={zero}, which DeepSpeed spreads over all "
            "replicas; use parallel.zero=1, or leave parallel.shard_replicas empty"
        )
    if replicas % size:
        fitting = ", ".join(str(n) for n in range(1, replicas + 1) if replicas % n == 0)
        raise ConfigError(
            f"parallel.shard_replicas ({size}) must divide the number of replicas ({replicas}): use one of {fitting}, "
            "or leave it empty for all"
        )


def _check_rows(config: Config, world_size: int) -> None:
    data, micro_batch = world_size // (config.parallel.tensor * config.parallel.pipeline), config.train.micro_batch or 1
    for name, batch in values_in_force(config, "batch", config.data.batch, "data.batch"):
        if batch % (data * micro_batch):
            rows = f"{data} replicas of train.micro_batch ({micro_batch})" if micro_batch > 1 else f"{data} replicas"
            raise ConfigError(
                f"{name} ({batch}) must be a multiple of the {data * micro_batch} rows that {rows} take: "
                f"use {name}={_next_multiple(batch, data * micro_batch)}{_same_rows(config, world_size)}"
            )


def _same_rows(config: Config, world_size: int) -> str:
    """Text that names a layout with more processes a model replica, which fits the rows as they are; else empty."""
    parallel, micro_batch = config.parallel, config.train.micro_batch
    batches = [batch for _, batch in values_in_force(config, "batch", config.data.batch, "data.batch")]
    for tensor in range(parallel.tensor, world_size + 1):
        data, remainder = divmod(world_size, tensor * parallel.pipeline)
        if remainder or any(batch % data for batch in batches) or any(tensor_obstacles(config.model, tensor)):
            continue
        size = gcd(micro_batch, *(batch // data for batch in batches))
        changed = [f"parallel.tensor={tensor}"] if tensor != parallel.tensor else []
        changed += [f"train.micro_batch={size}"] if micro_batch and size != micro_batch else []
        return f", or keep it by {' and '.join(changed)}"
    return ""


def _check_one_backward(config: Config, data: int) -> None:
    """Raise ConfigError if a ZeRO-3 step has several backwards: the second would replace the gradients of the first."""
    if config.parallel.zero != 3 or data * config.parallel.tensor == 1:
        return
    if config.sleep.bptt_windows is not None:
        raise ConfigError(
            "parallel.zero=3 takes one backward a step, sleep.bptt_windows makes several; use parallel.zero=1 or 2, or "
            "leave sleep.bptt_windows empty"
        )
    for name, batch in values_in_force(config, "batch", config.data.batch, "data.batch"):
        if config.train.micro_batch not in (0, batch // data):
            raise ConfigError(
                f"parallel.zero=3 takes one backward a step, but train.micro_batch ({config.train.micro_batch}) cuts "
                f"the {batch // data} rows that each of {data} replicas has of {name} ({batch}); use "
                "train.micro_batch=0, or parallel.zero=1 or 2"
            )


def _check_recompute(config: Config) -> None:
    pipeline = config.parallel.pipeline
    if pipeline > 1 and config.sleep.recompute == "window":
        raise ConfigError(
            f"sleep.recompute=window does not go with parallel.pipeline={pipeline}, which runs each round again by "
            "itself in its backward; use sleep.recompute=pass, or block for less memory in it"
        )
    if config.parallel.zero == 3 and config.sleep.recompute == "selective":
        raise ConfigError(
            "sleep.recompute=selective does not go with parallel.zero=3: DeepSpeed would gather the weights of "
            "products that do not run again; use sleep.recompute=pass, or parallel.zero=1"
        )


def _check_stop(config: Config) -> None:
    """Stop rules decide by whole rows in whole layers, which tensor ranks and stages do not have."""
    if config.sleep.stop == "fixed":
        return
    for name in ("tensor", "pipeline", "zero"):
        if (value := getattr(config.parallel, name)) > 1:
            raise ConfigError(
                f"sleep.stop={config.sleep.stop} does not go with parallel.{name}={value}: it runs in one process and "
                "over replicas under parallel.zero=0 or 1; use sleep.stop=fixed, or such a layout"
            )


def _check_bptt_passes(config: Config) -> None:
    """A stage sends gradients of each round back to the stage before, which would wait for those that are cut off."""
    bptt_passes, pipeline = config.sleep.bptt_passes, config.parallel.pipeline
    if bptt_passes is not None and pipeline > 1:
        raise ConfigError(
            f"sleep.bptt_passes={bptt_passes} does not go with parallel.pipeline={pipeline}, whose stages exchange "
            "gradients of all passes; leave sleep.bptt_passes empty, or use parallel.pipeline=1"
        )


def _check_cuda_graphs(config: Config, replicas: int) -> None:
    """Graphs hold what one process does between the start of a round and its end, without a word of Python."""
    if not config.train.cuda_graphs:
        return
    parallel, sleep, optim = config.parallel, config.sleep, config.optim
    obstacles = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "zero")]
    obstacles = [text for text in obstacles if int(text.partition("=")[2]) > 1]
    if parallel.zero == 0 and replicas > 1:
        obstacles.append("parallel.zero=0 and several replicas")
    if sleep.recompute != "none":
        obstacles.append(f"sleep.recompute={sleep.recompute}")
    if sleep.stop != "fixed":
        obstacles.append(f"sleep.stop={sleep.stop}")
    if sleep.bptt_passes is not None:
        obstacles.append(f"sleep.bptt_passes={sleep.bptt_passes}")
    if replicas > 1 and (optim.frozen or optim.curriculum):
        obstacles.append("optim.frozen or optim.curriculum over several replicas")
    if obstacles:
        raise ConfigError(
            f"train.cuda_graphs=true does not go with {' and '.join(obstacles)}: it runs in one process or replicas "
            "under parallel.zero=1, with sleep.recompute=none, sleep.stop=fixed and an empty sleep.bptt_passes; set "
            "these, or train.cuda_graphs=false"
        )


def _check_sequence(config: Config) -> None:
    size = config.parallel.tensor
    if not config.parallel.sequence:
        return
    if size == 1:
        raise ConfigError(
            "parallel.sequence=true splits tokens over tensor ranks, of which there is one: set parallel.tensor to 2 "
            "or more, or parallel.sequence=false"
        )
    tokens, source = row_length(config.data), config.data.source
    rows = "data.sequence" if source == "shards" else f"data.{source}"
    for name, window in values_in_force(config, "window", config.sleep.window, "sleep.window"):
        lengths = {stop - start for start, stop in window_spans(tokens, window)}
        if odd := [length for length in lengths if length % size]:
            raise ConfigError(
                f"parallel.sequence=true splits each window over parallel.tensor ({size}), but {name}={window} leaves "
                f"one of {odd[0]} tokens of a row of {tokens} ({rows}): make both multiples of {size}, or use "
                "parallel.sequence=false"
            )


def _check_head(config: Config) -> None:
    """Raise ConfigError if a part of a shared head would be empty. A vocabulary of the data's size, 0, is not known."""
    parallel, vocab_size = config.parallel, config.model.vocab_size
    if not parallel.split_head or not vocab_size:
        return
    rows = padded_size(vocab_size, parallel.tensor) // parallel.tensor
    if rows < parallel.pipeline:
        raise ConfigError(
            f"parallel.split_head=true shares the head among {parallel.pipeline} stages (parallel.pipeline), but of "
            f"model.vocab_size ({vocab_size}) a tensor rank has only {rows} tokens: use parallel.split_head=false, "
            "which suits small vocabularies"
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
