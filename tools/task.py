"""Show a task: some rows as text, the guessing lines, and how many rows a core draws in a second.

python tools/task.py experiment=depo_small [--rows 2] [--held-out] [setting=value ...]
"""

from __future__ import annotations

import argparse
import sys
import time

from sleeptrain.config.compose import compose
from sleeptrain.config.paths import naming_settings
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.tasks.build import build_task
from sleeptrain.data.tasks.task import Task
from sleeptrain.errors import ConfigError, UserError
from sleeptrain.terminal import say

SECONDS = 1.0  # CPU time over which the rate is measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="rows to show")
    parser.add_argument("--held-out", action="store_true", help="show held-out rows instead of training rows")
    arguments, overrides = parser.parse_known_args()
    if arguments.rows < 1:
        parser.error("--rows must be at least 1")
    try:
        config = compose(overrides)
        if config.data.source == "shards":
            raise ConfigError("data.source=shards is no task: choose one (experiment=depo_small)")
        with naming_settings(config):
            task = build_task(config.data)
        rows = min(arguments.rows, task.num_held_out) if arguments.held_out else arguments.rows
        batch = task.held_out(0, rows) if arguments.held_out else task.rows(config.data.seed, 0, rows)
        say(shown(task, batch))
        say(f"{task.vocab_size} ids, rows of {task.sequence} tokens, {task.num_held_out} held out")
        say("guessing: " + ", ".join(f"{name} {value:.4f}" for name, value in task.guessing().items()))
        say(f"{rate(task, config.data.batch):,.0f} rows a second in batches of {config.data.batch}")
    except UserError as error:
        say(f"task: {error}", sys.stderr)
        return 2
    return 0


def shown(task: Task, batch: Batch) -> str:
    """Each row's inputs, without pads, and its targets, as text."""
    lines = []
    for tokens, targets, documents in zip(batch.tokens_BT, batch.targets_BT, batch.documents_BT, strict=True):
        lines.append(task.text(tokens[documents != PAD].tolist()))
        lines.append(f"  targets: {task.text(targets[targets != IGNORE].tolist())}")
    return "\n".join(lines)


def rate(task: Task, batch: int) -> float:
    """Training rows per second of this process's CPU time. batch: rows per call."""
    start, num_rows = time.process_time(), 0
    while time.process_time() - start < SECONDS:
        task.rows(0, num_rows, batch)
        num_rows += batch
    return num_rows / (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main())
