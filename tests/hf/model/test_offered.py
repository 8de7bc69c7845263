"""Every option of transformers for generation works as in its own class, or is refused with a way out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import LogitsProcessor, StoppingCriteria, WatermarkDetector

from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import FAMILIES
from sleeptrain.hf.model import offered
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.hf.model.refusing import Refusing
from tests.hf.models import MODELS, disturbed, native
from tests.hf.sleeping import padded, sleeping
from tests.models import VOCABULARY
from tests.sleep.trained import texts

EOS, NEVER = 4, 12  # an id that answers hold, and one that they do not hold
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True, "top_k": 0}
ENDING = GREEDY | {"eos_token_id": EOS}
BEAMS = ENDING | {"num_beams": 3}
RECORDED = GREEDY | {"return_dict_in_generate": True}

# {setting: (options without it, the setting)}.
SERVED: dict[str, tuple[dict[str, Any], Any]] = {
    "max_length": (GREEDY | {"max_new_tokens": None}, 13),
    "max_new_tokens": (GREEDY, 5),
    "min_length": (ENDING, 17),
    "min_new_tokens": (ENDING, 8),
    "early_stopping": (BEAMS, True),
    "max_time": (GREEDY, 0.0),
    "do_sample": (GREEDY | {"top_k": 0}, True),
    "num_beams": (ENDING, 3),
    "temperature": (SAMPLED, 0.2),
    "top_k": (SAMPLED, 2),
    "top_p": (SAMPLED, 0.3),
    "min_p": (SAMPLED, 0.5),
    "top_h": (SAMPLED, 0.2),
    "typical_p": (SAMPLED, 0.2),
    "epsilon_cutoff": (SAMPLED, 0.1),
    "eta_cutoff": (SAMPLED, 0.3),
    "repetition_penalty": (GREEDY, 3.0),
    "encoder_repetition_penalty": (GREEDY, 3.0),
    "length_penalty": (BEAMS, -9.0),
    "no_repeat_ngram_size": (GREEDY, 1),
    "encoder_no_repeat_ngram_size": (GREEDY, 1),
    "bad_words_ids": (GREEDY, [[1], [2], [3], [4], [5], [6]]),
    "renormalize_logits": (
        BEAMS | {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "suppress_tokens": [6]},
        True,
    ),
    "forced_eos_token_id": (GREEDY, 7),
    "exponential_decay_length_penalty": (ENDING, (2, 9.0)),
    "suppress_tokens": (GREEDY, [1, 2, 3, 4, 5, 6]),
    "begin_suppress_tokens": (GREEDY, list(range(1, 9))),
    "sequence_bias": (GREEDY, {(7,): 3.0}),
    "guidance_scale": (GREEDY, 3.0),
    "watermarking_config": (GREEDY, {"bias": 3.0}),
    "num_return_sequences": (SAMPLED, 3),
    "output_scores": (RECORDED, True),
    "output_logits": (RECORDED, True),
    "return_dict_in_generate": (GREEDY, True),
    "eos_token_id": (GREEDY, [EOS, 1]),
}
# Settings that have an effect only together with others. Each has a test of its own, or the tests named here.
ELSEWHERE = {
    "stop_strings": "test_stop_strings",
    "use_cache": "all cases",
    "pad_token_id": "all cases",
    "bos_token_id": "test_without_a_prompt",
    "forced_bos_token_id": "test_without_a_prompt",
    "remove_invalid_values": "test_values_that_are_no_numbers",
}
REFUSED_VALUES: dict[str, Any] = {
    "cache_implementation": "static", "cache_config": {"backend": "quanto"}, "max_cache_len": 9,
    "prefill_chunk_size": 2, "compile_config": transformers.CompileConfig(), "token_healing": True,
    "penalty_alpha": 0.6, "dola_layers": "high", "diversity_penalty": 0.5, "num_beam_groups": 2,
    "force_words_ids": [[1]], "constraints": [object()], "assistant_early_exit": 1, "prompt_lookup_num_tokens": 2,
    "speculation_type": "dflash", "continuous_batching_config": {"a": 1}, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4, "assistant_ensemble_weight": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, SleepForCausalLM]:
    """Transformers' own class and ours with the same weights. They are equal while a text is shorter than a window."""
    folder = tmp_path_factory.mktemp("pair")
    name, config = MODELS["qwen3_5_text-transformer"]
    theirs = native(FAMILIES[name], disturbed(config, amount=0.3), folder)
    return theirs, SleepForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Each id is a letter."""
    vocabulary = {chr(ord("a") + i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a")


def generate(model: Any, options: dict[str, Any], batch: dict[str, torch.Tensor] | None = None) -> Any:
    torch.manual_seed(1)
    return model.generate(**(padded(texts([9, 5])) if batch is None else batch), **options)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert type(found) is type(expected)
    for name in ("sequences", "sequences_scores", "beam_indices", "scores", "logits"):
        ours, theirs = getattr(found, name, None), getattr(expected, name, None)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SERVED)
def test_served_options_give_the_results_of_transformers(pair, name):
    theirs, ours = pair
    base, value = SERVED[name]
    options = base | {name: value}
    expected = generate(theirs, options)
    assert_same(generate(ours, options), expected)
    assert_same(generate(ours, options | {"use_cache": False}), expected)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        assert_same(generate(theirs, base), expected)


def test_every_setting_is_served_or_refused():
    assert not offered.UNKNOWN, "a newer transformers has settings that are not in sleeptrain/hf/offered.py"
    assert set(SERVED) | set(ELSEWHERE) == set(offered.SERVED)
    assert not offered.SERVED & set(offered.REFUSED)


def test_a_setting_of_a_newer_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(offered, "UNKNOWN", frozenset(["top_k"]))
    generate(sleeping(), GREEDY)
    with pytest.raises(ConfigError, match="top_k: a setting of a newer transformers"):
        generate(sleeping(), GREEDY | {"top_k": 5})


@pytest.mark.parametrize("name", [*offered.REFUSED, *offered.REFUSED_ARGUMENTS])
def test_a_refusal_names_the_option_and_the_way_out(name):
    value = REFUSED_VALUES.get(name, 1 if name.startswith(("num", "max", "assistant_l", "target")) else True)
    with pytest.raises(ConfigError, match=rf"^{name}: .*(leave it out|instead|take|give)"):
        generate(sleeping(), GREEDY | {name: value})
    if name not in offered.REFUSED_ARGUMENTS:
        generate(sleeping(), GREEDY | {name: None, "max_new_tokens": 1})


def test_other_arguments_of_forward():
    model, ids = sleeping(), texts([6])[0][None]
    for name in ("position_ids", "inputs_embeds"):
        with pytest.raises(ConfigError, match=f"^{name}: .*give"):
            model(ids, **{name: torch.zeros(1, 6)})
    with pytest.raises(ConfigError, match=r"^input_ids: give"):
        model()
    with pytest.raises(TypeError, match="'bogus'"):
        model(ids, bogus=1)


def test_stop_strings(pair, letters):
    theirs, ours = pair
    free = generate(ours, GREEDY)
    options = GREEDY | {"eos_token_id": NEVER, "tokenizer": letters}
    strings = [letters.decode(row[11:13]) for row in free]
    for more in ({"stop_strings": strings}, {"stop_strings": strings[0], "num_beams": 2}):
        expected = generate(theirs, options | more)
        assert_same(generate(ours, options | more), expected)
        assert_same(generate(ours, options | more | {"use_cache": False}), expected)
        without = generate(theirs, options | more | {"stop_strings": None})
        assert expected.shape != without.shape or not torch.equal(expected, without)
    for one in (theirs, ours):
        one.generation_config.stop_strings = strings
    try:
        assert_same(generate(ours, options), generate(theirs, options))
        config = GenerationConfig(**GREEDY, eos_token_id=NEVER, stop_strings=strings[:1])
        options_of_config = {"generation_config": config, "tokenizer": letters}
        assert_same(generate(ours, options_of_config), generate(theirs, options_of_config))
    finally:
        for one in (theirs, ours):
            one.generation_config.stop_strings = None
    with pytest.raises(ConfigError, match=r"stop_strings are found with the tokenizer; give it"):
        generate(ours, GREEDY | {"stop_strings": strings})


def test_a_row_that_a_stop_string_has_ended_reads_no_pads(letters):
    """The next turn of a conversation shows it: each row answers as if it were alone."""
    model, documents, question = sleeping(), texts([9, 9]), torch.stack(texts([4, 4], seed=1))
    options = GREEDY | {"eos_token_id": NEVER, "tokenizer": letters, "pad_token_id": 17}  # an id of no prompt
    memory = model.read(torch.stack(documents))
    end = letters.decode(generate(model, options | {"cache": memory.copy()}, {"input_ids": question})[0, 5:7])
    found = generate(model, options | {"stop_strings": end, "cache": memory}, {"input_ids": question})
    after = generate(model, options | {"cache": memory}, {"input_ids": question})
    lengths = [(letters.decode(row) + end).index(end) + len(end) for row in found[:, 4:]]
    assert lengths[0] == 3
    assert lengths[1] > 8, "one row ends before the other"
    for b, length in enumerate((3, 8)):
        text = torch.cat([documents[b], question[b], found[b, 4 : 4 + length], question[b]])
        alone = generate(model, options | {"use_cache": False}, {"input_ids": text[None]})[0, len(text) :]
        assert torch.equal(alone, after[b, 4 : 4 + len(alone)])


def test_without_a_prompt(pair):
    theirs, ours = pair
    for more in ({}, {"forced_bos_token_id": 9}):
        options = GREEDY | {"bos_token_id": 1} | more
        expected = theirs.generate(**options)
        assert_same(ours.generate(**options), expected)
        assert expected[0, 0] == 1
        assert not more or expected[0, 1] == 9


def test_values_that_are_no_numbers(pair):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):  # type: ignore[no-untyped-def]
            return scores.index_fill(1, torch.tensor([4]), float("nan"))

    options = GREEDY | {"logits_processor": [Broken()], "remove_invalid_values": True}
    assert_same(generate(pair[1], options), generate(pair[0], options))


@pytest.mark.parametrize("more", [{}, {"negative_prompt_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}])
def test_a_negative_prompt(pair, more):
    options = GREEDY | {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[4, 5, 6], [7, 8, 9]])} | more
    expected = generate(pair[0], options)
    assert_same(generate(pair[1], options), expected)
    assert_same(generate(pair[1], options | {"use_cache": False}), expected)
    with pytest.raises(ConfigError, match="negative_prompt_ids do nothing without guidance_scale"):
        generate(pair[1], GREEDY | {"negative_prompt_ids": torch.tensor([[4], [5]])})


def test_guidance_with_sleep_is_that_of_two_texts():
    """The model reads the other text window by window, too."""
    model, (row,) = sleeping(), texts([9])
    other = texts([7], seed=1)[0]
    options = GREEDY | {"pad_token_id": 17, "guidance_scale": 2.0, "negative_prompt_ids": other[None]}
    found = generate(model, options, {"input_ids": row[None]})
    for at in range(9, found.shape[1]):
        with torch.no_grad():
            pair = [torch.cat([start, found[0, 9:at]])[None] for start in (row, other)]
            yes, no = (model(ids, use_cache=False).logits[0, -1].log_softmax(-1) for ids in pair)
        assert (2 * yes - no).argmax() == found[0, at]


def test_functions_as_arguments(pair):
    class Shifted(LogitsProcessor):
        def __call__(self, input_ids, scores):  # type: ignore[no-untyped-def]
            return scores.roll(1, dims=-1)

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):  # type: ignore[no-untyped-def]
            return torch.full((len(input_ids),), input_ids.shape[1] > 12)

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        return [2 + batch, 5, 7]

    for more in (
        {"logits_processor": [Shifted()]},
        {"stopping_criteria": [Long()]},
        {"prefix_allowed_tokens_fn": allowed},
    ):
        assert_same(generate(pair[1], GREEDY | more), generate(pair[0], GREEDY | more))


def test_a_loop_of_the_caller():
    """The loop prepares its inputs by the model's method, as transformers documents it."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):  # type: ignore[no-untyped-def]
        first = True
        while not first or input_ids.shape[1] < 30:
            step = None if first else 1
            inputs = model.prepare_inputs_for_generation(input_ids, step, is_first_iteration=first, **kwargs)
            logits = model(**inputs, return_dict=True).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
            first = False
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids

    model, batch = sleeping(), {"input_ids": torch.stack(texts([9, 9]))}
    assert torch.equal(generate(model, GREEDY | {"custom_generate": loop}, batch), generate(model, GREEDY, batch))
    with pytest.raises(ConfigError, match="custom_generate names a folder or a hub's: give a function"):
        generate(model, GREEDY | {"custom_generate": "somebody/something"})


