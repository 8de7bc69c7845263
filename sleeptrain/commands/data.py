"""`sleeptrain data`: questions about the documents that a run reads."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleeptrain.data.consent import add_consent, require_consent, with_consent
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.remote import UrlPath
from sleeptrain.terminal import ArgumentParser, printable, say, say_document, say_json


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain data ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    return options.answer(options)


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain data", description=__doc__)
    questions = root.add_subparsers(metavar="QUESTION", required=True)
    which = questions.add_parser("which", help="the documents of each row in one step of a run")
    which.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    which.add_argument("--step", type=int, required=True, help="the step, as metrics.jsonl counts them: the first is 1")
    which.add_argument("--row", type=int, help="this row only, from 0")
    which.add_argument("--text", action="store_true", help="the text, too, read with data.shards.tokenizer")
    which.add_argument("--json", action="store_true", help="one JSON object a line")
    add_consent(which)
    which.set_defaults(answer=_which)
    describe = questions.add_parser("describe", help="sources, epochs, shuffling, and the waste of each layout")
    describe.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="as for `sleeptrain train`")
    describe.set_defaults(answer=_describe)
    return root


def _which(options: Namespace) -> int:
    from sleeptrain.commands.data_describe import cuts_before, reads
    from sleeptrain.config import load_resolved
    from sleeptrain.data.continued import continued_text
    from sleeptrain.data.source import ShardsSource
    from sleeptrain.data.tokenizer import load_tokenizer

    if options.step < 1:
        raise ConfigError(f"--step {options.step}: the first step of a run is 1")
    config = load_resolved(options.run / "config.yaml")
    if config.data.source != "shards":
        raise ConfigError(f"{options.run} reads data.source={config.data.source}; only shards have documents")
    source = ShardsSource(with_consent(config.data, options.allow_source, str(options.run)))
    tokenizer = load_tokenizer(Path(config.data.shards.tokenizer)) if options.text else None
    cuts, rows = cuts_before(config, options.step, _saved_cuts(options.run, options.allow_source))
    if options.row is not None and not 0 <= options.row < rows:
        raise ConfigError(f"--row {options.row}: step {options.step} has the rows 0 to {rows - 1}")
    source.stream.seek(cuts)
    for read in reads(source, *source.stream.next_step(rows)):
        if options.row is None or read.row == options.row:
            line = asdict(read)
            if tokenizer is not None:
                shard = [shard.url for shard in source.train[read.source].shards].index(read.shard)
                tokens = source.train[read.source].document(shard, read.document)[slice(*read.tokens)]
                line["text"] = continued_text(tokenizer, None if read.tokens[0] else (), tokens.tolist())
            if options.json:
                say_json(json.dumps(line))
                continue
            say(printable(_line(line), keep=""))
            if tokenizer is not None:
                say_document(line["text"])
    return 0


def _saved_cuts(run: Path, allowed: Sequence[str]) -> Sequence[tuple[int, int]]:
    """The pairs (rows, steps) in the newest undamaged checkpoint of a run. Prints a line for each damaged one.

    allowed: as in `with_consent`, which a place in an object store needs, too.
    """
    from sleeptrain.checkpoint.folder import checkpoints, checkpoints_of, find_damage, read_state

    place = checkpoints_of(run)
    require_consent([place.url] if isinstance(place, UrlPath) else [], allowed, str(run))
    for path in reversed(checkpoints(place)):
        damage = find_damage(path, tensors=False)
        if damage is None:
            return read_state(path, ["data"])["data"].get("cuts", ())
        say(f"sleeptrain: {path.name} is damaged ({damage}); the rows of a step come from an older one", sys.stderr)
    return ()


def _line(read: dict[str, Any]) -> str:
    return (
        f"row {read['row']}  tokens {read['at'][0]}-{read['at'][1]}  {read['source']}  {read['shard']}  "
        f"document {read['document']}, its tokens {read['tokens'][0]}-{read['tokens'][1]}"
    )


def _describe(options: Namespace) -> int:
    from sleeptrain.commands.data_describe import describe
    from sleeptrain.config.compose import compose
    from sleeptrain.config.paths import naming_settings

    config = compose(options.overrides)
    if config.data.source != "shards":
        raise DataError(f"data.source={config.data.source} reads no files: there is nothing to describe")
    with naming_settings(config):
        say(describe(config))
    return 0
