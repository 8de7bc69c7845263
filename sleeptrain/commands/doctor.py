"""`sleeptrain doctor`: flags and output. Imports no third-party package, so it can report that one is missing."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from sleeptrain.doctor.checks import CHECKS
from sleeptrain.doctor.examine import examine
from sleeptrain.doctor.finding import FAILED, Case, Result, skipped
from sleeptrain.doctor.report import brief, summary, to_json, to_lines, wants_colour
from sleeptrain.errors import ConfigError
from sleeptrain.terminal import ArgumentParser, say, say_json

SUMMARY = "say whether this machine can train, and what to do where it cannot"
SKIPS = "skipped by --skip"


def parser() -> ArgumentParser:
    root = ArgumentParser("sleeptrain doctor", description=__doc__.partition(":")[0] + f": {SUMMARY}.")
    root.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="settings of a run to check, too")
    form = root.add_mutually_exclusive_group()
    form.add_argument("--brief", action="store_true", help="one line for this machine")
    form.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    root.add_argument(
        "--links", action="store_true", help="measure the links between all processes of this job, and nothing else"
    )
    root.add_argument("--skip", action="append", default=[], metavar="NAME", help=f"one of {', '.join(CHECKS)}")
    return root


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain doctor ARGUMENTS`. Returns 0, or 1 if a check failed. Raises UserError for wrong settings."""
    options = parser().parse_intermixed_args(arguments)
    if unknown := [name for name in options.skip if name not in CHECKS]:
        raise ConfigError(f"--skip {unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    if options.links:
        return _measure_links(options)
    config = None
    if options.overrides:
        from sleeptrain.config.compose import compose

        config = compose(options.overrides)
    case = Case(config, num_machines(), Path())
    began = time.monotonic()
    results = _print_results(options, case)
    seconds = time.monotonic() - began
    if options.json:
        say_json(json.dumps(to_json(results, seconds)))
    else:
        say(brief(results, seconds) if options.brief else summary(results, seconds))
    return int(any(result.finding.state == FAILED for result in results))


def _measure_links(options: Namespace) -> int:
    if options.overrides or options.skip or options.brief:
        raise ConfigError("--links measures links only: leave out settings, --skip and --brief")
    from sleeptrain.doctor.links import measure_links
    from sleeptrain.doctor.links_report import links_to_json, links_to_text

    rank, links = measure_links()
    if rank == 0 and options.json:
        say_json(json.dumps(links_to_json(links)))
    elif rank == 0:
        say(links_to_text(links))
    return 0


def _print_results(options: Namespace, case: Case) -> list[Result]:
    """Run the checks; print and return the results in the order of CHECKS."""
    results, coloured, width = [], wants_colour(), max(map(len, CHECKS))
    with closing(_in_order(options.skip, case)) as ordered:
        for result in ordered:
            results.append(result)
            if not (options.brief or options.json):
                print(to_lines(result, width, coloured), flush=True)  # noqa: T201  # the text holds colour codes
    return results


def _in_order(skips: Sequence[str], case: Case) -> Generator[Result, None, None]:
    done = {name: Result(name, skipped(SKIPS), 0.0) for name in skips}
    waiting = list(CHECKS)
    with closing(examine([name for name in waiting if name not in done], case)) as results:
        while waiting:
            if waiting[0] in done:
                yield done[waiting.pop(0)]
            else:
                result = next(results)
                done[result.name] = result


def num_machines() -> int:
    """The number of machines of this job, from the environment variables of Slurm or torchrun; 1 without a job."""
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    by_torchrun = -(-int(os.environ.get("WORLD_SIZE", 1)) // per_machine) if per_machine else 1
    return max(int(os.environ.get("SLURM_JOB_NUM_NODES", 1)), by_torchrun)