def test_scores_of_transitions(pair):
    options = RECORDED | {"output_scores": True}
    for model_options in (options, options | {"num_beams": 2}):
        found = []
        for model in pair:
            out = generate(model, model_options)
            indices = getattr(out, "beam_indices", None)
            found.append(model.compute_transition_scores(out.sequences, out.scores, indices, normalize_logits=True))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_watermark_is_found(pair):
    settings = transformers.WatermarkingConfig(bias=9.0)
    config = transformers.PreTrainedConfig(bos_token_id=1, vocab_size=VOCABULARY)
    detector = WatermarkDetector(config, "cpu", settings)
    batch = {"input_ids": texts([9])[0][None]}
    scores = []
    for marks in (settings, None):
        ids = generate(pair[1], SAMPLED | {"watermarking_config": marks, "max_new_tokens": 40}, batch)
        scores.append(detector(ids[:, 9:], return_dict=True).z_score[0])
    assert scores[0] > 3 > scores[1]


@pytest.mark.parametrize("name", offered.REFUSED_LOADING)
def test_settings_that_from_pretrained_would_not_follow_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        SleepForCausalLM.from_pretrained(tmp_path, **{name: "auto"})


# Methods by group. MACHINERY: the methods for loading and for sharding over processes.
AS_THEY_ARE = set(
    """
    add_model_tags base_model base_model_prefix can_generate can_record_outputs config_class device dtype dummy_inputs
    disable_input_require_grads enable_input_require_grads from_pretrained generation_config_class get_decoder
    get_encoder get_input_embeddings get_output_embeddings get_memory_footprint get_parameter_or_buffer input_modalities
    output_modalities is_activation_checkpointing is_gradient_checkpointing activation_checkpointing_disable
    gradient_checkpointing_disable init_weights initialize_weights main_input_name model_tags num_parameters
    push_to_hub register_for_auto_class save_pretrained supports_gradient_checkpointing tie_weights
    use_kernels warn_if_padding_and_no_attention_mask compute_transition_scores generate
    prepare_inputs_for_generation destroy_cached_continuous_batching_manager loss_function
    """.split()  # noqa: SIM905
)
OF_ADAPTERS = {name for name in vars(transformers.integrations.PeftAdapterMixin) if not name.startswith("_")}
MACHINERY = set(
    """
    adjust_generation_fn barrier_after_gathered_checkpoint_save ep_plan fsdp_plan fsdp_size
    gather_sharded_state_dict_for_save get_compiled_call get_correct_experts_implementation
    get_expanded_tied_weights_keys get_experts_implementation get_init_context init_parallel_plans
    is_backend_compatible is_custom_code is_remote_code is_distributed_loading_by_transformers
    mark_tied_weights_as_initialized maybe_distribute_model named_non_persistent_buffers post_init pp_plan
    prepare_distribute_model retrieve_modules_from_names save_distributed_checkpoint set_experts_implementation
    should_save_on_this_rank supports_context_parallel supports_pp_plan supports_tp_plan tp_plan tp_size
    """.split()  # noqa: SIM905
)
REFUSED_METHODS = {name: value for name, value in vars(Refusing).items() if not name.startswith("_")}


