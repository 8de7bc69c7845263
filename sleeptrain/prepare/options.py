"""The command-line options that select the text that a tool reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source, folder_inputs, named_inputs, stdlib_inputs
from sleeptrain.prepare.readers import MAX_DOCUMENT_BYTES


def add_input_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--stdlib", action="store_true", help="the running Python's standard library")
    source.add_argument("--folder", type=Path, help="a folder; --glob selects its files")
    source.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="files or globs: .jsonl .ndjson .json (an object a line), .parquet; any other is UTF-8 text. All except "
        "parquet also as .gz or .zst",
    )
    parser.add_argument("--glob", default="*.txt", help="the files of --folder, at any depth (default: %(default)s)")
    parser.add_argument(
        "--document",
        choices=("file", "line"),
        default="file",
        help="a document of a .txt is the file or a line of it (default: %(default)s)",
    )
    parser.add_argument(
        "--text-field", default="text", help="the JSON field or parquet column with the text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=MAX_DOCUMENT_BYTES,
        help="a document with more bytes of text, or of a JSON line, is bad. A process takes 300 MiB plus 80 times "
        "this limit, with a Hugging Face tokenizer 500 times (default: %(default)s)",
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.05, help="share of the documents held out (default: %(default)s)"
    )


def inputs_of(options: argparse.Namespace) -> list[Source]:
    """The files that the options name, in order. Raises DataError."""
    if not 0 < options.validation_share < 1:
        raise DataError(f"--validation-share {options.validation_share}: must lie between 0 and 1")
    if options.max_document_bytes < 1:
        raise DataError(f"--max-document-bytes {options.max_document_bytes}: must be at least 1")
    if options.stdlib:
        return stdlib_inputs()
    if options.folder is not None:
        return folder_inputs(options.folder, options.glob, options.document)
    return named_inputs(options.input, options.document)
