"""The typed configuration: a dataclass for each concept, composed by hydra from `configs/`, checked by `validate`.

Every field is a setting a user may override on the command line by its dotted path (`sleep.passes=4`). What a run was
is `Config` written to `<run folder>/config.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class AttentionConfig:
    """Softmax attention inside a window: grouped-query, optional output gate and q/k norms, partial RoPE."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.5
    gate: bool = True
    qk_norm: str = "head"  # none | head | all: of each head, or of all heads together
    qkv_bias: bool = False
    scale: float = 0.0  # of the scores; 0: 1 / sqrt(head_dim)
    post_norm: bool = False  # attention blocks norm what mixer and feed-forward give, instead of what they read
    sliding_window: int = 1024  # tokens that one of a sliding_attention block attends to, itself included


@dataclass
class GatedDeltaNetConfig:
    """Gated DeltaNet mixer: state S is [num_v_heads, head_k_dim, head_v_dim] a sequence."""

    num_k_heads: int = 4
    num_v_heads: int = 4
    head_k_dim: int = 32
    head_v_dim: int = 32
    conv_size: int = 4
    allow_neg_eigval: bool = False  # writes of strength up to 2, so that the transition may reflect
    norm_eps: float = 0.0  # of the gated norm; 0: model.norm_eps


@dataclass
class JetConfig:
    """JetBlock mixer: S is [num_heads, head_k_dim, head_v_dim] a sequence; values pass a dynamic convolution."""

    num_heads: int = 4
    head_k_dim: int = 32
    head_v_dim: int = 64
    conv_size: int = 4
    kernel_dim: int = 32  # width between the features and the kernels that are made of them
    norm_eps: float = 1e-5


@dataclass
class Mamba2Config:
    """Mamba-2 (SSD) mixer: S is [num_heads, state_dim, head_dim] a sequence; a group's heads share B and C."""

    num_heads: int = 8
    head_dim: int = 32
    state_dim: int = 64
    num_groups: int = 1
    conv_size: int = 4


