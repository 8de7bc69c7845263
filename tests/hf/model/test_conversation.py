"""Several calls of `generate` on one memory lose nothing, and read nothing but text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.hf.model.cache import SleepCache
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.hf.sleeping import padded, sleeping
from tests.sleep.trained import texts

EOS = 3  # greedy answers of these models hold this id; rows that have ended are padded with it
NEW = 9
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS}
CASES = [{}, {"eviction": "sliding", "conv_state": "carry"}]


def answers(ids: torch.Tensor, prompt: int) -> list[torch.Tensor]:
    """The ids that each row has added, without pads."""
    return [row[mask] for row, mask in zip(ids[:, prompt:], up_to_end(ids[:, prompt:]), strict=True)]


def up_to_end(ids: torch.Tensor) -> torch.Tensor:
    """bool: True up to the first EOS of each row."""
    ends = (ids == EOS).long()
    return ends.cumsum(1) - ends == 0


def answers_at_once(model: SleepForCausalLM, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    batch = padded(rows)
    return answers(model.generate(**batch, **OPTIONS, use_cache=False), batch["input_ids"].shape[1])


def test_rows_end_at_different_steps():
    """The other tests need this."""
    model = sleeping()
    lengths = [len(answer) for answer in answers_at_once(model, texts([9, 4, 12]))]
    assert min(lengths) < max(lengths) == NEW


@pytest.mark.parametrize("sleep", [*CASES[:1], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])], ids=str)
def test_several_turns_of_new_text(sleep: dict[str, str]):
    """Questions are longer or shorter than the text of the turn before, of different lengths or of one length."""
    model = sleeping(**sleep)
    rows = texts([9, 4, 12])
    memory = model.read(**padded(rows))
    for turn, lengths in enumerate([(2, 5, 3), (14, 16, 12), (4, 4, 4), (1, 1, 2)]):
        questions = texts(lengths, seed=turn + 1)
        batch = padded(questions)
        found = answers(model.generate(**batch, past_key_values=memory, **OPTIONS), batch["input_ids"].shape[1])
        rows = [torch.cat(pair) for pair in zip(rows, questions, strict=True)]
        expected = answers_at_once(model, rows)
        for row, a, b in zip(rows, found, expected, strict=True):
            assert torch.equal(a, b), len(row)
        rows = [torch.cat(pair) for pair in zip(rows, found, strict=True)]
        assert memory.boundaries == tuple(len(row) // memory.window for row in rows)


def test_text_read_by_forward_between_turns():
    model, (row, more, question) = sleeping(), texts([9, 7, 4])
    memory = model.read(row[None])
    with torch.no_grad():
        model(more[None], past_key_values=memory)
    found = model.generate(question[None], past_key_values=memory, **OPTIONS)
    expected = answers_at_once(model, [torch.cat([row, more, question])])
    assert torch.equal(answers(found, len(question))[0], expected[0])


def test_a_memory_from_a_file_and_a_copy_take_new_text(tmp_path: Path):
    model, (row, *questions) = sleeping(), texts([9, 4, 11, 2])
    memory = model.read(row[None])
    memory.save(tmp_path / "memory")
    found = []
    for one in (SleepCache.load(tmp_path / "memory", model), memory.copy(), memory):
        found.append([model.generate(q[None], past_key_values=one, **OPTIONS) for q in questions])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("sleep", CASES, ids=str)
def test_the_whole_text_again_with_the_cache_of_the_turn_before(sleep: dict[str, str]):
    model, batch = sleeping(**sleep), padded(texts([9, 4, 12]))
    out = model.generate(**batch, **OPTIONS, return_dict_in_generate=True)
    no_pads = up_to_end(out.sequences[:, batch["input_ids"].shape[1] :])
    assert not no_pads.all()
    question = padded(texts([6, 3, 5], seed=1))
    ids = torch.cat([out.sequences, question["input_ids"]], dim=1)
    mask = torch.cat([batch["attention_mask"], no_pads.long(), question["attention_mask"]], dim=1)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS, use_cache=False)
    copy = out.past_key_values.copy()
    found = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **OPTIONS)
    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match=r"has read 20 columns, and the ids have 4: .*follow_with_new_text\(\)"):
        model.generate(texts([4] * 3)[0].expand(3, -1), past_key_values=copy, **OPTIONS)
    with torch.no_grad():  # the logits as well, after all the text
        new = ids[:, copy.columns :]
        cached = model(new, mask, copy).logits[:, -1]
        torch.testing.assert_close(cached, model(ids, mask, use_cache=False).logits[:, -1], rtol=1e-9, atol=1e-10)


def test_the_cache_of_a_beam_search_is_refused():
    model, (row, question) = sleeping(), texts([9, 4])
    memory = model.read(row[None])
    memory.batch_repeat_interleave(2)
    before = memory.copy()
    expected = model.generate(torch.cat([row, question])[None], **OPTIONS, num_beams=2, use_cache=False)
    for one in (memory, before):
        found = model.generate(question[None], past_key_values=one, **OPTIONS, num_beams=2)
        assert torch.equal(found[0], expected[0, len(row) :])
        for again in (one, one.copy()):
            with pytest.raises(ConfigError, match="holds the last beams of a search"):
                model.generate(question[None], past_key_values=again, **OPTIONS, num_beams=2)
            with pytest.raises(ConfigError, match="holds the last beams of a search"):
                model.read(question.expand(2, -1), past_key_values=again)
    memory.reset()
    model.read(question.expand(2, -1), past_key_values=memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefill_chunk_size": 2}, "prefill_chunk_size: a prompt is read window by window"),
        ({"use_cache": False}, "use_cache=False goes with the whole text"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "the model gives logits only"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "the model gives logits only"),
    ],
)
def test_arguments_that_generate_refuses(arguments: dict[str, object], message: str):
    model, ids = sleeping(), texts([4])[0][None]
    memory = model.read(ids)
    with pytest.raises(ConfigError, match=message):
        model.generate(ids, past_key_values=memory, **OPTIONS, **arguments)
