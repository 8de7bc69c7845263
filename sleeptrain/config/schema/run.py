"""How a run is carried out: steps, checkpoints, processes, health, logs."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from sleeptrain.config.setting import setting


@dataclass
class TrainConfig:
    tokens: int = setting(MISSING, "wake tokens to train on", at_least=1)
    micro_batch: int = setting(
        0, "rows that a forward holds at once, a divisor of the batch; 0 is all", at_least=0, on_resume="free"
    )
    precision: str = setting(
        "fp32",
        "of matrix products and attention; [weights, S, decays and the loss](numerics.md) stay fp32",
        choices=("fp32", "bf16"),
    )
    residual: str = setting(
        "fp32", "under `train.precision=bf16`, of the features between blocks", choices=("fp32", "bf16")
    )
    compile: bool = setting(
        False,
        "[compile each block](training.md#compiled-blocks) with torch.compile; not with `parallel.zero=3`",
        on_resume="free",
    )
    cuda_graphs: bool = setting(
        False,
        "run rounds as [CUDA graphs](training.md#cuda-graphs), which spare the host; on a GPU, in one process or "
        "replicas under `parallel.zero=1`, with `sleep.recompute=none` and `sleep.stop=fixed`",
        on_resume="free",
    )
    device: str = setting("auto", "auto is a GPU where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", at_least=0, on_resume="free")
    seed: int = setting(0, "weights at the start, and sampled N", at_least=0)
    log_every: int = setting(10, "steps between training records", at_least=1, on_resume="free")
    eval_every: int = setting(200, "steps between evaluations; 0 is only at the end", at_least=0)
    eval_batches: int = setting(8, "held-out batches of an evaluation, at most", at_least=1)
    max_time: str | None = setting(
        "auto",
        "when to [stop](training.md#stopping), from the start of the process; auto is the end of the Slurm "
        "job, null never",
        allowed="`3:55:00`, `1-12:00:00`, `90m`, `2.5h`, `45s`; auto; null",
        on_resume="free",
    )


@dataclass
class CheckpointConfig:
    folder: str = setting(
        "",
        "where [the checkpoints](checkpoints.md#in-an-object-store) are, in a folder named `run.name`; empty is "
        "`checkpoints` in the run's folder",
        allowed="a URL for fsspec, such as `s3://bucket/runs`; a folder",
        on_resume="free",
    )
    every: int = setting(
        200,
        "steps between checkpoints; 0 is only at the start, at the end and on a signal",
        at_least=0,
        on_resume="free",
    )
    keep: int = setting(2, "how many of the newest stay", at_least=1, on_resume="free")
    keep_every: int = setting(
        0, "checkpoints whose step is a multiple of it stay too; 0 is none", at_least=0, on_resume="free"
    )


@dataclass
class ParallelConfig:
    """How a run is spread over its processes: tensor ranks x pipeline stages x data-parallel replicas.

    ZeRO-1 is the default because it is right in every layout and costs nothing. It shards the optimizer's state over
    the replicas; with one replica it shards nothing. ZeRO-2 also shards the gradients, ZeRO-3 the weights too.
    """

    tensor: int = setting(
        1,
        "parts of each layer; divides heads, `model.ffn_dim` and `model.jet.kernel_dim`. Key-value heads and "
        "Mamba-2 groups may be fewer: ranks share them. The vocabulary is padded",
        at_least=1,
        on_resume="free",
    )
    pipeline: int = setting(1, "stages of consecutive blocks, at most one a block", at_least=1, on_resume="free")
    zero: int = setting(
        1,
        "DeepSpeed shards over the replicas: the optimizer's state (1), gradients too (2), weights too "
        "(3). 3 needs one stage, 0 needs one stage and one tensor rank "
        "([parallel](parallel.md#what-is-refused))",
        at_least=0,
        allowed="0 to 3",
        on_resume="free",
    )
    shard_replicas: int | None = setting(
        None,
        "neighbouring replicas over which ZeRO-1 cuts its state, such as those of a machine; divides the replicas. "
        "Each group keeps all of the state, gathers weights inside, and adds its gradients to those of the others; "
        "null: all replicas ([parallel](parallel.md#groups-of-replicas))",
        at_least=1,
        on_resume="free",
    )
    sequence: bool = setting(
        False,
        "between mixers each tensor rank holds its part of a window's tokens; windows must be multiples of "
        "`parallel.tensor`",
        on_resume="free",
    )
    split_head: bool = setting(
        False,
        "the stages of a pipeline share the head, each with a part of the vocabulary; otherwise the last stage has it "
        "whole. For large vocabularies: a head that takes as long as several blocks unbalances the stages, but a small "
        "one costs less than its messages ([pipeline](pipeline.md#a-head-on-all-stages))",
        on_resume="free",
    )

    def state_replicas(self, replicas: int) -> int:
        """The number of replicas, of all `replicas`, over which ZeRO cuts its state."""
        return self.shard_replicas or replicas

    @property
    def token_parts(self) -> int:
        """The number of parts into which tokens are cut between mixers; it divides the tokens of every round."""
        return self.tensor if self.sequence else 1


@dataclass
class HealthConfig:
    """When a process counts as lost or stuck, and the measurements that a run takes of itself."""

    lost_after: int = setting(
        30, "seconds without a sign of life after which a process is lost", at_least=3, on_resume="free"
    )
    stall_after: int = setting(
        600,
        "seconds without progress after which a run has stalled; 0 is never",
        at_least=0,
        on_resume="free",
    )
    timeout: int = setting(
        1800,
        "how many seconds processes wait for each other, and saving and the first step may take",
        at_least=1,
        allowed="above the other two",
        on_resume="free",
    )
    norms_every: int = setting(
        100, "steps between records of the sizes of memory and features; 0 is never", at_least=0, on_resume="free"
    )
    compare_every: int = setting(
        100,
        "steps between comparisons of the replicas' weights, which are also made before each checkpoint; 0 is never",
        at_least=0,
        on_resume="free",
    )
    probe_every: int = setting(
        100, "steps between comparisons of the processes' speed; 0 is never", at_least=0, on_resume="free"
    )
    slow_factor: float = setting(
        1.5, "a process that takes more than this many times the median is named", at_least=1, on_resume="free"
    )
    on_nonfinite: str = setting(
        "stop",
        "after a step whose loss or gradient is not finite",
        choices=("stop", "skip", "rollback"),
        on_resume="free",
    )
    on_spike: str = setting(
        "stop",
        "after a step whose loss or gradient norm is a spike",
        choices=("stop", "skip", "rollback"),
        on_resume="free",
    )
    spike_factor: float = setting(
        0.0, "a value this many robust deviations above the median is a spike; 0 is never", at_least=0
    )
    spike_window: int = setting(64, "steps of the median; a rollback goes back at least as many", at_least=8)
    max_rollbacks: int = setting(
        3, "rollbacks in a row without getting past the failed step", at_least=1, on_resume="free"
    )


@dataclass
class RunConfig:
    name: str = setting(
        MISSING,
        "the run folder is `<run.root>/<run.name>`; an existing run is resumed",
        allowed="a relative path",
        on_resume="free",
    )
    root: str = setting("runs", "where run folders are", allowed="a path", on_resume="free")
    allow_changes: list[str] = setting(
        [],
        "what may change when the run [goes on](training.md#changed-settings) or "
        "[begins](checkpoints.md#starting-from-another-runs-weights) with other weights",
        allowed="names of settings",
        on_resume="free",
    )
    start_over: bool = setting(
        False,
        "where a run has records and no checkpoint to go on from: begin at step 0 and "
        "[keep them](training.md#what-is-lost-and-what-is-kept). A run that has a checkpoint goes on",
        on_resume="free",
    )
    init_from: str = setting(
        "",
        "the weights that a new run begins with; empty is initial ones",
        allowed="a run's or a checkpoint's folder",
        on_resume="free",
    )
    allow_older: bool = setting(
        False,
        "if the newest checkpoint of the run `run.init_from` is damaged, begin with the newest undamaged one "
        "instead of refusing",
        on_resume="free",
    )
    init_inserted: list[int] = setting(
        [], "blocks that the model has between those of that checkpoint", allowed="a list of blocks", on_resume="free"
    )
    init_new: list[str] = setting(
        [], "parameters that the model has and that checkpoint has not", allowed="a list of patterns", on_resume="free"
    )
    init_dropped: list[str] = setting(
        [], "parameters that the checkpoint has and the model has not", allowed="a list of patterns", on_resume="free"
    )


@dataclass
class WandbConfig:
    mode: str = setting(
        "auto",
        "auto is online where a key is configured, else offline",
        choices=("auto", "online", "offline", "disabled"),
        on_resume="free",
    )
    project: str = setting("sleeptrain", "project", allowed="a name", on_resume="free")
    entity: str | None = setting(None, "team or user; null is wandb's own choice", allowed="a name", on_resume="free")
