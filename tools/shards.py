"""Check and index token shards: `python tools/shards.py verify data/stdlib/train`.

`verify LOCATION` reads every shard, also over a network, and compares all checksums. `index FOLDER --tokenizer PATH`
makes shards from webdataset tar files of another program, or from changed ones. Exit code 2 and one line for each
problem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.data.shard_build import index_folder
from sleeptrain.data.shards import Shard, TokenShards
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import UserError
from sleeptrain.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return verify(options.location) if options.command == "verify" else index(options)
    except UserError as error:
        say(f"shards: {error}", sys.stderr)
    except OSError as error:
        say(f"shards: {error.filename or options.command}: {error.strerror}", sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shards", description="Check and index token shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="compare every checksum")
    check.add_argument("location", help="a folder, the URL of one, or a pattern: /data/shard-{000000..000127}.tar")
    make = commands.add_parser("index", help="write the index of tar files of another program, or changed ones")
    make.add_argument("folder", type=Path, help="the folder of the tar files")
    make.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made the ids")
    make.add_argument("--name", help="the data set's name (default: as in the earlier index, else the folder's name)")
    return parser


def verify(location: str) -> int:
    """Print a line for each damaged shard. Returns the exit code: 2 if there is one."""
    shards = TokenShards(location)
    num_damaged = 0
    for number, (place, problem) in enumerate(shards.verify(), 1):
        _progress(number, shards.num_shards, place)
        if problem is not None:
            num_damaged += 1
            say(f"shards: {problem}", sys.stderr)
    if num_damaged:
        say(f"shards: {location}: {num_damaged} of {shards.num_shards} shards are damaged", sys.stderr)
        return 2
    say(f"{location}: {shards.num_shards:,} shards, {shards.num_documents:,} documents, all as they were written")
    return 0


def index(options: argparse.Namespace) -> int:
    """Write the sidecars and the index, and print the totals."""
    num_files = len(list(options.folder.glob("*.tar")))
    done: list[Shard] = []

    def progress(shard: Shard) -> None:
        done.append(shard)
        _progress(len(done), num_files, shard.url)

    index_folder(options.folder, load_tokenizer(options.tokenizer), options.name, progress)
    documents, tokens = sum(shard.nsamples for shard in done), sum(shard.tokens for shard in done)
    say(f"{options.folder}: {len(done):,} shards, {documents:,} documents, {tokens:,} tokens")
    return 0


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
        say(f"{done}/{total} {what}", sys.stderr, end="\n" if done == total else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
