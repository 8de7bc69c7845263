"""`sleeptrain plan`: flags, printed tables and the picture of the schedule."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.terminal import say, say_json

if TYPE_CHECKING:
    from sleeptrain.distributed.gpus import Gpu
    from sleeptrain.plan.search import Search

PICTURES = (".png", ".pdf", ".svg")


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--processes", type=_positive, metavar="N", help="of the run; default: those of one replica")
    parser.add_argument("--gpu", metavar="NAME", help="forecast time on this GPU, and compare memory with the GPU's")
    parser.add_argument(
        "--efficiency",
        type=_share,
        metavar="SHARE",
        help="of the GPU's peak FLOP/s that the run reaches; default: counted from the operators of its rounds",
    )
    parser.add_argument("--search", action="store_true", help="try every layout of --processes on --gpu and rank them")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the pipeline's schedule (.png, .pdf, .svg)")


def run(config: Config, options: Namespace) -> int:
    """Print the plan and return the exit code. Raises ConfigError at once for an impossible layout, GPU or file."""
    picture = None if options.plot is None else _checked(_job_path(options.plot))
    # These imports are inside the function: the help and wrong flags need no torch.
    from sleeptrain.distributed.gpus import find_gpu
    from sleeptrain.plan.layout import make_plan
    from sleeptrain.plan.report import to_json, to_text

    gpu = None if options.gpu is None else find_gpu(options.gpu)
    if options.search:
        return _search(config, options, gpu)
    processes = options.processes or config.parallel.tensor * config.parallel.pipeline
    plan = make_plan(config, processes, gpu, options.efficiency)
    if picture is not None:
        from sleeptrain.parallel.pipeline.plot import plot_schedule

        plot_schedule(plan.largest.simulation).savefig(picture)
    if options.json:
        say_json(json.dumps(to_json(plan)))
    else:
        say(to_text(plan))
    return 0


def _search(config: Config, options: Namespace, gpu: tuple[str, Gpu] | None) -> int:
    from sleeptrain.plan.search import search
    from sleeptrain.plan.search_report import search_to_json, search_to_text

    if gpu is None or options.processes is None or options.plot is not None:
        raise ConfigError("--search ranks layouts by time: give --processes N and --gpu NAME, and no --plot")
    progress = _nothing if options.json else _Progress()
    result = search(config, options.processes, gpu, options.efficiency, progress)
    if options.json:
        say_json(json.dumps(search_to_json(result, options.processes, gpu[0])))
    else:
        say(search_to_text(result, options.processes, gpu[0]))
    return 0


class _Progress:
    """Prints how far a search is to standard error, for each tenth of its layouts."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, so_far: Search) -> None:
        done = so_far.layouts - so_far.waiting
        if (tenths := done * 10 // so_far.layouts) > self._tenths:
            self._tenths = tenths
            say(f"search: {done} of {so_far.layouts} layouts, {so_far.forecast} forecast", file=sys.stderr)


def _nothing(so_far: Search) -> None:
    pass


def _job_path(path: Path) -> Path:
    """`path`; in a sweep, with the number of the job at the end of the name."""
    from hydra.core.hydra_config import HydraConfig

    from sleeptrain.config.compose import in_sweep

    return path.with_stem(f"{path.stem}-{HydraConfig.get().job.num}") if in_sweep() else path


def _checked(path: Path) -> Path:
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--plot {path}: cannot be written; choose another file")
    return path


def _number(convert: Callable[[str], float], low: float, high: float, expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = low
        if not low < value <= high:
            raise ArgumentTypeError(f"must be {expected}, not '{text}'")
        return value

    return parse


_positive = _number(int, 0, 2**31, "a whole number of at least 1")
_share = _number(float, 0.0, 1.0, "above 0 and at most 1")
