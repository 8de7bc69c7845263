"""`sleeptrain report`: one page with curves and tables of many runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.terminal import ArgumentParser, printable, say


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain report ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    # These imports are inside the function: the help needs neither torch nor matplotlib.
    from sleeptrain.report.groups import sections
    from sleeptrain.report.runs import find_runs
    from sleeptrain.report.summary import summary
    from sleeptrain.report.write import check_out, write_report

    out = options.out or default_out(options.runs)
    check_out(out)
    runs, unreadable = find_runs(options.runs)
    groups = sections(runs)
    index = write_report(groups, unreadable, out, options.title or f"Runs in {', '.join(map(str, options.runs))}")
    lines = [line for section in groups for line in summary(section)]
    lines += [f"NOT READABLE and left out: {reason}" for reason in unreadable]
    for line in (*lines, str(index)):
        say(printable(line, keep=""))
    return 0


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain report", description=__doc__)
    root.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of runs such as that of a sweep"
    )
    root.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of index.html and the pictures; default: report, beside the runs",
    )
    root.add_argument("--title", help="of the page")
    return root


def default_out(paths: Sequence[Path]) -> Path:
    """The folder `report` inside a single path, or inside the common parent of several paths."""
    if len(paths) == 1:
        return paths[0] / "report"
    return Path(os.path.relpath(os.path.commonpath([path.absolute() for path in paths]))) / "report"
