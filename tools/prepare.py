"""Make token shards from text: `python tools/prepare.py --stdlib --out data/stdlib --vocab-size 2048`.

Writes `<out>/tokenizer.model`, `<out>/train/`, `<out>/validation/` and, last, `<out>/prepared.json`: the settings and
the report. The folder appears when all is done. The same call again changes nothing; other settings are refused without
`--force`. Exit code 2 and one line when the user can mend it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sleeptrain.data.corpus import Corpus, folder_corpus, name_rank, split_names, stdlib_corpus
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.tokenizer import Tokenizer, train_tokenizer
from sleeptrain.errors import DataError, UserError
from sleeptrain.files import staged_folder

FORMAT = 1  # raise it when the same settings would give other files
TOKENIZER_CHARACTERS = 32 * 2**20  # of training text that the tokenizer sees at most
RECORD = "prepared.json"
SIDES = ("train", "validation")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        report = prepare(options)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 2
    for side in SIDES:
        print(f"{side:10}  " + "  ".join(f"{name} {value:,}" for name, value in report[side].items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description="Make a tokenizer and token shards from text.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--stdlib", action="store_true", help="the running Python's standard library")
    source.add_argument("--folder", type=Path, help="a folder of UTF-8 text files, one document a file")
    parser.add_argument("--glob", default="*.txt", help="the files of --folder, at any depth (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--vocab-size", type=int, default=2048, help="ids of the tokenizer (default: %(default)s)")
    parser.add_argument("--max-documents", type=int, help="use the first so many documents only")
    parser.add_argument(
        "--validation-share", type=float, default=0.05, help="share of the documents held out (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="make it anew where other settings or damage are found")
    return parser


def prepare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The report of each side: what was there already, or what has been made. Raises DataError."""
    if options.max_documents is not None and options.max_documents < 2:
        raise DataError(f"--max-documents {options.max_documents}: at least 2 are needed")
    if not 0 < options.validation_share < 1:
        raise DataError(f"--validation-share {options.validation_share}: must lie between 0 and 1")
    corpus = _corpus(options)
    settings = {
        "format": FORMAT,
        "corpus_sha256": corpus.sha256,
        "documents": len(corpus.names),
        "vocab_size": options.vocab_size,
        "validation_share": options.validation_share,
    }
    found = _found(options.out, settings, options.force)
    if found is not None:
        print(f"{options.out} is complete and was made with the same settings: nothing to do")
        return found
    print(f"{len(corpus.names)} documents; left out: {len(corpus.undecodable)} not UTF-8, {corpus.empty} empty")
    with staged_folder(options.out, replace=options.force) as staged:
        report = _make(corpus, staged, options)
        (staged / RECORD).write_text(json.dumps({"settings": settings, "report": report}, indent=2) + "\n")
    return report


def _corpus(options: argparse.Namespace) -> Corpus:
    if options.stdlib:
        return stdlib_corpus(options.max_documents)
    return folder_corpus(options.folder, options.glob, options.max_documents)


def _found(out: Path, settings: dict[str, Any], force: bool) -> dict[str, dict[str, Any]] | None:
    """The report of a sound earlier result, None where there is to be made one. Raises DataError for anything else."""
    if not out.is_dir() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_bytes())
        earlier, report = record["settings"], record["report"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Never replaced, not even by force: this may be a folder with somebody's own files.
        raise DataError(f"{out} is not empty and not a prepared corpus; name another --out") from error
    if force:
        return None
    differing = [name for name in settings if earlier.get(name) != settings[name]]
    changed = [f"{name} {earlier.get(name)}, now {settings[name]}" for name in differing]
    if changed:
        raise DataError(f"{out} was made with other settings ({'; '.join(changed)}); name another --out or use --force")
    try:
        tokenizer = Tokenizer(out / "tokenizer.model")
        for side in SIDES:
            TokenShards(out / side, expect_tokenizer=tokenizer.hash)
    except DataError as error:
        raise DataError(f"{error}; make it anew with --force") from error
    return report


def _make(corpus: Corpus, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    train, validation = split_names(corpus.names, options.validation_share)
    print(f"training a tokenizer of {options.vocab_size} ids")
    tokenizer = train_tokenizer(_sample(corpus, train), options.vocab_size, folder / "tokenizer.model")
    report = {}
    for side, names in zip(SIDES, (train, validation), strict=True):
        texts = _with_progress(corpus.texts(names), len(names), side)
        shards = write_shards(folder / side, texts, tokenizer, name=f"{options.out.name} {side}")
        report[side] = {
            "documents": shards.num_documents,
            "tokens": shards.num_tokens,
            "bytes_per_token": round(shards.num_bytes / shards.num_tokens, 3),
            "longest": int(shards.lengths_D.max()),
        }
    return report


def _sample(corpus: Corpus, names: Sequence[str]) -> Iterator[str]:
    """Documents in an order that has nothing to do with their place, until the tokenizer has seen enough."""
    seen = 0
    for name in sorted(names, key=name_rank):
        if seen >= TOKENIZER_CHARACTERS:
            return
        text = corpus.text(name)[: TOKENIZER_CHARACTERS - seen]
        seen += len(text)
        yield text


def _with_progress(texts: Iterable[str], total: int, side: str) -> Iterator[str]:
    """`texts`, while one line on a terminal tells how many have been taken."""
    for done, text in enumerate(texts, 1):
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rtokenizing {side}: {done}/{total}", end=end, file=sys.stderr, flush=True)
        yield text


if __name__ == "__main__":
    sys.exit(main())
