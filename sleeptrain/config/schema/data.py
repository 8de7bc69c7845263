"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from sleeptrain.config.setting import setting


@dataclass
class ShardSource:
    """Token shards of one kind of text, and their share of the tokens; `validation` may be empty."""

    name: str = setting("text", "its name in logs and stages; its random order depends on it", allowed="a unique name")
    train: str = setting(
        "",
        "shards to train on; a `${oc.env:NAME}` in it is [kept as a name](trust.md#your-own-secrets)",
        allowed="a folder, URL or pattern",
    )
    validation: str = setting("", "held-out shards; at least one source has them", allowed="the same")
    weight: float = setting(1.0, "its share of the tokens, relative to the others", allowed=">= 0")


@dataclass
class MixtureStage:
    """The sources' weights from `tokens` seen on; a source that is not named has weight 0."""

    tokens: int = setting(0, "in force from this many tokens seen on", allowed=">= 1")
    weights: dict[str, float] = setting({}, "a source that is not named has weight 0", allowed="name: weight")


@dataclass
class ShardsConfig:
    """Token shards made by `tools/prepare.py`, of one source or a mixture."""

    tokenizer: str = setting(
        "",
        "the tokenizer that made the shards; compared with them, and needed to show text",
        allowed="a file or folder",
    )
    sources: list[ShardSource] = setting([], "see below; at least one", allowed="a list of sources", on_resume="fixed")
    curriculum: list[MixtureStage] = setting(
        [], "weights that change; see below; sorted by `tokens`", allowed="a list of stages", on_resume="fixed"
    )
    shuffle: int = setting(8, "shards whose documents are shuffled together", at_least=1, on_resume="fixed")
    on_damage: str = setting(
        "stop", "whether a damaged document ends the run or becomes pads", choices=("stop", "skip"), on_resume="free"
    )
    workers: int = setting(1, "steps that are read ahead, each by a thread", at_least=0, on_resume="free")
    cache: str = setting(
        "",
        "where remote shards are kept; empty is `$SLEEPTRAIN_CACHE` or `~/.cache/sleeptrain/shards`",
        allowed="a folder",
        on_resume="free",
    )
    cache_gib: int = setting(64, "GiB of remote shards, at most", at_least=1, on_resume="free")


# Far above any published experiment, so that a damaged setting is refused before rows are made from it. MOST_ITEMS:
# cells, nodes or words of a row. MOST_OPERATIONS: updates, operations of a problem, or symbols of a name.
MOST_ITEMS, MOST_OPERATIONS = 2**16, 2**10


@dataclass
class Rule110Config:
    """Rule 110: `strings` random rows of `width` cells; a label is one of a string's cells `steps` updates on."""

    width: int = setting(20, "cells of a string, one window", at_least=3, at_most=MOST_ITEMS, on_resume="fixed")
    strings: int = setting(1, "strings of a row", at_least=1, at_most=MOST_ITEMS, on_resume="fixed")
    steps: int = setting(8, "updates to the answer", at_least=1, at_most=MOST_OPERATIONS, on_resume="fixed")
    mixed_steps: list[int] = setting(
        [],
        "updates of each row, drawn from these and told by a token before each string; empty: all rows have `steps`",
        allowed="two or more different numbers",
        on_resume="fixed",
    )
    boundary: str = setting(
        "periodic", "the cells beyond the edge", choices=("periodic", "zeros", "ones"), on_resume="fixed"
    )
    label: int = setting(0, "the cell that is asked for, less than `width`", at_least=0, on_resume="fixed")
    validation_samples: int = setting(1024, "held-out rows", at_least=1)


@dataclass
class DepoConfig:
    """Depo: a shuffled directed cycle of named nodes, then questions about the node k edges further on."""

    nodes: int = setting(
        75, "nodes of the largest cycle, and of all held-out cycles", at_least=2, at_most=MOST_ITEMS, on_resume="fixed"
    )
    min_nodes: int = setting(3, "nodes of the smallest cycle", at_least=2, at_most=MOST_ITEMS, on_resume="fixed")
    hops: int = setting(16, "the largest k", at_least=1, at_most=MOST_ITEMS, on_resume="fixed")
    symbols: int = setting(50, "symbols of which words are made", at_least=1, at_most=MOST_ITEMS, on_resume="fixed")
    max_word: int = setting(
        2, "symbols of a node's name, at most", at_least=1, at_most=MOST_OPERATIONS, on_resume="fixed"
    )
    queries: int = setting(
        10, "questions of a row, at most one a node", at_least=1, at_most=MOST_ITEMS, on_resume="fixed"
    )
    windows: int = setting(
        0,
        "windows of the context, each with a number of edges drawn for its row; 0: the edges stand one after another",
        allowed="0, or 2 and more",
        at_least=0,
        at_most=MOST_ITEMS,
        on_resume="fixed",
    )
    validation_samples: int = setting(1024, "held-out rows", at_least=1)


@dataclass
class GsmInfiniteConfig:
    """GSM-Infinite: word problems of a given number of operations among distractors; the question comes first."""

    min_ops: int = setting(
        1,
        "operations of a problem, at least; with 0 a question may ask for a number of the text",
        at_least=0,
        on_resume="fixed",
    )
    max_ops: int = setting(
        8,
        "operations of a problem, at most; uniform between the two",
        at_least=1,
        at_most=MOST_OPERATIONS,
        on_resume="fixed",
    )
    min_tokens: int = setting(2000, "tokens of a row's inputs, at least", at_least=1, on_resume="fixed")
    max_tokens: int = setting(3300, "tokens of a row's inputs, at most; T", at_least=1, on_resume="fixed")
    tokenizer: str = setting(
        "", "the model's own tokenizer; empty is the task's own words", allowed="a file or folder", on_resume="fixed"
    )
    train: str = setting(
        "",
        "problems in the public generator's format; empty: problems are generated",
        allowed="a `.jsonl` file",
        on_resume="fixed",
    )
    validation: str = setting("", "held-out problems; set both files or none", allowed="a `.jsonl` file")
    validation_samples: int = setting(1600, "held-out rows, at most", at_least=1)


@dataclass
class DataConfig:
    source: str = setting(
        "shards", "where batches come from", choices=("shards", "rule110", "depo", "gsm_infinite"), on_resume="fixed"
    )
    layout: str = setting(
        "lanes",
        "how documents fill rows, see [data](data.md#layouts)",
        choices=("lanes", "packed", "one_document"),
        on_resume="fixed",
    )
    sequence: int = setting(1024, "T, tokens of a row; tasks have their own", at_least=1, on_resume="fixed")
    batch: int = setting(8, "rows of a step", at_least=1)
    seed: int = setting(0, "order of documents, or the task's samples", at_least=0, on_resume="fixed")
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    rule110: Rule110Config = field(default_factory=Rule110Config)
    depo: DepoConfig = field(default_factory=DepoConfig)
    gsm_infinite: GsmInfiniteConfig = field(default_factory=GsmInfiniteConfig)
