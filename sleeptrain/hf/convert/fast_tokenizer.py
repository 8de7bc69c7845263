"""Convert a tokenizer to files of Hugging Face's fast tokenizers. A text keeps the ids that it has in training.

Pieces of a SentencePiece model are written with real spaces. SentencePiece's symbol for a space is then an ordinary
character and is encoded in bytes, as in our tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from sleeptrain.data.hf_tokenizer import CONFIG_JSON, TOKENIZER_JSON, all_text_is_ordinary, named, of_library
from sleeptrain.data.tokenizer import MODEL_NAME, SPACE_SYMBOL, SentencePieceTokenizer
from sleeptrain.data.tokenizer import Tokenizer as OurTokenizer
from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.small_files import parse_json

# Score of pieces that text must not become although it may spell them: control tokens, bytes.
_NEVER = -1e6
_HIDDEN = "\U000f2581"  # a private-use character, which no text holds

# Keys of tokenizer_config.json to copy besides the names of tokens. They do not change the ids of a text.
_COPIED = ("chat_template", "model_max_length", "model_input_names", "padding_side", "truncation_side")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def fast_files(tokenizer: OurTokenizer) -> dict[str, bytes]:
    """The files of a tokenizer for transformers, by name.

    A text gets the ids of training, with BOS first if the data has one; the name of a special token is ordinary text.
    Raises DataError: the kind of SentencePiece model cannot be converted. `tokenizer_check` compares the ids.
    """
    with _converting():
        if isinstance(tokenizer, SentencePieceTokenizer):
            fast, config = convert(tokenizer)
            content = fast.to_str(pretty=True).encode()
        else:
            content = _as_in_training(tokenizer)
            config = _copied_config(tokenizer, Tokenizer.from_str(content.decode()))
    return {TOKENIZER_JSON: content, CONFIG_JSON: (json.dumps(config, indent=2) + "\n").encode()}


@contextmanager
def _converting() -> Iterator[None]:
    """Turn exceptions of the tokenizer libraries into a DataError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        raise of_library(error, "the tokenizer cannot be converted") from error


def _as_in_training(tokenizer: OurTokenizer) -> bytes:
    """The `tokenizer.json` of a Hugging Face tokenizer, unchanged if it already gives the ids of training."""
    before = parse_json(tokenizer.files[TOKENIZER_JSON])
    fast = Tokenizer.from_str(json.dumps(before))
    ends = {fast.id_to_token(id) for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None}
    after = all_text_is_ordinary(before, ends) | {"truncation": None, "padding": None}
    fast.no_truncation()
    fast.no_padding()
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if fast.encode("a").ids != first + fast.encode("a", add_special_tokens=False).ids:
        after["post_processor"] = None
        if tokenizer.bos_id is not None:
            template = _begins_with(str(fast.id_to_token(tokenizer.bos_id)), tokenizer.bos_id)
            after["post_processor"] = json.loads(template.__getstate__())
    return tokenizer.files[TOKENIZER_JSON] if after == before else json.dumps(after, indent=2).encode()


def _copied_config(tokenizer: OurTokenizer, fast: Tokenizer) -> dict[str, Any]:
    """The `tokenizer_config.json`, with the generic class: other classes rebuild the tokenizer or add tokens."""
    config = parse_json(tokenizer.files[CONFIG_JSON])
    known = fast.get_vocab(with_added_tokens=True)
    tokens = {name: text for name in config if name.endswith("_token") and (text := named(config, name)) in known}
    if tokenizer.bos_id is None:
        tokens.pop("bos_token", None)
    lists = {
        name: [text for item in config[name] if (text := named({"": item}, "")) in known]
        for name in _LISTS
        if isinstance(config.get(name), list)
    }
    return {name: config[name] for name in _COPIED if name in config} | tokens | lists | _common(tokenizer)


