"""A prompt and its continuation make the right text, wherever it is cut, though tokenizers drop its first space."""

from __future__ import annotations

import json
import random

import pytest

from sleeptrain.data.continued import UNFINISHED, ContinuedText, continued_text
from sleeptrain.data.hf_tokenizer import CONFIG_JSON, TOKENIZER_JSON, HuggingFaceTokenizer
from sleeptrain.data.tokenizer import Tokenizer, train_tokenizer
from sleeptrain.hf.convert.fast_tokenizer import convert
from tests.data.texts import default_sentencepiece, make_texts

TEXTS = ["the cat sat on the cat", "cat", "a €é漢😀b €", "漢", " two  spaces ", "x\ny \n z", ""]
KINDS = ["ours", "default", "prefix kept", "ours as fast", "default as fast"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("continued")
    path = folder / "tokenizer.model"
    if request.param.startswith("ours"):
        found = train_tokenizer(make_texts(20), 320, path)
    else:
        found = default_sentencepiece(path, remove_extra_whitespaces=request.param != "prefix kept")
    if not request.param.endswith("fast"):
        return found
    fast, config = convert(found)
    (folder / TOKENIZER_JSON).write_text(fast.to_str())
    (folder / CONFIG_JSON).write_text(json.dumps(config))
    return HuggingFaceTokenizer(folder / TOKENIZER_JSON)


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_cut_in_two(tokenizer, text):
    ids = with_bos(tokenizer, tokenizer.encode(text))
    expected = tokenizer.decode(ids)
    for at in range(len(ids) + 1):
        start = tokenizer.decode(ids[:at])
        if start.endswith(UNFINISHED):
            continue  # a prompt has whole characters only
        assert start + continued_text(tokenizer, ids[:at], ids[at:]) == expected, at


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_tokens_gives_only_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    for before in (with_bos(tokenizer, []), tokenizer.encode("the"), None):
        stream = ContinuedText(tokenizer, before)
        pieces = [stream.add([id]) for id in ids]
        assert not any(UNFINISHED in piece for piece in pieces)
        expected = continued_text(tokenizer, before, ids)
        assert "".join(pieces) + stream.end() == expected
    assert expected.lstrip() == tokenizer.decode(ids).lstrip()


def test_a_cut_off_character_is_shown_at_the_end(tokenizer):
    euro = tokenizer.encode("cat €")
    stream = ContinuedText(tokenizer, tokenizer.encode("the"))
    output = "".join(stream.add([id]) for id in euro[:-1])
    assert output.strip() == "cat"
    end = stream.end()
    assert set(end.strip()) == {UNFINISHED}
    assert continued_text(tokenizer, tokenizer.encode("the"), euro[:-1]) == output + end


def test_any_ids_give_the_same_text_at_once_and_one_by_one(tokenizer):
    """This includes broken characters. The stream does not take a whole character back."""
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(0, 12))]
        stream = ContinuedText(tokenizer, None)
        found = "".join([stream.add([id]) for id in ids]) + stream.end()
        assert found == continued_text(tokenizer, None, ids), ids
