"""`generate()` with sleep: the tokens that the training forward predicts, with the cache and without."""

from __future__ import annotations

import pytest
import torch
from transformers import TextStreamer

from sleeptrain.errors import ConfigError
from sleeptrain.sleep import live as live_module
from tests.hf.sleeping import WINDOW, padded, settings_of, sleeping
from tests.sleep.trained import texts, trained_logits

NEW = 11
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 17,
}  # no id of a text, because transformers would take it for a pad
CASES = {
    "every": {},
    "one pass": {"passes": 1},
    "sliding": {"eviction": "sliding"},
    "no feedback": {"feedback": "none"},
    "conv carried": {"conv_state": "carry"},
    "core": {"core": [1, 2]},
    "unlabelled": {"when": "unlabelled"},
}


@pytest.mark.parametrize("sleep", CASES.values(), ids=CASES)
def test_greedy_equals_the_training_forward_token_for_token(sleep):
    model, rows = sleeping(**sleep), texts([9, 3, 8, 12])
    batch = padded(rows)
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
    for b, row in enumerate(rows):
        text = torch.cat([row, cached[b, -NEW:]])
        logits = trained_logits(model.model, [text], settings_of(model), len(row) - 1)[0]
        assert torch.equal(logits[len(row) - 1 : -1].argmax(-1), cached[b, -NEW:]), f"row {b}"
        alone = model.generate(row[None], **GREEDY)
        assert torch.equal(alone[0, -NEW:], cached[b, -NEW:])


@pytest.mark.parametrize("window", [WINDOW, 2])  # longer and shorter than the reach of a sliding layer
@pytest.mark.parametrize("when", ["every", pytest.param("unlabelled", marks=pytest.mark.slow)])
def test_sliding_eviction_of_a_layer_that_reaches_less_than_a_window(when, window):
    """At one step some rows sleep, and others do not, because they have predicted. N grows inside a text."""
    layers = ["sliding_attention", "jet", "attention"]
    model = sleeping(layers, eviction="sliding", when=when, window=window)
    documents, questions = texts([5, 13, 8]), texts([11, 7, 8], seed=1)
    rows = [torch.cat(pair) for pair in zip(documents, questions, strict=True)]
    expected = model.generate(**padded(rows), **GREEDY, use_cache=False)
    memory = model.read(**padded(documents))
    found = model.generate(**padded(questions), past_key_values=memory, **GREEDY)
    assert torch.equal(found[:, -NEW:], expected[:, -NEW:])
    memory = model.read(**padded(documents), passes=1)
    found = model.generate(**padded(questions), past_key_values=memory, **GREEDY, passes=3)
    for b, (document, question) in enumerate(zip(documents, questions, strict=True)):
        memory = model.read(document[None], passes=1)
        alone = model.generate(question[None], past_key_values=memory, **GREEDY, passes=3)
        assert torch.equal(alone[0, -NEW:], found[b, -NEW:])


def test_each_boundary_sleeps_once(monkeypatch):
    model, rows = sleeping(passes=2), texts([9, 3])
    rounds = []

    def counted(context, num_rows, r, *rest):  # type: ignore[no-untyped-def]
        rounds.append(len(r.rows))
        return run_on_rows(context, num_rows, r, *rest)

    run_on_rows = live_module.run_on_rows
    monkeypatch.setattr(live_module, "run_on_rows", counted)
    out = model.generate(**padded(rows), **GREEDY, return_dict_in_generate=True)
    # The last token is not read, so 9 + 10 and 3 + 10 are.
    assert out.past_key_values.boundaries == (4, 3)
    assert sum(rounds) == 7


@pytest.mark.parametrize("sleep", [{}, {"eviction": "sliding"}, {"when": "unlabelled"}], ids=str)
def test_beams_equal_beams_without_a_cache(sleep):
    model, batch = sleeping(**sleep), padded(texts([9, 5]))
    options = GREEDY | {
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with_cache = model.generate(**batch, **options)
    without = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores)
    assert not torch.equal(with_cache.sequences[::2], model.generate(**batch, **GREEDY))


def test_sampling_equals_sampling_without_a_cache():
    model, batch = sleeping(), padded(texts([9, 5]))
    options = GREEDY | {"do_sample": True, "temperature": 2.0, "top_k": 0}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(**batch, **options, use_cache=use_cache))
    assert torch.equal(*found)
    torch.manual_seed(2)
    assert not torch.equal(model.generate(**batch, **options), found[0])


def test_passes_and_window_are_arguments_of_generate():
    model, batch = sleeping(passes=1, window=64), padded(texts([9, 5]))
    expected = sleeping(passes=3).generate(**batch, **GREEDY)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**batch, **GREEDY, passes=3, window=WINDOW, use_cache=use_cache), expected)
    assert not torch.equal(model.generate(**batch, **GREEDY), expected)
    with pytest.raises(ValueError, match="pases"):
        model.generate(**batch, **GREEDY, pases=3)


def test_streaming(capsys):
    class Words:
        def decode(self, ids, **_):  # type: ignore[no-untyped-def]
            return "".join(f"{int(i)} " for i in ids)

    model, (row,) = sleeping(), texts([9])
    out = model.generate(row[None], **GREEDY, streamer=TextStreamer(Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(int(i)) for i in out[0, -NEW:]]


def test_generation_after_a_text_that_was_read_before():
    """A caller gives the whole text again with the cache of its beginning, or only the new part."""
    model, (row,) = sleeping(), texts([15])
    expected = model.generate(row[None], **GREEDY)
    memory = model.read(row[None, :10])
    for _ in range(2):
        found = model.generate(row[None, 10:], past_key_values=memory.copy(), **GREEDY)
        assert torch.equal(found[:, 5:], expected[:, 15:])
    with torch.no_grad():
        prefix = model(row[None, :10], use_cache=True).past_key_values
    assert torch.equal(model.generate(row[None], past_key_values=prefix, **GREEDY), expected)


def test_several_answers_to_one_document():
    model, (row, *questions) = sleeping(), texts([10, 4, 2])
    memory = model.read(row[None])
    memory.batch_repeat_interleave(2)
    batch = padded(questions)
    found = model.generate(**batch, past_key_values=memory, **GREEDY)
    for b, question in enumerate(questions):
        alone = model.generate(torch.cat([row, question])[None], **GREEDY)
        assert torch.equal(found[b, -NEW:], alone[0, -NEW:])


def test_assisted_generation_is_refused():
    model = sleeping()
    with pytest.raises(ConfigError, match="assistant_model: rejected draft tokens would have to be removed"):
        model.generate(texts([5])[0][None], assistant_model=sleeping(), **GREEDY)
