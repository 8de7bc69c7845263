"""Tokens a second of training steps over windows L and passes N, beside what the paper measured on one H200."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gpu_parts import Note, Options
from gpu_parts.page import table
from gpu_parts.trained import Trained, peak_memory, random_rows, reset_peak, step_config, timed
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.recompute import MODES
from sleeptrain.train.peak import peak_flops

# Figure 6 of arXiv 2605.26099, thousands of tokens a second, read off the figure to 3 %: Ouro 1.4B with Jet layers, one
# H200, rows of 12,000 tokens, windows recomputed, the batch tuned for each. {(L, N)}
PAPER = {
    (1024, 1): 19.9, (2048, 1): 19.5, (4096, 1): 18.2,
    (1024, 2): 9.8, (2048, 2): 10.1, (4096, 2): 10.3,
    (1024, 3): 6.3, (2048, 3): 6.7, (4096, 3): 7.1,
    (1024, 4): 4.6, (2048, 4): 4.8, (4096, 4): 5.5,
}  # fmt: skip
PAPER_PARALLEL = {1024: 28.4, 2048: 25.9, 4096: 23.9}  # sliding attention over the whole row at once: no windows
# The order of rows of the table, (L, N): what says most comes first.
ORDER = (
    (2048, 1), (2048, 4), (4096, 1), (1024, 1), (2048, 2), (4096, 4),
    (1024, 4), (2048, 3), (4096, 2), (1024, 2), (4096, 3), (1024, 3),
)  # fmt: skip
TOKENS = 12_288  # of a row: whole windows for every L
ROUND_TOKENS = 4096  # of all rows in a round, so that short windows fill the GPU too
ROW_SECONDS = 40.0
MEASURED_SECONDS, MOST_STEPS = 4.0, 3  # of a row


@dataclass(frozen=True)
class Sizes:
    """The sizes of a row of the table. rows: of the batch. tokens: of each."""

    window: int
    passes: int
    rows: int
    tokens: int

    @property
    def shape(self) -> StepShape:
        return StepShape(self.passes, self.window, self.rows)

    @property
    def positions(self) -> int:
        """Tokens of all passes, to which saved activations are proportional."""
        return self.rows * self.tokens * self.passes


def run(options: Options, note: Note) -> list[str]:
    """Rows in `ORDER` until the time is up."""
    device, end = torch.device(options.device), time.monotonic() + 0.9 * options.seconds
    seconds, trained = timed(lambda: Trained.build(step_config(options.subject, options.small), device), device)
    note({"model": options.subject, "parameters": sum(p.numel() for p in trained.model.parameters())})
    note({"peak_flops": (peak := peak_flops(device)), "build_seconds": round(seconds, 1), "rows": []})
    rows: list[dict[str, Any]] = []
    too_many: dict[str, int] = {}
    for sizes in _table(options.small):
        remaining = end - time.monotonic()
        if remaining < 0:
            rows.append(_named(sizes) | {"not_run": "the time was up"})
        else:
            # The first row compiles all kernels, which may take all the time that there is.
            with limit(remaining if not rows else min(ROW_SECONDS, remaining)):
                rows.append(_row(trained, sizes, device, peak, too_many))
        note({"rows": rows})
    return [f"{name}: {row['failed']}" for row in rows if "failed" in row for name in [_title(row)]]


def _table(small: bool) -> list[Sizes]:
    if small:
        return [Sizes(16, n, 2, 48) for n in (1, 2)]
    return [Sizes(window, n, ROUND_TOKENS // window, TOKENS) for window, n in ORDER]


def _row(
    trained: Trained, sizes: Sizes, device: torch.device, peak: float | None, too_many: dict[str, int]
) -> dict[str, Any]:
    """A measured row: with the first mode of recomputation that fits the memory. A failure is a row too.

    too_many: by mode, positions that did not fit; those of this row are added.
    """
    for mode in MODES:
        if sizes.positions >= too_many.get(mode, sizes.positions + 1):
            continue
        trained.config.sleep.recompute = mode
        try:
            return _named(sizes) | {"recompute": mode} | _measure(trained, sizes, device, peak)
        except torch.OutOfMemoryError:
            too_many[mode] = sizes.positions
        except TimeLimitError as error:
            return _named(sizes) | {"recompute": mode, "not_run": str(error)}
        except Exception as error:  # whatever a kernel or its compiler raises: the other rows run
            return _named(sizes) | {
                "recompute": mode,
                "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300],
            }
        trained.optim.zero_grad()
        reset_peak(device)  # here, where the exception's frames hold no tensors any more
    return _named(sizes) | {"not_run": "no mode of recomputation fits the memory"}


def _measure(trained: Trained, sizes: Sizes, device: torch.device, peak: float | None) -> dict[str, Any]:
    """Steps after one on two windows, in which kernels are compiled."""
    warm_up = random_rows(trained.config.model, sizes.rows, 2 * sizes.window)
    first, _ = timed(lambda: trained.step(warm_up, sizes.shape), device)
    batch = random_rows(trained.config.model, sizes.rows, sizes.tokens)
    reset_peak(device)
    steps: list[float] = []
    while not steps or (sum(steps) < MEASURED_SECONDS and len(steps) < MOST_STEPS):
        seconds, result = timed(lambda: trained.step(batch, sizes.shape), device)
        steps.append(seconds)
    if not math.isfinite(result.loss):
        raise ValueError(f"the loss is {result.loss}")
    least = min(steps)
    return {
        "first_seconds": round(first, 2),
        "steps": [round(s, 4) for s in steps],
        "tokens_per_second": sizes.rows * sizes.tokens / least,
        "rounds": result.num_rounds,
        "flops": result.flops,
        "mfu": None if peak is None else result.flops / least / peak,
        "memory_gib": peak_memory(device),
        "loss": round(result.loss, 4),
    }


def _named(sizes: Sizes) -> dict[str, Any]:
    return {"window": sizes.window, "passes": sizes.passes, "batch": sizes.rows, "tokens": sizes.tokens}


def _title(row: dict[str, Any]) -> str:
    return f"L={row['window']} N={row['passes']}"


class TimeLimitError(Exception):
    pass


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError inside after some seconds, as soon as Python runs again."""

    def stop(*_: object) -> None:
        raise TimeLimitError(f"it was stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def lines(result: dict[str, Any]) -> list[str]:
    head = ["L", "N", "batch", "recompute", "tokens/s", "MFU", "memory, GiB", "loss", "first step, s", "paper, Ouro"]
    rows = [_cells(row) for row in sorted(result["rows"], key=lambda r: (r["passes"], r["window"]))]
    parallel = ", ".join(f"{v} k at L={w}" for w, v in PAPER_PARALLEL.items())
    return [
        f"{result['parameters'] / 1e9:.2f} B parameters, built in {result['build_seconds']} s. bf16 with one cast of "
        "each matrix a step; forward, backward, clipping and the optimizers; the quickest of a row's steps. MFU counts "
        "the model's FLOPs, without recomputation. The first step compiles kernels.",
        "",
        *table(head, rows),
        "",
        "The paper's figures (figure 6, read to 3 %) are of Ouro 1.4B with Jet layers on one H200, T = 12,000, with a "
        f"tuned batch. Without windows, sliding attention over the whole row, it has {parallel}.",
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    paper = PAPER.get((row["window"], row["passes"]))
    last = "" if paper is None else f"{paper} k"
    names = [str(row["window"]), str(row["passes"]), f"{row['batch']} x {row['tokens']}", row.get("recompute", "")]
    if why := row.get("failed") or row.get("not_run"):
        return [*names, why, "", "", "", "", last]
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
    return [
        *names,
        f"{row['tokens_per_second']:,.0f}",
        mfu,
        memory,
        f"{row['loss']:.2f}",
        f"{row['first_seconds']}",
        last,
    ]
