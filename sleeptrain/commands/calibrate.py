"""`sleeptrain calibrate`: what stop rules are worth for a checkpoint, and the threshold for a budget of passes."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeptrain.checkpoint.older import add_older
from sleeptrain.config.schema.sleep import STOP_RULES
from sleeptrain.data.consent import add_consent
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.remote import Location, named_place
from sleeptrain.terminal import ArgumentParser, printable, say

if TYPE_CHECKING:
    from sleeptrain.commands.evaluate import Opened
    from sleeptrain.config.schema import Config
    from sleeptrain.train.calibrate import Calibration, Point

JSON_FILE, FIGURE, GATE = "calibration.json", "calibration.png", "gate.safetensors"


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain calibrate ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    if options.thresholds < 2:
        raise ConfigError("--thresholds must be at least 2")
    from sleeptrain.report.stop_curves import draw_calibrations
    from sleeptrain.report.style import png

    several = len(options.places) > 1
    folders = [_folder(None if several else options.out, str(place)) for place in options.places]
    calibrations = []
    for place, out in zip(options.places, folders, strict=True):
        checkpoint, calibration = _calibrated(options, place, out)
        calibrations.append(calibration)
        budget = _budget(calibration, options.budget)
        for line in ([str(place)] if several else []) + lines(calibration, budget):
            say(printable(line, keep=""))
        saved = json.dumps(report(checkpoint, calibration, budget), indent=1).encode()
        _write(out, {JSON_FILE: saved, FIGURE: png(draw_calibrations([calibration]))})
    if several:
        out = options.out or Path(os.path.commonpath([folder.absolute() for folder in folders])) / "calibration"
        _write(out, {FIGURE: png(draw_calibrations(calibrations))})
    return 0


def _calibrated(options: Namespace, place: Location, out: Path) -> tuple[str, Calibration]:
    """(the checkpoint, its calibration). out: the folder of a fitted gate."""
    from sleeptrain.commands.evaluate import open_checkpoint
    from sleeptrain.train.calibrate import calibrate
    from sleeptrain.train.calibration_rows import halves, held_out_rows

    passes = None if options.passes is None else [options.passes]
    consent = options.allow_source, options.allow_older
    opened = open_checkpoint(place, passes, options.window, None, options.device, *consent)
    if opened.passes[-1] == 1:
        raise ConfigError("a stop rule chooses among passes, and this model has one: give --passes of 2 or more")
    source, config = opened.source, opened.config
    rows = halves(held_out_rows(source, config, options.rows))
    if options.fit_gate:
        config = _with_gate(opened, out / GATE, options.fit_batches)
    rules = options.rules or [r for r in STOP_RULES if r == "change" or config.sleep.feedback == "features"]
    if not config.sleep.stop_gate:
        if options.rules and "gate" in options.rules:
            raise ConfigError("--rules gate needs a gate: add --fit-gate, or name one in sleep.stop_gate of the run")
        rules = [rule for rule in rules if rule != "gate"]
    return str(opened.checkpoint), calibrate(opened.model, rows, config, source.task, rules, options.thresholds)


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain calibrate", description=__doc__)
    root.add_argument(
        "places", type=named_place, nargs="+", metavar="RUN_OR_CHECKPOINT",
        help="of a run its newest checkpoint; several, such as seeds, also share a figure",
    )  # fmt: skip
    root.add_argument("--rules", nargs="+", choices=STOP_RULES, help="default: all; gate with --fit-gate only")
    root.add_argument("--fit-gate", action="store_true", help=f"fit a gate to training rows first, and write {GATE}")
    root.add_argument(
        "--fit-batches", type=int, default=32, metavar="K", help="training batches of the fit; default: 32"
    )
    root.add_argument("--passes", type=int, metavar="N", help="most passes; default: as the model was trained last")
    root.add_argument("--window", type=int, metavar="L", help="default: as the model was trained last")
    root.add_argument("--thresholds", type=int, default=12, metavar="K", help="thresholds of each rule; default: 12")
    root.add_argument("--budget", type=float, metavar="X", help="mean passes; default: 1 + 0.6 of the sleep passes")
    root.add_argument(
        "--rows", type=int, metavar="K",
        help="held-out rows of each set, half of which choose thresholds; default: those of the run's evaluations",
    )  # fmt: skip
    root.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    root.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help=f"of {JSON_FILE} and {FIGURE}, or of the figure that several share; default: calibration, in the run",
    )  # fmt: skip
    add_consent(root)
    add_older(root)
    return root


def _with_gate(opened: Opened, path: Path, num_batches: int) -> Config:
    """The settings with the gate that is fitted to the next training batches and written to `path`."""
    from sleeptrain.sleep.stop_gate import save_gate
    from sleeptrain.train.fit_gate import fit_gate, gate_samples

    config, source = opened.config, opened.source
    if config.sleep.feedback != "features" or num_batches < 1:
        raise ConfigError("--fit-gate needs sleep.feedback=features, and --fit-batches of at least 1")
    batches = (source.batch(config.data.batch) for _ in range(num_batches))
    gate, explained = fit_gate(gate_samples(opened.model, batches, config), config.train.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_gate(gate, path)
    say(f"{path}: predicts {explained:.0%} of the variance of losses on rows that it was not fitted to")
    return replace(config, sleep=replace(config.sleep, stop_gate=str(path)))


def report(checkpoint: str, calibration: Calibration, budget: float) -> dict[str, Any]:
    """The contents of the JSON file: the calibration, the thresholds that the calibration rows chose, and the split."""
    from sleeptrain.train.calibration_rows import RULE

    choices = {rule: [asdict(c) for c in calibration.choices(rule, budget)] for rule in calibration.judged.rules}
    return {"checkpoint": checkpoint, "split": RULE, "budget": budget, "choices": choices} | asdict(calibration)


def lines(calibration: Calibration, budget: float) -> list[str]:
    """The calibration for a human: the fixed numbers of passes, then each rule's chosen thresholds, on judged rows."""
    rows, judged = calibration.rows, calibration.judged
    result = [
        f"thresholds chosen on {rows['calibration']:,} held-out rows (0, 2, 4, ... of each set), "
        f"all results on the {rows['judged']:,} others"
    ]
    result += [f"N={int(p.passes)}  {_value(calibration, p)}" for p in judged.fixed]
    for rule in judged.rules:
        choices = calibration.choices(rule, budget)
        result += [
            f"sleep.stop={rule} sleep.stop_threshold={c.threshold:.4g}  {c.judged.passes:.2f} mean passes "
            f"({c.share:.0%} of the sleep passes)  {_value(calibration, c.judged)}  {c.reason}"
            for c in choices
        ]
        if not choices:
            result.append(f"{rule}: no threshold keeps to {budget:.2f} mean passes or is as good as all passes")
    within = [p for p in calibration.hindsight if p.passes <= budget]
    if within:
        result.append(f"in hindsight  {within[-1].passes:.2f} mean passes  {_value(calibration, within[-1])}")
    return result


def _budget(calibration: Calibration, requested: float | None) -> float:
    return 1 + 0.6 * (calibration.judged.fixed[-1].passes - 1) if requested is None else requested


def _value(calibration: Calibration, point: Point) -> str:
    return f"accuracy {point.value:.1%}" if calibration.quantity == "accuracy" else f"loss {point.value:.4f}"


def _folder(out: Path | None, place: str) -> Path:
    """The folder of the files. Raises ConfigError if the run is in an object store and none is named."""
    if out is not None:
        return out
    path = Path(place)
    if not path.is_dir():
        raise ConfigError(f"{place} is no folder of this machine: name one for the files with --out")
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / "calibration"


def _write(out: Path, contents: dict[str, bytes]) -> None:
    from sleeptrain.files import write_whole

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(out / name, content)
            say(str(out / name))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}; name another folder with --out") from error
