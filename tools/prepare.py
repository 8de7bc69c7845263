"""Make token shards from text: `python tools/prepare.py --stdlib --out data/stdlib --vocab-size 2048`.

Writes `<out>/tokenizer.model` (or the files of `--tokenizer`), `<out>/train/`, `<out>/validation/` and
`<out>/prepared.json`: the settings and the report. The folder appears only when it is complete. After a kill the same
call continues and gives the same bytes. If the folder is complete, the same call changes nothing; other settings are
refused without `--force`. Exit code 2 and one line if the user can mend the cause.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeptrain.data.shard_writer import SHARD_BYTES
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError, UserError
from sleeptrain.prepare.job import Job, prepare
from sleeptrain.prepare.options import add_input_options, inputs_of
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.units import UNIT_BYTES
from sleeptrain.terminal import say

VOCAB_SIZE = 2048


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    start = time.monotonic()
    try:
        report = prepare(_job(options))
    except UserError as error:
        say(f"prepare: {error}", sys.stderr)
        return 2
    except OSError as error:
        say(f"prepare: {error.filename or options.out}: {error.strerror}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("prepare: interrupted; the same call goes on", sys.stderr)
        return 130
    _print_report(report, time.monotonic() - start)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description="Make a tokenizer and token shards from text.")
    add_input_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab-size", type=int, help=f"ids of a tokenizer to train (default: {VOCAB_SIZE})")
    tokenizer.add_argument(
        "--tokenizer", type=Path, help="a SentencePiece model or a Hugging Face tokenizer.json (or its folder) to use"
    )
    parser.add_argument("--bos-token", help="the BOS of a Hugging Face tokenizer; '' for none (default: its own)")
    parser.add_argument("--eos-token", help="the EOS of a Hugging Face tokenizer (default: its own)")
    parser.add_argument("--max-documents", type=int, help="use only this many documents, from the first one on")
    parser.add_argument(
        "--on-bad-document",
        choices=("stop", "skip"),
        help="if a document is not UTF-8, no JSON, without text field or too long: stop, or leave it out and count it "
        "(default: stop; skip with --stdlib)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one for each CPU, here %(default)s)"
    )
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="size at which a shard ends (default: %(default)s)"
    )
    parser.add_argument(
        "--unit-bytes",
        type=int,
        default=UNIT_BYTES,
        help="bytes of text that a process takes at a time; a shard ends with them (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace a result that is damaged or has other settings")
    return parser


def _job(options: argparse.Namespace) -> Job:
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, options.bos_token, options.eos_token)
    elif options.bos_token is not None or options.eos_token is not None:
        raise DataError("--bos-token and --eos-token go with --tokenizer only")
    return Job(
        sources=inputs_of(options),
        out=options.out,
        tokenizer=tokenizer,
        vocab_size=options.vocab_size if options.vocab_size is not None else VOCAB_SIZE,
        text_field=options.text_field,
        validation_share=options.validation_share,
        max_documents=options.max_documents,
        shard_bytes=options.shard_bytes,
        unit_bytes=options.unit_bytes,
        max_document_bytes=options.max_document_bytes,
        skip_bad=(options.on_bad_document or ("skip" if options.stdlib else "stop")) == "skip",
        workers=options.workers,
        force=options.force,
    )


def _print_report(report: dict[str, Any], seconds: float) -> None:
    for side in SIDES:
        say(f"{side:10}  " + "  ".join(f"{name} {value:,}" for name, value in report[side].items()))
    say(f"{'left out':10}  empty {report['empty']:,}  bad {report['bad']:,}")
    if report["first_bad"]:
        say(f"{'first bad':10}  {report['first_bad']}")
    say(f"{'units':10}  {report['units']:,} in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
