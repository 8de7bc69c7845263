"""Law 6: the forward of `SleepForCausalLM`, with and without a cache, equals the training loop."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.families import FAMILIES
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.sleep.stop_gate import save_gate
from tests.hf.models import MODELS, disturbed, native
from tests.hf.sleeping import WINDOW, gated, padded, settings_of, sleeping
from tests.models import VOCABULARY, tiny_config, tiny_model
from tests.sleep.gates import gated_settings
from tests.sleep.trained import texts, trained_decisions, trained_logits

EXACT = dict(rtol=1e-9, atol=1e-10)
STACKS = {
    "all mixers": None,
    "gated deltanet": ["gated_deltanet", "attention"],
    "mamba2": ["mamba2", "attention"],
    "transformer": ["attention", "attention"],
    "sliding attention": ["sliding_attention", "jet", "attention"],
}


@pytest.mark.parametrize(("windows", "passes"), list(product([1, 2, 3, 4], [1, 2, 3])))
def test_ragged_rows_equal_the_training_forward(windows, passes):
    model = sleeping(passes=passes)
    full = WINDOW * windows
    rows = texts([full, full - 1, full - 3, 1, max(1, full - 5)], seed=windows)
    expected = trained_logits(model.model, rows, settings_of(model))
    for side, cached in product(["left", "right"], [True, False]):
        batch = padded(rows, side)
        with torch.no_grad():
            logits = model(**batch, use_cache=cached).logits
        for b in range(len(rows)):
            found = logits[b][batch["attention_mask"][b].bool()]
            torch.testing.assert_close(found, expected[b], **EXACT)
        assert (logits[batch["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(
    "sleep", [{}, {"eviction": "sliding"}, {"feedback": "none"}, {"conv_state": "carry"}, {"core": [0, 1]}], ids=str
)
def test_single_precision(stack, sleep):
    recurrent = stack is None or set(stack) != {"attention"}
    if stack is not None and len(stack) == 2 and recurrent and "core" in sleep:
        stack = [*stack, "attention"]
    elif "core" in sleep:
        sleep = {"core": [1, 2]}
    model = sleeping(stack, passes=2 if recurrent else 1, **(sleep if recurrent else {})).float()
    rows = texts([14, 9])
    batch = padded(rows)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.dtype == torch.float32
    model.double()
    for b, expected in enumerate(trained_logits(model.model, rows, settings_of(model))):
        found = logits[b][batch["attention_mask"][b].bool()].double()
        # Processors round differently: up to 4e-5 was seen.
        assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("when", ["every", "unlabelled"])
def test_loss_and_gradients_are_those_of_training(when):
    model = sleeping(when=when)
    rows = texts([13, 10])
    batch = padded(rows)
    labels = batch["input_ids"].clone()  # the labels of pads are ignored
    first = 9 if when == "unlabelled" else 0  # a token of the third window on
    for b, row in enumerate(rows):
        begin = labels.shape[1] - len(row)
        labels[b, begin : begin + first] = -100
    out = model(**batch, labels=labels)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    model.zero_grad()
    total, count = 0.0, 0
    for row in rows:
        logits = trained_logits(model.model, [row], settings_of(model), max(0, first - 1), with_gradient=True)[0]
        targets = row[max(1, first) :]
        total = total + F.cross_entropy(logits[max(1, first) - 1 : -1], targets, reduction="sum")
        count += len(targets)
    (total / count).backward()
    torch.testing.assert_close(out.loss, (total / count), **EXACT)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, **EXACT, msg=name)


@pytest.mark.parametrize("stack", ["all mixers", "sliding attention"])
def test_pieces_of_a_text_with_a_cache(stack):
    model = sleeping(STACKS[stack], eviction="sliding")
    (row,) = texts([15])
    expected = trained_logits(model.model, [row], settings_of(model))[0]
    cache, found = None, []
    with torch.no_grad():
        for piece in row.split([2, 7, 1, 1, 4]):
            out = model(piece[None], past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits[0]]
    torch.testing.assert_close(torch.cat(found), expected, **EXACT)
    assert cache.boundaries == (3,)
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("sleep", [{}, {"eviction": "sliding", "min_passes": 2}], ids=str)
def test_a_gate_that_the_model_holds_decides_as_in_training(sleep, tmp_path):
    rows = texts([13, 9, 18, 16])
    settings = gated_settings(tiny_model(), rows, tmp_path / "gate.safetensors", **sleep)
    model = gated(settings)
    (tmp_path / "gate.safetensors").unlink()
    assert model.stop_gate is not None and {p.dtype for p in model.stop_gate.parameters()} == {torch.float32}
    save_gate(model.stop_gate, tmp_path / "gate.safetensors")
    expected = trained_logits(model.model, rows, settings)
    for side, cached in product(["left", "right"], [True, False]):
        batch = padded(rows, side)
        with torch.no_grad():
            logits = model(**batch, use_cache=cached).logits
        for b in range(len(rows)):
            torch.testing.assert_close(logits[b][batch["attention_mask"][b].bool()], expected[b], **EXACT)
    decided = trained_decisions(model.model, rows, settings).passes_KB
    for b, row in enumerate(rows):
        cache, taken = None, []
        for piece in row.split(WINDOW):
            cache = model.read(piece[None], cache=cache)
            taken.append(cache.passes[0])
        windows = (len(row) - 1) // WINDOW  # training never lets the last window of a text sleep
        assert taken[:windows] == [passes[b] for passes in decided[:windows]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gate_is_saved_and_loaded_with_the_weights(dtype, tmp_path):
    rows = texts([13, 9, 18, 16])
    model = gated(gated_settings(tiny_model(), rows, tmp_path / "gate.safetensors"))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert (again.dtype, again.config.sleep) == (dtype, model.config.sleep)
    for (name, ours), found in zip(model.stop_gate.named_parameters(), again.stop_gate.parameters(), strict=True):
        assert torch.equal(found.view(torch.int32), ours.view(torch.int32)), name
        assert not found.requires_grad
    other = SleepForCausalLM.from_pretrained(tmp_path / "saved", sleep={"stop": "change"}, dtype=dtype)
    with torch.no_grad():
        logits = again(**padded(rows)).logits
        assert torch.equal(logits, model.to(dtype)(**padded(rows)).logits)
        assert not torch.equal(other(**padded(rows)).logits, logits)


def test_a_folder_without_its_gate_is_refused(tmp_path):
    gated(gated_settings(tiny_model(), texts([13, 9, 18, 16]), tmp_path / "gate.safetensors")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    without = {name: t for name, t in tensors.items() if not name.startswith("stop_gate.")}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"10 missing keys \(stop_gate\.facts\.bias, "):
        SleepForCausalLM.from_pretrained(tmp_path)
    damaged = tensors | {"stop_gate.losses.3.bias": torch.zeros(9)}
    save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 mismatched keys \(.*stop_gate\.losses\.3\.bias"):
        SleepForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["stop_gate_passes"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"sleep\.stop=gate: this model holds no gate; export a run with"):
        SleepForCausalLM.from_pretrained(tmp_path)


def test_only_the_last_features_reach_the_head():
    model, rows = sleeping(), texts([11, 6])
    with torch.no_grad():
        logits = model(**padded(rows)).logits
        for cached in (True, False):
            few = model(**padded(rows), use_cache=cached, logits_to_keep=3).logits
            torch.testing.assert_close(few, logits[:, -3:], **EXACT)


def test_passes_and_window_at_call_time():
    model, rows = sleeping(passes=1, window=8), texts([11])
    now = model.config.sleep_settings(passes=2, window=4)
    with torch.no_grad():
        for cached in (True, False):
            logits = model(rows[0][None], passes=2, window=4, use_cache=cached).logits[0]
            torch.testing.assert_close(logits, trained_logits(model.model, rows, now)[0], **EXACT)
        model.config.sleep["passes"] = 2
        torch.testing.assert_close(model(rows[0][None], window=4).logits[0], logits, **EXACT)


def test_gradients_are_computed_where_torch_records_them():
    model = sleeping()
    out = model(texts([6])[0][None])
    assert out.past_key_values is None
    out.logits.sum().backward()
    assert model.model.blocks[0].mixer.q_proj.weight.grad is not None
    out = model(texts([6])[0][None], use_cache=True)  # with a cache there is no gradient
    assert out.past_key_values is not None
    assert not out.logits.requires_grad


def test_a_tuple_on_request():
    model, ids = sleeping(), texts([6])[0][None]
    expected = model(ids, labels=ids)
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected.logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_native_export_is_the_same_model_within_a_window(name, tmp_path):
    family, config = MODELS[name]
    theirs = native(FAMILIES[family], disturbed(config), tmp_path)
    model = SleepForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert settings_of(model).passes == 1


def test_a_native_export_says_how_it_sleeps(tmp_path):
    config = tiny_config(["attention", "gated_deltanet"])
    ours = disturbed(config)
    native(FAMILIES["qwen3_5_text"], ours, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sleep": {"passes": 3, "window": 4}, "eos_token_id": 3}))
    model = SleepForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (settings_of(model).passes, settings_of(model).window, model.config.eos_token_id) == (3, 4, 3)
    rows = texts([11])
    with torch.no_grad():
        expected = trained_logits(ours.double(), rows, settings_of(model))[0]
        torch.testing.assert_close(model(rows[0][None]).logits[0], expected, **EXACT)
    half = SleepForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.rsplit(".", 1)[-1] for name, p in half.named_parameters() if p.dtype != torch.bfloat16}
    assert wide == {"A_log", "dt_bias"}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_saved_and_loaded_by_the_auto_classes(auto, tmp_path):
    model, rows = sleeping(), texts([11])
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is SleepForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is SleepPretrainedConfig
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(again(rows[0][None]).logits, model(rows[0][None]).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {name for name, p in half.named_parameters() if p.dtype == torch.float32} == {
        name for name in model.state_dict() if name.endswith(("A_log", "dt_bias", ".D"))
    }


def test_a_file_without_a_weight_is_refused(tmp_path):
    sleeping().save_pretrained(tmp_path / "own")
    native(FAMILIES["qwen3_5_text"], disturbed(tiny_config(["attention"])), tmp_path)
    for folder, lost in (
        (tmp_path / "own", "model.blocks.0.mixer.q_proj.weight"),
        (tmp_path, "model.layers.0.mlp.up_proj.weight"),
    ):
        tensors = load_file(folder / "model.safetensors")
        del tensors[lost]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match=lost.replace(".", r"\.")):
            SleepForCausalLM.from_pretrained(folder)


def test_inputs_that_do_not_fit_are_refused():
    model = sleeping()
    ids = texts([6])[0][None]
    with pytest.raises(ConfigError, match="the cache is a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="holds 1 rows, not 2"):
        model(ids.expand(2, -1), past_key_values=cache)
    with pytest.raises(ConfigError, match=r"sleep.window=8: the cache was filled with 4"):
        model(ids, past_key_values=cache, window=8)
    with pytest.raises(ConfigError, match="labels need the whole text"):
        model(ids, past_key_values=cache, labels=ids)
    for mask in (torch.ones(1, 3), torch.ones(6), torch.ones(2, 6)):
        with pytest.raises(ConfigError, match=r"attention_mask has shape .* the 1 rows of input_ids and a column for"):
            model(ids, attention_mask=mask)
    for other in (sleeping(), copy.deepcopy(model)):
        with pytest.raises(ConfigError, match="the cache was made by another model"):
            other(ids, past_key_values=cache)
    other, own = copy.deepcopy((model, cache))
    other(ids, past_key_values=own)
    for outputs in ({"output_hidden_states": True}, {"output_attentions": True}):
        with pytest.raises(ConfigError, match="the model gives logits only"):
            model(ids, **outputs)
        other_model = sleeping()
        other_model.config.output_hidden_states = True
        with pytest.raises(ConfigError, match="the model gives logits only"):
            other_model(ids)
    with pytest.raises(ConfigError, match=r"model.vocab_size must be set"):
        SleepForCausalLM(SleepPretrainedConfig())