@dataclass
class ModelConfig:
    """The decoder. `layers` lists each block's mixer: attention | sliding_attention | gated_deltanet | jet | mamba2."""

    vocab_size: int = 0  # 0: taken from the data (tokenizer or task)
    dim: int = 128
    ffn_dim: int = 384
    layers: list[str] = field(default_factory=lambda: ["attention", "gated_deltanet"] * 2)
    mixer_only: list[int] = field(default_factory=list)  # blocks without a feed-forward, which begin as the identity
    norm: str = "zero_centred"  # zero_centred | plain: scale by 1 + weight, or by the weight
    norm_eps: float = 1e-6
    sandwich_norms: bool = False  # a norm behind mixer and feed-forward, too
    norm_between_passes: bool = False  # what is fed back goes through the last norm
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what mixers and feed-forwards add
    logits_divisor: float = 1.0
    tie_embeddings: bool = True
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    jet: JetConfig = field(default_factory=JetConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mixers: dict[str, Any] = field(default_factory=dict)  # settings of mixers that other packages bring, by their names


@dataclass
class Stage:
    """One stage of the curriculum, in force from `tokens` seen on. An empty field keeps the last stage's value.

    ramp: whether N jumps to `passes` or has grown to it by then, from the stage before on.
    """

    tokens: int = 0
    passes: int | None = None
    window: int | None = None
    batch: int | None = None
    ramp: str = "step"  # step | linear | sqrt


@dataclass
class SleepConfig:
    """When and how the model sleeps; `passes` counts the wake pass (N=1 never sleeps)."""

    passes: int = 1
    window: int = 128
    when: str = "every"  # every | unlabelled
    feedback: str = "features"  # features | none
    eviction: str = "hard"  # hard | sliding
    conv_state: str = "restart"  # restart | carry
    core: list[int] | None = None  # [first, last) blocks of the loop; empty: all blocks
    sample_passes: bool = False  # draw N uniformly from 1..passes at each step
    recompute: str = "none"  # none | block | pass | window
    bptt_windows: int | None = None  # gradients flow through at most this many windows; empty: all windows of a step
    curriculum: list[Stage] = field(default_factory=list)


@dataclass
class ShardSource:
    """Token shards of one kind of text, and how much of it is read; `validation` may be left out."""

    name: str = "text"
    train: str = ""
    validation: str = ""
    weight: float = 1.0


@dataclass
class MixtureStage:
    """The sources' weights from `tokens` seen on; a source that is not named has weight 0."""

    tokens: int = 0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class ShardsConfig:
    """Token shards made by `tools/prepare.py`, of one source or a mixture."""

    tokenizer: str = ""
    sources: list[ShardSource] = field(default_factory=list)
    curriculum: list[MixtureStage] = field(default_factory=list)
    shuffle: int = 8  # shards whose documents are shuffled together
    on_damage: str = "stop"  # stop | skip: the tokens of a damaged document become pads
    workers: int = 1  # steps that are read ahead, each by a thread
    cache: str = ""  # where remote shards are kept; empty: $SLEEPTRAIN_CACHE or ~/.cache/sleeptrain/shards
    cache_gib: int = 64  # of remote shards, at most


@dataclass
class Rule110Config:
    """Rule 110: `strings` random rows of `width` cells; a label is one of a string's cells `steps` updates on."""

    width: int = 20
    strings: int = 1
    steps: int = 8
    boundary: str = "periodic"  # periodic | zeros | ones: the cells beyond the edge
    label: int = 0  # the cell that is asked for
    validation_samples: int = 1024


@dataclass
class DepoConfig:
    """Depo: a shuffled directed cycle of named nodes, then questions which node is k edges on."""

    nodes: int = 75  # of the largest cycle, and of all held-out ones
    min_nodes: int = 3
    hops: int = 16  # k is at most this
    symbols: int = 50  # that words are made of
    max_word: int = 2  # symbols of a node's name, at most
    queries: int = 10
    validation_samples: int = 1024


@dataclass
class GsmInfiniteConfig:
    """GSM-Infinite: word problems of a given number of operations among distractors; the question comes first."""

    min_ops: int = 1
    max_ops: int = 8
    min_tokens: int = 2000  # of a row's inputs, in the tokenizer's own tokens
    max_tokens: int = 3300
    tokenizer: str = ""  # a tokenizer's file or folder; empty: the task's own words
    train: str = ""  # problems in the public generator's format, a .jsonl file; empty: generated ones
    validation: str = ""
    validation_samples: int = 1600


@dataclass
class DataConfig:
    source: str = "shards"  # shards | rule110 | depo | gsm_infinite
    layout: str = "lanes"  # lanes | packed | one_document: how documents fill rows (shards)
    sequence: int = 1024  # T, tokens of a row in a step (tasks have their own)
    batch: int = 8  # rows in a step
    seed: int = 0
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    rule110: Rule110Config = field(default_factory=Rule110Config)
    depo: DepoConfig = field(default_factory=DepoConfig)
    gsm_infinite: GsmInfiniteConfig = field(default_factory=GsmInfiniteConfig)


@dataclass
class FrozenStage:
    """What is not trained from `tokens` seen on."""

    tokens: int = 0
    frozen: list[str] = field(default_factory=list)


@dataclass
class Rate:
    """Parameters whose rate is `factor` times that of the others of their optimizer."""

    parameters: str = ""  # a pattern of names
    factor: float = 1.0


@dataclass
class OptimConfig:
    """Muon on the body's matrices, AdamW on the rest."""

    muon_lr: float = 2e-3
    muon_momentum: float = 0.95
    muon_weight_decay: float = 1e-4
    muon_scaling: str = "keller_jordan"  # keller_jordan | moonshot
    adamw_lr: float = 1e-3
    adamw_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    adamw_weight_decay: float = 1e-4
    adamw_eps: float = 1e-8
    clip_norm: float = 1.0  # 0: no clipping
    schedule: str = "wsd"  # wsd | cosine | constant
    warmup_fraction: float = 0.01
    decay_fraction: float = 0.2  # wsd: the last share of the tokens over which the rate falls
    min_lr_ratio: float = 0.0
    rates: list[Rate] = field(default_factory=list)  # of a parameter the last that matches counts
    frozen: list[str] = field(default_factory=list)  # patterns of what is not trained; !pattern excepts
    curriculum: list[FrozenStage] = field(default_factory=list)  # other `frozen` later on


@dataclass
class TrainConfig:
    tokens: int = MISSING  # wake tokens to train on
    micro_batch: int = 0  # rows a forward holds at once; 0: the whole batch
    precision: str = "fp32"  # fp32 | bf16 (autocast; S, A_log, dt_bias and the loss stay fp32)
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads; 0: torch's own choice
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200  # steps; 0: only at the end
    eval_batches: int = 8
    max_time: str | None = "auto"  # 3:55:00, 90m; auto: until the Slurm job ends; empty: no limit


@dataclass
class CheckpointConfig:
    every: int = 200  # steps; 0: only at the start and the end
    keep: int = 2  # of the newest
    keep_every: int = 0  # steps whose multiples stay besides; 0: none


@dataclass
class ParallelConfig:
    """How a run is spread over its processes; what tensor and pipeline leave over are data-parallel replicas.

    ZeRO-1 is the default because it is right in every layout and costs nothing: the optimizer's state is cut over the
    replicas, with one replica over nobody. 2 also cuts the gradients, 3 the weights.
    """

    tensor: int = 1  # parts of each layer: heads, feed-forward, vocabulary
    pipeline: int = 1  # stages of consecutive blocks
    zero: int = 1  # 0 | 1 | 2 | 3: what DeepSpeed cuts over the replicas
    sequence: bool = False  # between mixers each tensor rank holds its part of a window's tokens


@dataclass
class HealthConfig:
    """When a run takes one of its processes for lost or stuck, and what it measures of itself."""

    lost_after: int = 30  # seconds without a sign of life
    stall_after: int = 600  # seconds without progress; 0: never
    timeout: int = 1800  # seconds of an operation between processes, and of phases that show no progress such as saving
    norms_every: int = 100  # steps between records of the sizes of memory and features; 0: never
    compare_every: int = 100  # steps between comparisons of the replicas' weights; 0: never
    probe_every: int = 100  # steps between comparisons of the processes' speed; 0: never
    slow_factor: float = 1.5  # a process that takes so many times as long as the median is named
    on_nonfinite: str = "stop"  # stop | skip | rollback: after a step whose loss or gradient is not finite
    on_spike: str = "stop"  # stop | skip | rollback: after one whose loss or gradient norm is a spike
    spike_factor: float = 0.0  # robust deviations above the median that are a spike; 0: none is
    spike_window: int = 64  # steps that the median is of; a rollback goes back at least so many
    max_rollbacks: int = 3  # without coming past the step that went wrong


@dataclass
class RunConfig:
    name: str = MISSING
    root: str = "runs"  # the run folder is <root>/<name>; an existing one is resumed
    # Settings that may differ when the run goes on, or from those of init_from.
    allow_changes: list[str] = field(default_factory=list)
    start_over: bool = False  # where the records are there and no checkpoint is: begin again, and keep the records
    init_from: str = ""  # a checkpoint, or a run that has one, whose weights a new run starts with
    allow_older: bool = False  # where the newest checkpoint of the run init_from is damaged, take the one before
    init_inserted: list[int] = field(default_factory=list)  # blocks that the checkpoint lacks; it numbers the others
    init_new: list[str] = field(default_factory=list)  # patterns of parameters that only the model has
    init_dropped: list[str] = field(default_factory=list)  # patterns of parameters that only the checkpoint has


@dataclass
class WandbConfig:
    mode: str = "auto"  # auto | online | offline | disabled; auto: online where a key is configured
    project: str = "sleeptrain"
    entity: str | None = None


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
