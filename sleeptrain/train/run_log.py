"""The records of a run: lines of metrics.jsonl, wandb, and the progress line on the terminal."""

from __future__ import annotations

from typing import Any

from sleeptrain.train.logging.metrics import MetricsFile
from sleeptrain.train.logging.progress_line import ProgressLine
from sleeptrain.train.logging.wandb_log import WandbLogger


class RunLog:
    """The records in a process that is not the main process: its methods do nothing."""

    wandb_id: str | None = None

    def write(self, record: dict[str, Any], wandb_step: int) -> None:
        """Write one record. wandb_step: wandb's step, which never falls."""

    def message(self, text: str) -> None:
        """Print lines above the progress line."""

    def sync(self) -> None:
        """Wait until all records are on the disk. Raises OSError."""

    def truncate_after(self, step: int, rollbacks: int) -> None:
        """Drop the records of later steps and rollbacks (`MetricsFile.truncate_after`)."""

    def close(self) -> None:
        """Close the progress line, the metrics file and wandb."""


class MainRunLog(RunLog):
    """The records in the main process."""

    def __init__(self, metrics: MetricsFile, wandb: WandbLogger, progress_line: ProgressLine) -> None:
        self.metrics, self.wandb, self.progress_line = metrics, wandb, progress_line
        self.wandb_id = wandb.run_id

    def write(self, record: dict[str, Any], wandb_step: int) -> None:
        failed_before = self.metrics.failed
        self.metrics.append(record)
        if self.metrics.failed and not failed_before:
            self.message(
                f"ALARM: {self.metrics.path} takes no records ({self.metrics.failed}); they are kept and retried"
            )
        self.wandb.log(record, wandb_step)
        self.progress_line.update(record)

    def message(self, text: str) -> None:
        self.progress_line.message(text)

    def sync(self) -> None:
        self.metrics.sync()

    def truncate_after(self, step: int, rollbacks: int) -> None:
        self.metrics.truncate_after(step, rollbacks)

    def close(self) -> None:
        self.progress_line.close()
        self.metrics.close()
        self.wandb.finish()
