"""`sleeptrain convert`: checkpoints to Hugging Face folders and back."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.older import add_older
from sleeptrain.commands.stop_options import add_stop_options, stop_settings
from sleeptrain.config.overrides import override, shell_command
from sleeptrain.config.ranges import settings
from sleeptrain.errors import ConfigError
from sleeptrain.hf.convert.exporting import DTYPES, export
from sleeptrain.hf.convert.importing import Imported, import_folder, option_name
from sleeptrain.hf.families import FAMILIES
from sleeptrain.remote import named_place
from sleeptrain.terminal import ArgumentParser, printable, say


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain convert ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    if options.check_tokens < 8:
        raise ConfigError(f"--check-tokens {options.check_tokens}: the check needs 8 at least, two a window")
    return options.convert(options)


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain convert", description=__doc__)
    directions = root.add_subparsers(metavar="WAY", required=True)
    out = directions.add_parser("export", help="a checkpoint to a folder that transformers loads without code of ours")
    out.add_argument("source", type=named_place, metavar="RUN_OR_CHECKPOINT", help="of a run its newest checkpoint")
    out.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    out.add_argument("--to", choices=list(FAMILIES), help="the model type; default: the first that fits the model")
    out.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights; decays stay float32")
    tokenizer = out.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the run's data.shards.tokenizer")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="export none")
    add_stop_options(out)
    add_older(out)
    out.set_defaults(convert=_export)
    into = directions.add_parser("import", help="a model's folder to a checkpoint for run.init_from")
    into.add_argument("source", type=Path, metavar="HF_FOLDER", help="with config.json and safetensors files")
    into.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    into.set_defaults(convert=_import)
    for direction in (out, into):
        direction.add_argument(
            "--check-tokens", type=int, default=256, metavar="N", help="tokens of a row of the check (default 256)"
        )
    return root


def _export(options: Namespace) -> int:
    exported = export(
        options.source,
        options.out,
        options.to,
        options.dtype,
        options.tokenizer,
        not options.no_tokenizer,
        options.check_tokens,
        options.allow_older,
        stop_settings(options),
    )
    tokenizer = "with its tokenizer" if exported.tokenizer else "without a tokenizer"
    say(f"{options.out}: {exported.model_type}, {exported.num_parameters:,} parameters in {options.dtype}, {tokenizer}")
    say(_checked(exported.error))
    if exported.texts is not None:
        say(_compared(exported.texts))
    return 0


def _import(options: Namespace) -> int:
    imported = import_folder(options.source, options.out, options.check_tokens)
    say(f"{options.out}: a checkpoint of a {imported.model_type} model")
    say(_checked(imported.error))
    for line in (*_left_out(imported), *imported.remarks):
        say(printable(line, keep=""))
    for name, value in settings(imported.config, "model."):
        say(f"  {name}={value}")
    say("Begin a run with it:")
    say(f"  {shell_command('sleeptrain', 'train', *begin_with(options.out, imported.tokenizer))} ...")
    return 0


def begin_with(out: Path, has_tokenizer: bool) -> list[str]:
    """Command-line settings of a run that starts from the import `out`."""
    settings = {
        "hydra.searchpath": [f"file://{out.resolve()}"],
        "model": option_name(out),
        "run.init_from": out,
        **({"data.shards.tokenizer": out} if has_tokenizer else {}),
    }
    return [override(name, value) for name, value in settings.items()]


def _checked(error: float) -> str:
    return f"checked: the logits of both models differ by {error:.1e} of the largest"


def _compared(texts: int) -> str:
    if not texts:
        return "checked: the tokenizers' ids of a built-in sample only, because no data of the run can be read here"
    plural = "s" if texts > 1 else ""
    return f"checked: the tokenizers' ids of a built-in sample and of {texts} document{plural} of the run's data"


def _left_out(imported: Imported) -> list[str]:
    """Count the tensors that were left out, by the first two parts of their names."""
    counts = Counter(".".join(name.split(".")[:2]) for name in imported.left_out)
    return [f"left out: {number} tensors of {prefix}.*" for prefix, number in sorted(counts.items())]