def _common(tokenizer: OurTokenizer) -> dict[str, Any]:
    """Settings of all exports. A text that spells a special token is ordinary text, as in training."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def _begins_with(bos: str, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, id)])


def convert(tokenizer: SentencePieceTokenizer) -> tuple[Tokenizer, dict[str, Any]]:
    """(fast tokenizer, its `tokenizer_config.json`). Raises DataError: this kind of model cannot be converted."""
    model = _format().ModelProto.FromString(tokenizer.files[MODEL_NAME])
    kind, trained = _format().ModelProto.SentencePiece, _format().TrainerSpec
    if any(piece.type == kind.USER_DEFINED for piece in model.pieces):
        raise DataError("the tokenizer cannot be converted: it has symbols defined by its user; use --no-tokenizer")
    if model.trainer_spec.model_type == trained.BPE:
        fast = Tokenizer(_bpe(model.pieces))
    elif model.trainer_spec.model_type == trained.UNIGRAM:
        fast = Tokenizer(_unigram(model.pieces))
    else:
        raise DataError("the tokenizer cannot be converted: fast tokenizers are BPE or unigram; use --no-tokenizer")
    if steps := _normalizers(model.normalizer_spec):
        fast.normalizer = normalizers.Sequence(steps)
    # Decoding removes the space that such a model puts before a text.
    strip = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [p.piece for p in model.pieces if p.type in (kind.CONTROL, kind.UNKNOWN)]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    fast.encode_special_tokens = True
    config = _config(tokenizer, model)
    if tokenizer.bos_id is not None:
        fast.post_processor = _begins_with(config["bos_token"], tokenizer.bos_id)
    return fast, config


def _format() -> Any:
    """The protobuf module of SentencePiece's file format. Raises ConfigError: protobuf is not installed."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError(
            "a SentencePiece tokenizer is converted with protobuf; install it with pip install 'sleeptrain[hf]', or "
            "use --no-tokenizer"
        ) from error
    return sentencepiece_model_pb2


def _config(tokenizer: SentencePieceTokenizer, model: Any) -> dict[str, Any]:
    """The `tokenizer_config.json`. Padding is on the left, so that generated ids directly follow each prompt."""
    spec = model.trainer_spec
    ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    tokens = {f"{name}_token": model.pieces[id].piece for name, id in ids.items() if id >= 0}
    return tokens | _common(tokenizer) | {"padding_side": "left"}


def _spaced(piece: str) -> str:
    return piece.replace(SPACE_SYMBOL, " ")


def _bpe(pieces: Sequence[Any]) -> models.BPE:
    """SentencePiece merges the two neighbours whose join scores highest. Each such pair becomes a rule, best first."""
    kind = _format().ModelProto.SentencePiece
    scores = {_spaced(p.piece): p.score for p in pieces if p.type == kind.NORMAL}
    vocab = {_spaced(p.piece) if p.type == kind.NORMAL else p.piece: id for id, p in enumerate(pieces)}
    rules = [
        (-score, vocab[piece], i, (piece[:i], piece[i:]))
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    unknown = next(p.piece for p in pieces if p.type == kind.UNKNOWN)
    return models.BPE(vocab, [pair for *_, pair in sorted(rules)], unk_token=unknown, byte_fallback=True)


def _unigram(pieces: Sequence[Any]) -> models.Unigram:
    kind = _format().ModelProto.SentencePiece
    scored = [(_spaced(p.piece), p.score) if p.type == kind.NORMAL else (p.piece, _NEVER) for p in pieces]
    unknown = next(id for id, p in enumerate(pieces) if p.type == kind.UNKNOWN)
    return models.Unigram(scored, unknown, byte_fallback=True)


def _normalizers(spec: Any) -> list[Any]:
    """The steps of SentencePiece's normaliser; none if the model keeps text unchanged."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # The rules would change SentencePiece's symbol for a space; our tokenizer hides it from them.
        hide, show = normalizers.Replace(SPACE_SYMBOL, _HIDDEN), normalizers.Replace(_HIDDEN, SPACE_SYMBOL)
        steps += [hide, normalizers.Precompiled(spec.precompiled_charsmap), show]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:  # such models also read their symbol as a space
        steps += [normalizers.Replace(SPACE_SYMBOL, " "), normalizers.Prepend(" ")]
    return steps
