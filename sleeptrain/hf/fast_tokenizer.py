"""A SentencePiece model as a `tokenizer.json` of Hugging Face's fast tokenizers, with the same ids for the same text.

Pieces are written with real spaces: SentencePiece's symbol for a space is then an ordinary character, which is spelled
in bytes as our tokenizer spells it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from sleeptrain.data.hf_tokenizer import CONFIG_JSON, TOKENIZER_JSON
from sleeptrain.data.tokenizer import MODEL_NAME, SPACE_SYMBOL, SentencePieceTokenizer
from sleeptrain.data.tokenizer import Tokenizer as OurTokenizer
from sleeptrain.errors import ConfigError, DataError

# The score of a piece that text must not be cut into though it may spell it: a control token, a byte.
_NEVER = -1e6
_HIDDEN = "\U000f2581"  # for private use: in no text

SAMPLE = (
    "".join(f"{' ' * n}x{'=' * n}" for n in range(1, 81)) + "\n"
    "The quick brown fox jumps over the lazy dog. It's 3.14159 o'clock, isn't it?\n"
    "def f(x: int) -> int:\n    if x < 2:\n\t\treturn x  # ====--====\n    return f(x - 1) + f(x - 2)\n\n\n"
    "    https://example.org/a_b/c%20d?e=f&g=h  \t \r\n{'k': [1, 22, 333, 4444]} ......!!! ????  \x00\x07\x1b\n"
    "naïve café Ærøskøbing Straße ÀÉÎÕÜ ﬁ ½ № ① Ⅷ ａｂｃ e\u0301 \u200b\u00a0\u3000\ufeff\n"
    "Быстрая лиса 速い茶色の狐 빠른 여우 سريع חתול ἀλώπηξ गति ᚠᛇᚻ 𝔘𝔫𝔦 😀👩‍👩‍👧🏽 \U0010ffff\n"
    f"{SPACE_SYMBOL} a{SPACE_SYMBOL}b {SPACE_SYMBOL}{SPACE_SYMBOL}c <s></s><unk><pad><0x0A><0xE2> ▂▁▂\n"
)


def fast_files(tokenizer: OurTokenizer, texts: Iterable[str] = ()) -> dict[str, bytes]:
    """The files of a tokenizer for transformers, by name; those of a Hugging Face tokenizer as they are.

    texts: whose ids are compared, besides SAMPLE. Raises DataError where the ids of a text differ, or where a kind of
    SentencePiece model has no counterpart.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return dict(tokenizer.files)
    fast, config = convert(tokenizer)
    for text in (SAMPLE, *SAMPLE.splitlines(), *texts):
        expected, found = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != found:
            at = next(i for i, (a, b) in enumerate(zip([*expected, -1], [*found, -1], strict=False)) if a != b)
            raise DataError(
                f"the tokenizer cannot be converted: the fast tokenizer's ids of {text[:40]!r} differ from the "
                f"{at + 1}th on; name a Hugging Face tokenizer with the same ids (--tokenizer), or use --no-tokenizer"
            )
    written = (json.dumps(config, indent=2) + "\n").encode()
    return {TOKENIZER_JSON: fast.to_str(pretty=True).encode(), CONFIG_JSON: written}


def convert(tokenizer: SentencePieceTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """The fast tokenizer, and its `tokenizer_config.json`. Raises DataError for an unknown kind of model."""
    found = _format().ModelProto.FromString(tokenizer.files[MODEL_NAME])
    kind, trained = _format().ModelProto.SentencePiece, _format().TrainerSpec
    if any(piece.type == kind.USER_DEFINED for piece in found.pieces):
        raise DataError("the tokenizer cannot be converted: it has symbols defined by its user; use --no-tokenizer")
    if found.trainer_spec.model_type == trained.BPE:
        fast = Tokenizer(_bpe(found.pieces))
    elif found.trainer_spec.model_type == trained.UNIGRAM:
        fast = Tokenizer(_unigram(found.pieces))
    else:
        raise DataError("the tokenizer cannot be converted: fast tokenizers are BPE or unigram; use --no-tokenizer")
    if steps := _normalizers(found.normalizer_spec):
        fast.normalizer = normalizers.Sequence(steps)
    # The space that such a model puts before a text is no part of the text that comes back.
    strip = [decoders.Strip(" ", 1, 0)] if found.normalizer_spec.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [p.piece for p in found.pieces if p.type in (kind.CONTROL, kind.UNKNOWN)]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    fast.encode_special_tokens = True
    config = _config(tokenizer, found)
    if tokenizer.bos_id is not None:
        bos = config["bos_token"]
        fast.post_processor = processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, tokenizer.bos_id)]
        )
    return fast, config


def _format() -> Any:
    """SentencePiece's file format. Raises ConfigError where protobuf, which reads it, is not installed."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError(
            "a SentencePiece tokenizer is converted with protobuf; install it with pip install 'sleeptrain[hf]', or "
            "use --no-tokenizer"
        ) from error
    return sentencepiece_model_pb2


def _config(tokenizer: SentencePieceTokenizer, found: Any) -> dict[str, Any]:
    """Text that spells a control token is ordinary text, as it was in training."""
    spec = found.trainer_spec
    ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": found.pieces[id].piece for name, id in ids.items() if id >= 0},
        "add_bos_token": tokenizer.bos_id is not None,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def _spaced(piece: str) -> str:
    return piece.replace(SPACE_SYMBOL, " ")


def _bpe(pieces: Sequence[Any]) -> models.BPE:
    """SentencePiece merges the two neighbours whose join scores highest; here every such pair is a rule."""
    kind = _format().ModelProto.SentencePiece
    scores = {_spaced(p.piece): p.score for p in pieces if p.type == kind.NORMAL}
    vocab = {_spaced(p.piece) if p.type == kind.NORMAL else p.piece: id for id, p in enumerate(pieces)}
    rules = [
        (-score, vocab[whole], at, (whole[:at], whole[at:]))
        for whole, score in scores.items()
        for at in range(1, len(whole))
        if whole[:at] in scores and whole[at:] in scores
    ]
    unknown = next(p.piece for p in pieces if p.type == kind.UNKNOWN)
    return models.BPE(vocab, [pair for *_, pair in sorted(rules)], unk_token=unknown, byte_fallback=True)


def _unigram(pieces: Sequence[Any]) -> models.Unigram:
    kind = _format().ModelProto.SentencePiece
    scored = [(_spaced(p.piece), p.score) if p.type == kind.NORMAL else (p.piece, _NEVER) for p in pieces]
    unknown = next(id for id, p in enumerate(pieces) if p.type == kind.UNKNOWN)
    return models.Unigram(scored, unknown, byte_fallback=True)


def _normalizers(spec: Any) -> list[Any]:
    """What SentencePiece does to a text before it cuts it; nothing in a model that keeps text as it is."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # The rules take SentencePiece's symbol for a space, and our tokenizer keeps it away from them.
        hide, show = normalizers.Replace(SPACE_SYMBOL, _HIDDEN), normalizers.Replace(_HIDDEN, SPACE_SYMBOL)
        steps += [hide, normalizers.Precompiled(spec.precompiled_charsmap), show]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:  # such models take their symbol for a space, too
        steps += [normalizers.Replace(SPACE_SYMBOL, " "), normalizers.Prepend(" ")]
    return steps
