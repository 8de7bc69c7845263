"""Train a SentencePiece tokenizer on a sample: `python tools/tokenizer.py --input '*.jsonl' --out tokenizer.model`.

The sample comes from the training side, spread over the corpus. At the end the tool prints measures on held-out text.
Exit code 2 and one line if the user can mend the cause.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sleeptrain.data.tokenizer import MODEL_TYPES, NORMALIZATIONS, SentencePieceTokenizer, train_tokenizer
from sleeptrain.errors import DataError, UserError
from sleeptrain.prepare.options import add_input_options, inputs_of
from sleeptrain.prepare.sample import SAMPLE_CHARACTERS, sample
from sleeptrain.prepare.units import plan_units
from sleeptrain.terminal import say

HELD_OUT_CHARACTERS = 2 * 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _train(options)
    except UserError as error:
        say(f"tokenizer: {error}", sys.stderr)
        return 2
    except OSError as error:
        say(f"tokenizer: {error.filename or options.out}: {error.strerror}", sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenizer", description="Train a SentencePiece tokenizer on text.")
    add_input_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the model to write, such as tokenizer.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, with control tokens and bytes")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="default: %(default)s")
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="identity",
        help="only `identity` restores every text exactly (default: %(default)s)",
    )
    parser.add_argument("--control-tokens", nargs="+", default=[], metavar="TOKEN", help="tokens that no text yields")
    parser.add_argument("--reserved", type=int, default=0, help="number of control tokens <|reserved_0|>, ... to add")
    parser.add_argument(
        "--characters", type=int, default=SAMPLE_CHARACTERS, help="most characters to train on (default: %(default)s)"
    )
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.out.suffix != ".model":
        raise DataError(f"--out {options.out}: give it a name that ends in .model")
    for name in ("characters", "reserved"):
        if getattr(options, name) < (name == "characters"):
            raise DataError(f"--{name} {getattr(options, name)}: too small")
    units = plan_units(inputs_of(options), options.text_field)
    share, longest = options.validation_share, options.max_document_bytes
    control_tokens = [*options.control_tokens, *(f"<|reserved_{number}|>" for number in range(options.reserved))]
    tokenizer = train_tokenizer(
        sample(units, options.text_field, share, characters=options.characters, max_bytes=longest),
        options.vocab_size,
        options.out,
        options.model_type,
        options.normalization,
        control_tokens,
    )
    held_out = sample(
        units, options.text_field, share, characters=HELD_OUT_CHARACTERS, wanted="validation", max_bytes=longest
    )
    say(f"{options.out}: {tokenizer.vocab_size:,} ids, {options.model_type}, normalization {options.normalization}")
    say("control  " + "  ".join(f"{token} {id}" for token, id in tokenizer.control_tokens.items()))
    say(_measures(tokenizer, held_out))


def _measures(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> str:
    num_bytes = num_tokens = fallbacks = 0
    for text in texts:
        ids = tokenizer.encode(text)
        num_bytes += len(text.encode())
        num_tokens += len(ids)
        fallbacks += sum(map(tokenizer.is_byte, ids))
    if not num_tokens:
        return "held out  no document (give more, or a larger --validation-share)"
    share = f"{fallbacks / num_tokens:.3%} of the tokens single bytes"
    return f"held out  {num_bytes:,} bytes, {num_bytes / num_tokens:.3f} a token, {share}"


if __name__ == "__main__":
    sys.exit(main())