def test_every_public_method_is_served_or_refused():
    theirs = {name for kind in (PreTrainedModel, GenerationMixin) for name in dir(kind)} - set(dir(torch.nn.Module))
    found = {name for name in theirs if not name.startswith("_")}
    assert found == AS_THEY_ARE | OF_ADAPTERS | MACHINERY | set(REFUSED_METHODS)


def test_gradients_at_the_inputs():
    model, ids = sleeping(), texts([6])[0][None]
    model.requires_grad_(False)
    assert not model(ids).logits.requires_grad
    model.enable_input_require_grads()
    assert model(ids).logits.requires_grad


@pytest.mark.parametrize("way", ["attn_implementation", "device_map"])
def test_one_attention_and_one_device(way, tmp_path):
    sleeping().save_pretrained(tmp_path / "own")
    native(FAMILIES["qwen3_5_text"], disturbed(MODELS["qwen3_5_text"][1]), tmp_path)
    for folder in (tmp_path / "own", tmp_path):
        good, bad = {"attn_implementation": ("sdpa", "eager"), "device_map": ("cpu", "auto")}[way]
        assert SleepForCausalLM.from_pretrained(folder, **{way: good}).device.type == "cpu"
        with pytest.raises(ConfigError, match=f"{way}='?{bad}'?: "):
            SleepForCausalLM.from_pretrained(folder, **{way: bad})
        with pytest.raises(ConfigError, match="attn_implementation='eager'"):
            config = SleepForCausalLM.config_class.from_pretrained(folder)
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_the_trainer_passes_no_count_of_items():
    assert SleepForCausalLM.accepts_loss_kwargs is False
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(SleepForCausalLM.forward).parameters.values())


def test_the_documentation_lists_every_option():
    page = Path(__file__).parents[3].joinpath("docs", "generation.md").read_text()
    tables = page.split("## What of transformers is served")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", tables))
    needed = set(offered.SERVED) | offered.WITHOUT_EFFECT | set(offered.REFUSED) | set(offered.REFUSED_ARGUMENTS)
    needed |= set(offered.REFUSED_LOADING) | set(REFUSED_METHODS)
    assert needed - documented == set()


def test_the_pipeline_for_text(letters):
    model = sleeping()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, unk_token="a", pad_token="q")
    answer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = answer(["bcdefghij", "dcb"], max_new_tokens=6, do_sample=False, batch_size=2)
    for prompt, (text,) in zip(("bcdefghij", "dcb"), found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=17)
        assert text["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)
