"""`sleeptrain evaluate`: a checkpoint on the held-out data of its run, with any number of passes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sleeptrain.checkpoint.older import add_older
from sleeptrain.commands.stop_options import add_stop_options, stop_settings
from sleeptrain.data.consent import add_consent, with_consent
from sleeptrain.errors import ConfigError
from sleeptrain.remote import Location, named_place
from sleeptrain.terminal import ArgumentParser, printable, say, say_json

if TYPE_CHECKING:
    from sleeptrain.config.schema import Config
    from sleeptrain.data.source import Source
    from sleeptrain.model.hybrid import Hybrid
    from sleeptrain.train.evaluate import Evaluation


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain evaluate ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    opened = open_checkpoint(
        options.place,
        options.passes,
        options.window,
        options.batches,
        options.device,
        options.allow_source,
        options.allow_older,
        stop_settings(options),
    )
    report = evaluate_opened(opened)
    if options.json:
        say_json(json.dumps(report))
    else:
        say("\n".join(printable(line, keep="") for line in lines(report)))
    return 0


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain evaluate", description=__doc__)
    root.add_argument("place", type=named_place, metavar="RUN_OR_CHECKPOINT", help="of a run its newest checkpoint")
    root.add_argument(
        "--passes", type=int, nargs="+", metavar="N", help="default: 1, and as the model was trained last"
    )
    root.add_argument("--window", type=int, metavar="L", help="default: as the model was trained last")
    add_stop_options(root)
    root.add_argument("--batches", type=int, metavar="K", help="default: train.eval_batches of the run")
    root.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    root.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_consent(root)
    add_older(root)
    return root


@dataclass(frozen=True)
class Opened:
    """The model of a checkpoint and the data to evaluate it on.

    checkpoint: its folder.
    config: the settings of the run, with the requested window and number of batches.
    state: the entries of the checkpoint that are no tensors.
    model: the model, on its device.
    source: held-out data.
    passes: numbers of passes N to evaluate with.
    """

    checkpoint: Location
    config: Config
    state: Mapping[str, Any]
    model: Hybrid
    source: Source
    passes: Sequence[int]


def evaluate_opened(opened: Opened) -> dict[str, Any]:
    """{"checkpoint", "step", "tokens", "window", "eval"}; `eval` has the form of a run's records (docs/training.md).

    Raises UserError.
    """
    from sleeptrain.train.evaluate import evaluate, held_out

    config, source = opened.config, opened.source
    sets = held_out(source, config)
    evaluation = evaluate(opened.model, sets, config, config.sleep.window, opened.passes, source.task)
    report = {"checkpoint": str(opened.checkpoint), "step": opened.state["step"], "tokens": opened.state["tokens"]}
    return report | {"window": config.sleep.window, "eval": evaluation}


def open_checkpoint(
    place: Location,
    passes: Sequence[int] | None = None,
    window: int | None = None,
    batches: int | None = None,
    device: str = "auto",
    allow_sources: Sequence[str] = (),
    allow_older: bool = False,
    stop: Mapping[str, Any] | None = None,
) -> Opened:
    """Load a checkpoint in this process alone.

    place: a run folder (its newest checkpoint) or a checkpoint. passes: None takes 1 and N of the curriculum at the
    checkpoint. window: None takes L of the curriculum there. batches: replaces `train.eval_batches`. allow_sources:
    commands and URLs of the run's data that may be used (`data.consent`). allow_older: see `named_checkpoint`.
    stop: replaces settings of `sleep`, by name. Raises UserError.
    """
    # These imports are inside the function: the help needs no torch.
    import torch

    from sleeptrain.checkpoint.find import named_checkpoint
    from sleeptrain.checkpoint.folder import CONFIG, read_state
    from sleeptrain.checkpoint.read import TensorFiles
    from sleeptrain.checkpoint.vocabulary import check_same_tokenizer
    from sleeptrain.checkpoint.weights import load_weights
    from sleeptrain.config import load_resolved
    from sleeptrain.data.source import build_source
    from sleeptrain.distributed.launch import find_device
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.distributed.world import World
    from sleeptrain.sleep.curriculum import last_shape

    checkpoint = named_checkpoint(place, World(Mesh.single(), torch.device("cpu")), allow_older=allow_older)
    config, state, files = load_resolved(checkpoint / CONFIG), read_state(checkpoint), TensorFiles(checkpoint)
    config = replace(config, data=with_consent(config.data, allow_sources, str(place)))
    shape = last_shape(config, state)
    numbers = _numbers_of_passes(passes or (1, shape.passes))
    config = _with_options(config, numbers[-1], shape.window if window is None else window, batches, stop or {})
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model = load_weights(config.model, files)
    model.to(find_device(device))
    source = build_source(config.data)
    check_same_tokenizer(checkpoint, source.tokenizer_hash)
    if source.task is not None:
        source.load_state_dict(read_state(checkpoint, ["data"])["data"])
    return Opened(checkpoint, config, state, model, source, numbers)


def lines(report: dict[str, Any]) -> list[str]:
    """The report of `evaluate_opened` for a human: a line for each N and number."""
    evaluation: Evaluation = report["eval"]
    result = [f"{report['checkpoint']}: step {report['step']:,}, {report['tokens']:,} tokens, L={report['window']}"]
    for n, losses in evaluation["loss"].items():
        if n in evaluation.get("accuracy", {}):
            result.append(f"N={n}  accuracy  {evaluation['accuracy'][n]:.1%}")
        result.append(f"N={n}  loss of windows 1..K  {_windows(losses)}")
        if n in evaluation.get("passes", {}):
            result.append(f"N={n}  mean passes of windows that may sleep  {evaluation['passes'][n]:.2f}")
        result += [
            f"N={n}  {name}  {_value(value)}" for name, value in evaluation.get("metrics", {}).get(n, {}).items()
        ]
        result += [
            f"N={n}  loss of {name}  {_windows(of['loss'][n])}" for name, of in evaluation.get("sets", {}).items()
        ]
    if "guessing" in evaluation:
        result.append(f"guessing  {_value(evaluation['guessing'])}")
    return result


def _numbers_of_passes(passes: Sequence[int]) -> list[int]:
    numbers = sorted(set(passes))
    if numbers[0] < 1:
        raise ConfigError("--passes must be at least 1")
    return numbers


def _with_options(config: Config, passes: int, window: int, batches: int | None, stop: Mapping[str, Any]) -> Config:
    """The settings with these N and L and no curriculum. Raises ConfigError if they do not allow that."""
    from sleeptrain.config.validate import validate

    if batches is not None and batches < 1:
        raise ConfigError("--batches must be at least 1")
    sleep = replace(config.sleep, curriculum=[], passes=passes, window=window, **stop)
    train = replace(config.train, eval_batches=batches or config.train.eval_batches)
    config = replace(config, sleep=sleep, train=train)
    validate(config)
    return config


def _windows(losses: Sequence[float | None]) -> str:
    return " ".join("none" if loss is None else f"{loss:.4f}" for loss in losses)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(of)}" for name, of in value.items())
    return f"{value:.4f}"
