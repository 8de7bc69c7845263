"""Rule 110 with and without sleep: train one small model with N=1 and N=4 over some seeds, and report on the runs.

    python tools/rule110.py [--passes 1 4] [--seeds 3] [--root runs/rule110] [--report] [setting=value ...]

Each run is `sleeptrain train experiment=rule110` with its own seed, on one thread. As many runs as there are cores
train at a time. A stopped run continues; a finished run is not repeated. With --report nothing is trained: the runs,
for example of slurm/rule110_sweep.sh, are reported on once all are finished. The page is that of
`sleeptrain report ROOT`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.commands.report import main as report
from sleeptrain.config.overrides import override
from sleeptrain.errors import UserError
from sleeptrain.terminal import say
from sleeptrain.train.status import is_finished


@dataclass(frozen=True)
class Trial:
    """One training run: its folder, N and seed."""

    root: Path
    passes: int
    seed: int

    @property
    def name(self) -> str:
        return f"n{self.passes}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        return is_finished(self.root / self.name)

    def train(self, overrides: list[str]) -> Trial:
        """Train the run in a process. Raises UserError if it fails."""
        command = [sys.executable, "-m", "sleeptrain", "train", "experiment=rule110"]
        command += [override("run.root", self.root), f"run.name={self.name}", f"sleep.passes={self.passes}"]
        command += [f"train.seed={self.seed}", f"data.seed={self.seed}", "train.threads=1", *overrides]
        log = self.root / f"{self.name}.log"
        with open(log, "a") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise UserError(f"{self.name} ended with code {code}; its last line is: {log.read_text().splitlines()[-1]}")
        return self


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="the values of N to compare")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each N")
    parser.add_argument("--root", type=Path, default=Path("runs/rule110"), help="the folder of the runs and the report")
    parser.add_argument("--report", action="store_true", help="train nothing; report once all runs are finished")
    arguments, overrides = parser.parse_known_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    numbers = sorted(set(arguments.passes))
    trials = [Trial(arguments.root, n, seed) for seed in range(arguments.seeds) for n in numbers]
    if arguments.report:
        finished = sum(trial.finished for trial in trials)
        if finished < len(trials):
            say(f"{finished} of {len(trials)} runs in {arguments.root} are finished: nothing to report yet")
            return 0
    arguments.root.mkdir(parents=True, exist_ok=True)
    try:
        if not arguments.report:
            _train_all(trials, overrides)
        folders = [str(trial.root / trial.name) for trial in trials]
        return report([*folders, f"--out={arguments.root / 'report'}", "--title=Rule 110"])
    except UserError as error:
        say(f"rule110: {error}", sys.stderr)
        return 2


def _train_all(trials: list[Trial], overrides: list[str]) -> None:
    workers = os.cpu_count() or 1
    say(f"{len(trials)} runs, {workers} at a time; logs in {trials[0].root}", flush=True)
    # The longest first, so that no core waits at the end.
    order = sorted(trials, key=lambda t: -t.passes)
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(t.train, overrides) for t in order]):
            trial = future.result()
            say(f"{trial.name} is finished", flush=True)


if __name__ == "__main__":
    sys.exit(main())
