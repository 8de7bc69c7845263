"""The memory as a value: its size is constant, it is copied and saved, and only its own model restores it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.model.cache import SleepCache
from tests.hf.sleeping import gated, padded, sleeping
from tests.models import tiny_model
from tests.sleep.gates import gated_settings
from tests.sleep.trained import texts

NEW = 9
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 17,
}  # no id of a text, because transformers would take it for a pad
CASES = [{}, {"eviction": "sliding"}, {"conv_state": "carry"}, {"core": [1, 2]}, {"when": "unlabelled"}]

FRESH = """
import sys, torch
from sleeptrain.hf.model.cache import SleepCache
from sleeptrain.hf.model.modeling import SleepForCausalLM
model = SleepForCausalLM.from_pretrained(sys.argv[1])
memory = SleepCache.load(sys.argv[2], model)
ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
print(model.generate(ids, past_key_values=memory, max_new_tokens=9, do_sample=False, pad_token_id=17).tolist())
"""


@pytest.mark.parametrize("sleep", CASES, ids=str)
def test_saved_and_restored(sleep, tmp_path):
    model = sleeping(**sleep)
    memory = model.read(**padded(texts([14, 7])))
    memory.save(tmp_path / "memory.safetensors")
    other = sleeping(**sleep)
    again = SleepCache.load(tmp_path / "memory.safetensors", other)
    assert again.boundaries == memory.boundaries == (3, 1)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = model.generate(ids, past_key_values=memory, **GREEDY)
    assert torch.equal(other.generate(ids, past_key_values=again, **GREEDY), expected)


def gated_model(tmp_path):
    return gated(gated_settings(tiny_model(), texts([13, 9, 18, 16]), tmp_path / "gate.safetensors"))


def test_a_memory_of_a_gated_model_goes_on_as_it_would_have(tmp_path):
    model, other, path = gated_model(tmp_path), gated_model(tmp_path), tmp_path / "memory.safetensors"
    memory = model.read(**padded(texts([14, 7])))
    memory.save(path)
    again, taken = SleepCache.load(path, other), set()
    read_at_start, found = memory.live.at_start.to_state_dict(), again.live.at_start.to_state_dict()
    assert read_at_start and found.keys() == read_at_start.keys()
    assert all(torch.equal(found[name], t) for name, t in read_at_start.items())
    for piece in torch.stack(texts([24, 24], seed=1)).split(4, dim=1):
        model.read(piece, cache=memory)
        other.read(piece, cache=again)
        assert again.passes == memory.passes
        taken |= set(memory.passes)
    assert len(taken) > 1
    states = (cache.live.state.to_state_dict() for cache in (memory, again))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    with pytest.raises(ConfigError, match=r"sleep.stop=change: the cache was filled with gate"):
        SleepCache.load(path, sleeping(passes=4, stop="change"))


@pytest.mark.parametrize("make", [lambda _: sleeping(), gated_model], ids=["fixed", "gate"])
def test_restored_in_a_fresh_process(make, tmp_path):
    model = make(tmp_path)
    model.save_pretrained(tmp_path / "model")
    memory = model.read(**padded(texts([14, 7])))
    memory.save(tmp_path / "memory.safetensors")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = model.generate(ids, past_key_values=memory, **GREEDY).tolist()
    paths = [str(tmp_path / "model"), str(tmp_path / "memory.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert done.stdout.splitlines()[-1] == str(expected)


def test_the_memory_of_another_model_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    model = sleeping()
    model.read(texts([9])[0][None]).save(path)
    trained_on = sleeping()
    with torch.no_grad():
        for parameter in trained_on.parameters():
            parameter.add_(1e-3)
    for other in (sleeping(["attention", "gated_deltanet"]), trained_on, sleeping().float()):
        with pytest.raises(DataError, match="made by another model"):
            SleepCache.load(path, other)
    with pytest.raises(ConfigError, match=r"sleep.eviction=sliding: the cache was filled with hard"):
        SleepCache.load(path, sleeping(eviction="sliding"))
    SleepCache.load(path, sleeping(passes=1, window=9))  # N may change, and L comes from the file


def test_files_that_hold_no_memory_are_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        SleepCache.load(path, sleeping())
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read"):
        SleepCache.load(path, sleeping())
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="is no memory of this version"):
        SleepCache.load(path, sleeping())
    sleeping().read(texts([9])[0][None]).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read"):
        SleepCache.load(path, sleeping())
    with pytest.raises(ConfigError, match="has read nothing"):
        model = sleeping()
        SleepCache(model.model, 1, model.sleep_settings()).save(path)


def test_the_file_does_not_grow_with_the_text(tmp_path):
    model, sizes = sleeping(eviction="sliding"), []
    for length in (9, 97):
        path = tmp_path / f"{length}.safetensors"
        model.read(texts([length])[0][None]).save(path)
        sizes.append(path.stat().st_size)
    assert abs(sizes[0] - sizes[1]) <= 8  # digits


def test_a_copy_is_independent():
    model, ids = sleeping(), torch.tensor([[1, 2, 3]])
    memory = model.read(texts([10])[0][None])
    expected = model.generate(ids, past_key_values=memory.copy(), **GREEDY)
    deep = copy.deepcopy(memory)
    assert torch.equal(model.generate(ids, past_key_values=deep, **GREEDY), expected)
    assert torch.equal(model.generate(ids, past_key_values=memory, **GREEDY), expected)


def test_the_methods_of_a_cache():
    model = sleeping()
    memory = model.read(**padded(texts([14, 7])))
    assert (memory.batch_size, memory.window, len(memory), memory.is_initialized) == (2, 4, 3, True)
    memory.batch_select_indices(torch.tensor([1]))
    assert memory.boundaries == (1,)
    with pytest.raises(ConfigError, match="cannot forget tokens"):
        memory.crop(1)
    memory.reset()
    assert memory.boundaries == (0,)
