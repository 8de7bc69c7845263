"""Rule 110 with and without sleep: trains one small model with N=1 and N=4 over some seeds and draws their accuracy.

    python tools/rule110.py [--passes 1 4] [--seeds 3] [--root runs/rule110] [--report] [setting=value ...]

Each run is `sleeptrain train experiment=rule110` with its own seed, on one thread, as many side by side as there are
cores. Runs that were stopped go on, finished ones are not run again. With --report nothing is trained: runs that
others have made, such as slurm/rule110_sweep.sh, are drawn once all are finished.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sleeptrain.config import load_resolved
from sleeptrain.errors import UserError
from sleeptrain.files import whole_file
from sleeptrain.tasks.rule110 import Rule110
from sleeptrain.train.metrics import read_metrics
from sleeptrain.train.status import State, read_status


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
        status = read_status(self.root / self.name)
        return status is not None and status["state"] == State.FINISHED

    def train(self, overrides: list[str]) -> Trial:
        command = [sys.executable, "-m", "sleeptrain", "train", "experiment=rule110"]
        command += [f"run.root={self.root}", f"run.name={self.name}", f"sleep.passes={self.passes}"]
        command += [f"train.seed={self.seed}", f"data.seed={self.seed}", "train.threads=1", *overrides]
        log = self.root / f"{self.name}.log"
        with open(log, "a") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise UserError(f"{self.name} ended with code {code}; its last line is: {log.read_text().splitlines()[-1]}")
        return self

    def curve(self) -> dict[int, float]:
        """Held-out exact accuracy by step, with the N that was trained."""
        records = [r for r in read_metrics(self.root / self.name / "metrics.jsonl") if "eval" in r]
        return {r["step"]: r["eval"]["accuracy"][str(self.passes)] for r in records}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="the numbers of passes to compare")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each of them")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/rule110"), help="the folder of the runs and the picture"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; draw if all runs are finished")
    arguments, overrides = parser.parse_known_args()
    trials = [Trial(arguments.root, n, seed) for seed in range(arguments.seeds) for n in sorted(arguments.passes)]
    if arguments.report:
        finished = sum(trial.finished for trial in trials)
        if finished < len(trials):
            print(f"{finished} of {len(trials)} runs in {arguments.root} are finished: nothing is drawn yet")
            return 0
    arguments.root.mkdir(parents=True, exist_ok=True)
    try:
        if not arguments.report:
            _train_all(trials, overrides)
        picture = draw(trials, arguments.root / "rule110.png")
    except UserError as error:
        print(f"rule110: {error}", file=sys.stderr)
        return 2
    print(summary(trials))
    print(picture)
    return 0


def _train_all(trials: list[Trial], overrides: list[str]) -> None:
    workers = os.cpu_count() or 1
    print(f"{len(trials)} runs, {workers} at a time; logs in {trials[0].root}", flush=True)
    # The longest first, so that no core waits at the end.
    order = sorted(trials, key=lambda t: -t.passes)
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(t.train, overrides) for t in order]):
            trial = done.result()
            print(f"{trial.name}: accuracy {last(trial):.1%}", flush=True)


def last(trial: Trial) -> float:
    curve = trial.curve()
    return curve[max(curve)]


def summary(trials: list[Trial]) -> str:
    """Mean and range of the last accuracy for each N, and how far the largest N is ahead of the smallest."""
    groups = by_passes(trials)
    lines = []
    for n, group in groups.items():
        ends = [last(t) for t in group]
        lines.append(f"N={n}: {statistics.mean(ends):.1%} ({min(ends):.1%} to {max(ends):.1%}, {len(ends)} seeds)")
    few, many = (statistics.mean(map(last, groups[n])) for n in (min(groups), max(groups)))
    lines.append(f"N={max(groups)} is {100 * (many - few):+.1f} points ahead of N={min(groups)} at equal steps")
    return "\n".join(lines)


def by_passes(trials: list[Trial]) -> dict[int, list[Trial]]:
    groups: dict[int, list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.passes):
        groups.setdefault(trial.passes, []).append(trial)
    return groups


def draw(trials: list[Trial], path: Path) -> Path:
    """Accuracy against steps: each seed thin, the mean of each N thick, and what guessing gives."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for color, (n, group) in zip(("#888888", "#1f77b4", "#2ca02c", "#d62728"), by_passes(trials).items(), strict=False):
        curves = [t.curve() for t in group]
        for curve in curves:
            axes.plot(list(curve), [100 * a for a in curve.values()], color=color, alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        mean = [100 * statistics.mean(c[s] for c in curves) for s in steps]
        axes.plot(steps, mean, color=color, linewidth=2.5, label=f"N={n}, mean of {len(group)} seeds")
    task = load_resolved(trials[0].root / trials[0].name / "config.yaml").data.rule110
    axes.axhline(
        100 * Rule110(task).guessing()["majority"], color="black", linestyle=":", label="always the likelier answer"
    )
    axes.set(xlabel="steps", ylabel="exact accuracy, held out (%)", ylim=(0, 101))
    axes.set_title(
        f"Rule 110, {task.strings} x {task.width} cells, {task.steps} updates, answered after the cells are gone"
    )
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


if __name__ == "__main__":
    sys.exit(main())
